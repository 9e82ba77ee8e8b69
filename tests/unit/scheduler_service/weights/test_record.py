"""What is recorded of the weights at the first start, so that what was written to their files since is noticed."""

import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from quartet.runtime.config import ResolvedConfig
from quartet.runtime.errors import StartupError
from quartet.scheduler_service.weights import record
from quartet.scheduler_service.weights.record import Committed
from tests.configs import resolved


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"first")
    return tmp_path / "model"


def started(model: Path, **settings: Any) -> ResolvedConfig:
    """As the launcher hands it to a scheduler."""
    return msgspec.structs.replace(resolved(model_path=str(model), **settings), model_dir=str(model))


def rewrite(model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"other")
    os.utime(model / "model.safetensors", ns=(1, 1))


def own_dirs(tmp_path: Path) -> list[str]:
    """The first scheduler's is the run directory."""
    (tmp_path / "run" / "1").mkdir(parents=True)
    return [str(tmp_path / "run"), str(tmp_path / "run" / "1")]


def test_files_that_are_written_to_before_a_first_death_are_another_version(model: Path, tmp_path: Path) -> None:
    config, (own, _) = started(model, weight_version="A"), own_dirs(tmp_path)
    record.begin(config, own, own)
    assert record.restored(config, own).weight_version == "A"
    rewrite(model)
    record.begin(config, own, own)
    assert record.restored(config, own).weight_version == "A-rewritten"


def test_a_scheduler_that_starts_later_than_the_first_one_reads_the_same_files_or_another_version(
    model: Path, tmp_path: Path
) -> None:
    config, (first, second) = started(model, weight_version="A"), own_dirs(tmp_path)
    record.begin(config, first, first)
    rewrite(model)
    record.begin(config, second, first)
    assert record.restored(config, second).weight_version == "A-rewritten"


def test_an_update_is_recorded_by_each_scheduler_in_place_of_what_was_first(model: Path, tmp_path: Path) -> None:
    config, (first, second) = started(model, weight_version="A"), own_dirs(tmp_path)
    record.begin(config, second, first)
    rewrite(model)
    record.write_record(second, Committed.at_start(started(model, weight_version="B")))
    record.begin(config, second, first)
    assert record.restored(config, second).weight_version == "B"


def test_files_that_are_written_to_while_they_are_read_are_not_served(model: Path, tmp_path: Path) -> None:
    config, (own, _) = started(model), own_dirs(tmp_path)
    record.begin(config, own, own)
    to_read = Committed.at_start(record.restored(config, own))
    record.check_unchanged(to_read, config, own)
    rewrite(model)
    with pytest.raises(StartupError, match=f"{model} was written to while"):
        record.check_unchanged(to_read, config, own)


def test_the_name_of_the_files_tells_contents_apart_and_not_places(model: Path, tmp_path: Path) -> None:
    config = started(model)
    before, same = Committed.at_start(config), Committed.at_start(config)
    rewrite(model)
    assert before.weight_files == same.weight_files != Committed.at_start(config).weight_files
    assert before.told == {"model_path": str(model), "weight_files": before.weight_files}


def test_random_weights_come_from_no_file(model: Path, tmp_path: Path) -> None:
    config, (own, _) = started(model, load_format="dummy", weight_version="A"), own_dirs(tmp_path)
    record.begin(config, own, own)
    rewrite(model)
    assert record.restored(config, own).weight_version == "A"
    assert Committed.at_start(config).weight_files == ""


def test_a_broken_index_of_files_that_are_not_read_does_not_matter(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin.index.json").write_text("{")
    config, (own, _) = started(model, load_format="dummy", weight_version="A"), own_dirs(tmp_path)
    record.begin(config, own, own)
    assert record.restored(config, own).weight_version == "A"


def test_a_server_starts_though_nothing_can_be_recorded(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = started(model, weight_version="A")
    record.begin(config, str(tmp_path / "none"), str(tmp_path / "none"))
    assert record.restored(config, str(tmp_path / "none")).weight_version == "A"
    assert "could not be recorded" in caplog.text


def test_files_that_are_being_written_are_not_read_before_they_are_complete(model: Path) -> None:
    clock, to_write = [1000.0], [1001.0, 1002.0]

    def write_on(wait_s: float) -> None:
        clock[0] += wait_s
        while to_write and to_write[0] <= clock[0]:
            written_ns = int(to_write.pop(0) * 1e9)
            os.utime(model / "model.safetensors", ns=(written_ns, written_ns))

    known = Committed.at_start(started(model))
    record.wait_until_written(known, lambda: clock[0], write_on)
    assert clock == [1000.0], "they are those that are known"
    os.utime(model / "model.safetensors", ns=(1000 * 10**9, 1000 * 10**9))
    record.wait_until_written(known, lambda: clock[0], write_on)
    assert not to_write
    assert 1002 + record.QUIET_S <= clock[0] < 1003 + record.QUIET_S
    rewrite(model)
    record.wait_until_written(known, lambda: clock[0], write_on)
    assert clock[0] < 1003 + record.QUIET_S, "they were written long ago"


def test_files_that_somebody_writes_to_all_the_time_are_not_waited_for_longer_than_a_minute(model: Path) -> None:
    clock, known = [1000.0], Committed.at_start(started(model))

    def write_on(wait_s: float) -> None:
        clock[0] += wait_s
        os.utime(model / "model.safetensors", ns=(int(clock[0] * 1e9), int(clock[0] * 1e9)))

    write_on(0.0)
    record.wait_until_written(known, lambda: clock[0], write_on)
    assert 1000 + record.MOST_WAIT_S <= clock[0] < 1001 + record.MOST_WAIT_S
