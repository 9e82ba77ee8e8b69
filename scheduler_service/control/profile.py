"""Commands that record a profile of the steps with torch's profiler.

A recording ends by /stop_profile, or by itself after so many steps: what it keeps grows with every step.
"""

import logging
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.profiler import ProfilerActivity, profile

from quartet.runtime.control import ControlCommand, StartProfile, StopProfile
from quartet.runtime.errors import CommandRefused
from quartet.runtime.limits import MAX_PROFILE_STEPS
from quartet.runtime.messages import Message, Reply

if TYPE_CHECKING:
    from quartet.scheduler_service.scheduler import Scheduler

log = logging.getLogger(__name__)

STARTED = "Start profiling.\n"
STOPPED = "Stop profiling. This will take some time.\n"
RUNNING = "Profiling is already in progress. Call /stop_profile first."
NOT_RUNNING = "Profiling is not in progress. Call /start_profile first."
DIRECTORY_BY = "SGLANG_TORCH_PROFILER_DIR"  # environment variable of the API that this one is compatible with
ACTIVITIES = {"CPU": ProfilerActivity.CPU, "GPU": ProfilerActivity.CUDA}


class Profile:
    """A recording under way."""

    def __init__(self, directory: Path, steps: int, recorder: profile) -> None:
        self._directory = directory
        self._steps = steps  # left
        self._recorder = recorder
        recorder.start()

    def stepped(self) -> bool:
        """Note a step. Whether it was the last: then the recording is written."""
        self._steps -= 1
        if self._steps > 0:
            return False
        self.write()
        return True

    def write(self) -> None:
        """End the recording, and write it as a trace that browsers show. The steps wait meanwhile."""
        self._recorder.stop()
        file = self._directory / f"{time.time():.3f}-TP-0.trace.json.gz"
        try:
            self._recorder.export_chrome_trace(str(file))
        except (OSError, RuntimeError) as error:  # torch has its own for files
            log.error("The profile could not be written to %s: %s", file, error)
            return
        log.info("Wrote the profile to %s", file)


def start(scheduler: "Scheduler", command: StartProfile) -> list[Message]:
    """Record from the next step on."""
    if scheduler.profile is not None:
        raise CommandRefused(RUNNING)
    for field in ("start_step", "profile_by_stage"):
        if getattr(command, field):
            raise CommandRefused(f"{field} is not supported.")
    steps = MAX_PROFILE_STEPS if command.num_steps is None else command.num_steps
    if not 1 <= steps <= MAX_PROFILE_STEPS:
        raise CommandRefused(f"num_steps must be in [1, {MAX_PROFILE_STEPS}], got {steps}.")
    recorder = profile(
        activities=activities(command.activities),
        record_shapes=bool(command.record_shapes),
        with_stack=bool(command.with_stack),
    )
    scheduler.profile = Profile(directory(command.output_dir), steps, recorder)
    log.info("Profiling starts; it ends after %d steps at the latest.", steps)
    return [Reply(id=command.id, message=STARTED)]


def activities(names: list[str] | None) -> list[ProfilerActivity]:
    """Those of torch. A GPU that is not there is left out; nothing else is."""
    asked = names or list(ACTIVITIES)
    if unknown := [name for name in asked if name not in ACTIVITIES]:
        raise CommandRefused(f"activities may name {' and '.join(ACTIVITIES)}, got {unknown[0]!r:.40}.")
    found = [ACTIVITIES[name] for name in asked if name != "GPU" or torch.cuda.is_available()]
    if not found:
        raise CommandRefused("activities names the GPU alone, and there is none.")
    return found


def directory(asked: str | None) -> Path:
    path = Path(asked or os.environ.get(DIRECTORY_BY) or tempfile.gettempdir())
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise CommandRefused(f"output_dir cannot be used: {error}") from None
    return path


def stop(scheduler: "Scheduler", command: StopProfile) -> list[Message]:
    """Record no more, and write the trace."""
    if scheduler.profile is None:
        raise CommandRefused(NOT_RUNNING)
    running, scheduler.profile = scheduler.profile, None
    running.write()
    return [Reply(id=command.id, message=STOPPED)]


HANDLERS: dict[type[ControlCommand], Callable[..., Any]] = {StartProfile: start, StopProfile: stop}
