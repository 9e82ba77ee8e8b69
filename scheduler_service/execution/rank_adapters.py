"""LoRA adapters of a model that several ranks compute: each has the parts that belong to its parts of the weights.

Every rank reads an adapter from the same directory, and keeps what it has read under a number. Once rank 0 has it in
memory, or not any more, it says so at that place in the order of the steps; and each step names the adapters of its
slices. So all ranks have the same adapters in memory at the same step.
"""

import itertools
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from weakref import WeakValueDictionary

import torch

from quartet.runtime.adapters import LoadAdapterFromDistributed
from quartet.runtime.config import ResolvedConfig
from quartet.runtime.errors import CommandRefused, StartupError
from quartet.scheduler_service.core.plan import Plan
from quartet.scheduler_service.execution.adapters import CpuAdapters, Read
from quartet.scheduler_service.execution.rank_messages import (
    Answer,
    DropAdapter,
    ReadAdapter,
    ReceiveAdapter,
    TakeAdapter,
)
from quartet.scheduler_service.execution.ranks import Followers
from quartet.scheduler_service.model.decoder import Decoder
from quartet.scheduler_service.weights.checkpoint import CheckpointError
from quartet.scheduler_service.weights.distributed import Groups, receive_adapter
from quartet.scheduler_service.weights.file_identity import FileIdentity

ONE_MACHINE = "what is broadcast is written on one machine only, and --nnodes is {}: load the adapter from a directory"
DIFFERS = "{} is not the same file for rank {} as for rank 0"


@dataclass(frozen=True)
class NumberedRead(Read):
    """What all ranks have read; the others know it by its number."""

    number: int


class LeadingAdapters(CpuAdapters):
    """The adapters of rank 0, which the others have too."""

    def __init__(self, model: Decoder, config: ResolvedConfig, run_dir: str, followers: Followers) -> None:
        super().__init__(model, config, run_dir)
        self._followers = followers
        self._numbers = itertools.count(1)
        self._read: WeakValueDictionary[int, NumberedRead] = WeakValueDictionary()  # what may still be put in memory
        self._reading = threading.Lock()

    def read(self, directory: Path) -> NumberedRead:
        """See AdapterStore.read."""
        with self._reading:
            task = ReadAdapter(str(directory), next(self._numbers), list(self._read))
            try:
                own, others = self._followers.together(task, partial(super().read, directory))
            except CommandRefused as refusal:
                raise CheckpointError(refusal.message) from refusal
            for rank, other in enumerate(others, 1):
                if other != content_of(own.identity):
                    raise CheckpointError(DIFFERS.format(directory, rank))
            found = NumberedRead(own.rank, own.identity, own.weights, task.number)
            self._read[task.number] = found
        return found

    def receive(self, groups: Groups, command: LoadAdapterFromDistributed) -> list[tuple[str, torch.Tensor]]:
        """See AdapterStore.receive: every rank takes part."""
        if self.config.nnodes > 1:
            raise CheckpointError(ONE_MACHINE.format(self.config.nnodes))
        self.check_announced(command)  # before the others wait for what is broadcast
        try:
            return self._followers.together(ReceiveAdapter(command), partial(receive_adapter, groups, command))[0]
        except CommandRefused as refusal:
            raise CheckpointError(refusal.message) from refusal

    def put(self, name: str, read: Read) -> None:
        """See AdapterStore.put."""
        assert isinstance(read, NumberedRead), read
        self._followers.tell(TakeAdapter(name, read.number))
        super().put(name, read)

    def take_out(self, name: str) -> None:
        """See AdapterStore.take_out."""
        if name in self.loaded:
            self._followers.tell(DropAdapter(name))
        super().take_out(name)


class FollowingAdapters(CpuAdapters):
    """The adapters of a rank other than 0: what rank 0 says of them, and the steps' slices, which it names."""

    def __init__(self, model: Decoder, config: ResolvedConfig) -> None:
        super().__init__(model, config, "")
        self._read: dict[int, Read] = {}
        self._named: Sequence[str] | None = None  # of the next step's slices
        self._counts: Sequence[int] = ()

    def do(self, task: ReadAdapter) -> Answer:
        """Read an adapter, in the background."""
        for number in list(self._read):
            if number not in task.kept:
                del self._read[number]
        try:
            found = self.read(Path(task.directory))
        except (StartupError, OSError) as error:
            return Answer(refusal=str(error))
        self._read[task.number] = found
        return Answer(content_of(found.identity))

    def take(self, name: str, number: int) -> None:
        """Have in memory what was read."""
        self.put(name, self._read.pop(number))

    def expect(self, named: Sequence[str] | None, counts: Sequence[int]) -> None:
        """The next step's slices have these adapters and so many tokens; None: it is the model's own."""
        self._named, self._counts = named, counts

    def uses(self, plan: Plan) -> bool:
        """See CpuAdapters.uses; the plan is rank 0's."""
        return self._named is not None

    def of_step(self, plan: Plan) -> AbstractContextManager[None]:
        """See CpuAdapters.of_step; the plan is rank 0's."""
        assert self._named is not None
        return self.of_slices(self._named, self._counts)


def content_of(identity: FileIdentity) -> list[int]:
    """What is the same of copies on several machines: size and time of change."""
    return [identity.size, identity.written_ns]
