"""The schedulers behind the gateway: which live, what each has to do and has cached, and which gets a request.

The gateway chooses, and not the tokenizer, which knows the ids: only the journal knows which requests a dead scheduler
had, and it sends them elsewhere; epochs, deaths and load are known here as well. So there is one place that knows
where a request is.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from quartet.http_gateway.ring.prefix_memory import BLOCK_BYTES, PrefixMemory, PromptBlocks
from quartet.runtime import records
from quartet.runtime.messages import SCHEDULER, Facts, Generate, Message, Reply, title_of

log = logging.getLogger(__name__)

MOST_MORE_REQUESTS = 16  # that a scheduler may have than another, and still get those whose prefix it has cached
LONG_PREFIX_BLOCKS = 4096 // BLOCK_BYTES  # a shorter one counts only where it is half of the prompt

RECORD = "served.json"  # in the run directory


class Served(msgspec.Struct, frozen=True):
    """What a scheduler serves, as far as all must serve the same."""

    model_path: str = ""
    weight_version: str = ""
    adapters: frozenset[tuple[str, str, bool]] = frozenset()  # name, path, whether it is pinned

    @property
    def weights(self) -> tuple[str, str]:
        return self.model_path, self.weight_version


@dataclass(slots=True)
class SchedulerState:
    """What the gateway knows of one scheduler."""

    rank: int
    epoch: int = 0  # the last one that it has reported
    heard: bool = False  # it has said its facts
    up: bool = False
    given_away: bool = False  # it is dead, and its requests were sent elsewhere
    held: bool = False  # it came back while the others change their weights: what it must serve is not known yet
    levelled: bool = False  # it is being given the weights of the others
    requests: int = 0  # unfinished ones that are its own
    sent: int = 0  # ever
    served: Served = field(default_factory=Served)
    unloaded: dict[str, str] = field(default_factory=dict)  # adapters that it keeps nevertheless: name → version
    facts: Facts | None = None
    prefixes: PrefixMemory = field(default_factory=PrefixMemory)


class Schedulers:
    """All of them, by rank."""

    def __init__(self, count: int, run_dir: str = "") -> None:
        """`run_dir`: keeps what all must serve for the next gateway, where there are several."""
        self.all = [SchedulerState(rank) for rank in range(count)]
        self._prompts = PromptBlocks()
        self.on_change: Callable[[], None] = lambda: None  # what all must serve has changed
        self._changes = 0  # of weights, that are decided and not finished
        self._run_dir = run_dir if count > 1 else ""
        # what all must serve; None: not yet known
        self.reference = records.read_record(run_dir, RECORD, Served) if self._run_dir else None
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

    async def complete(self) -> None:
        """Return once all live, as commands that change something need it."""
        if self.several:
            await self._complete.wait()

    @property
    def heard_of_all(self) -> bool:
        return all(one.heard for one in self.all)

    def serving(self) -> list[SchedulerState]:
        """Those that may get requests: they live and serve the weights of all; else those that will be back."""
        right = [one for one in self.all if one.up and not one.held and one.served == self.reference]
        return right or [one for one in self.all if not one.up] or self.all

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
        served = self.reference.adapters if self.reference else frozenset()
        return bool(adapter) and all(name != adapter for name, _, _ in served)

    def release(self, rank: int) -> None:
        """A request of this scheduler has ended, or goes elsewhere."""
        self.all[rank].requests -= self.several

    # what is heard of them

    def note_facts(self, facts: Facts, common: Facts) -> bool:
        """A scheduler speaks; `common`: what holds for all. Returns whether it was started again."""
        one = self.all[facts.rank]
        one.unloaded = msgspec.convert(facts.state.get("unloaded_adapters", {}), dict[str, str])
        restarted = one.heard and facts.epoch > one.epoch
        if restarted:
            one.prefixes.forget()
            one.held = self.changing
        if one.heard and not restarted:
            self._serves(one, served(facts.state, one.served))
        one.epoch, one.heard, one.up = facts.epoch, True, True
        one.facts, one.served = facts, served(facts.state, Served())
        if self.several and self.reference is None:
            self._set_reference(one.served)
        self._common = common
        self._heard_of_one.set()
        if self.heard_of_all:
            self._heard_of_all.set()
        if len(self.up) == len(self.all):
            self._complete.set()
        return restarted

    def note_reply(self, reply: Reply) -> None:
        """A reply may say what its scheduler serves now.

        It may come before the scheduler's facts, to a command of the gateway before: what it does not say is as it was.
        """
        body = (reply.success and reply.body) or {}
        if not 0 <= reply.rank < len(self.all):  # of no scheduler: it ends a message that could not be handled
            return
        one = self.all[reply.rank]
        if not one.heard and self.reference is not None:
            one.served = self.reference
        if one.heard or self.reference is not None:
            self._serves(one, served(body, one.served))

    def note_adapter(self, name: str, *answers: Message) -> None:
        """A command for all has loaded or unloaded this adapter: all must serve what the answers say of it.

        A scheduler that was being given what the others serve meanwhile does not speak for all by itself.
        """
        if not self.several or self.reference is None:
            return
        said = [answer.body for answer in answers if isinstance(answer, Reply) and answer.body]
        now = served(said[-1] if said else {}, self.reference).adapters
        others = frozenset(one for one in self.reference.adapters if one[0] != name)
        adapters = others | frozenset(one for one in now if one[0] == name)
        if adapters != self.reference.adapters:
            self._set_reference(msgspec.structs.replace(self.reference, adapters=adapters))

    def _serves(self, one: SchedulerState, now: Served) -> None:
        """A scheduler that lives changes what it serves as we say, so that all must serve it from now on.

        Of what it has not changed, all must serve what they must: it may be behind, and not be given that yet.
        """
        before, one.served = one.served, now
        if now == before or not self.several or one.levelled:
            return
        reference = now if self.reference is None else changed(self.reference, before, now)
        if reference != self.reference:
            self._set_reference(reference)

    def _set_reference(self, reference: Served) -> None:
        self.reference = reference
        if self._run_dir:
            try:
                records.write(self._run_dir, RECORD, reference)
            except OSError as error:
                log.error("Could not record what all schedulers serve: %s.", error)
        self.on_change()

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

    def begin_change(self) -> None:
        """All that live are about to change their weights."""
        self._changes += 1

    @property
    def changing(self) -> bool:
        """Whether such a change is not finished."""
        return self._changes > 0

    def end_change(self) -> None:
        """They have."""
        self._changes -= 1
        if not self._changes:
            for one in self.all:
                one.held = False
            self.on_change()

    def is_behind(self, rank: int) -> bool:
        """Whether a scheduler serves something else than all must."""
        return self.several and self.reference not in (None, self.all[rank].served)

    def speaks_for_all(self, rank: int) -> bool:
        """Whether what it says of weights and adapters holds for all: it is not being given those of the others."""
        return not (0 <= rank < len(self.all) and self.all[rank].levelled)

    def common(self, facts: Facts) -> Facts:
        """The facts of one scheduler, with the sizes that every one has."""
        known = [facts, *(one.facts for one in self.all if one.facts is not None and one.rank != facts.rank)]
        return msgspec.structs.replace(
            facts,
            max_total_num_tokens=min(other.max_total_num_tokens for other in known),
            max_req_input_len=min(other.max_req_input_len for other in known),
            state={} if self._would_be_behind(facts) else facts.state,
        )

    def _would_be_behind(self, facts: Facts) -> bool:
        """Whether these facts tell what one scheduler serves and all do not, and it has not just changed that."""
        one, says = self.all[facts.rank], served(facts.state, Served())
        changed = one.heard and facts.epoch == one.epoch and says != one.served and not one.levelled
        return self.several and not changed and self.reference not in (None, says)

    def forget_prefixes(self) -> None:
        """The caches were emptied."""
        for one in self.all:
            one.prefixes.forget()


def best(serving: list[SchedulerState], blocks: list[int]) -> SchedulerState:
    """The one whose cache has most of the prompt, if that is worth it; else the one that has least to do."""
    matches = {one.rank: one.prefixes.match(blocks) for one in serving}
    longest = max(serving, key=lambda one: (matches[one.rank], -one.requests))
    least = min(serving, key=lambda one: (one.requests, one.sent))
    matched = matches[longest.rank]
    counts = matched >= LONG_PREFIX_BLOCKS or (matched and 2 * matched >= len(blocks))
    return longest if counts and longest.requests <= least.requests + MOST_MORE_REQUESTS else least


def changed(reference: Served, before: Served, now: Served) -> Served:
    """The reference with what one scheduler has changed."""
    weights = reference if before.weights == now.weights else now
    added, removed = now.adapters - before.adapters, before.adapters - now.adapters
    names = {name for name, _, _ in added}
    kept = frozenset(adapter for adapter in reference.adapters - removed if adapter[0] not in names)
    return Served(weights.model_path, weights.weight_version, kept | added)


def served(said: dict[str, Any], before: Served) -> Served:
    """What a scheduler serves, by its facts or a reply; what those do not say is as before."""
    adapters = said.get("adapters")
    return Served(
        str(said.get("model_path", before.model_path)),
        str(said.get("weight_version", before.weight_version)),
        before.adapters
        if adapters is None
        else frozenset((one["name"], one["path"], one["pinned"]) for one in adapters),
    )
