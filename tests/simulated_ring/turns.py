"""Whose turn it is: actors drawn at random, on a virtual clock. Some are slow for a while, and others quick."""

from collections.abc import Callable, Sequence
from random import Random

from tests.simulated_ring.clock import Agenda
from tests.simulated_ring.faults import Fault

TURN_S = 0.0005  # the mean time of a turn
MOST_TURNS = 250_000  # a command with 10,000 texts, encoded one a step, takes about 60,000
LOOK_EVERY = 24  # turns in which nothing happened
WEIGHTS = (1, 1, 4, 4, 16)  # how often it is an actor's turn


class Turns:
    """Of all actors of a run."""

    def __init__(
        self, actors: Sequence[Callable[[], bool]], agenda: Agenda, random: Random, at_rest: Callable[[], bool]
    ) -> None:
        """An actor does one thing, and returns whether there was any. `at_rest`: none has, before something is due."""
        self.taken = 0
        self._actors, self._agenda, self._random, self._at_rest = actors, agenda, random, at_rest
        self._weights: list[int] = []  # cumulative

    def shuffle(self) -> None:
        """Some are slow now and others quick."""
        weights = [self._random.choice(WEIGHTS) for _ in self._actors]
        self._weights = [sum(weights[: i + 1]) for i in range(len(weights))]

    def level(self) -> None:
        """All are as quick from now on."""
        self._weights = list(range(1, len(self._actors) + 1))

    def run_until(self, done: Callable[[], bool]) -> None:
        """When nothing can happen, time goes on to what is due next. Returns when nothing is due either."""
        idle, random, agenda = 0, self._random, self._agenda
        while not done():
            self.taken += 1
            if self.taken > MOST_TURNS:
                raise Fault(f"the ring does not come to rest in {MOST_TURNS} turns")
            agenda.now += random.random() * 2 * TURN_S
            agenda.run_due()
            (actor,) = random.choices(self._actors, cum_weights=self._weights)
            idle = 0 if actor() else idle + 1
            if idle and idle % LOOK_EVERY == 0 and self._at_rest():
                if not agenda:
                    return
                agenda.skip_to_next()

    def run_for(self, seconds: float) -> None:
        end = self._agenda.now + seconds
        self.run_until(lambda: self._agenda.now > end)
