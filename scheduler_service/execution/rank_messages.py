"""What rank 0 tells the other ranks, what they answer, and the channel for both.

Every piece of work in which all ranks take part begins with a message. A channel keeps their order, so all ranks do the
same things in the same order. What takes long (`Task`) runs in the background there and is answered; the rest is not.
"""

import select
import socket
import struct
import sys
import threading
from typing import Any

import msgspec
import torch

from quartet.kernels.cpu.attention_schedule import Ragged
from quartet.runtime.adapters import LoadAdapterFromDistributed
from quartet.runtime.config import ResolvedConfig
from quartet.runtime.control import InitWeightsUpdateGroup, UpdateWeightsFromDistributed
from quartet.runtime.model_files.model_info import ModelInfo
from quartet.scheduler_service.core.tier_acts import (
    Act,
    Brought,
    CarryOut,
    Clear,
    DropFile,
    DropMemory,
    EndRead,
    Keep,
    Put,
    PutState,
    ReadFiles,
    Store,
    Written,
)
from quartet.scheduler_service.execution.inputs import Inputs
from quartet.scheduler_service.execution.kv_cache import Placement
from quartet.scheduler_service.model.state_access import StateRows

ACTS: dict[str, Any] = {
    kind.__name__: kind for kind in (Store, DropMemory, DropFile, ReadFiles, Put, PutState, Keep, EndRead, Clear)
}
LENGTH = struct.Struct("<Q")


class Start(msgspec.Struct, tag=True):
    """The first message to a rank."""

    rank: int
    size: int
    config: ResolvedConfig
    info: ModelInfo
    place: str  # where the ranks meet, see parallel.open_store
    parent_pid: int
    threads: int
    title: str  # of the process


class Hello(msgspec.Struct, tag=True):
    """The first message of a rank on another machine."""

    rank: int
    token: str  # from the store
    pulses: bool = False  # the connection is for signs of life: a byte a second


class Pool(msgspec.Struct, tag=True):
    """The size of every rank's KV pool, and of its recurrent states; sent once, when the weights are loaded."""

    page_count: int
    page_size: int
    state_slots: int = 0
    snapshots: int = 0


class Forward(msgspec.Struct, tag=True):
    """A forward pass: `execution.inputs.Inputs` with tensors as bytes."""

    input_ids: bytes  # int64
    positions: bytes  # int64
    slots: bytes  # int64
    begun: bytes  # int64; empty: none
    starts: list[int]
    query_lengths: list[int]
    context_lengths: list[int]
    runs: list[list[tuple[int, int]]]
    embeds: bytes = b""  # float32 (tokens, hidden)
    embeds_mask: bytes = b""  # bool
    adapters: list[str] | None = None  # of each slice, "": none; None: no part of the step has to do with adapters
    states: StateRows | None = None  # of a model with recurrent layers


class Logits(msgspec.Struct, tag=True):
    """Logits of so many rows of hidden states, which rank 0 broadcasts."""

    rows: int


class FromDisk(msgspec.Struct, tag=True):
    """Task: stage the weights of a directory. Answered with the files that were read, as `Committed.files` has them."""

    directory: str
    load_format: str
    digests: dict[str, str] | None = None  # a manifest, of which each rank checks its share


class Collect(msgspec.Struct, tag=True):
    """Task: put the tensors of this rank's file into the update session, which begins with the first."""

    files: list[str]  # by rank
    load_format: str | None


class Finish(msgspec.Struct, tag=True):
    """Task: make what the session has collected ready for the swap."""


class Part(msgspec.Struct, tag=True):
    """Task: this rank's part of a tensor that serves. Answered with its bytes; of a whole tensor with the checksum."""

    name: str


class Snapshot(msgspec.Struct, tag=True):
    """Task: keep these tensors, to compare with."""

    names: list[str]


class Differing(msgspec.Struct, tag=True):
    """Task: which of these tensors are not as they were kept. Answered with their names."""

    names: list[str]


class Randomize(msgspec.Struct, tag=True):
    """Task: make random values for these tensors, the same on every rank that has them, ready for the swap."""

    names: list[str]
    seed: int


class Reread(msgspec.Struct, tag=True):
    """Task: stage the committed weights again, whose memory was given back. Answered with the files that were read."""


class JoinGroup(msgspec.Struct, tag=True):
    """Join a trainer's process group, as many ranks behind rank 0 as this one is in its own group."""

    command: InitWeightsUpdateGroup


class LeaveGroup(msgspec.Struct, tag=True):
    """Leave a trainer's process group, if this rank is in it."""

    name: str


class Meet(msgspec.Struct, tag=True):
    """Join or leave a group, beside all else. Answered under the same number, in no order with other answers."""

    number: int
    task: JoinGroup | LeaveGroup


class Receive(msgspec.Struct, tag=True):
    """Task: put the tensors that a trainer is about to broadcast into the update session."""

    command: UpdateWeightsFromDistributed


class ReceiveAdapter(msgspec.Struct, tag=True):
    """Task: take part in the broadcast of an adapter; rank 0 writes it to a directory, from which all ranks read it."""

    command: LoadAdapterFromDistributed


class ReadAdapter(msgspec.Struct, tag=True):
    """Task: read the LoRA adapter of a directory, to be kept under a number. Answered with what identifies its file."""

    directory: str
    number: int
    kept: list[int]  # of the adapters read before that may still be put in memory


class TakeAdapter(msgspec.Struct, tag=True):
    """Have in memory, under a name, what was read under a number."""

    name: str
    number: int


class DropAdapter(msgspec.Struct, tag=True):
    """Free the memory of an adapter."""

    name: str


class Release(msgspec.Struct, tag=True):
    """Give back memory, and answer. `backup`: keep the values of the weights."""

    tags: list[str]  # see MemorySaver
    backup: bool


class Resume(msgspec.Struct, tag=True):
    """Take memory again, and answer."""

    tags: list[str]
    backup: bool


class OpenTier(msgspec.Struct, tag=True):
    """Prepare a part of the tier behind the KV pool, once there is a pool. Answered with what its KV follows from."""

    block_tokens: int
    memory_blocks: int
    most_copied: int  # blocks at once
    ranks: int
    directory: str | None  # of rank 0; the others have one in it; None: no files


class UseTier(msgspec.Struct, tag=True):
    """Keep KV of this identity. Answered with the keys of blocks whose files are there."""

    identity: bytes


class Tier(msgspec.Struct, tag=True):
    """Do this with the tier, before the next step. `report`: answer with a `TierReport` behind it."""

    acts: list[tuple[str, Any]]  # see `packed`
    report: bool


class TierReport(msgspec.Struct, tag=True):
    """What has ended since the report before."""

    written: list[Written]
    brought: list[Brought]


class DropSecond(msgspec.Struct, tag=True):
    """Free the second set of weights; nothing is staged."""


class Commit(msgspec.Struct, tag=True):
    """Serve what was staged, from the next step on."""


class GiveUp(msgspec.Struct, tag=True):
    """Drop what was staged and collected."""


class Answer(msgspec.Struct, tag=True):
    """What came of a task."""

    value: Any = None
    refusal: str = ""  # why it was not done
    status: int = 400  # of the refusal
    meeting: int | None = None  # the number of the `Meet` that this answers


Meeting = JoinGroup | LeaveGroup
InGroup = Receive | ReceiveAdapter
Task = FromDisk | Collect | Finish | Part | Snapshot | Differing | Randomize | Reread | InGroup
Memory = Release | Resume
Adapters = ReadAdapter | TakeAdapter | DropAdapter
Tiers = OpenTier | UseTier | Tier
Told = Pool | Forward | Logits | Task | Meet | Memory | Adapters | Tiers | DropSecond | Commit | GiveUp
Message = Start | Hello | Told | Answer | TierReport
DECODER = msgspec.msgpack.Decoder(Message)


class Channel:
    """Messages to and from one other rank, over a stream socket."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._sending = threading.Lock()

    def send(self, message: Message) -> None:
        """Send from any thread. Raises OSError when the other rank has ended."""
        data = msgspec.msgpack.encode(message)
        with self._sending:
            self.connection.sendall(LENGTH.pack(len(data)) + data)

    def receive(self, most_bytes: int = sys.maxsize) -> Message | None:
        """The next message; None when the other rank has ended. One thread may receive.

        `most_bytes`: of a message from who may be no rank. Raises msgspec.MsgspecError for a longer one.
        """
        if (head := self._read(LENGTH.size)) is None:
            return None
        if (size := LENGTH.unpack(head)[0]) > most_bytes:
            raise msgspec.DecodeError(f"a message of {size} bytes")
        if (body := self._read(size)) is None:
            return None
        found: Message = DECODER.decode(body)
        return found

    def waits(self, timeout_s: float) -> bool:
        """Whether there is something to receive within so long."""
        return bool(select.select([self.connection], [], [], timeout_s)[0])

    def _read(self, size: int) -> bytearray | None:
        data = bytearray(size)
        view, done = memoryview(data), 0
        while done < size:
            try:
                count = self.connection.recv_into(view[done:])
            except ConnectionError:
                return None
            if not count:
                return None
            done += count
        return data


def packed(act: Act | Store | DropMemory | DropFile) -> tuple[str, Any]:
    """An act of the tier with the name of its class, since a message cannot have a union of dataclasses."""
    content = [packed(command) for command in act.commands] if isinstance(act, CarryOut) else act
    return type(act).__name__, content


def unpacked(name: str, content: Any) -> Any:
    """The reverse of `packed`. Raises KeyError or msgspec.ValidationError for what is none."""
    if name == CarryOut.__name__:
        return CarryOut([unpacked(*command) for command in content])
    return msgspec.convert(content, ACTS[name])


def forward_message(inputs: Inputs, adapters: list[str] | None = None) -> Forward:
    """A step's inputs as the other ranks get them."""
    ragged, placement = inputs.ragged, inputs.placement
    return Forward(
        input_ids=as_bytes(inputs.input_ids),
        positions=as_bytes(inputs.positions),
        slots=as_bytes(placement.slots),
        begun=as_bytes(placement.begun),
        starts=inputs.offsets,
        query_lengths=ragged.query_lengths,
        context_lengths=ragged.context_lengths,
        runs=ragged.runs,
        embeds=as_bytes(inputs.embeds),
        embeds_mask=as_bytes(inputs.embeds_mask),
        adapters=adapters,
        states=inputs.states,
    )


def inputs_of(message: Forward, page_size: int, hidden_size: int, device: torch.device) -> Inputs:
    """The reverse of `forward_message`."""
    begun = from_bytes(message.begun, torch.int64, device) if message.begun else None
    inputs = Inputs(
        input_ids=from_bytes(message.input_ids, torch.int64, device),
        positions=from_bytes(message.positions, torch.int64, device),
        starts=torch.tensor(message.starts, device=device),
        offsets=message.starts,
        ragged=Ragged(message.query_lengths, message.context_lengths, message.runs, page_size),
        placement=Placement(from_bytes(message.slots, torch.int64, device), begun),
        states=message.states,
    )
    if message.embeds:
        inputs.embeds = from_bytes(message.embeds, torch.float32, device).view(-1, hidden_size)
        inputs.embeds_mask = from_bytes(message.embeds_mask, torch.bool, device)
    return inputs


def as_bytes(x: torch.Tensor | None) -> bytes:
    """The bytes of a tensor; none of none."""
    return b"" if x is None else x.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def from_bytes(data: bytes, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A flat tensor of bytes that `as_bytes` gave."""
    return torch.frombuffer(bytearray(data), dtype=dtype).to(device) if data else torch.empty(0, dtype=dtype)
