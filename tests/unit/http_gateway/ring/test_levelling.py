"""A scheduler that serves something else than all must is given what the others have."""

import asyncio

import pytest

from quartet.http_gateway.ring import levelling
from quartet.http_gateway.ring.levelling import Leveller
from quartet.http_gateway.ring.schedulers import Schedulers
from quartet.runtime.adapters import LoadAdapter, UnloadAdapter
from quartet.runtime.control import COMMAND_LOST, ControlCommand, UpdateWeightsFromDisk
from quartet.runtime.errors import Kind, RequestError
from quartet.runtime.messages import Facts, Message, Reply
from tests.unit.http_gateway.ring.test_schedulers import ADAPTER, facts


def says(schedulers: Schedulers, told: Facts) -> Reply:
    """A scheduler says what it serves, and answers a command of the leveller."""
    schedulers.note_facts(told, told)
    return Reply(id="c", rank=told.rank)


def test_an_adapter_is_unloaded_behind_the_requests_that_name_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(levelling, "LOOK_AFTER_S", 0.0)
    users = {"a"}

    async def scenario() -> list[str]:
        schedulers, given, done = Schedulers(2), list[str](), asyncio.Event()

        async def run(command: ControlCommand, timeout_s: float, rank: int) -> Message:
            assert isinstance(command, UnloadAdapter) and rank == 1 and not users
            given.append(command.lora_name)
            done.set()
            return says(schedulers, facts(1))

        leveller = Leveller(schedulers, run, lambda rank, adapter: rank == 1 and adapter in users)
        for told in (facts(0), facts(1, adapters=[ADAPTER])):
            schedulers.note_facts(told, told)
            leveller.look_at(told.rank)
        for _ in range(10):
            await asyncio.sleep(0)
        assert not given
        users.clear()
        await done.wait()
        return given

    assert asyncio.run(asyncio.wait_for(scenario(), 60)) == ["a"]


def test_nothing_is_unloaded_that_all_must_serve_by_the_end_of_the_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(levelling, "LOOK_AFTER_S", 0.0)
    users = {"a"}

    async def scenario() -> list[str]:
        schedulers, given = Schedulers(2), list[str]()

        async def run(command: ControlCommand, timeout_s: float, rank: int) -> Message:
            given.append(command.path)
            return Reply(id=command.id, rank=rank)

        leveller = Leveller(schedulers, run, lambda rank, adapter: rank == 1 and adapter in users)
        for told in (facts(0), facts(1, adapters=[ADAPTER])):
            schedulers.note_facts(told, told)
            leveller.look_at(told.rank)
        await asyncio.sleep(0)
        schedulers.decide(LoadAdapter(lora_name="a", lora_path="/a"))
        assert not schedulers.is_behind(1)
        users.clear()
        for _ in range(10):
            await asyncio.sleep(0)
        return given

    assert asyncio.run(asyncio.wait_for(scenario(), 60)) == []


def test_a_command_that_an_earlier_one_stands_in_the_way_of_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(levelling, "LOOK_AFTER_S", 0.0)

    async def scenario(refusals: int) -> tuple[int, bool]:
        schedulers, tries = Schedulers(2), 0

        async def run(command: ControlCommand, timeout_s: float, rank: int) -> Message:
            nonlocal tries
            tries += 1
            assert isinstance(command, LoadAdapter) and rank == 1
            if tries <= refusals:
                return Reply(id=command.id, rank=1, success=False, message="it is being unloaded")
            return says(schedulers, facts(1, adapters=[ADAPTER]))

        leveller = Leveller(schedulers, run)
        for told in (facts(0, adapters=[ADAPTER]), facts(1)):
            schedulers.note_facts(told, told)
            leveller.look_at(told.rank)
        for _ in range(50):
            await asyncio.sleep(0)
        return tries, schedulers.is_behind(1)

    assert asyncio.run(scenario(2)) == (3, False)
    assert asyncio.run(scenario(9)) == (1 + levelling.MOST_TRIES, True)


def test_a_scheduler_that_could_not_be_levelled_is_looked_at_again_and_the_log_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(levelling, "LOOK_AFTER_S", 0.0)
    monkeypatch.setattr(levelling, "AGAIN_AFTER_S", 0.0)

    async def scenario(failure: Exception | None) -> None:
        schedulers, tries = Schedulers(2), 0
        caplog.clear()

        async def run(command: ControlCommand, timeout_s: float, rank: int) -> Message:
            nonlocal tries
            tries += 1
            if tries > 3 * (1 + levelling.MOST_TRIES):
                return says(schedulers, facts(1, adapters=[ADAPTER]))
            if failure is not None:
                raise failure
            return Reply(id=command.id, rank=1, success=False, message="it cannot be read")

        leveller = Leveller(schedulers, run)
        for told in (facts(0, adapters=[ADAPTER]), facts(1)):
            schedulers.note_facts(told, told)
            leveller.look_at(told.rank)
        while schedulers.is_behind(1):
            await asyncio.sleep(0)
        reason = "it cannot be read" if failure is None else levelling.NO_ANSWER
        assert [message for message in caplog.messages if "DP1" in message] == [
            levelling.BEHIND % (1, "v0", "v0"),
            levelling.CANNOT % (1, reason),
        ]

    asyncio.run(asyncio.wait_for(scenario(None), 60))
    asyncio.run(asyncio.wait_for(scenario(TimeoutError()), 60))


def test_what_is_missing_is_loaded_while_requests_use_what_is_to_be_unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(levelling, "LOOK_AFTER_S", 0.0)
    left = ADAPTER | {"name": "left", "path": "/left"}

    async def scenario() -> None:
        schedulers = Schedulers(2)

        async def run(command: ControlCommand, timeout_s: float, rank: int) -> Message:
            assert isinstance(command, LoadAdapter) and command.lora_name == "a"
            return says(schedulers, facts(1, adapters=[ADAPTER, left]))

        leveller = Leveller(schedulers, run, lambda rank, adapter: adapter == "left")
        for told in (facts(0, adapters=[ADAPTER]), facts(1, adapters=[left])):
            schedulers.note_facts(told, told)
            leveller.look_at(told.rank)
        while len(schedulers.serving()) < 2:
            await asyncio.sleep(0)

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_a_scheduler_that_is_started_again_while_it_is_levelled_is_levelled_again() -> None:
    async def scenario() -> list[str]:
        schedulers, given, restarted = Schedulers(2), list[str](), asyncio.Event()
        done = asyncio.Event()

        async def run(command: ControlCommand, timeout_s: float, rank: int) -> Message:
            assert isinstance(command, UpdateWeightsFromDisk) and rank == 1
            given.append(str(command.weight_version))
            if len(given) == 1:
                await restarted.wait()
                raise RequestError(COMMAND_LOST, Kind.UNAVAILABLE)
            done.set()
            return says(schedulers, facts(1, epoch=1))

        leveller = Leveller(schedulers, run)
        for told in (facts(0), facts(1, version="v1")):
            schedulers.note_facts(told, told)
            leveller.look_at(told.rank)
        await asyncio.sleep(0)
        again = facts(1, epoch=1, version="v1")
        schedulers.note_facts(again, again)
        leveller.look_at(1)  # under way
        restarted.set()
        await done.wait()
        await asyncio.sleep(0)
        assert not schedulers.is_behind(1)
        return given

    assert asyncio.run(asyncio.wait_for(scenario(), 60)) == ["v0", "v0"]


def test_nothing_is_given_to_a_scheduler_that_a_command_of_a_client_is_on_its_way_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(levelling, "LOOK_AFTER_S", 0.0)

    async def scenario() -> tuple[int, int]:
        schedulers, given, on_their_way = Schedulers(2), 0, {1}

        async def run(command: ControlCommand, timeout_s: float, rank: int) -> Message:
            nonlocal given
            given += 1
            return says(schedulers, facts(1, adapters=[ADAPTER]))

        leveller = Leveller(schedulers, run)
        schedulers.changes = on_their_way.__contains__
        for told in (facts(0), facts(1)):
            says(schedulers, told)
        schedulers.decide(LoadAdapter(lora_name="a", lora_path="/a"))
        says(schedulers, facts(0, adapters=[ADAPTER]))
        leveller.look_at(1)
        for _ in range(10):
            await asyncio.sleep(0)
        meanwhile = given
        on_their_way.clear()
        schedulers.on_change()  # the command has ended
        while schedulers.is_behind(1):
            await asyncio.sleep(0)
        return meanwhile, given

    assert asyncio.run(asyncio.wait_for(scenario(), 60)) == (0, 1)


def test_the_log_says_who_gets_no_requests_and_not_so_of_others(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(*told: Facts) -> list[bool]:
        schedulers = Schedulers(2)
        schedulers.note_facts(facts(0), facts(0))

        async def run(command: ControlCommand, timeout_s: float, rank: int) -> Message:
            raise RequestError(COMMAND_LOST, Kind.UNAVAILABLE)

        leveller = Leveller(schedulers, run)
        caplog.clear()
        for one in told:
            schedulers.note_facts(one, one)
            leveller.look_at(one.rank)
        await asyncio.sleep(0)
        return [f"DP{rank} serves version" in caplog.text for rank in (0, 1)]

    rewritten = [facts(rank, 1, "v0-rewritten", weight_files="new") for rank in (0, 1)]
    assert asyncio.run(scenario(facts(0), rewritten[1])) == [False, True]
    assert asyncio.run(scenario(*rewritten)) == [False, False], "they serve what all have"
    assert asyncio.run(scenario(facts(0), facts(1, adapters=[ADAPTER]))) == [False, False], "nobody names that adapter"
