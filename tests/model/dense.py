"""A plain `attend` for tests: keys and values in lists, one dense softmax per sequence, everything in float32."""

from pathlib import Path

import torch

from quartet.runtime.model_files import model_info
from quartet.scheduler_service.model.batch import AttentionSpec, Batch, ServedModel, states_of
from quartet.scheduler_service.model.registry import load_model
from quartet.scheduler_service.model.state_access import Run, StateAccess
from tests.configs import resolved

MOST_SEQUENCES = 8  # of a runner


class DenseAttend:
    """Keeps the context of the sequences it is told about; sequence n of a batch is always the same one."""

    def __init__(self) -> None:
        self.cache: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}  # (layer, sequence)
        self.starts: list[int] = []

    def __call__(self, spec: AttentionSpec, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        assert q.shape[1:] == (spec.heads, spec.head_dim), q.shape
        assert k.shape[1:] == v.shape[1:] == (spec.kv_heads, spec.head_dim), (k.shape, v.shape)
        for sequence, (start, end) in enumerate(zip(self.starts, self.starts[1:], strict=False)):
            keys, values = k[start:end], v[start:end]
            if known := self.cache.get((spec.layer, sequence)):
                keys, values = torch.cat((known[0], keys)), torch.cat((known[1], values))
            self.cache[spec.layer, sequence] = keys, values
        return self.attend_written(spec, q)

    def attend_written(self, spec: AttentionSpec, q: torch.Tensor) -> torch.Tensor:
        """The same once a layer has written its keys and values."""
        bounds = enumerate(zip(self.starts, self.starts[1:], strict=False))
        parts = [attend_one(spec, q[start:end], *self.cache[spec.layer, sequence]) for sequence, (start, end) in bounds]
        return torch.cat(parts)


def attend_one(spec: AttentionSpec, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """q is the tail of the sequence whose keys and values are k and v."""
    group = spec.heads // spec.kv_heads
    k, v = k.repeat_interleave(group, dim=1).float(), v.repeat_interleave(group, dim=1).float()
    scores = torch.einsum("qhd,khd->hqk", q.float(), k) * spec.scale
    if spec.softcap is not None:
        scores = torch.tanh(scores / spec.softcap) * spec.softcap
    query_at = torch.arange(len(k) - len(q), len(k)).unsqueeze(1)
    key_at = torch.arange(len(k)).unsqueeze(0)
    hidden = key_at > query_at
    if spec.window is not None:
        hidden |= key_at <= query_at - spec.window
    if spec.chunk is not None:
        hidden |= key_at // spec.chunk < query_at // spec.chunk
    scores = scores.masked_fill(hidden, -torch.inf)
    if spec.sinks is not None:
        scores = torch.cat((scores, spec.sinks.float().view(-1, 1, 1).expand(-1, len(q), 1)), dim=-1)
    return torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1)[..., : len(k)], v).to(q.dtype)


def serve(directory: Path, **settings: object) -> ServedModel:
    """Load a model directory as the scheduler does."""
    config = resolved(model_path=str(directory), device="cpu", **settings)
    return load_model(config, model_info.load(config), torch.device("cpu"))


class DenseRunner:
    """Feeds sequences to a model, a few tokens at a time."""

    def __init__(self, model: ServedModel) -> None:
        self.model = model
        self.attend = DenseAttend()
        self.lengths: dict[int, int] = {}
        self.states = {
            spec.layer: tuple(
                torch.zeros(1 + MOST_SEQUENCES, *shape, dtype=dtype)
                for shape, dtype in zip(spec.shapes, spec.dtypes, strict=True)
            )
            for spec in states_of(model)
        }

    @torch.inference_mode()
    def feed(self, sequences: list[list[int]], **extra: object) -> torch.Tensor:
        """Append tokens to each sequence; logits of all of them, (tokens, vocab)."""
        positions, starts, runs = [], [0], []
        for index, ids in enumerate(sequences):
            begin = self.lengths.get(index, 0)
            own = 1 + index  # row 0 is the state in front of a first token
            if ids:
                runs.append(Run(starts[-1], starts[-1] + len(ids), own if begin else 0, own))
            positions += range(begin, begin + len(ids))
            starts.append(starts[-1] + len(ids))
            self.lengths[index] = begin + len(ids)
        self.attend.starts = starts
        batch = Batch(
            input_ids=torch.tensor([token for ids in sequences for token in ids]),
            positions=torch.tensor(positions),
            attend=self.attend,
            starts=torch.tensor(starts),
            states=self.states_of_step(runs),
            **extra,
        )
        return self.model.logits(self.model.forward(batch))

    def states_of_step(self, runs: list[Run]) -> StateAccess | None:
        """Where recurrent layers find and leave the states of a step; None without such layers."""
        none = torch.empty(0, dtype=torch.int64)
        return StateAccess(self.states, none, none, runs) if self.states else None
