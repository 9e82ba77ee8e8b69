import random
from array import array

import pytest

from quartet.runtime.messages import Request
from quartet.runtime.sampling import SamplingParams
from quartet.scheduler_service.core.plan import Plan, Result
from quartet.scheduler_service.core.planner import Planner
from quartet.scheduler_service.core.queue import WaitingQueue
from quartet.scheduler_service.core.request import Sequence
from tests.fakes import FakeWorker
from tests.stepper import config, tokenized

ADAPTERS = ["a", "b", "c", "d"]
REQUESTS = 10_000
POOL_PAGES = 24


def sequence(priority: int = 0, again: bool = False) -> Sequence:
    request = Request(rid="a", params=SamplingParams(), extra_key="key", again=again)
    return Sequence(request=request, ids=array("i", [1]), prompt_len=1, priority=priority)


def queue_of(*waiting: Sequence, by_priority: bool = True, max_queued: int | None = 2) -> WaitingQueue:
    queue = WaitingQueue(max_queued, by_priority)
    for item in waiting:
        queue.number(item)
        queue.put(item)
    return queue


@pytest.mark.parametrize(("max_queued", "free_slots"), [(3, 0), (2, 1), (None, 0)])
def test_below_the_limit_no_request_must_end(max_queued: int | None, free_slots: int) -> None:
    queue = queue_of(sequence(), sequence(), max_queued=max_queued)
    assert queue.overflow(sequence(), free_slots) is None


def test_above_the_limit_the_newest_of_the_lowest_priority_ends() -> None:
    first, second = sequence(priority=1), sequence(priority=1)
    assert queue_of(sequence(priority=5), first, second).overflow(sequence(priority=2), 0) is second


@pytest.mark.parametrize("policy_has_priorities", [True, False])
def test_a_newcomer_of_no_higher_priority_ends_itself(policy_has_priorities: bool) -> None:
    newcomer = sequence(priority=1)
    waiting = [sequence(priority=1 if policy_has_priorities else 0) for _ in range(2)]
    assert queue_of(*waiting, by_priority=policy_has_priorities).overflow(newcomer, 0) is newcomer


def test_a_request_that_was_admitted_before_is_not_displaced() -> None:
    newcomer = sequence(priority=9)
    assert queue_of(sequence(again=True), sequence(priority=1)).overflow(newcomer, 0) is newcomer


def test_invalidating_prefixes_moves_waiting_and_later_requests_to_a_new_namespace() -> None:
    waiting, later = sequence(), sequence()
    queue = queue_of(waiting)
    before = waiting.namespace
    queue.invalidate_prefixes()
    queue.put(later)
    assert waiting.namespace == later.namespace != before


class Owners(FakeWorker):
    """Notes which version of which adapter has computed the keys and values of each place of the pool.

    What a request begins with must be of the version that its adapter has then.
    """

    def __init__(self, page_size: int, pages: int) -> None:
        super().__init__(page_size, pages)
        self.versions = {"": "", **{name: str(number) for number, name in enumerate(ADAPTERS)}}
        self.owner: dict[int, str] = {}
        self.retractions: dict[str, int] = {}  # by rid, when it last began
        self.cached_tokens = 0

    def launch(self, plan: Plan) -> list[Result]:
        for part in plan.slices:
            sequence, version = part.sequence, self.versions[part.sequence.request.adapter]
            cells = [self._cell(sequence, position) for position in range(part.end)]
            if self.retractions.get(sequence.rid) != sequence.retractions:
                self.retractions[sequence.rid] = sequence.retractions
                found = {self.owner[cell] for cell in cells[: part.start]}
                assert found <= {version}, (sequence.rid, sequence.request.adapter, version, found)
                self.cached_tokens += part.start
            self.owner.update(dict.fromkeys(cells[part.start :], version))
        return super().launch(plan)


def test_ten_thousand_requests_begin_with_nothing_of_another_adapter_or_version() -> None:
    planner, owners = (
        Planner(config(page_size=4, total_pages=POOL_PAGES, chunked_prefill_size=16)),
        Owners(4, POOL_PAGES),
    )
    planner.growth.START = 0.0  # no output is expected, so that requests have to be retracted
    planner.growth.reset()
    dice, stems = random.Random(0), [[7] * 12, [7] * 8 + [8] * 8, [9] * 5]

    def step() -> None:
        if plan := planner.next(0.0):
            planner.apply(plan, owners.collect(owners.launch(plan)), 0.0)
        for sequence in planner.released:
            owners.forget(sequence)
        planner.released.clear()

    for number in range(REQUESTS):
        if number % 40 == 0:  # under the requests that use it
            owners.versions = {**owners.versions, dice.choice(ADAPTERS): str(number + len(ADAPTERS))}
            planner.waiting.set_adapter_versions(owners.versions)
        message = tokenized(f"r{number}", [*dice.choice(stems), dice.randrange(2, 6)], dice.randint(1, 8))
        message.request.adapter = dice.choice(["", *ADAPTERS])
        planner.add(message, 0.0, None)
        while len(planner.live) > 7:
            step()
    while not planner.idle:
        step()
    assert planner.audit() == ""
    assert owners.cached_tokens > REQUESTS and sum(owners.retractions.values()) > 10
