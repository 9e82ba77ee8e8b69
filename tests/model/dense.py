"""A plain `attend` for tests: keys and values in lists, one dense softmax per sequence, everything in float32."""

import torch

from scheduler_service.model.batch import AttentionSpec, Batch, ServedModel


class DenseAttend:
    """Keeps the context of the sequences it is told about; sequence n of a batch is always the same one."""

    def __init__(self) -> None:
        self.cache: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}  # (layer, sequence)
        self.starts: list[int] = []

    def __call__(self, spec: AttentionSpec, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        assert q.shape[1:] == (spec.heads, spec.head_dim), q.shape
        assert k.shape[1:] == v.shape[1:] == (spec.kv_heads, spec.head_dim), (k.shape, v.shape)
        outputs = []
        for sequence, (start, end) in enumerate(zip(self.starts, self.starts[1:], strict=False)):
            keys, values = k[start:end], v[start:end]
            if known := self.cache.get((spec.layer, sequence)):
                keys, values = torch.cat((known[0], keys)), torch.cat((known[1], values))
            self.cache[spec.layer, sequence] = keys, values
            outputs.append(attend_one(spec, q[start:end], keys, values))
        return torch.cat(outputs)


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
    mixed = torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(dim=-1), v)
    return mixed.to(q.dtype)


class DenseRunner:
    """Feeds sequences to a model, a few tokens at a time."""

    def __init__(self, model: ServedModel) -> None:
        self.model = model
        self.attend = DenseAttend()
        self.lengths: dict[int, int] = {}

    @torch.inference_mode()
    def feed(self, sequences: list[list[int]], **extra: object) -> torch.Tensor:
        """Append tokens to each sequence; logits of all of them, (tokens, vocab)."""
        positions, starts = [], [0]
        for index, ids in enumerate(sequences):
            begin = self.lengths.get(index, 0)
            positions += range(begin, begin + len(ids))
            starts.append(starts[-1] + len(ids))
            self.lengths[index] = begin + len(ids)
        self.attend.starts = starts
        batch = Batch(
            input_ids=torch.tensor([token for ids in sequences for token in ids]),
            positions=torch.tensor(positions),
            attend=self.attend,
            starts=torch.tensor(starts),
            **extra,
        )
        return self.model.logits(self.model.forward(batch))
