"""Which experts a mixture-of-experts model chooses: for each step while it runs, and kept as a recording.

    Chosen            filled by the model during one forward pass
    ExpertRecorder    keeps what one pass after the other chose; started, stopped and dumped by commands

Counts are exact: a token counts where it is computed, so what a cached prefix spares is not in them.
"""

import csv
import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quartet.runtime.config import ResolvedConfig
from quartet.runtime.errors import CommandRefused, StartupError
from quartet.scheduler_service.execution.inputs import Inputs
from quartet.scheduler_service.model.batch import ExpertShape, ServedModel

log = logging.getLogger(__name__)

NO_EXPERT = -1  # in the rows of layers without experts
MAX_RECORDED_BYTES = 1 << 30  # of what is kept between two dumps
DEFAULT_BUFFER_SIZE = 1000  # passes
UNBOUNDED = -1
LISTS = ("input_ids", "positions")
EXTEND, DECODE, MIXED = 1, 2, 3  # kinds of passes, as readers of the files know them


def expert_shape(config: ResolvedConfig, model: ServedModel) -> ExpertShape | None:
    """The size of the model's mixture of experts. Raises StartupError where a flag asks for one that is not there."""
    shape: ExpertShape | None = getattr(model, "experts", None)
    for flag, given in (
        ("--expert-distribution-recorder-mode", config.expert_distribution_recorder_mode is not None),
        ("--enable-return-routed-experts", config.enable_return_routed_experts),
    ):
        if given and shape is None:
            raise StartupError(
                f"{flag} needs a mixture of experts whose routers can be read, and {config.model_path} is none; "
                "leave the flag out"
            )
    return shape


def make_recorder(config: ResolvedConfig, shape: ExpertShape | None) -> "ExpertRecorder | None":
    """The recorder of --expert-distribution-recorder-mode; None without that flag."""
    mode, directory = config.expert_distribution_recorder_mode, Path(config.expert_distribution_recorder_dir)
    if mode is None or shape is None:
        return None
    return ExpertRecorder(mode, shape, directory, config.expert_distribution_recorder_buffer_size)


class Chosen:
    """The experts that the tokens of one forward pass chose. The model calls it once a sparse layer."""

    def __init__(self, shape: ExpertShape) -> None:
        self.shape = shape
        self.by_layer: dict[int, torch.Tensor] = {}  # (tokens, top_k)

    def __call__(self, layer: int, topk_ids: torch.Tensor) -> None:
        self.by_layer[layer] = topk_ids

    def counts(self) -> torch.Tensor:
        """How often each expert was chosen: int32 (layers, experts), zeros for layers without experts."""
        counts = torch.zeros(self.shape.layers, self.shape.experts, dtype=torch.int32, device=self._device)
        for layer, ids in self.by_layer.items():
            flat = ids.flatten().long()
            counts[layer].scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))
        return counts

    def ids(self) -> torch.Tensor:
        """int32 (tokens, layers, top_k), -1 for layers without experts; on the CPU."""
        tokens = len(next(iter(self.by_layer.values())))
        size = tokens, self.shape.layers, self.shape.top_k
        ids = torch.full(size, NO_EXPERT, dtype=torch.int32, device=self._device)
        for layer, chosen in self.by_layer.items():
            ids[:, layer] = chosen
        return ids.cpu()

    @property
    def _device(self) -> torch.device:
        return next(iter(self.by_layer.values())).device


@dataclass(slots=True)
class Record:
    """What is kept of one forward pass."""

    number: int
    counts: torch.Tensor  # int32 (layers, experts)
    details: dict[str, Any]  # of mode per_token
    nbytes: int


Payload = Callable[[Sequence[Record], ExpertShape], dict[str, Any]]


def stat_payload(records: Sequence[Record], shape: ExpertShape) -> dict[str, Any]:
    """Counts by pass: (passes, layers, experts). A recording without a pass is one of zeros."""
    none = [torch.zeros(shape.layers, shape.experts, dtype=torch.int32)]
    counts = torch.stack([record.counts.cpu() for record in records] or none)
    return {"rank": 0, "logical_count": counts, "average_utilization_rate_over_window": None}


def detailed_payload(records: Sequence[Record], shape: ExpertShape) -> dict[str, Any]:
    """One record a pass."""
    return {
        "records": [
            {
                "forward_pass_id": record.number,
                "rank": 0,
                "gatherer_key": "primary",
                "global_physical_count": record.counts.cpu(),
                **{name: as_read(name, value) for name, value in record.details.items()},
            }
            for record in records
        ],
        "last_physical_to_logical_map": torch.arange(shape.experts).repeat(shape.layers, 1),
    }


def as_read(name: str, value: Any) -> Any:
    """A detail as readers of the files expect it; what they expect as a list is kept as a tensor, which is smaller."""
    return value.tolist() if name in LISTS else value


@dataclass(frozen=True, slots=True)
class Mode:
    """How much is kept of a pass, and how its file looks."""

    payload: Payload
    suffix: str = ""
    per_token: bool = False


MODES = {
    "stat": Mode(stat_payload),
    "stat_approx": Mode(stat_payload),  # an estimate elsewhere; exact counts cost nothing more here
    "per_pass": Mode(detailed_payload, suffix="_0"),
    "per_token": Mode(detailed_payload, suffix="_0", per_token=True),
}


class ExpertRecorder:
    """Keeps the last `buffer_size` passes (-1: all), at most 1 GiB of them, and writes them to files."""

    def __init__(
        self,
        mode: str,
        shape: ExpertShape,
        directory: Path,
        buffer_size: int = DEFAULT_BUFFER_SIZE,
        most_bytes: int = MAX_RECORDED_BYTES,
    ) -> None:
        self.mode = MODES[mode]
        self.shape = shape
        self.directory = directory
        self.recording = False
        self.records: deque[Record] = deque(maxlen=None if buffer_size == UNBOUNDED else buffer_size)
        self._most_bytes = most_bytes
        self.passes = 0  # recorded so far
        self._bytes = 0
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="expert-dump")

    def start(self) -> None:
        """Begin an empty recording."""
        if self.recording:
            log.warning("the expert distribution is being recorded already: what was recorded is dropped")
        self._forget(self.passes)
        self.recording = True

    def stop(self) -> None:
        """Record no more; what was recorded stays."""
        if not self.recording:
            log.warning("the expert distribution is not being recorded: nothing to stop")
        self.recording = False

    def add(self, inputs: Inputs, decodes: int, chosen: Chosen) -> None:
        """Keep one pass, whose first `decodes` sequences decode, and drop the oldest where there are too many."""
        self.passes += 1
        counts = chosen.counts()
        details, nbytes = token_details(inputs, decodes, chosen) if self.mode.per_token else ({}, 0)
        if len(self.records) == self.records.maxlen:
            self._drop_oldest()
        self._bytes += nbytes + counts.nbytes
        self.records.append(Record(self.passes, counts, details, nbytes + counts.nbytes))
        while self._bytes > self._most_bytes and len(self.records) > 1:
            self._drop_oldest()

    def dump(self) -> Generator[None, None, Path]:
        """Write what was recorded to a .pt and a .csv file, then forget it; returns the .pt file's path.

        A thread writes, so that decoding goes on: every turn of this generator looks whether it is done. Raises
        CommandRefused when the files cannot be written, and keeps the recording.
        """
        path = self.directory / f"expert_distribution_recorder_{time.time()}{self.mode.suffix}.pt"
        log.info("Write expert distribution to %s", path)
        records, last = list(self.records), self.passes
        writing = self._writer.submit(write, path, records, self.mode, self.shape)
        while not writing.done():
            yield
        writing.result()
        self._forget(last)
        return path

    def _drop_oldest(self) -> None:
        self._bytes -= self.records.popleft().nbytes

    def _forget(self, last: int) -> None:
        """Drop the passes up to this one."""
        log.info("Resetting ExpertDistributionRecorder...")
        while self.records and self.records[0].number <= last:
            self._drop_oldest()


def token_details(inputs: Inputs, decodes: int, chosen: Chosen) -> tuple[dict[str, Any], int]:
    """Who chose: every token of the pass, with its experts in all layers; and the bytes that this takes."""
    lengths = inputs.starts.diff().tolist()
    ids = chosen.ids().transpose(0, 1).contiguous()  # (layers, tokens, top_k)
    details = {
        "input_ids": inputs.input_ids.cpu(),
        "positions": inputs.positions.cpu(),
        "extend_seq_lens": lengths,
        "forward_mode": EXTEND if not decodes else DECODE if decodes == len(lengths) else MIXED,
        "topk_ids_of_layer": ids,
        "misc_objects": [],
    }
    return details, ids.nbytes + 2 * inputs.input_ids.nbytes


def write(path: Path, records: Sequence[Record], mode: Mode, shape: ExpertShape) -> Path:
    """Both files, each whole or not at all. Raises CommandRefused."""
    total = sum((record.counts.cpu().long() for record in records), torch.zeros(shape.layers, shape.experts).long())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        put(path, lambda file: torch.save(mode.payload(records, shape), file))
        put(path.with_suffix(".csv"), lambda file: write_csv(file, total))
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise CommandRefused(f"The expert distribution cannot be written to {path}: {error}", 500) from error
    return path


def put(path: Path, fill: Callable[[Path], None]) -> None:
    """Fill a file under another name, and rename it when it is complete."""
    unfinished = path.with_name(path.name + ".part")
    try:
        fill(unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_csv(path: Path, counts: torch.Tensor) -> None:
    """A line for each layer and expert."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("layer_id", "expert_id", "count"))
        for layer, row in enumerate(counts.tolist()):
            writer.writerows((layer, expert, count) for expert, count in enumerate(row))
