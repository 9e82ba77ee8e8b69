"""Unloaded adapters are kept by schedulers until the journal has no request that may come again with them."""

from typing import Any

import pytest

from quartet.http_gateway.ring.quarantine import PROOF_TOKENS
from quartet.runtime.adapters import ForgetAdapter
from quartet.runtime.messages import Facts, Finish, Generate, Request, Restarted
from quartet.runtime.sampling import SamplingParams
from tests.unit.http_gateway.harness import asynchronous, step
from tests.unit.http_gateway.ring.test_recovery import Ring, connected, facts
from tests.unit.http_gateway.ring.test_schedulers import facts as facts_of
from tests.unit.http_gateway.ring.test_several_schedulers import Fleet, fleet

STOP = Finish(reason="stop", matched=2)


def asked(rid: str, adapter: str = "a", rank: int | None = None) -> Generate:
    return Generate(request=Request(rid=rid, params=SamplingParams(), adapter=adapter, wanted_rank=rank), text=rid)


def keeps(rank: int = 0, epoch: int = 0, **unloaded: str) -> Facts:
    """A scheduler's word that it keeps these unloaded adapters, by version."""
    said = facts_of(rank, epoch)
    said.state |= {"adapters": [], "unloaded_adapters": unloaded}
    return said


def forgotten(ring: Ring | Fleet) -> list[tuple[str, str, int]]:
    """Name, version and scheduler of the adapters that are to be forgotten; what was sent before is dropped."""
    sent: list[Any] = ring.transport.sent
    found = [(one.lora_name, one.version, one.rank) for one in sent if isinstance(one, ForgetAdapter)]
    ring.transport.sent.clear()
    return found


@asynchronous
async def test_an_unloaded_adapter_is_forgotten_when_the_last_request_that_names_it_has_ended() -> None:
    async with connected() as ring:
        ring.client.open([asked("x"), asked("y"), asked("z", "b")])
        ring.transport.push(keeps(a="1", c="2"))
        await ring.settle()
        assert forgotten(ring) == [("c", "2", 0)]
        for rid, expected in (("x", []), ("z", []), ("y", [("a", "1", 0)])):
            ring.transport.push(keeps(a="1"), step(rid, [5], "e", finish=STOP))
            await ring.settle()
            assert forgotten(ring) == expected, rid
        ring.transport.push(keeps())
        await ring.settle()
        assert forgotten(ring) == []


@asynchronous
async def test_the_end_of_a_request_says_nothing_of_adapters_that_it_does_not_name() -> None:
    async with connected() as ring:
        ring.client.open([asked("x"), asked("y")])
        ring.transport.push(keeps(a="1", c="2"))
        await ring.settle()
        assert forgotten(ring) == [("c", "2", 0)]
        ring.transport.push(step("x", [5], "e", finish=STOP))
        await ring.settle()
        assert forgotten(ring) == []
        ring.transport.push(step("y", [5], "e", finish=STOP))
        await ring.settle()
        assert forgotten(ring) == [("a", "1", 0)]


@asynchronous
async def test_an_adapter_stays_for_a_request_that_is_held_back_while_suspects_run() -> None:
    async with connected() as ring:
        ring.client.open([asked("slow", "")])
        await ring.restart("scheduler")
        ring.client.open([asked("held")])
        ring.transport.push(step("held", [5] * PROOF_TOKENS, "e" * PROOF_TOKENS, attempt=1))
        await ring.restart("scheduler")
        assert "held" not in ring.rids and ring.client._quarantine.unproven
        ring.transport.push(keeps(epoch=ring.epoch, a="1"))
        await ring.settle()
        assert forgotten(ring) == []
        ring.transport.push(step("slow", attempt=2, finish=STOP))
        await ring.settle()
        [again] = [message.request for message in ring.transport.sent if isinstance(message, Generate)]
        assert (again.rid, again.again, len(again.resume_ids)) == ("held", True, 4 * PROOF_TOKENS)
        assert forgotten(ring) == []
        ring.transport.push(step("held", [5], "e", attempt=again.attempt, finish=STOP))
        await ring.settle()
        assert forgotten(ring) == [("a", "1", 0)]


@asynchronous
async def test_a_scheduler_keeps_an_adapter_for_a_request_of_another_one() -> None:
    async with fleet() as ring:
        ring.client.open([asked("x", rank=1)])
        await ring.say(keeps(0, a="1"), keeps(1, a="7"))
        assert forgotten(ring) == []
        await ring.say(step("x", [5], "e", finish=STOP))
        assert forgotten(ring) == [("a", "1", 0), ("a", "7", 1)]


@pytest.mark.parametrize("role", ["tokenizer", "detokenizer"])
@asynchronous
async def test_what_was_lost_with_a_service_is_said_again(role: str) -> None:
    async with connected() as ring:
        await ring.restart(role)
        assert any(isinstance(message, Restarted) for message in ring.transport.sent), "asks for the facts"
        ring.transport.push(keeps(a="1"))
        await ring.settle()
        assert forgotten(ring) == [("a", "1", 0)]


@asynchronous
async def test_a_restarted_scheduler_keeps_an_adapter_for_the_requests_that_it_gets_again() -> None:
    async with connected() as ring:
        ring.client.open([asked("x")])
        ring.transport.sent.clear()
        ring.transport.push(keeps(epoch=1, a="1"))
        await ring.settle()
        assert ring.rids == ["x"] and forgotten(ring) == []
        ring.transport.push(step("x", [5], "e", attempt=1, finish=STOP))
        await ring.settle()
        assert forgotten(ring) == [("a", "1", 0)]


@asynchronous
async def test_facts_with_no_names_of_adapters_are_counted_as_failed_and_forget_nothing() -> None:
    async with connected() as ring:
        ring.transport.push(facts(0, unloaded_adapters=["a"]))
        await ring.settle()
        assert ring.client.guard.failed == 1 and forgotten(ring) == []
