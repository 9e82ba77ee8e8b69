"""The ranks that compute one model together, and the sums and gathers between them.

The ranks are processes. They meet in a process group of torch.distributed: Gloo on CPUs, NCCL on GPUs. All of them
run the same layers in the same order, so that every collective operation finds its counterparts. A rank that fails
leaves the others inside one; no step can be repeated then, and `Parallel` ends the process.
"""

import contextlib
import fcntl
import logging
import os
import socket
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C import _distributed_c10d as c10d

from quartet.runtime.errors import StartupError

log = logging.getLogger(__name__)

Store = c10d.Store
TIMEOUT = timedelta(seconds=600)  # of one operation; the launcher's watchdog is earlier
LOST = 70  # exit status of a process that has lost its group
TCP = "tcp://"
ADDRESS_OF_INTERFACE = 0x8915  # SIOCGIFADDR
INTERFACE = "GLOO_SOCKET_IFNAME"
BACKENDS = {"cpu": "gloo", "cuda": "nccl"}


@dataclass(frozen=True, slots=True)
class Parallel:
    """One rank of a group. A group of one computes alone and needs no process group."""

    rank: int = 0
    size: int = 1
    in_order: bool = False  # every number of a sum is added up in the order of the ranks

    def sum(self, part: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' parts, in the dtype of `part`; on a CPU it is added up in float32.

        The order of three ranks and more depends on where in `part` a number stands, and so on the other rows, unless
        `in_order` is set. Of two ranks there is only one order.
        """
        total = part.float() if part.device.type == "cpu" else part
        total = total.contiguous()
        if self.in_order and self.size > 2:
            total = self._sum_in_order(total)
        else:
            together(lambda: dist.all_reduce(total))
        return total.to(part.dtype)

    def _sum_in_order(self, part: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' parts, added up rank by rank. Each rank receives all parts."""
        parts = [torch.empty_like(part) for _ in range(self.size)]
        together(lambda: dist.all_gather(parts, part))
        total = parts[0]
        for other in parts[1:]:
            total += other
        return total

    def gather(self, part: torch.Tensor, out: torch.Tensor) -> None:
        """Write all ranks' columns (rows, columns / size) side by side into `out` (rows, columns)."""
        parts = [torch.empty_like(part) for _ in range(self.size)]
        together(lambda: dist.all_gather(parts, part.contiguous()))
        torch.cat(parts, 1, out=out)

    def broadcast(self, x: torch.Tensor) -> None:
        """Give all ranks the values of rank 0, in place."""
        together(lambda: dist.broadcast(x, src=0))


ALONE = Parallel()


def together(operation: Callable[[], object]) -> None:
    """Do a collective operation; end this process where it fails, since the others are in another state."""
    try:
        operation()
    except RuntimeError as error:  # errors of torch.distributed derive from it
        log.critical("The ranks have lost each other: %s. Ending the group.", str(error).splitlines()[0])
        os._exit(LOST)


def open_store(parallel: Parallel, place: str) -> Store:
    """What the ranks know of each other: in a file, or at `tcp://HOST:PORT`, where rank 0 has it.

    Waits for rank 0. Raises StartupError.
    """
    if not place.startswith(TCP):
        return c10d.FileStore(place, parallel.size)
    host, port = place.removeprefix(TCP).rsplit(":", 1)
    try:
        interface_towards(host)  # there is one, which `join` uses
        leads = parallel.rank == 0
        return c10d.TCPStore(host, int(port), parallel.size, leads, timeout=TIMEOUT, wait_for_workers=False)
    except (OSError, RuntimeError) as error:
        raise StartupError(f"--dist-init-addr {host}:{port}: {str(error).splitlines()[0]}") from error


def interface_towards(host: str) -> str:
    """The network interface of this machine by which another is reached. Raises OSError."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # sends nothing
        own = socket.inet_aton(probe.getsockname()[0])
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # it has no address
                if fcntl.ioctl(probe.fileno(), ADDRESS_OF_INTERFACE, struct.pack("256s", name.encode()))[20:24] == own:
                    return name
    raise OSError(f"no network interface leads to {host}")


@contextlib.contextmanager
def interface_for(store: Store) -> Iterator[None]:
    """Within it Gloo connects ranks over the interface that leads to all of them, unless the operator has chosen one.

    Groups that are made later are of other processes, a trainer's for example.
    """
    if INTERFACE in os.environ:
        yield
        return
    os.environ[INTERFACE] = interface_towards(store.host) if isinstance(store, c10d.TCPStore) else "lo"
    try:
        yield
    finally:
        del os.environ[INTERFACE]


def join(parallel: Parallel, device: torch.device, store: Store) -> None:
    """Meet the other ranks. Blocks until all have come."""
    log.info("Init torch distributed begin.")
    with interface_for(store):
        dist.init_process_group(
            BACKENDS[device.type], store=store, rank=parallel.rank, world_size=parallel.size, timeout=TIMEOUT
        )
    log.info("Init torch distributed ends. rank=%d of %d", parallel.rank, parallel.size)
