"""Finds the poison request: the one that ends a process of the ring each time it is served.

A request that was in the ring at two deaths of the same service, and made almost no output between them, is a suspect.
Suspects run while all other requests wait: first those that have never made output; in groups, about as many groups as
a group has members, so that many suspects do not take long; each until it has made more output than at the last death.
When the service dies while a group runs, its members run one by one; when it dies while one request runs, that one is
the poison request. Equal requests are blocked for a while, for clients try again. A group is sent only when a probe
has come back behind the end of all other requests, so that nothing they have left in the ring counts against it.
"""

import math
from collections import OrderedDict, deque
from collections.abc import Collection, Iterable

from quartet.http_gateway.ring.journal import Deaths, JournalEntry, request_digest
from quartet.runtime.control import Probe
from quartet.runtime.messages import Generate, Reply

ID_BYTES = 4
SUSPICIOUS_DEATHS = 2
PROOF_TOKENS = 8  # made since a death: it was not this request's fault
FEW = 4  # suspects that run one by one: a death of a group costs more than their time
BLOCKED_KEPT = 64
BLOCKED_FOR_S = 600.0
POISON_REQUEST = "The {role} ended each time it served this request, the last time alone; the request is given up."

SuspectGroup = tuple[str, list[JournalEntry]]  # the service that died, and who is suspected


class Quarantine:
    """Which suspects run while all other requests wait, and which requests are blocked."""

    def __init__(self) -> None:
        self.unproven: list[JournalEntry] = []  # suspects that run now; empty: every request may run
        self.cleared = False  # nothing of other requests is in the ring any more: the suspects may be sent
        self._clearing: set[tuple[str, int]] = set()  # the probes behind which that is so, by id and rank
        self._role = ""  # the service whose death they are suspected of
        self._group: list[JournalEntry] = []  # the whole group of `unproven`
        self._groups: deque[SuspectGroup] = deque()
        self._blocked: OrderedDict[bytes, float] = OrderedDict()  # digest → when it was blocked

    def service_died(self, role: str, lost: Collection[JournalEntry]) -> JournalEntry | None:
        """A service has died while these were not finished. Returns the poison request, where that is known."""
        present = [entry for entry in lost if entry.in_ring]
        for entry in present:
            deaths = entry.deaths.setdefault(role, Deaths())
            deaths.count = 1 if len(entry.delivered) >= deaths.proof_bytes else deaths.count + 1
            deaths.proof_bytes = len(entry.delivered) + PROOF_TOKENS * ID_BYTES
        suspects = [entry for entry in present if entry.deaths[role].count >= SUSPICIOUS_DEATHS]
        ran, self.cleared = self.cleared, False
        if not (self.unproven and ran and role == self._role):
            fresh = [entry for entry in suspects if not entry.delivered]
            older = [entry for entry in suspects if entry.delivered]
            groups = [(role, group) for group in [*grouped(fresh), *grouped(older)]]
            if groups and self.unproven:  # they end another service as well, and would do so for ever
                groups.append((self._role, self.unproven))
                self._groups.extendleft(reversed(groups))
                self.unproven = []
            else:
                self._groups.extend(groups)
            return None
        self.unproven, self._group = [], []
        if len(present) == 1:
            return present[0]
        self._groups.extendleft((role, [entry]) for entry in reversed(suspects))
        return None

    def admits(self, entry: JournalEntry) -> bool:
        """Whether the entry may be sent now."""
        return not self.unproven or (self.cleared and entry in self.unproven)

    def note_output(self, entry: JournalEntry, ended: bool) -> bool:
        """Output came for the entry. Whether all of its group are proven harmless with it."""
        if entry not in self.unproven:
            return False
        if ended or len(entry.delivered) >= entry.deaths[self._role].proof_bytes:
            self.unproven.remove(entry)
        return not self.unproven

    def advance(self, unfinished: Iterable[JournalEntry]) -> list[JournalEntry]:
        """Choose the next group when there is none. Returns the requests of the last one that must wait again."""
        there = set(unfinished)
        while self._groups and not self.unproven:
            self.cleared = False
            self._role, group = self._groups.popleft()
            self.unproven = [entry for entry in group if entry in there and not entry.requested_abort]
        if not self.unproven:
            self._group = []
            return []
        before, self._group = self._group, list(self.unproven)
        waiting = there.difference(self.unproven)
        return [entry for entry in before if entry in waiting and entry.in_ring and not entry.requested_abort]

    def clearing_probes(self, id: str, ranks: Iterable[int]) -> list[Probe]:
        """Probes to these schedulers: once all have come back, nothing of other requests is left."""
        probes = [Probe(id=id, rank=rank) for rank in ranks]
        self._clearing = {(id, probe.rank) for probe in probes}
        return probes

    def takes(self, answer: Reply | Probe) -> bool:
        """Whether this is one of them; the last one clears the way for the suspects."""
        if (answer.id, answer.rank) not in self._clearing:
            return False
        self._clearing.remove((answer.id, answer.rank))
        self.cleared = not self._clearing
        return True

    def block(self, poison: JournalEntry, unfinished: Iterable[JournalEntry], now: float) -> list[JournalEntry]:
        """Refuse requests equal to this one for a while. Returns it, and those of them that are unfinished."""
        digest = request_digest(poison.generate)
        self._blocked[digest] = now
        while len(self._blocked) > BLOCKED_KEPT:
            self._blocked.popitem(last=False)
        return [entry for entry in unfinished if entry is poison or request_digest(entry.generate) == digest]

    def blocks(self, generate: Generate, now: float) -> bool:
        """Whether an equal request was blocked lately."""
        while self._blocked and next(iter(self._blocked.values())) < now - BLOCKED_FOR_S:
            self._blocked.popitem(last=False)
        return bool(self._blocked) and request_digest(generate) in self._blocked


def grouped(suspects: list[JournalEntry]) -> list[list[JournalEntry]]:
    """As many groups as a group has members, nearly; few suspects are groups of one."""
    size = 1 if len(suspects) <= FEW else math.isqrt(len(suspects) - 1) + 1
    return [suspects[start : start + size] for start in range(0, len(suspects), size)]
