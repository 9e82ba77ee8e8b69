"""A scheduler process without a model: `python -m tests.fake_scheduler`.

Everything is real but the worker. For tests of the ring only; tuned through the environment of the test:
QUARTET_FAKE_STEP_S (seconds per step, default 0), QUARTET_FAKE_PAGES (default 65536), QUARTET_FAKE_RUNNING (256),
QUARTET_FAKE_DEADLY (an id: a step with a prompt that begins with it ends the process).
"""

import os
import signal
from typing import Any

from quartet.runtime.model_files import model_info
from quartet.runtime.service import Boot, run
from quartet.scheduler_service.assemble import serve
from quartet.scheduler_service.core.plan import Plan
from tests.fakes import FakeWorker


class DeadlyWorker(FakeWorker):
    """One that some prompts are too much for."""

    def __init__(self, deadly: int, **settings: Any) -> None:
        super().__init__(**settings)
        self._deadly = deadly

    def launch(self, plan: Plan) -> Any:
        if any(part.sequence.ids[0] == self._deadly for part in plan.slices):
            os.kill(os.getpid(), signal.SIGSEGV)
        return super().launch(plan)


def main(boot: Boot) -> None:
    info = model_info.load(boot.config)
    worker = DeadlyWorker(
        int(os.environ.get("QUARTET_FAKE_DEADLY", "-1")),
        page_size=boot.config.page_size or 16,
        page_count=int(os.environ.get("QUARTET_FAKE_PAGES", "65536")),
        max_running_requests=int(os.environ.get("QUARTET_FAKE_RUNNING", "256")),
        vocab_size=info.vocab_size,
        step_s=float(os.environ.get("QUARTET_FAKE_STEP_S", "0")),
    )
    serve(boot, info, worker)


if __name__ == "__main__":
    run(main)
