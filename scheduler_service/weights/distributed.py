"""Process groups in which a trainer broadcasts weights: rank 0 is the trainer and sends, the servers receive.

All calls here block until the peers have done their part or the timeout is over, so they run in background threads.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d
from torch.distributed.rendezvous import rendezvous

from quartet.runtime.adapters import LoadAdapterFromDistributed
from quartet.runtime.control import InitWeightsUpdateGroup
from quartet.runtime.errors import CommandRefused
from quartet.runtime.shorten import short
from quartet.scheduler_service.weights import wire
from quartet.scheduler_service.weights.checkpoint import CheckpointError

Groups = Mapping[str, "dist.ProcessGroup"]

TRAINER = 0
TIMEOUT = timedelta(seconds=300)
NEEDS_GPU = ("nccl",)
BACKENDS = ("gloo", *NEEDS_GPU)
MOST_RANKS = 1 << 20
NO_HOST = frozenset("/?#@ ")  # what would be more than a host in an address


@dataclass(frozen=True, slots=True)
class GroupSpec:
    """The address where the processes of a group meet, and this server's rank in it."""

    address: str
    port: int
    rank: int
    world_size: int
    name: str
    backend: str

    @classmethod
    def of(cls, command: InitWeightsUpdateGroup) -> "GroupSpec":
        """Raises CommandRefused for an address that is none. Some trainers send the port as a string."""
        try:
            port = int(command.master_port)
        except ValueError:
            port = 0
        if not 0 < port < 1 << 16:
            raise failed_to_join(f"master_port {command.master_port} is no port")
        if not command.master_address or NO_HOST & set(command.master_address):
            raise failed_to_join(f'master_address "{short(command.master_address)}" is no host')
        rank, size = command.rank_offset, command.world_size
        return cls(command.master_address, port, rank, size, command.group_name, command.backend)


def join(spec: GroupSpec) -> "dist.ProcessGroup":
    """Meet the trainer. Raises CommandRefused when that fails."""
    if not backends_of(spec.backend) <= set(BACKENDS):
        raise failed_to_join(f'backend "{short(spec.backend)}" is not supported; choose one of {", ".join(BACKENDS)}')
    if spec.backend in NEEDS_GPU and not torch.cuda.is_available():
        raise failed_to_join(f'backend "{spec.backend}" needs a GPU, and this server has none: use "gloo"')
    if not 0 < spec.rank < spec.world_size <= MOST_RANKS:
        raise failed_to_join(f"rank {spec.rank} of {spec.world_size}: the trainer is rank 0, servers follow it")
    try:
        where = f"tcp://{spec.address}:{spec.port}"
        store, _, _ = next(rendezvous(where, spec.rank, spec.world_size, timeout=TIMEOUT))
        store.set_timeout(TIMEOUT)
        return new_group(spec, store)
    except (RuntimeError, ValueError) as error:  # the errors of torch.distributed derive from RuntimeError
        raise failed_to_join(first_line(error)) from error


def new_group(spec: GroupSpec, store: "c10d.Store") -> "dist.ProcessGroup":
    """A group besides the default one. Trainers use the same helper, so both use the same keys of the store."""
    group: dist.ProcessGroup
    group, _ = c10d._new_process_group_helper(
        spec.world_size,
        spec.rank,
        [],
        dist.Backend(spec.backend),
        c10d.PrefixStore(spec.name, store),
        group_name=c10d.GroupName(spec.name),
        timeout=TIMEOUT,
    )
    c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(spec.world_size)}
    return group


def backends_of(name: str) -> set[str]:
    """The backends that a name stands for, which may have one for each kind of device: cpu:gloo,cuda:nccl."""
    return {part.rpartition(":")[2] for part in name.lower().split(",")}


def failed_to_join(reason: str) -> CommandRefused:
    return CommandRefused(f"Failed to initialize custom process group: {reason}.")


def receive(group: "dist.ProcessGroup", tensors: list[torch.Tensor]) -> None:
    """Fill the tensors with what the trainer broadcasts, in order. Raises RuntimeError when that fails."""
    for pending in [group.broadcast(tensor, TRAINER) for tensor in tensors]:
        pending.wait()


def receive_named(
    group: "dist.ProcessGroup", entries: list[wire.BucketEntry], device: torch.device, in_one: bool
) -> wire.Named:
    """The tensors of `entries`; `in_one`: they come as one flat tensor of bytes."""
    if in_one:
        flat = torch.empty(entries[-1].end_idx if entries else 0, dtype=torch.uint8, device=device)
        receive(group, [flat])
        return wire.split(flat, entries)
    tensors = [torch.empty(entry.shape, dtype=wire.dtype_of(entry.dtype), device=device) for entry in entries]
    receive(group, tensors)
    return zip((entry.name for entry in entries), tensors, strict=True)


def receive_adapter(groups: Groups, command: LoadAdapterFromDistributed) -> list[tuple[str, torch.Tensor]]:
    """The tensors of an adapter, in memory of the host. Raises CheckpointError.

    `groups`: those that this process is in, by name.
    """
    if (group := groups.get(command.group_name)) is None:
        raise CheckpointError(f"there is no group {short(command.group_name)}; initialize it first")
    if not len(command.names) == len(command.dtypes) == len(command.shapes):
        raise CheckpointError("names, dtypes and shapes differ in length")
    entries = wire.entries_of(command.names, command.dtypes, command.shapes)
    device = torch.device("cuda" if dist.get_backend(group) in NEEDS_GPU else "cpu")
    try:
        return [(name, tensor.cpu()) for name, tensor in receive_named(group, entries, device, in_one=False)]
    except RuntimeError as error:  # torch: when memory is short, and when the others do not do their part
        raise CheckpointError(first_line(error)) from error


def leave(group: "dist.ProcessGroup") -> None:
    """Forget a group and close its connections."""
    dist.destroy_process_group(group)


def first_line(error: Exception) -> str:
    """What an exception says, in one line that ends without a full stop."""
    return str(error).strip().split("\n")[0].rstrip(".")[:300]
