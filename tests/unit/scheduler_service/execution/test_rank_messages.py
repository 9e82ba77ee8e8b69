"""What ranks tell each other arrives as it was sent."""

import socket

import torch

from quartet.kernels.cpu.attention_schedule import Ragged
from quartet.scheduler_service.core.tier_acts import (
    Act,
    CarryOut,
    Clear,
    DropFile,
    DropMemory,
    EndRead,
    Keep,
    Put,
    PutState,
    ReadFiles,
    Store,
)
from quartet.scheduler_service.execution.inputs import Inputs
from quartet.scheduler_service.execution.kv_cache import Placement
from quartet.scheduler_service.execution.rank_messages import (
    Answer,
    Channel,
    Collect,
    Commit,
    Forward,
    Message,
    Tier,
    forward_message,
    inputs_of,
    packed,
    unpacked,
)
from quartet.scheduler_service.model.state_access import Run, StateRows


def channels() -> tuple[Channel, Channel]:
    one, other = socket.socketpair()
    return Channel(one), Channel(other)


def test_messages_arrive_in_order_and_their_end_is_none() -> None:
    near, far = channels()
    sent: list[Message] = [Collect(["a", "b"], None), Commit(), Answer([3, b"bytes"])]
    assert not far.waits(0)
    for message in sent:
        near.send(message)
    assert far.waits(0)
    assert [far.receive() for _ in sent] == sent
    near.connection.close()
    assert far.receive() is None


def test_a_message_that_was_cut_off_is_none() -> None:
    near, far = channels()
    near.connection.sendall(bytes([200, 0, 0, 0, 0, 0, 0, 0, 1, 2]))
    near.connection.close()
    assert far.receive() is None


def test_the_inputs_of_a_step_arrive_on_another_rank() -> None:
    near, far = channels()
    inputs = Inputs(
        input_ids=torch.tensor([5, 6, 7]),
        positions=torch.tensor([0, 1, 8]),
        starts=torch.tensor([0, 2, 3]),
        offsets=[0, 2, 3],
        ragged=Ragged([2, 1], [2, 9], [[(1, 1)], [(2, 3)]], 4),
        placement=Placement(torch.tensor([4, 5, 16]), torch.tensor([1])),
        states=StateRows([1], [2], [Run(0, 2, 0, 3)], [(2, 7)]),
    )
    near.send(forward_message(inputs))
    message = far.receive()
    assert isinstance(message, Forward)
    found = inputs_of(message, 4, 8, torch.device("cpu"))
    for name in ("input_ids", "positions", "starts"):
        assert torch.equal(getattr(found, name), getattr(inputs, name)), name
    assert found.offsets == inputs.offsets and found.embeds is None and found.states == inputs.states
    assert (found.ragged.query_lengths, found.ragged.context_lengths) == ([2, 1], [2, 9])
    assert [[tuple(run) for run in runs] for runs in found.ragged.runs] == [[(1, 1)], [(2, 3)]]
    assert torch.equal(found.placement.slots, inputs.placement.slots)
    assert found.placement.begun is not None and found.placement.begun.tolist() == [1]


def test_all_that_the_tier_is_told_arrives_as_it_was_said() -> None:
    near, far = channels()
    key = bytes(range(236, 256))
    acts: list[Act] = [
        CarryOut([Store(key, [3, 1], 7, True, False, 2, 1), DropMemory(key), DropFile(key)]),
        ReadFiles(8, [key, key]),
        Put(8, [key], 1, [4]),
        PutState(8, [key], 5),
        Keep(8, key),
        EndRead(8),
        Clear(key),
    ]
    near.send(Tier([packed(act) for act in acts], True))
    message = far.receive()
    assert isinstance(message, Tier) and message.report
    assert [unpacked(*act) for act in message.acts] == acts
