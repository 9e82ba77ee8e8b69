"""Commands that record a profile of the steps with torch's profiler.

A recording ends by /stop_profile, or after a number of steps: its size grows with every step.
"""

import logging
import os
import tempfile
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from quartet.runtime.control import ControlCommand, StartProfile, StopProfile
from quartet.runtime.errors import CommandRefused
from quartet.runtime.limits import MAX_PROFILE_STEPS
from quartet.runtime.messages import Message, Reply
from quartet.scheduler_service.control.context import Context, Handler
from quartet.scheduler_service.execution.profile import Profile

log = logging.getLogger(__name__)

STARTED = "Start profiling.\n"
STOPPED = "Stop profiling. This will take some time.\n"
RUNNING = "Profiling is already in progress. Call /stop_profile first."
NOT_RUNNING = "Profiling is not in progress. Call /start_profile first."
DIRECTORY_VARIABLE = "SGLANG_TORCH_PROFILER_DIR"  # environment variable of the API that this one is compatible with
ACTIVITIES = {"CPU": ProfilerActivity.CPU, "GPU": ProfilerActivity.CUDA}


def start(context: Context, command: StartProfile) -> list[Message]:
    """Start recording with the next step."""
    if context.profile is not None:
        raise CommandRefused(RUNNING)
    for field in ("start_step", "profile_by_stage", "profile_stages", "merge_profiles"):
        if getattr(command, field):
            raise CommandRefused(f"{field} is not supported.")
    steps = MAX_PROFILE_STEPS if command.num_steps is None else int(command.num_steps)
    if not 1 <= steps <= MAX_PROFILE_STEPS:
        raise CommandRefused(f"num_steps must be in [1, {MAX_PROFILE_STEPS}], got {steps}.")
    recorder = profile(
        activities=activities(command.activities),
        record_shapes=bool(command.record_shapes),
        with_stack=bool(command.with_stack),
    )
    rank = context.facts.rank if context.facts else 0
    context.profile = Profile(directory(command.output_dir) / file_name(rank, command), steps, recorder)
    log.info("Profiling starts; it ends after %d steps at the latest.", steps)
    return [Reply(id=command.id, message=STARTED)]


def file_name(rank: int, command: StartProfile) -> str:
    """The name of the trace. Each of several schedulers has a name of its own: all may write to one directory."""
    names = [command.profile_prefix, command.profile_id or f"{time.time():.3f}", "TP-0", f"DP-{rank}" if rank else None]
    return "-".join(filter(None, names)) + ".trace.json.gz"


def activities(names: list[str] | None) -> list[ProfilerActivity]:
    """The activities for torch; GPU is left out where there is none. Raises CommandRefused if none is left."""
    chosen = names or list(ACTIVITIES)
    if unknown := [name for name in chosen if name not in ACTIVITIES]:
        raise CommandRefused(f"activities may name {' and '.join(ACTIVITIES)}, got {unknown[0]!r:.40}.")
    available = [ACTIVITIES[name] for name in chosen if name != "GPU" or torch.cuda.is_available()]
    if not available:
        raise CommandRefused("activities names the GPU alone, and there is none.")
    return available


def directory(output_dir: str | None) -> Path:
    """Create the directory for the trace. Raises CommandRefused."""
    path = Path(output_dir or os.environ.get(DIRECTORY_VARIABLE) or tempfile.gettempdir())
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise CommandRefused(f"output_dir cannot be used: {error}") from None
    return path


def stop(context: Context, command: StopProfile) -> list[Message]:
    """Stop recording and write the trace."""
    if context.profile is None:
        raise CommandRefused(NOT_RUNNING)
    running, context.profile = context.profile, None
    running.write()
    return [Reply(id=command.id, message=STOPPED)]


HANDLERS: dict[type[ControlCommand], Handler] = {StartProfile: start, StopProfile: stop}
