"""Clients that read streams while the weights change under them, and what they saw."""

import contextlib
import statistics
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from deploy.examples.stream_client import StreamError, stream

NEW_TOKENS = 250  # enough to be still running when an update is over
FIRST_TOKEN_TIMEOUT_S = 60


class Stream(threading.Thread):
    """One client: asks for a fixed number of tokens and notes when they come."""

    def __init__(self, url: str, prompt_ids: list[int], lora_path: str | None, version_key: str) -> None:
        """`version_key`: of a run in meta_info.weight_versions."""
        super().__init__(daemon=True)
        self.began = threading.Event()
        self.arrivals: list[float] = []
        self.meta: dict[str, Any] = {}
        self.fault = ""
        self._url = url
        self._version_key = version_key
        self._body = {
            "input_ids": prompt_ids,
            "sampling_params": {"temperature": 1.0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True},
            "lora_path": lora_path,
        }
        self.start()

    def run(self) -> None:
        try:
            self._read()
        except (OSError, StreamError) as error:
            self.fault = str(error)
        finally:
            self.began.set()

    def _read(self) -> None:
        ids: list[int] = []
        for chunk in stream(self._url, self._body):
            self.arrivals.append(time.perf_counter())
            self.began.set()
            if chunk["output_ids"][: len(ids)] != ids:
                self.fault = "a chunk took back tokens that had been sent"
            ids, self.meta = chunk["output_ids"], chunk["meta_info"]
        if len(ids) != NEW_TOKENS or self.meta["finish_reason"]["type"] != "length":
            self.fault = f"{len(ids)} of {NEW_TOKENS} tokens: {self.meta['finish_reason']}"
        runs = self.meta["weight_versions"]
        if [run["start"] for run in runs] + [NEW_TOKENS] != [0] + [run["end"] for run in runs]:
            self.fault = f"the versions do not account for every token once: {runs}"

    @property
    def versions(self) -> list[str]:
        """Those that made its tokens, in order."""
        return [run[self._version_key] for run in self.meta.get("weight_versions", [])]

    def gaps(self, start: float, end: float) -> list[float]:
        """The seconds between two chunks, where they overlap with an interval."""
        pairs = zip(self.arrivals, self.arrivals[1:], strict=False)
        return [later - earlier for earlier, later in pairs if later > start and earlier < end]


@dataclass
class Watch:
    """The streams of one update, and its time."""

    streams: list[Stream]
    start: float = 0.0
    end: float = field(default=float("inf"))

    def report(self, old: str, new: str) -> dict[str, Any]:
        """For the history, once all streams have ended; `old` and `new` are the versions before and after."""
        during = [gap for s in self.streams for gap in s.gaps(self.start, self.end)]
        every = [gap for s in self.streams for gap in s.gaps(0, float("inf"))]
        return {
            "streams": len(self.streams),
            "complete_streams": sum(not s.fault for s in self.streams),
            "streams_across": sum(s.versions == [old, new] for s in self.streams),
            "faults": [s.fault for s in self.streams if s.fault],
            "largest_gap_s": max(during, default=0.0),
            "usual_gap_s": statistics.median(every) if every else 0.0,
        }


@contextlib.contextmanager
def running(url: str, prompts: list[list[int]], lora_path: str | None, version_key: str) -> Iterator[Watch]:
    """Streams that have begun when the block is entered; they are read to their ends after it."""
    streams = [Stream(url, prompt, lora_path, version_key) for prompt in prompts]
    for each in streams:
        each.began.wait(FIRST_TOKEN_TIMEOUT_S)
    watch = Watch(streams, start=time.perf_counter())
    yield watch
    watch.end = time.perf_counter()
    for each in streams:
        each.join()
