"""Finds the request that ends a process.

A request that was in the ring at two deaths of the same service, and made nothing to speak of between them, is a
suspect. Suspects run while all others wait: first those that have never made anything; in groups, about as many as a
group has members, so that many innocent ones do not take long; each until it has got beyond the point where it was at
the last death. When the service dies under a group, its members run one by one; when it dies under one request, that
one is guilty. Its like is not accepted for a while, for clients try again. So that nobody pays for what others have
left in the ring, a group is sent when a probe has come round behind the end of all others.
"""

import math
from collections import OrderedDict, deque
from collections.abc import Collection, Iterable

from quartet.http_gateway.ring.journal import Deaths, Pending, digest
from quartet.runtime.messages import Generate

ID_BYTES = 4
SUSPICIOUS_DEATHS = 2
PROOF_TOKENS = 8  # made since a death: it was not this request's fault
FEW = 4  # suspects: a death of a group costs more than their time
GUILTY_KEPT = 64
GUILTY_FOR_S = 600.0
GUILTY = "The {role} ended each time it served this request, the last time alone; the request is given up."

Group = tuple[str, list[Pending]]  # whose death, and who is suspected of it


class Quarantine:
    """Which suspects run while all others wait."""

    def __init__(self) -> None:
        self.alone: list[Pending] = []  # unproven; empty: everybody may run
        self.cleared = False  # nothing of the others is in the ring any more: those may be sent
        self._role = ""  # whose death those are suspected of
        self._running: list[Pending] = []  # of the same group, proven ones too
        self._groups: deque[Group] = deque()
        self._guilty: OrderedDict[bytes, float] = OrderedDict()  # digest → when it was found guilty

    def died(self, role: str, lost: Collection[Pending]) -> Pending | None:
        """A service has died with these. Returns the request that is to blame, where that is known."""
        present = [entry for entry in lost if entry.in_ring]
        for entry in present:
            deaths = entry.deaths.setdefault(role, Deaths())
            deaths.count = 1 if len(entry.delivered) >= deaths.proof_bytes else deaths.count + 1
            deaths.proof_bytes = len(entry.delivered) + PROOF_TOKENS * ID_BYTES
        suspects = [entry for entry in present if entry.deaths[role].count >= SUSPICIOUS_DEATHS]
        ran, self.cleared = self.cleared, False
        if not (self.alone and ran and role == self._role):
            fresh = [entry for entry in suspects if not entry.delivered]
            older = [entry for entry in suspects if entry.delivered]
            groups = [(role, group) for group in [*grouped(fresh), *grouped(older)]]
            if groups and self.alone:  # who runs alone ends another service as well, and would for ever
                groups.append((self._role, self.alone))
                self._groups.extendleft(reversed(groups))
                self.alone = []
            else:
                self._groups.extend(groups)
            return None
        self.alone, self._running = [], []
        if len(present) == 1:
            return present[0]
        self._groups.extendleft((role, [entry]) for entry in reversed(suspects))
        return None

    def admits(self, entry: Pending) -> bool:
        """Whether the entry may be sent now."""
        return not self.alone or (self.cleared and entry in self.alone)

    def hears(self, entry: Pending, ended: bool) -> bool:
        """Something came for the entry: whether that was the last that its group had to prove."""
        if entry not in self.alone:
            return False
        if ended or len(entry.delivered) >= entry.deaths[self._role].proof_bytes:
            self.alone.remove(entry)
        return not self.alone

    def advance(self, unfinished: Iterable[Pending]) -> list[Pending]:
        """With nobody alone, choose the next group; returns who still runs of the last one and has to wait again."""
        there = set(unfinished)
        while self._groups and not self.alone:
            self.cleared = False
            self._role, group = self._groups.popleft()
            self.alone = [entry for entry in group if entry in there and not entry.unwanted]
        if not self.alone:
            self._running = []
            return []
        before, self._running = self._running, list(self.alone)
        waiting = there.difference(self.alone)
        return [entry for entry in before if entry in waiting and entry.in_ring and not entry.unwanted]

    def condemn(self, generate: Generate, now: float) -> None:
        """Accept nothing like it for a while."""
        self._guilty[digest(generate)] = now
        while len(self._guilty) > GUILTY_KEPT:
            self._guilty.popitem(last=False)

    def condemned(self, generate: Generate, now: float) -> bool:
        """Whether its like was found guilty lately."""
        while self._guilty and next(iter(self._guilty.values())) < now - GUILTY_FOR_S:
            self._guilty.popitem(last=False)
        return bool(self._guilty) and digest(generate) in self._guilty


def grouped(suspects: list[Pending]) -> list[list[Pending]]:
    """As many groups as a group has members, nearly; few suspects are groups of one."""
    size = 1 if len(suspects) <= FEW else math.isqrt(len(suspects) - 1) + 1
    return [suspects[start : start + size] for start in range(0, len(suspects), size)]
