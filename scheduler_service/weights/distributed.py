"""Groups of processes in which a trainer broadcasts weights: rank 0 is the trainer, it sends, we receive.

A group is joined, used and left in background threads only; all calls here block until the peers have done their
part, or the time is over.
"""

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d
from torch.distributed.rendezvous import rendezvous

from quartet.runtime.control import InitWeightsUpdateGroup
from quartet.runtime.errors import CommandRefused
from quartet.scheduler_service.weights import wire

TRAINER = 0
TIMEOUT = timedelta(seconds=300)
NEEDS_GPU = ("nccl",)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a group meets and what it looks like."""

    address: str
    port: int
    rank: int
    world_size: int
    name: str
    backend: str

    @classmethod
    def of(cls, command: InitWeightsUpdateGroup) -> "Place":
        """Some trainers send the port as a string."""
        try:
            port = int(command.master_port)
        except ValueError:
            port = 0
        if not 0 < port < 1 << 16:
            raise failed_to_join(f"master_port {command.master_port} is no port")
        rank, size = command.rank_offset, command.world_size
        return cls(command.master_address, port, rank, size, command.group_name, command.backend)


def join(place: Place) -> "dist.ProcessGroup":
    """Meet the trainer. Raises CommandRefused when the group does not come about."""
    if place.backend in NEEDS_GPU and not torch.cuda.is_available():
        raise failed_to_join(f'backend "{place.backend}" needs a GPU, and this server has none: use "gloo"')
    if not 0 < place.rank < place.world_size:
        raise failed_to_join(f"rank {place.rank} of {place.world_size}: the trainer is rank 0, servers follow it")
    try:
        where = f"tcp://{place.address}:{place.port}"
        store, _, _ = next(rendezvous(where, place.rank, place.world_size, timeout=TIMEOUT))
        store.set_timeout(TIMEOUT)
        return new_group(place, store)
    except (RuntimeError, ValueError) as error:  # the errors of torch.distributed derive from RuntimeError
        raise failed_to_join(first_line(error)) from error


def new_group(place: Place, store: "c10d.Store") -> "dist.ProcessGroup":
    """A group besides the default one. Trainers make theirs with the same helper, so both look under the same keys."""
    group: dist.ProcessGroup
    group, _ = c10d._new_process_group_helper(
        place.world_size,
        place.rank,
        [],
        dist.Backend(place.backend),
        c10d.PrefixStore(place.name, store),
        group_name=c10d.GroupName(place.name),
        timeout=TIMEOUT,
    )
    c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(place.world_size)}
    return group


def failed_to_join(reason: str) -> CommandRefused:
    return CommandRefused(f"Failed to initialize custom process group: {reason}.")


def receive(group: "dist.ProcessGroup", tensors: list[torch.Tensor]) -> None:
    """What the trainer broadcasts, in order. Raises RuntimeError when it does not, or the peers disagree."""
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


def leave(group: "dist.ProcessGroup") -> None:
    """Forget a group and close its connections."""
    dist.destroy_process_group(group)


def first_line(error: Exception) -> str:
    """What an exception says, in one line that ends without a full stop."""
    return str(error).strip().split("\n")[0].rstrip(".")[:300]
