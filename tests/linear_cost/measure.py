"""CPU time of the four processes for one request, and the gaps that a stream beside it sees."""

import http.client
import itertools
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.linear_cost.fields import Field
from tests.servers import Server

ROLES = ("gateway", "tokenizer", "scheduler", "detokenizer")
TIMEOUT_S = 120
SETTLE_S = 0.02  # until work beside the loops has ended too
Costs = dict[str, float]  # seconds of CPU time by role


class Meter:
    """Sends requests to a server and reads what they cost."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._pids = {role: process.pid for role, process in server.children().items() if role in ROLES}

    def cpu(self) -> Costs:
        return {role: cpu_s(pid) for role, pid in self._pids.items()}

    def send(self, field: Field, body: bytes) -> int:
        """Status of the answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self._server.port, timeout=TIMEOUT_S)
        method = "POST" if "POST" in field.route.methods else "PUT"
        try:
            connection.request(method, field.route.path, body, {"Content-Type": "application/json"})
            return drained(connection)
        except (BrokenPipeError, ConnectionResetError):  # refused before all was sent
            return http.client.REQUEST_ENTITY_TOO_LARGE
        finally:
            connection.close()

    def cost(self, field: Field, size: int) -> tuple[int, Costs]:
        """Status, and what every process spent. What stands still costs nothing."""
        body = field.body(size)
        before = self.cpu()
        status = self.send(field, body)
        after = self.rested()
        return status, {role: after[role] - before[role] for role in after}

    def rested(self) -> Costs:
        """The times once nobody works any more."""
        now = self.cpu()
        while True:
            time.sleep(SETTLE_S)
            later = self.cpu()
            if all(later[role] - now[role] < SETTLE_S / 5 for role in now):
                return later
            now = later


def drained(connection: http.client.HTTPConnection) -> int:
    answer = connection.getresponse()
    while answer.read(1 << 20):
        pass
    return answer.status


def cpu_s(pid: int) -> float:
    """CPU time of all threads of a process; more exact than its clock ticks."""
    spent = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            spent += int((task / "schedstat").read_text().split()[0])
        except (FileNotFoundError, ProcessLookupError):
            continue
    return spent / 1e9


class Stream:
    """A client that reads one stream after the other and notes when chunks come."""

    TOKENS = 1500

    def __init__(self, server: Server) -> None:
        self._port = server.port
        self._arrived: list[tuple[float, float]] = []  # (when, seconds since the chunk before of the same stream)
        self._ends = False

    def largest_gap(self, since: float) -> float:
        """Also the one that has not ended yet."""
        seen = [gap for when, gap in list(self._arrived) if when >= since]
        last = self._arrived[-1][0] if self._arrived else since
        return max([*seen, time.monotonic() - last])

    def read(self) -> None:
        for serial in itertools.count():
            if self._ends:
                return
            body = {"prompt": f"Tell me a story, number {serial}:", "max_tokens": self.TOKENS}
            body |= {"stream": True, "ignore_eos": True, "temperature": 0.8}
            body |= {"skip_special_tokens": False}  # so that every token is a chunk
            connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=TIMEOUT_S)
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            before: float | None = None
            while not self._ends and answer.readline():
                now = time.monotonic()
                if before is not None:
                    self._arrived.append((now, now - before))
                before = now
            connection.close()

    def stop(self) -> None:
        self._ends = True


@contextmanager
def streaming(server: Server) -> Iterator[Stream]:
    stream = Stream(server)
    thread = threading.Thread(target=stream.read, daemon=True)
    thread.start()
    time.sleep(1)
    try:
        yield stream
    finally:
        stream.stop()
        thread.join(10)
