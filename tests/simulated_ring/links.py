"""The ring's links as ZeroMQ has them: PUSH → PULL over ipc, each incarnation of a receiver behind its own path.

What was seen of the real sockets (pyzmq 27, libzmq 4.3), and is so here:

* Frames of one connection arrive in order. A receiver has a connection with every incarnation of its sender; what
  waits on several is taken in turns, so the frames of a dead sender come between, or after, those of its successor.
* A sender's death cuts off what had not left it: a prefix of its frames is still read, the rest never comes.
* A receiver's death takes with it whatever it had not read. Frames sent before the sender's I/O thread has noticed are
  lost as well. After that a service (IMMEDIATE) has nobody to send to and blocks in `send`; the gateway (not
  IMMEDIATE) queues frames for the next incarnation, together with a suffix of those that were still with it.
* A sender has noticed a death before it connects to the successor, so what is lost is one run of frames, never two.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

ARRIVALS = 4  # frames that arrive together at most


@dataclass(slots=True, eq=False)
class Connection:
    """One incarnation of the sender and one of the receiver."""

    travelling: deque[bytes] = field(default_factory=deque)
    arrived: deque[bytes] = field(default_factory=deque)
    open: bool = True  # both live, as far as is known
    broken: bool = False  # the receiver is dead, and the sender does not know


class Inbox:
    """Where one process receives, from the links of all that send to it; they are read in turns."""

    def __init__(self, links: "list[Link]") -> None:
        self._links = list(links)

    @property
    def waiting(self) -> bool:
        return any(link.waiting for link in self._links)

    def take(self) -> bytes | None:
        """The next frame that waits."""
        for _ in range(len(self._links)):
            link = self._links.pop(0)
            self._links.append(link)
            if (frame := link.take()) is not None:
                return frame
        return None

    def tell(self, on_arrival: Callable[[], None]) -> None:
        for link in self._links:
            link.on_arrival = on_arrival


class Link:
    """From one process to the next, through all their incarnations."""

    def __init__(self, random: Random, keeps: bool) -> None:
        """`keeps`: the sender does not block while nobody is there; its frames are kept."""
        self.keeps = keeps
        self.unsent: deque[bytes] = deque()  # for want of a peer
        self.sender_is_there = False
        self.receiver_is_there = False
        self.on_arrival: Callable[[], None] = lambda: None
        self._random = random
        self._current: Connection | None = None
        self._connections: list[Connection] = []  # of the living receiver, in the order in which they are read

    @property
    def blocks(self) -> bool:
        """Whether the sender is stuck in `send`."""
        return bool(self.unsent) and not self.keeps

    @property
    def has_peer(self) -> bool:
        return self._current is not None

    @property
    def at_rest(self) -> bool:
        if self._current is None:
            return not (self.sender_is_there and self.receiver_is_there)
        return not (self._current.broken or self._current.travelling)

    @property
    def waiting(self) -> bool:
        """Whether the receiver has frames to read."""
        return any(connection.arrived for connection in self._connections)

    # the sender's and the receiver's side

    def send(self, frame: bytes) -> None:
        if self._current is None:
            self.unsent.append(frame)
        elif not self._current.broken:
            self._current.travelling.append(frame)

    def take(self) -> bytes | None:
        """The next frame that waits; connections take turns."""
        for _ in range(len(self._connections)):
            connection = self._connections.pop(0)
            if connection.open or connection.arrived:
                self._connections.append(connection)
            if connection.arrived:
                return connection.arrived.popleft()
        return None

    # what happens by itself

    def turn(self) -> bool:
        """One thing happens, if there is any: a connection is made or found dead, or frames arrive."""
        if self.at_rest:
            return False
        if self._current is None:
            self._connect()
        elif self._current.broken:
            self._current = None
        else:
            for _ in range(min(len(self._current.travelling), self._random.randint(1, ARRIVALS))):
                self._current.arrived.append(self._current.travelling.popleft())
            self.on_arrival()
        return True

    def _connect(self) -> None:
        self._current = Connection(travelling=self.unsent)
        self.unsent = deque()
        self._connections.append(self._current)

    def sender_died(self) -> None:
        """What it had handed to the system still comes."""
        self.sender_is_there = False
        self.unsent.clear()
        last, self._current = self._current, None
        if last is not None and not last.broken:
            for _ in range(self._random.randint(0, len(last.travelling))):
                last.arrived.append(last.travelling.popleft())
            last.travelling.clear()
            last.open = False
            self.on_arrival()

    def receiver_came(self) -> None:
        self.receiver_is_there = True
        if self._current is not None and self._current.broken:
            self._current = None

    def receiver_died(self) -> None:
        """Everything that it had not read is gone, and perhaps what is sent from now on."""
        self.receiver_is_there = False
        self._connections.clear()
        last = self._current
        if last is None:
            return
        kept = self._random.randint(0, len(last.travelling)) if self.keeps else 0
        last.broken = not kept
        if kept:
            self.unsent.extend(list(last.travelling)[-kept:])
            self._current = None
        last.travelling.clear()
