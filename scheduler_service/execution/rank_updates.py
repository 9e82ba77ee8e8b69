"""Weight updates of a model that several ranks compute: committed by all of them at the same step, or by none.

Every rank stages its own part in the background and answers; that is the vote. One refusal, and all drop what they
have staged. Once all agree, rank 0 exchanges its weights between two steps, as one process does, and tells the others
at that place in the order of the steps.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from quartet.runtime.config import ResolvedConfig
from quartet.runtime.control import InitWeightsUpdateGroup
from quartet.runtime.errors import CommandRefused
from quartet.scheduler_service.execution.rank_messages import (
    Answer,
    Collect,
    Commit,
    Differing,
    Finish,
    FromDisk,
    GiveUp,
    Part,
    Snapshot,
    Task,
    as_bytes,
    from_bytes,
)
from quartet.scheduler_service.execution.ranks import Followers
from quartet.scheduler_service.weights.distributed import failed_to_join
from quartet.scheduler_service.weights.inspection import Inspection
from quartet.scheduler_service.weights.manifest import Manifest
from quartet.scheduler_service.weights.parameters import Packed, Weights, checksum_of
from quartet.scheduler_service.weights.staging import on_one_thread
from quartet.scheduler_service.weights.update import NOT_LOADED, NOT_OPENED, Staged, Updates, refused_as

Result = TypeVar("Result")

ONE_PROCESS = "{} is done by one process only, and --tp-size is {}"
ONE_MACHINE = "Tensors in a body reach one machine only, and --nnodes is {}: update the weights from disk."
NO_MANIFEST = "a manifest hashes whole tensors, and each of {} ranks reads parts of them; leave the manifest out"
CHANGED = "the files in {} were changed while the ranks read them"
RANKS_DIFFER = "rank {} has another {} than rank 0"


class LeadingUpdates(Updates):
    """The updates of rank 0, in which all ranks take part."""

    def __init__(
        self,
        live: Weights,
        config: ResolvedConfig,
        run_dir: str,
        check_config: Callable[[Path], None],
        followers: Followers,
    ) -> None:
        super().__init__(live, config, run_dir, check_config)
        self.followers = followers
        self.inspection = LeadingInspection(live, self.together)

    def together(self, task: Task, own: Callable[[], Result]) -> tuple[Result, list[Any]]:
        """Have all ranks do a task: rank 0's result, and the answers of the others. Raises CommandRefused.

        After a refusal no rank has anything staged. Runs in the background.
        """
        self.followers.tell(task)
        try:
            result = own()
        except BaseException:
            self.followers.answers()
            self.followers.tell(GiveUp())
            raise
        answers = self.followers.answers()
        for rank, answer in enumerate(answers, 1):
            if answer.refusal:
                self.followers.tell(GiveUp())
                raise CommandRefused(f"{answer.refusal} (rank {rank})", answer.status)
        return result, [answer.value for answer in answers]

    def from_disk(self, model_path: str, load_format: str, digests: Manifest | None) -> Staged:
        """See Updates.from_disk."""
        if digests is not None:
            raise CommandRefused(NOT_LOADED.format(NO_MANIFEST.format(self.followers.parallel.size)))
        with refused_as(NOT_OPENED):
            directory = self.locate(model_path)
        task = FromDisk(str(directory), load_format)
        staged, read = self.together(task, partial(super().from_disk, model_path, load_format, None))
        assert staged.source is not None
        if any(files != staged.source.files for files in read):
            self.followers.tell(GiveUp())
            raise CommandRefused(NOT_LOADED.format(CHANGED.format(directory)))
        return staged

    def payload(self, files: list[str], load_format: str | None) -> Callable[[], None]:
        """See Updates.payload."""
        if self.config.nnodes > 1:
            raise CommandRefused(ONE_MACHINE.format(self.config.nnodes))
        own = super().payload(files, load_format)

        def collect() -> None:
            try:
                self.together(Collect(files, load_format), own)
            except CommandRefused as refusal:
                if self.session is not None:
                    self.session.broken = refusal.message
                raise

        return collect

    def finish_session(self) -> Staged:
        """See Updates.finish_session."""
        return self.together(Finish(), super().finish_session)[0]

    def swap(self, staged: Staged, version: str) -> Packed:
        """See Updates.swap."""
        self.followers.tell(Commit())
        return super().swap(staged, version)

    def close_session(self) -> None:
        """See Updates.close_session."""
        self.followers.tell(GiveUp())
        super().close_session()

    def randomized(self, names: object) -> Staged:
        """Refused: ranks that have the same tensor would draw different values."""
        raise CommandRefused(ONE_PROCESS.format("reset_tensors", self.followers.parallel.size) + ".")

    def join_group(self, command: InitWeightsUpdateGroup) -> None:
        """Refused."""
        raise failed_to_join(
            ONE_PROCESS.format("receiving weights from a trainer's group", self.followers.parallel.size)
        )


class LeadingInspection(Inspection):
    """Inspects the weights of all ranks: a tensor is put together of their parts, and copies have to be equal."""

    def __init__(self, weights: Weights, together: Callable[[Task, Callable[[], Any]], tuple[Any, list[Any]]]) -> None:
        super().__init__(weights)
        self._together = together

    def whole(self, name: str) -> torch.Tensor:
        """See Inspection.whole. Raises CommandRefused where ranks have different copies of the same values."""
        own = self._weights.view(name)
        mine, theirs = self._together(Part(name), partial(part_of, self._weights, name))
        cut = self._weights.layout.cuts.get(name)
        parts = {0: own.cpu()} if cut is None else {cut.start: own.cpu()}
        for rank, found in enumerate(theirs, 1):
            if cut is None:
                if found != mine:
                    raise CommandRefused(RANKS_DIFFER.format(rank, name), 500)
                continue
            start, data = found
            part = from_bytes(data, own.dtype, torch.device("cpu")).view(own.shape)
            if start in parts and as_bytes(parts[start]) != data:
                raise CommandRefused(RANKS_DIFFER.format(rank, name), 500)
            parts[start] = part
        ordered = [parts[start] for start in sorted(parts)]
        return ordered[0] if cut is None else torch.cat(ordered, cut.dimension)

    def take_snapshot(self, names: list[str]) -> None:
        """See Inspection.take_snapshot: every rank keeps its own."""
        self._together(Snapshot(names), partial(super().take_snapshot, names))

    def differing(self, names: list[str]) -> list[str] | None:
        """See Inspection.differing."""
        own, theirs = self._together(Differing(names), partial(super().differing, names))
        return None if own is None else sorted({*own, *(name for found in theirs for name in found or ())})


def part_of(weights: Weights, name: str) -> Any:
    """See rank_messages.Part."""
    cut = weights.layout.cuts.get(name)
    return checksum_of(weights.view(name)) if cut is None else (cut.start, as_bytes(weights.view(name)))


class FollowingUpdates:
    """The updates of a rank other than 0: it does what it is told."""

    def __init__(self, updates: Updates) -> None:
        self.updates = updates
        self.staged: Staged | None = None

    @on_one_thread
    def do(self, task: Task) -> Answer:
        """Do a task, in the background."""
        try:
            return Answer(self._do(task))
        except CommandRefused as refusal:
            return Answer(refusal=refusal.message, status=refusal.status)

    def _do(self, task: Task) -> Any:
        updates = self.updates
        match task:
            case FromDisk(directory, load_format):
                self.staged = updates.from_disk(directory, load_format, None)
                return self.staged.source and self.staged.source.files
            case Collect(files, load_format):
                if updates.session is None:
                    updates.open_session()
                updates.payload(files, load_format)()
            case Finish():
                if updates.session is None:
                    updates.open_session()
                self.staged = updates.finish_session()
            case Part(name):
                return part_of(updates.live, name)
            case Snapshot(names):
                updates.inspection.take_snapshot(names)
            case Differing(names):
                return updates.inspection.differing(names)
        return None

    def commit(self) -> Packed:
        """Serve what was staged; between two steps. Returns memory that is no longer needed, for `Updates.free`."""
        assert self.staged is not None, "every rank has agreed"
        staged, self.staged = self.staged, None
        return self.updates.swap(staged, self.updates.committed.weight_version)

    def give_up(self) -> None:
        """Drop what was staged and collected."""
        self.staged = None
        self.updates.close_session()
