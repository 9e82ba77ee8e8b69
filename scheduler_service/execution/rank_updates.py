"""Weight updates of a model that several ranks compute: committed by all of them at the same step, or by none.

Every rank stages its own part in the background and answers; that is the vote. One refusal, and all drop what they
have staged. Once all agree, rank 0 exchanges its weights between two steps, as one process does, and tells the others
at that place in the order of the steps.
"""

import secrets
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch

from quartet.runtime.config import ResolvedConfig
from quartet.runtime.control import InitWeightsUpdateGroup, UpdateWeightsFromDistributed
from quartet.runtime.errors import CommandRefused
from quartet.scheduler_service.execution.rank_messages import (
    Answer,
    Collect,
    Commit,
    Differing,
    DropSecond,
    Finish,
    FromDisk,
    GiveUp,
    JoinGroup,
    LeaveGroup,
    Meeting,
    Part,
    Randomize,
    Receive,
    ReceiveAdapter,
    Reread,
    Snapshot,
    Task,
    as_bytes,
    from_bytes,
)
from quartet.scheduler_service.execution.ranks import Followers
from quartet.scheduler_service.weights.checkpoint import CheckpointError
from quartet.scheduler_service.weights.distributed import failed_to_join, receive_adapter
from quartet.scheduler_service.weights.inspection import Inspection
from quartet.scheduler_service.weights.manifest import Manifest
from quartet.scheduler_service.weights.parameters import Packed, Weights, checksum_of
from quartet.scheduler_service.weights.refusals import INTERNAL, NOT_LOADED, NOT_OPENED, refused_as
from quartet.scheduler_service.weights.reread import reread as again
from quartet.scheduler_service.weights.staging import on_one_thread
from quartet.scheduler_service.weights.update import Staged, Updates

Result = TypeVar("Result")

ONE_MACHINE = "Tensors in a body reach one machine only, and --nnodes is {}: update the weights from disk."
NO_RANKS = "ranks {} to {} of {}: the trainer is rank 0, and --tp-size {} takes as many ranks from rank_offset on"
CHANGED = "the files in {} were changed while the ranks read them"
SEED_BITS = 63
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
        self.inspection = LeadingInspection(live, followers.together)  # it stages nothing that could be given up

    def together(self, task: Task, own: Callable[[], Result]) -> tuple[Result, list[Any]]:
        """Have all ranks do a task: rank 0's result, and the answers of the others. Raises CommandRefused.

        After an error no rank has anything staged, and an open session is broken. Runs in the background.
        """
        try:
            return self.followers.together(task, own)
        except ConnectionError:
            raise
        except BaseException as error:
            self._give_up(error.message if isinstance(error, CommandRefused) else INTERNAL.format(type(error).__name__))
            raise

    def _give_up(self, reason: str) -> None:
        """Have the others drop what they have staged and collected: what this rank has of it must not be committed."""
        self.break_session(reason)
        self.followers.tell(GiveUp())

    def from_disk(self, model_path: str, load_format: str, digests: Manifest | None) -> Staged:
        """See Updates.from_disk."""
        with refused_as(NOT_OPENED):
            directory = self.locate(model_path)
        task = FromDisk(str(directory), load_format, None if digests is None else dict(digests))
        return self._same_files(*self.together(task, partial(super().from_disk, model_path, load_format, digests)))

    def reread(self) -> Staged:
        """The committed checkpoint, read again by every rank: see weights.reread."""
        return self._same_files(*self.together(Reread(), partial(again, self)))

    def _same_files(self, staged: Staged, read: list[Any]) -> Staged:
        """What was staged, if all ranks have read the same files. Raises CommandRefused."""
        assert staged.source is not None
        if any(files != staged.source.files for files in read):
            refusal = CommandRefused(NOT_LOADED.format(CHANGED.format(staged.source.model_dir)))
            self._give_up(refusal.message)
            raise refusal
        return staged

    def payload(self, files: list[str], load_format: str | None) -> Callable[[], None]:
        """See Updates.payload."""
        if self.config.nnodes > 1:
            raise CommandRefused(ONE_MACHINE.format(self.config.nnodes))
        return partial(self.collect_together, Collect(files, load_format), super().payload(files, load_format))

    def broadcast(self, command: UpdateWeightsFromDistributed) -> Callable[[], None]:
        """See Updates.broadcast: every rank receives whole tensors, and keeps its part."""
        return partial(self.collect_together, Receive(command), super().broadcast(command))

    def collect_together(self, task: Task, own: Callable[[], None]) -> None:
        """Have all ranks put tensors into their sessions. Raises CommandRefused."""
        self.together(task, own)

    def finish_session(self) -> Staged:
        """See Updates.finish_session."""
        return self.together(Finish(), super().finish_session)[0]

    def swap(self, staged: Staged, version: str) -> Packed:
        """See Updates.swap."""
        self.followers.tell(Commit())
        return super().swap(staged, version)

    def drop_staged(self) -> None:
        """See Updates.drop_staged: the others hold it."""
        self.followers.tell(GiveUp())

    def close_session(self) -> None:
        """See Updates.close_session."""
        self.followers.tell(GiveUp())
        super().close_session()

    def randomized(self, names: Collection[str], seed: int | None = None) -> Staged:
        """See Updates.randomized: ranks that have the same tensor draw the same values."""
        seed = secrets.randbits(SEED_BITS) if seed is None else seed
        return self.together(Randomize(list(names), seed), partial(super().randomized, names, seed))[0]

    def drop_second(self) -> None:
        """See Updates.drop_second."""
        self.followers.tell(DropSecond())
        super().drop_second()

    def join_group(self, command: InitWeightsUpdateGroup) -> None:
        """See Updates.join_group: the ranks are neighbours in the group, from the command's `rank_offset` on."""
        first, ranks = command.rank_offset, self.followers.parallel.size
        if not 0 < first <= command.world_size - ranks:
            raise failed_to_join(NO_RANKS.format(first, first + ranks - 1, command.world_size, ranks))
        try:
            self.followers.meet(JoinGroup(command), partial(super().join_group, command))
        except CommandRefused:
            self.leave_group(command.group_name)
            raise

    def leave_group(self, name: str) -> None:
        """See Updates.leave_group."""
        own = partial(super().leave_group, name) if name in self.groups else lambda: None
        self.followers.meet(LeaveGroup(name), own)


class LeadingInspection(Inspection):
    """Inspects the weights of all ranks: a tensor is put together of their parts, and copies have to be equal."""

    def __init__(self, weights: Weights, together: Callable[[Task, Callable[[], Any]], tuple[Any, list[Any]]]) -> None:
        super().__init__(weights)
        self._together = together

    def whole(self, name: str) -> torch.Tensor:
        """See Inspection.whole. Raises CommandRefused where ranks have different copies of the same values."""
        own = self._weights.view(name).cpu()
        mine, theirs = self._together(Part(name), partial(part_of, self._weights, name))
        cut = self._weights.layout.cuts.get(name)
        if cut is None:
            for rank, found in enumerate(theirs, 1):
                if found != mine:
                    raise CommandRefused(RANKS_DIFFER.format(rank, name), 500)
            return own
        parts = [(cut, as_bytes(own))]
        parts += [(replace(cut, spans=tuple(tuple(span) for span in spans)), data) for spans, data in theirs]
        whole = own.new_empty(cut.whole)
        for part, data in reversed(parts):
            part.put(from_bytes(data, own.dtype, torch.device("cpu")).view(own.shape), whole)
        for rank, (part, data) in enumerate(parts):
            if as_bytes(part.of(whole)) != data:  # an earlier rank has other values in the same place
                raise CommandRefused(RANKS_DIFFER.format(rank, name), 500)
        return whole

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
    return checksum_of(weights.view(name)) if cut is None else (cut.spans, as_bytes(weights.view(name)))


class FollowingUpdates:
    """The updates of a rank other than 0: it does what it is told."""

    def __init__(self, updates: Updates) -> None:
        self.updates = updates
        self.staged: Staged | None = None

    @on_one_thread
    def do(self, task: Task | Meeting) -> Answer:
        """Do a task, in the background."""
        try:
            return Answer(self._do(task))
        except CommandRefused as refusal:
            return Answer(refusal=refusal.message, status=refusal.status)
        except CheckpointError as error:
            return Answer(refusal=str(error))

    def _do(self, task: Task | Meeting) -> Any:
        updates = self.updates
        match task:
            case FromDisk(directory, load_format, digests):
                self.staged = updates.from_disk(directory, load_format, digests)
                return self.staged.source and self.staged.source.files
            case Reread():
                if updates.live.device.type != "cpu":  # there its memory is exchanged, here values are copied
                    updates.live.allocate()
                self.staged = again(updates)
                return self.staged.source and self.staged.source.files
            case Randomize(names, seed):
                self.staged = updates.randomized(names, seed)
            case JoinGroup(command):
                behind = command.rank_offset + updates.live.layout.parallel.rank
                updates.join_group(msgspec.structs.replace(command, rank_offset=behind))
            case LeaveGroup(name):
                if name in updates.groups:
                    updates.leave_group(name)
            case Receive(command):
                if updates.session is None:
                    updates.open_session()
                updates.broadcast(command)()
            case ReceiveAdapter(command):
                receive_adapter(updates.groups, command)
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
