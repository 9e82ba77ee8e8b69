"""The ranks that compute one model together, and the sums and gathers between them.

The ranks are processes. They meet in a process group of torch.distributed: Gloo on CPUs, NCCL on GPUs. All of them
run the same layers in the same order, so that every collective operation finds its counterparts. A rank that fails
leaves the others inside one; no step can be repeated then, and `Parallel` ends the process.
"""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

log = logging.getLogger(__name__)

TIMEOUT = timedelta(seconds=600)  # of one operation; the launcher's watchdog is earlier
LOST = 70  # exit status of a process that has lost its group
BACKENDS = {"cpu": "gloo", "cuda": "nccl"}


@dataclass(frozen=True, slots=True)
class Parallel:
    """One rank of a group. A group of one computes alone and needs no process group."""

    rank: int = 0
    size: int = 1

    def sum(self, part: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' parts, in the dtype of `part`; on a CPU it is added up in float32."""
        total = part.float() if part.device.type == "cpu" else part
        total = total.contiguous()
        together(lambda: dist.all_reduce(total))
        return total.to(part.dtype)

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


def join(parallel: Parallel, device: torch.device, store_file: str) -> None:
    """Meet the other ranks through a file that all of them see. Blocks until all have come."""
    log.info("Init torch distributed begin.")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the ranks of one machine
    dist.init_process_group(
        BACKENDS[device.type],
        init_method=f"file://{store_file}",
        rank=parallel.rank,
        world_size=parallel.size,
        timeout=TIMEOUT,
    )
    log.info("Init torch distributed ends. rank=%d of %d", parallel.rank, parallel.size)
