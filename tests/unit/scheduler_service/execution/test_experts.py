"""The recorder of chosen experts: what it keeps, what it forgets, what it writes, and the commands for it."""

import contextlib
import csv
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from quartet.kernels.cpu.attention_schedule import Ragged
from quartet.runtime.control import (
    DumpExpertDistributionRecord,
    StartExpertDistributionRecord,
    StopExpertDistributionRecord,
)
from quartet.runtime.errors import CommandRefused, StartupError
from quartet.runtime.messages import Reply
from quartet.scheduler_service.control.experts import DUMPED, OFF, STARTED, STOPPED
from quartet.scheduler_service.execution.experts import Chosen, ExpertRecorder, expert_shape, make_recorder
from quartet.scheduler_service.execution.inputs import Inputs
from quartet.scheduler_service.execution.kv_cache import Placement
from quartet.scheduler_service.model.batch import ExpertShape
from tests.configs import resolved
from tests.rig import PROMPT, Rig
from tests.stepper import tokenized

SHAPE = ExpertShape(layers=3, experts=4, top_k=2)
CHOICES = {0: [[0, 1], [2, 0]], 2: [[3, 0], [3, 2]]}  # layer → (tokens, top_k); layer 1 is dense
COUNTS = [[2, 1, 1, 0], [0, 0, 0, 0], [1, 0, 1, 2]]


def chosen() -> Chosen:
    made = Chosen(SHAPE)
    for layer, ids in CHOICES.items():
        made(layer, torch.tensor(ids))
    return made


def inputs(*lengths: int) -> Inputs:
    """A pass over this many tokens of each sequence, with ids 10, 11, …"""
    tokens = sum(lengths)
    offsets = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    return Inputs(
        input_ids=torch.arange(10, 10 + tokens),
        positions=torch.arange(tokens),
        starts=torch.tensor(offsets),
        offsets=offsets,
        ragged=Ragged(list(lengths), list(lengths), [[] for _ in lengths], 1),
        placement=Placement(torch.arange(tokens)),
    )


def recorder(directory: Path, mode: str = "stat", buffer_size: int = 1000) -> ExpertRecorder:
    made = ExpertRecorder(mode, SHAPE, directory, buffer_size)
    made.start()
    return made


def dump(made: ExpertRecorder) -> Path:
    """The path of a complete dump."""
    writing = made.dump()
    while True:
        try:
            next(writing)
        except StopIteration as end:
            path: Path = end.value
            return path


def written(made: ExpertRecorder) -> dict[str, Any]:
    """The file of a dump."""
    content: dict[str, Any] = torch.load(dump(made), weights_only=True)
    return content


def test_choices_are_counted_by_layer_and_expert() -> None:
    assert chosen().counts().tolist() == COUNTS


def test_choices_by_token_have_no_expert_in_dense_layers() -> None:
    assert chosen().ids().tolist() == [[[0, 1], [-1, -1], [3, 0]], [[2, 0], [-1, -1], [3, 2]]]


@pytest.mark.parametrize("mode", ["stat", "stat_approx"])
def test_the_file_of_stat_has_the_counts_of_every_pass(mode: str, tmp_path: Path) -> None:
    made = recorder(tmp_path, mode)
    for _ in range(3):
        made.add(inputs(2), 0, chosen())
    content = written(made)
    assert content.keys() == {"rank", "logical_count", "average_utilization_rate_over_window"}
    assert (content["rank"], content["average_utilization_rate_over_window"]) == (0, None)
    assert content["logical_count"].dtype == torch.int32
    assert content["logical_count"].tolist() == [COUNTS] * 3


def test_an_empty_recording_is_one_of_zeros(tmp_path: Path) -> None:
    assert written(recorder(tmp_path))["logical_count"].tolist() == [[[0] * 4] * 3]
    assert written(recorder(tmp_path, "per_pass"))["records"] == []


def test_the_csv_beside_the_file_has_the_sums(tmp_path: Path) -> None:
    made = recorder(tmp_path)
    made.add(inputs(2), 0, chosen())
    made.add(inputs(2), 0, chosen())
    path = dump(made)
    rows = list(csv.reader(path.with_suffix(".csv").open()))
    assert rows[0] == ["layer_id", "expert_id", "count"]
    expected = [[str(layer), str(e), str(2 * n)] for layer, row in enumerate(COUNTS) for e, n in enumerate(row)]
    assert rows[1:] == expected
    assert sorted(tmp_path.iterdir()) == sorted([path, path.with_suffix(".csv")])


@pytest.mark.parametrize(
    ("lengths", "decodes", "forward_mode"), [((2,), 0, 1), ((1, 1), 0, 1), ((1, 1), 2, 2), ((1, 1), 1, 3)]
)
def test_a_record_by_token_says_what_kind_of_pass_it_was(
    lengths: tuple[int, ...], decodes: int, forward_mode: int, tmp_path: Path
) -> None:
    made = recorder(tmp_path, "per_token")
    made.add(inputs(*lengths), decodes, chosen())
    [record] = written(made)["records"]
    assert (record["forward_pass_id"], record["rank"], record["gatherer_key"]) == (1, 0, "primary")
    assert (record["forward_mode"], record["extend_seq_lens"]) == (forward_mode, list(lengths))
    assert record["input_ids"] == list(range(10, 10 + sum(lengths)))
    assert record["topk_ids_of_layer"].shape == (3, 2, 2) and record["topk_ids_of_layer"].dtype == torch.int32
    assert record["global_physical_count"].tolist() == COUNTS


def test_files_by_pass_are_named_by_rank(tmp_path: Path) -> None:
    assert dump(recorder(tmp_path, "per_pass")).name.endswith("_0.pt")
    assert not dump(recorder(tmp_path, "stat")).name.endswith("_0.pt")


def test_the_oldest_passes_are_forgotten_when_the_buffer_is_full(tmp_path: Path) -> None:
    made = recorder(tmp_path, "per_pass", buffer_size=2)
    for _ in range(5):
        made.add(inputs(2), 0, chosen())
    assert [record["forward_pass_id"] for record in written(made)["records"]] == [4, 5]


def test_an_unbounded_buffer_keeps_all(tmp_path: Path) -> None:
    made = recorder(tmp_path, buffer_size=-1)
    for _ in range(1500):
        made.add(inputs(2), 0, chosen())
    assert len(written(made)["logical_count"]) == 1500


@pytest.mark.parametrize("mode", ["stat", "per_token"])
def test_an_unbounded_buffer_stays_within_its_bytes(mode: str, tmp_path: Path) -> None:
    made = ExpertRecorder(mode, SHAPE, tmp_path, buffer_size=-1, most_bytes=1000)
    for _ in range(50):
        made.add(inputs(2), 0, chosen())
    kept = sum(record.nbytes for record in made.records)
    assert 800 < kept <= 1000 and made.records[-1].number == 50


def test_a_start_forgets_what_was_recorded_and_a_stop_does_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    made = recorder(tmp_path)
    made.add(inputs(2), 0, chosen())
    made.stop()
    assert (made.recording, len(made.records)) == (False, 1)
    made.start()
    assert (made.recording, len(made.records)) == (True, 0)
    assert caplog.messages == ["Resetting ExpertDistributionRecorder..."] * 2


def test_starting_twice_and_stopping_twice_are_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = recorder(tmp_path)
    made.start()
    made.stop()
    made.stop()
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert ["already" in text for text in warnings] == [True, False]
    assert "nothing to stop" in warnings[1]


def test_a_dump_forgets_what_it_wrote_and_recording_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    made = recorder(tmp_path)
    made.add(inputs(2), 0, chosen())
    path = dump(made)
    assert caplog.messages[1:] == [
        f"Write expert distribution to {path}",
        "Resetting ExpertDistributionRecorder...",
    ]
    assert made.recording
    made.add(inputs(2), 0, chosen())
    assert written(made)["logical_count"].tolist() == [COUNTS]


def test_a_dump_that_cannot_be_written_keeps_the_recording(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    made = recorder(tmp_path / "file")
    made.add(inputs(2), 0, chosen())
    with pytest.raises(CommandRefused, match="cannot be written") as refused:
        dump(made)
    assert (refused.value.status, len(made.records)) == (500, 1)


def test_passes_that_are_recorded_while_a_dump_is_written_belong_to_the_next(tmp_path: Path) -> None:
    made = recorder(tmp_path, "per_pass")
    made.add(inputs(2), 0, chosen())
    writing = made.dump()
    with contextlib.suppress(StopIteration):
        next(writing)
        made.add(inputs(2), 0, chosen())
        while True:
            next(writing)
    made.add(inputs(2), 0, chosen())
    numbers = [record["forward_pass_id"] for record in written(made)["records"]]
    assert 1 not in numbers and made.passes in numbers and len(numbers) == made.passes - 1


def test_the_recorder_follows_its_flags(tmp_path: Path) -> None:
    config = resolved(
        expert_distribution_recorder_mode="per_pass",
        expert_distribution_recorder_buffer_size=7,
        expert_distribution_recorder_dir=str(tmp_path),
    )
    made = make_recorder(config, SHAPE)
    assert made is not None and not made.recording
    assert (made.records.maxlen, made.directory) == (7, tmp_path)
    assert make_recorder(resolved(), SHAPE) is None


@pytest.mark.parametrize(
    ("flag", "setting"),
    [
        ("--expert-distribution-recorder-mode", {"expert_distribution_recorder_mode": "stat"}),
        ("--enable-return-routed-experts", {"enable_return_routed_experts": True}),
    ],
)
def test_a_model_without_experts_refuses_what_needs_them(flag: str, setting: dict[str, Any]) -> None:
    dense: Any = object()
    with pytest.raises(StartupError, match=f"{flag} needs a mixture of experts"):
        expert_shape(resolved(**setting), dense)
    assert expert_shape(resolved(), dense) is None


# commands


def replies(rig: Rig) -> list[tuple[bool, int, str]]:
    return [(m.success, m.status, m.message) for m in rig.outbox.messages if isinstance(m, Reply)]


def test_commands_start_stop_and_dump_with_the_words_of_the_contract(tmp_path: Path) -> None:
    rig = Rig()
    made = rig.worker.expert_recorder = ExpertRecorder("stat", SHAPE, tmp_path)
    rig.inbox.put(StartExpertDistributionRecord(id="1"))
    rig.scheduler.step()
    assert made.recording
    rig.inbox.put(StopExpertDistributionRecord(id="2"), DumpExpertDistributionRecord(id="3"))
    rig.scheduler.step()
    assert not made.recording
    while rig.scheduler.commands:
        rig.scheduler.step()
    assert replies(rig) == [(True, 200, STARTED), (True, 200, STOPPED), (True, 200, DUMPED)]
    assert len(list(tmp_path.glob("*.pt"))) == len(list(tmp_path.glob("*.csv"))) == 1


@pytest.mark.parametrize(
    "command", [StartExpertDistributionRecord, StopExpertDistributionRecord, DumpExpertDistributionRecord]
)
def test_commands_are_refused_where_nothing_is_recorded_and_requests_go_on(command: type) -> None:
    rig = Rig()
    rig.inbox.put(tokenized("a", PROMPT, 3), command(id="1"))
    rig.run()
    assert replies(rig) == [(False, 400, OFF)]
    assert rig.tokens("a")[-1].finish.reason == "length"  # type: ignore[union-attr]
