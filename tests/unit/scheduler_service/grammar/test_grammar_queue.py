"""Requests that wait for their grammar: queued when it is there, ended when it is refused or they are aborted."""

from typing import Any

import pytest

from quartet.runtime.control import Abort
from quartet.runtime.errors import RequestError
from quartet.runtime.messages import ABORTED_IN_QUEUE, Request, Tokenized, Tokens, pack_ids
from quartet.runtime.sampling import SamplingParams
from quartet.scheduler_service.scheduler import GRAMMAR_POLL_S
from tests.rig import PROMPT, Rig


class FakeMatcher:
    def __init__(self, finished: bool) -> None:
        self.finished = finished


class FakeGrammar:
    """Allows the output 7, 8 and nothing behind it."""

    def matcher(self, output_ids: Any = ()) -> FakeMatcher:
        if list(output_ids) not in ([], [7], [7, 8]):
            raise RequestError("the tokens generated so far do not follow the grammar")
        return FakeMatcher(len(output_ids) == 2)


class FakePool:
    """Decides when the test says so."""

    def __init__(self) -> None:
        self.submitted: dict[str, tuple[str, str]] = {}
        self.cancelled: list[str] = []
        self.outcomes: list[tuple[str, Any]] = []

    def submit(self, rid: str, kind: str, text: str, call: str = "") -> None:
        self.submitted[rid] = kind, text

    def cancel(self, rid: str) -> None:
        self.cancelled.append(rid)

    def ready(self) -> list[tuple[str, Any]]:
        outcomes, self.outcomes = self.outcomes, []
        return outcomes


def request(rid: str = "r", attempt: int = 0, resume_ids: tuple[int, ...] = (), **params: Any) -> Tokenized:
    made = Request(
        rid=rid,
        params=SamplingParams(regex="a+", max_new_tokens=3, **params),
        attempt=attempt,
        resume_ids=pack_ids(resume_ids),
    )
    return Tokenized(request=made, prompt_ids=pack_ids(PROMPT))


@pytest.fixture
def pool() -> FakePool:
    return FakePool()


@pytest.fixture
def rig(pool: FakePool) -> Rig:
    return Rig(grammars=pool)


def last(rig: Rig, rid: str = "r") -> Tokens:
    return rig.tokens(rid)[-1]


def test_a_constrained_request_is_queued_when_its_grammar_is_there(rig: Rig, pool: FakePool) -> None:
    rig.inbox.put(request())
    rig.scheduler.step()
    assert pool.submitted == {"r": ("regex", "a+")}
    assert rig.scheduler.planner.idle and rig.tokens("r") == []
    assert rig.scheduler.counters()["num_grammar_queue_reqs"] == 1
    grammar = FakeGrammar()
    pool.outcomes.append(("r", grammar))
    rig.scheduler.step()
    [plan] = rig.worker.plans
    assert plan.slices[0].sequence.grammar is grammar
    rig.run()
    assert last(rig).finish is not None


def test_others_do_not_wait_for_it(rig: Rig) -> None:
    rig.inbox.put(request())
    free = Request(rid="free", params=SamplingParams(max_new_tokens=2))
    rig.inbox.put(Tokenized(request=free, prompt_ids=pack_ids(PROMPT)))
    rig.run()
    assert last(rig, "free").finish is not None


def test_a_scheduler_that_waits_for_a_grammar_only_looks_after_it_often(rig: Rig) -> None:
    rig.inbox.put(request())
    rig.scheduler.step()
    rig.scheduler.step()
    assert rig.inbox.waits[-1] == GRAMMAR_POLL_S


def test_a_refused_grammar_ends_the_request_before_it_is_queued(rig: Rig, pool: FakePool) -> None:
    rig.inbox.put(request())
    pool.outcomes.append(("r", RequestError("Failed to compile", field="regex")))
    rig.scheduler.step()
    [tokens] = rig.tokens("r")
    assert tokens.finish is not None and (tokens.finish.status, tokens.finish.message) == (400, "Failed to compile")
    assert rig.worker.plans == [] and rig.scheduler.requests == []


def test_without_a_pool_it_is_refused() -> None:
    rig = Rig()
    rig.inbox.put(request())
    rig.scheduler.step()
    assert (finish := last(rig).finish) is not None and finish.status == 400


def test_an_abort_reaches_a_request_that_waits_for_its_grammar(rig: Rig, pool: FakePool) -> None:
    rig.inbox.put(request())
    rig.inbox.put(Abort(abort_all=True))
    rig.scheduler.step()
    assert pool.cancelled == ["r"] and rig.scheduler.requests == []
    assert (finish := last(rig).finish) is not None and (finish.reason, finish.message) == ("abort", ABORTED_IN_QUEUE)


def test_a_later_attempt_takes_the_place_of_an_earlier_one(rig: Rig, pool: FakePool) -> None:
    rig.inbox.put(request(attempt=1), request(attempt=0), request(attempt=2))
    rig.scheduler.step()
    assert pool.cancelled == ["r"]
    pool.outcomes.append(("r", FakeGrammar()))
    rig.run()
    assert {tokens.attempt for tokens in rig.tokens("r")} == {2}


def test_a_resumed_request_must_follow_its_grammar(rig: Rig, pool: FakePool) -> None:
    rig.inbox.put(request(resume_ids=(9,)))
    pool.outcomes.append(("r", FakeGrammar()))
    rig.scheduler.step()
    assert (finish := last(rig).finish) is not None and "do not follow" in finish.message


def test_a_resumed_request_that_was_complete_ends_at_once(rig: Rig, pool: FakePool) -> None:
    rig.inbox.put(request(resume_ids=(7, 8)))
    pool.outcomes.append(("r", FakeGrammar()))
    rig.scheduler.step()
    assert (finish := last(rig).finish) is not None and finish.reason == "stop"
    assert rig.worker.plans == []


def test_a_request_that_cannot_be_served_is_refused_though_its_grammar_is_good(rig: Rig, pool: FakePool) -> None:
    message = request()
    message.prompt_ids = pack_ids([1] * 100_000)
    rig.inbox.put(message)
    pool.outcomes.append(("r", FakeGrammar()))
    rig.scheduler.step()
    assert (finish := last(rig).finish) is not None and finish.status == 400
