"""The process of a rank other than 0: `python -m quartet.scheduler_service.follower`, started by rank 0.

It computes what rank 0 describes on its standard input, until that is closed.
"""

import logging
import os
import signal
import sys
from typing import IO

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read once, when torch is imported

import setproctitle
import torch

from quartet.runtime.errors import StartupError
from quartet.runtime.log import set_up_logging
from quartet.runtime.messages import SCHEDULER
from quartet.runtime.model_files import model_info
from quartet.runtime.service import EXIT_STARTUP, TITLE
from quartet.scheduler_service.core.plan import Plan
from quartet.scheduler_service.execution.device_state import SlotTokens
from quartet.scheduler_service.execution.eager_steps import EagerSteps, choose_attention
from quartet.scheduler_service.execution.kv_cache import KVCache
from quartet.scheduler_service.execution.ranks import Forward, Logits, Pool, Start, inputs_of, load_part, read_message
from quartet.scheduler_service.host.device import limit_threads
from quartet.scheduler_service.host.parallel import LOST, Parallel
from quartet.scheduler_service.model.batch import ServedModel

log = logging.getLogger(__name__)


def main() -> None:
    """Load a part of the model and compute with it until rank 0 ends."""
    pipe = sys.stdin.buffer
    start = read_message(pipe)
    if not isinstance(start, Start) or os.getppid() != start.parent_pid:
        sys.exit("ranks are started by the scheduler of `quartet serve --tp-size`")
    name = f"{SCHEDULER} TP{start.rank}"
    setproctitle.setproctitle(TITLE.format(role=name))
    set_up_logging(start.config, name)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 decides
    try:
        follow(start, pipe)
    except StartupError as error:
        log.error("%s: %s", name, error)
        os._exit(EXIT_STARTUP)
    except Exception:
        log.exception("%s hit an exception:", name)
        os._exit(LOST)
    os._exit(0)


def follow(start: Start, pipe: IO[bytes]) -> None:
    """Load the part of the model, and do what the messages say, until there are no more. Raises StartupError."""
    torch.set_num_threads(start.threads)
    parallel = Parallel(start.rank, start.size)
    device = torch.device(start.config.device)
    if device.type == "cuda":
        torch.cuda.set_device(parallel.rank)
    model = load_part(start.config, model_info.load(start.config), device, parallel, start.store)
    limit_threads(device, model.hidden_size)
    pool = read_message(pipe)
    if not isinstance(pool, Pool):
        return  # rank 0 could not start
    cache = KVCache(model.attention, pool.page_count, pool.page_size, model.dtype, device)
    steps = EagerSteps(model, cache, SlotTokens(1, device), choose_attention(device, model, deterministic=False))
    log.info("Rank %d of %d computes %.2f GB of weights.", parallel.rank, parallel.size, model.weights.nbytes() / 1e9)
    with torch.inference_mode():
        while (message := read_message(pipe)) is not None:
            if isinstance(message, Forward):
                steps.forward(Plan(), inputs_of(message, pool.page_size, model.hidden_size, device))
            elif isinstance(message, Logits):
                compute_logits(model, message.rows, parallel, device)


def compute_logits(model: ServedModel, rows: int, parallel: Parallel, device: torch.device) -> None:
    """This rank's part of the logits, of hidden states that rank 0 broadcasts."""
    hidden = torch.empty(rows, model.hidden_size, dtype=model.dtype, device=device)
    parallel.broadcast(hidden)
    model.logits(hidden)


if __name__ == "__main__":
    main()
