"""The schedulers behind the gateway: which live, what each has to do and has cached, and which gets a request.

The gateway chooses, and not the tokenizer, which knows the ids: only the journal knows which requests a dead scheduler
had, and it sends them elsewhere; epochs, deaths and load are known here as well. So there is one place that knows
where a request is.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from quartet.http_gateway.ring.decided import RECORD, Decided, Served
from quartet.http_gateway.ring.prefix_memory import BLOCK_BYTES, PrefixMemory, PromptBlocks
from quartet.runtime import records
from quartet.runtime.control import OTHER_VERSION, ControlCommand, UpdateWeightVersion, WeightChange
from quartet.runtime.messages import SCHEDULER, Facts, Generate, title_of

log = logging.getLogger(__name__)

MOST_MORE_REQUESTS = 16  # that a scheduler may have than another, and still get those whose prefix it has cached
LONG_PREFIX_BLOCKS = 4096 // BLOCK_BYTES  # a shorter one counts only where it is half of the prompt


@dataclass(slots=True)
class SchedulerState:
    """What the gateway knows of one scheduler."""

    rank: int
    epoch: int = 0  # the last one that it has reported
    heard: bool = False  # it has said its facts
    up: bool = False
    given_away: bool = False  # it is dead, and its requests were sent elsewhere
    requests: int = 0  # unfinished ones that are its own
    sent: int = 0  # ever
    served: Served = field(default_factory=Served)
    unloaded: dict[str, str] = field(default_factory=dict)  # adapters that it keeps nevertheless: name → version
    facts: Facts | None = None
    prefixes: PrefixMemory = field(default_factory=PrefixMemory)


class Schedulers:
    """All of them, by rank."""

    def __init__(self, count: int, run_dir: str = "") -> None:
        """`run_dir`: keeps what was decided for the next gateway, where there are several."""
        self.all = [SchedulerState(rank) for rank in range(count)]
        self._prompts = PromptBlocks()
        self.on_change: Callable[[], None] = lambda: None  # a command has ended that has changed what all must serve
        self.changes: Callable[[int], bool] = lambda rank: False  # whether such a one is on its way to this rank
        self._run_dir = run_dir if count > 1 else ""
        # what all must serve; None: not yet known, or there is one
        self.decided = records.read_record(run_dir, RECORD, Decided) if self._run_dir else None
        self._complete = asyncio.Event()
        self._heard_of_one = asyncio.Event()
        self._heard_of_all = asyncio.Event()
        self._common: Facts | None = None

    @property
    def several(self) -> bool:
        return len(self.all) > 1

    def title(self, role: str, rank: int) -> str:
        """What a process of the ring is called."""
        return title_of(role, rank, len(self.all) if role == SCHEDULER else 1)

    @property
    def up(self) -> list[SchedulerState]:
        return [one for one in self.all if one.up]

    async def facts(self) -> Facts:
        """What holds for all; waits until one has said its facts."""
        await self._heard_of_one.wait()
        assert self._common is not None, "the event is set behind it"
        return self._common

    async def hear_of_all(self, timeout_s: float) -> None:
        """Return once every one has said its facts, or after this time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._heard_of_all.wait()

    @property
    def targets(self) -> list[int]:
        """The ranks that a command or a probe goes to: of those that live; where none does, of all."""
        return [one.rank for one in self.up or self.all]

    def targets_of(self, command: ControlCommand) -> list[int]:
        """The ranks that a command for all goes to.

        No new version is given to weights that were rewritten, for they would pass for those of the others. Where those
        of all were, it is for the ones that have read the same.
        """
        targets = [self.all[rank] for rank in self.targets]
        if self.decided is not None and isinstance(command, UpdateWeightVersion):
            right = [one for one in targets if not self.decided.is_rewritten(one.served)]
            targets = right or alike(targets)
        return [one.rank for one in targets]

    def conflict(self, command: ControlCommand) -> str:
        """Why a change for which all are prepared must not be made: the weights have got another version meanwhile."""
        if not (self.decided and isinstance(command, WeightChange)):
            return ""
        served, expected = self.weight_version, command.expected_version
        return "" if expected in (None, served) else OTHER_VERSION.format(expected, served)

    async def complete(self) -> None:
        """Return once all live, as commands that change something need it."""
        while self.several and len(self.up) < len(self.all):  # one may die again before this goes on
            await self._complete.wait()

    @property
    def heard_of_all(self) -> bool:
        return all(one.heard for one in self.all)

    def serving(self) -> list[SchedulerState]:
        """Those that may get requests: they live and serve what was decided, or are about to; else those to come.

        Where all serve something else, those that serve the same.
        """
        there, decided = self.up, self.decided
        right = [one for one in there if decided is None or decided.may_be_asked(one.served)]
        right = right or [one for one in there if self.changes(one.rank)]
        return right or [one for one in self.all if not one.up] or alike(self.all)

    @property
    def left_out(self) -> list[int]:
        """The ranks that live and get no requests, since they serve something else than those that do."""
        serving = self.serving()
        return [one.rank for one in self.up if one not in serving]

    @property
    def weight_version(self) -> str:
        """What requests get; where all that serve have read files that were rewritten, what these are called."""
        decided, serving = self.decided, self.serving()
        assert decided is not None, "known from the first facts on"
        rewritten = all(one.up and not self.changes(one.rank) and decided.is_rewritten(one.served) for one in serving)
        return serving[0].served.weight_version if rewritten else decided.served.weight_version

    # where requests go

    def choose(self, generate: Generate) -> int:
        """The rank for a request, which becomes that scheduler's own until `release`.

        That which the client wants, where it serves. Else the one with the longest beginning of the prompt in its
        cache, unless it has much more to do than another. Else the one that has least to do.
        """
        if not self.several:
            return 0
        serving, wanted = self.serving(), generate.request.wanted_rank
        blocks = self._prompts.of(generate)
        chosen = next((one for one in serving if one.rank == wanted), None) or best(serving, blocks)
        chosen.prefixes.add(blocks)
        chosen.requests += 1
        chosen.sent += 1
        return chosen.rank

    def choose_again(self, generate: Generate, rank: int) -> int:
        """The same for a request that this scheduler had when it ended.

        It waits for that one where it uses an adapter that was unloaded: it alone is sure to have it.
        """
        if not (self.several and self._is_unloaded(generate.request.adapter)):
            return self.choose(generate)
        self.all[rank].requests += 1
        return rank

    def _is_unloaded(self, adapter: str) -> bool:
        """Whether no new request may name an adapter; "" is the base."""
        return bool(adapter) and (self.decided is None or adapter not in self.decided.adapter_names)

    def release(self, rank: int) -> None:
        """A request of this scheduler has ended, or goes elsewhere."""
        self.all[rank].requests -= self.several

    # what is heard of them

    def note_facts(self, facts: Facts, common: Facts) -> bool:
        """A scheduler speaks; `common`: what holds for all. Returns whether it was started again."""
        one, own = self.all[facts.rank], Served.of(facts.state)
        one.unloaded = msgspec.convert(facts.state.get("unloaded_adapters", {}), dict[str, str])
        restarted = one.heard and facts.epoch > one.epoch
        if restarted:
            one.prefixes.forget()
        one.epoch, one.heard, one.up = facts.epoch, True, True
        one.facts, one.served = facts, own
        if self.several and self.decided is None:
            self._set_decided(Decided(own))
        self._common = common
        self._heard_of_one.set()
        if self.heard_of_all:
            self._heard_of_all.set()
        if len(self.up) == len(self.all):
            self._complete.set()
        return restarted

    def decide(self, command: ControlCommand, weight_files: str = "") -> bool:
        """The gateway is about to send this command to all, or the word that all make it. Whether that decides a thing.

        It is recorded first, so that the next gateway goes on with it. `weight_files`: what all have read for it.
        """
        before = self.decided
        if before is not None and isinstance(command, UpdateWeightVersion):
            named = self.all[self.targets_of(command)[0]].served
            weight_files = named.weight_files if before.is_rewritten(named) else ""
        if before is not None and (decided := before.after(command, weight_files)) != before:
            self._set_decided(decided)
        return self.decided is not before

    def _set_decided(self, decided: Decided) -> None:
        self.decided = decided
        if self._run_dir:
            try:
                records.write(self._run_dir, RECORD, decided)
            except OSError as error:
                log.error("Could not record what all schedulers serve: %s.", error)

    def note_death(self, rank: int, epoch: int) -> bool:
        """This incarnation has ended. Returns whether that is news, and another one lives."""
        one = self.all[rank]
        if not one.up or one.epoch != epoch:
            return False
        one.up = False
        self._complete.clear()
        one.given_away = bool(self.up)
        one.prefixes.forget()
        if one.given_away:
            log.error("The scheduler DP%d has ended; another one goes on with its requests.", rank)
        return one.given_away

    def is_behind(self, rank: int) -> bool:
        """Whether a scheduler serves something else than all must."""
        return self.decided is not None and self.all[rank].served != self.decided.served

    def common(self, facts: Facts) -> Facts:
        """The facts of one scheduler as they hold for all: with the sizes that every one has, and what was decided."""
        known = [facts, *(one.facts for one in self.all if one.facts is not None and one.rank != facts.rank)]
        return msgspec.structs.replace(
            facts,
            max_total_num_tokens=min(other.max_total_num_tokens for other in known),
            max_req_input_len=min(other.max_req_input_len for other in known),
            state=facts.state if self.decided is None else self._shown(*(one.state for one in known)),
        )

    def _shown(self, *states: Mapping[str, Any]) -> dict[str, Any]:
        assert self.decided is not None, "known from the first facts on"
        return {**self.decided.shown(*states), "weight_version": self.weight_version}

    def forget_prefixes(self) -> None:
        """The caches were emptied."""
        for one in self.all:
            one.prefixes.forget()


def alike(schedulers: list[SchedulerState]) -> list[SchedulerState]:
    """Those whose weights are the same as the first one's."""
    return [one for one in schedulers if one.served.weights == schedulers[0].served.weights]


def best(serving: list[SchedulerState], blocks: list[int]) -> SchedulerState:
    """The one whose cache has most of the prompt, if that is worth it; else the one that has least to do."""
    matches = {one.rank: one.prefixes.match(blocks) for one in serving}
    longest = max(serving, key=lambda one: (matches[one.rank], -one.requests))
    least = min(serving, key=lambda one: (one.requests, one.sent))
    matched = matches[longest.rank]
    counts = matched >= LONG_PREFIX_BLOCKS or (matched and 2 * matched >= len(blocks))
    return longest if counts and longest.requests <= least.requests + MOST_MORE_REQUESTS else least
