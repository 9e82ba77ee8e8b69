"""A rank on another machine than rank 0's: started by the launcher of `quartet serve --nnodes N --node-rank R`.

It finds rank 0 through --dist-init-addr and then follows it, as the ranks do that rank 0 starts itself. When rank 0
ends, so does this, and the launcher starts it again, to wait for the next one.
"""

import os
from functools import partial

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read once, when torch is imported

import msgspec
import torch

from quartet.runtime.errors import StartupError
from quartet.runtime.messages import SCHEDULER
from quartet.runtime.service import Boot, report_ready, run
from quartet.scheduler_service.execution import remote_ranks
from quartet.scheduler_service.execution.rank_messages import Start
from quartet.scheduler_service.execution.ranks import parallel_of
from quartet.scheduler_service.follower import follow
from quartet.scheduler_service.host.parallel import LOST, TCP, Parallel, open_store


def main(boot: Boot) -> None:
    """Follow rank 0 until it ends. Raises StartupError."""
    config, address = boot.config, str(boot.config.dist_init_addr)
    parallel = Parallel(int(boot.role.removeprefix(f"{SCHEDULER} TP")), config.tp_size)
    store = open_store(parallel, f"{TCP}{address}")
    channel = remote_ranks.connect(store, parallel.rank, address.rsplit(":", 1)[0])
    start = channel.receive()
    if not isinstance(start, Start):
        raise StartupError("rank 0 has ended while the ranks met")
    if (start.rank, start.size) != (parallel.rank, parallel.size):
        raise StartupError(
            f"machine 0 has --tp-size {start.size}, this one {parallel.size}; start all with the same flags"
        )
    if (start.config.kv_cache_dir is None) != (config.kv_cache_dir is None):
        raise StartupError("--kv-cache-dir is given on one machine and not on another; start all with the same flags")
    parallel = parallel_of(start.config, parallel.rank)
    own = msgspec.structs.replace(start.config, kv_cache_dir=config.kv_cache_dir)  # a path of this machine
    start = msgspec.structs.replace(start, config=own, threads=max(1, torch.get_num_threads() // config.ranks_here))
    follow(start, channel, parallel, store, partial(report_ready, boot))
    raise SystemExit(LOST)


if __name__ == "__main__":
    run(main)
