"""The tiles of steps on buffers that stay in place."""

import torch

from quartet.scheduler_service.execution.adapter_tiles import TileBuffer, runs_of, uploaded

CPU = torch.device("cpu")


def test_slices_behind_the_decode_rows_are_found_where_the_buffer_has_them():
    assert runs_of([2, -1, 0], [0, 1, 2, 9], decodes=2, shift=6) == [(2, 0, 1), (0, 8, 15)]


def test_a_buffer_has_what_a_step_of_its_own_has_and_tiles_without_tokens():
    runs, ranks = runs_of([1, -1, 0, 1], range(5)), [4, 7]
    buffer = TileBuffer(6, 2, CPU)
    buffer.send(5, runs, ranks)
    for step in (uploaded(5, runs, ranks, CPU), buffer.of(5)):
        assert step.tiles.tolist() == [[0, 0, 1, 4], [1, 1, 2, 7]]
        assert step.order.tolist()[:3] == [2, 0, 3]
        assert step.owners.tolist() == [1, -1, 0, 1, -1] and step.ranks.tolist() == [4, 7]


def test_nothing_of_an_earlier_step_remains_where_a_smaller_one_looks():
    buffer = TileBuffer(40, 2, CPU)
    buffer.send(40, [(0, 0, 20), (1, 20, 40)], [4, 4])
    buffer.send(2, [(1, 0, 1)], [4, 4])
    assert buffer.of(2).tiles.tolist() == [[1, 0, 1, 4], [0, 0, 0, 0]]
    buffer.send(2, [(1, 0, 1)], [4, 9])
    assert buffer.of(2).tiles.tolist()[0] == [1, 0, 1, 9], "another adapter is in the slot"
    buffer.clear()
    assert not buffer.numbers.any()


def test_what_is_there_already_is_not_sent_again(monkeypatch):
    buffer, sent = TileBuffer(4, 1, CPU), []
    module = "quartet.scheduler_service.execution.adapter_tiles.upload"
    monkeypatch.setattr(module, lambda values, device, dtype: sent.append(values) or torch.tensor(values, dtype=dtype))
    for _ in range(3):
        buffer.send(4, [(0, 1, 3)], [8])
    assert len(sent) == 1
