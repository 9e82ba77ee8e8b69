"""A recording of steps by torch's profiler."""

import logging
from pathlib import Path

from torch.profiler import profile

log = logging.getLogger(__name__)


class Profile:
    """A recording under way."""

    def __init__(self, file: Path, steps: int, recorder: profile) -> None:
        self._file = file
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
        try:
            self._recorder.export_chrome_trace(str(self._file))
        except (OSError, RuntimeError) as error:  # torch has its own for files
            log.error("The profile could not be written to %s: %s", self._file, error)
            return
        log.info("Wrote the profile to %s", self._file)
