"""The scheduler process: `python -m scheduler_service.main <boot file>`."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read once, when torch is imported

from runtime import model_info
from runtime.service import Boot, run
from scheduler_service.assemble import serve
from scheduler_service.worker import Worker


def main(boot: Boot) -> None:
    info = model_info.load(boot.config)
    serve(boot, info, Worker(boot.config, info))


if __name__ == "__main__":
    run(main)
