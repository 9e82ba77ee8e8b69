"""A scheduler that serves something else than all must is given what the others have."""

import asyncio

from quartet.http_gateway.ring.levelling import Leveller
from quartet.http_gateway.ring.schedulers import Schedulers
from quartet.runtime.control import COMMAND_LOST, ControlCommand, UpdateWeightVersion
from quartet.runtime.errors import Kind, RequestError
from quartet.runtime.messages import Facts, Message, Reply


def facts(rank: int, epoch: int = 0, version: str = "v0") -> Facts:
    return Facts(
        rank=rank,
        epoch=epoch,
        max_total_num_tokens=100,
        max_req_input_len=90,
        context_length=100,
        vocab_size=10,
        state={"model_path": "m", "weight_version": version},
    )


def test_a_scheduler_that_is_started_again_while_it_is_levelled_is_levelled_again() -> None:
    async def scenario() -> list[str]:
        schedulers, given, restarted = Schedulers(2), list[str](), asyncio.Event()
        done = asyncio.Event()

        async def run(command: ControlCommand, timeout_s: float, rank: int) -> Message:
            assert isinstance(command, UpdateWeightVersion) and rank == 1
            given.append(command.new_version)
            if len(given) == 1:
                await restarted.wait()
                raise RequestError(COMMAND_LOST, Kind.UNAVAILABLE)
            reply = Reply(id=command.id, rank=1, body={"weight_version": command.new_version})
            schedulers.note_reply(reply)
            done.set()
            return reply

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
