"""/start_profile and /stop_profile as the scheduler carries them out."""

import gzip
import json
from pathlib import Path

import msgspec
import pytest

from quartet.runtime.control import StartProfile, StopProfile
from quartet.runtime.limits import MAX_PROFILE_STEPS
from quartet.runtime.messages import Facts, Reply
from quartet.scheduler_service.control.profile import DIRECTORY_VARIABLE, NOT_RUNNING, RUNNING, STARTED, STOPPED
from tests.rig import Rig
from tests.stepper import tokenized


def answer(rig: Rig, command: StartProfile | StopProfile) -> Reply:
    rig.inbox.put(command)
    rig.scheduler.receive()
    reply = rig.outbox.messages[-1]
    assert isinstance(reply, Reply)
    return reply


def traces(directory: Path) -> list[Path]:
    return sorted(directory.glob("*-TP-0.trace.json.gz"))


def test_a_profile_is_recorded_and_written(tmp_path: Path) -> None:
    rig = Rig()
    assert answer(rig, StartProfile(id="1", output_dir=str(tmp_path / "new"), activities=["CPU"])).message == STARTED
    assert answer(rig, StartProfile(id="2")).message == RUNNING
    assert answer(rig, StopProfile(id="3")).message == STOPPED
    [file] = traces(tmp_path / "new")
    assert "traceEvents" in json.loads(gzip.decompress(file.read_bytes()))
    refused = answer(rig, StopProfile(id="4"))
    assert (refused.success, refused.status, refused.message) == (False, 400, NOT_RUNNING)


def test_a_profile_of_some_steps_ends_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path))
    rig = Rig()
    assert answer(rig, StartProfile(id="1", num_steps=2)).success
    rig.inbox.put(tokenized("a", range(5), 6))
    rig.scheduler.step()
    assert rig.scheduler.profile is not None and not traces(tmp_path)
    rig.scheduler.step()
    assert rig.scheduler.profile is None and len(traces(tmp_path)) == 1


def test_the_body_of_a_profiling_client_with_numbers_as_text(tmp_path: Path) -> None:
    body = {
        "output_dir": str(tmp_path), "num_steps": "1", "activities": ["CPU", "GPU"], "profile_by_stage": False,
        "merge_profiles": False, "profile_prefix": "evening", "profile_id": "run-7",
    }  # fmt: skip
    rig = Rig()
    assert answer(rig, msgspec.convert(body | {"id": "1"}, StartProfile)).success
    rig.inbox.put(tokenized("a", range(5), 6))
    rig.scheduler.step()
    assert [file.name for file in traces(tmp_path)] == ["evening-run-7-TP-0.trace.json.gz"]


def test_schedulers_that_write_to_one_directory_write_files_of_their_own(tmp_path: Path) -> None:
    for rank in (0, 1):
        rig = Rig()
        rig.scheduler.facts = Facts(
            rank=rank, max_total_num_tokens=1, max_req_input_len=1, context_length=1, vocab_size=1
        )
        assert answer(rig, StartProfile(id="1", output_dir=str(tmp_path), activities=["CPU"], profile_id="run")).success
        assert answer(rig, StopProfile(id="2")).success
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "run-TP-0-DP-1.trace.json.gz",
        "run-TP-0.trace.json.gz",
    ]


@pytest.mark.parametrize("field", ["profile_prefix", "profile_id"])
@pytest.mark.parametrize("name", ["../x", "a/b", "", "a" * 101, "a\n"])
def test_a_part_of_a_file_name_leads_out_of_no_directory(field: str, name: str) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"id": "1", field: name}, StartProfile)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"num_steps": 0}, "num_steps"),
        ({"num_steps": "0"}, "num_steps"),
        ({"num_steps": MAX_PROFILE_STEPS + 1}, "num_steps"),
        ({"activities": ["MEM"]}, "activities"),
        ({"start_step": 3}, "start_step"),
        ({"start_step": "3"}, "start_step"),
        ({"profile_by_stage": True}, "profile_by_stage"),
        ({"profile_stages": ["decode"]}, "profile_stages"),
        ({"merge_profiles": True}, "merge_profiles"),
        ({"output_dir": "/dev/null/x"}, "output_dir"),
    ],
)
def test_unsupported_options_are_refused(fields: dict[str, object], named: str) -> None:
    rig = Rig()
    refused = answer(rig, StartProfile(id="1", **fields))  # type: ignore[arg-type]
    assert (refused.success, refused.status) == (False, 400)
    assert named in refused.message and rig.scheduler.profile is None
