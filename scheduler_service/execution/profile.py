"""A recording of steps by torch's profiler."""

import logging
import time
from pathlib import Path

from torch.profiler import profile

log = logging.getLogger(__name__)


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
