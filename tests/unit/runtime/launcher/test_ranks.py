"""Several processes of a role: their names, files, cores and devices."""

import pytest

from quartet.runtime.errors import StartupError
from quartet.runtime.launcher.child import Service, child_environment, device_numbers, usable_cores
from quartet.runtime.launcher.launch import SERVICES, ranked, saving
from quartet.runtime.launcher.supervisor import Supervisor
from tests.configs import resolved

TWO = ranked(SERVICES, 2)
FIRST, SECOND = (service for service in TWO if service.role == "scheduler")


@pytest.fixture
def supervisor(tmp_path) -> Supervisor:
    return Supervisor(TWO, resolved(), tmp_path, lifeline_fd=-1, listen_fd=9)


def test_only_schedulers_are_several_and_one_is_as_ever():
    assert [service.key for service in TWO] == ["gateway", "tokenizer", "scheduler", "scheduler-1", "detokenizer"]
    assert ranked(SERVICES, 1) == list(SERVICES)


def test_each_has_a_title_a_path_and_records_of_its_own(supervisor, tmp_path):
    first, second = supervisor.boot(FIRST, 0, 5), supervisor.boot(SECOND, 3, 6)
    assert (first.title, second.title) == ("scheduler DP0", "scheduler DP1")
    assert (first.inbox, second.inbox) == (f"ipc://{tmp_path}/scheduler.0", f"ipc://{tmp_path}/scheduler-1.3")
    assert (first.own_dir, second.own_dir) == (str(tmp_path), f"{tmp_path}/scheduler-1.own")
    assert first.outbox == second.outbox == f"ipc://{tmp_path}/detokenizer"
    assert supervisor.boot(TWO[1], 0, 7).outbox == f"ipc://{tmp_path}/scheduler"


def test_cores_are_divided():
    assert child_environment({}, SECOND)["OMP_NUM_THREADS"] == str(max(1, usable_cores() // 2))


def test_with_low_memory_libraries_keep_no_buffers_unless_the_environment_says_so():
    for service, saver in zip(SERVICES, saving(SERVICES), strict=True):
        assert child_environment({}, saver) == {**child_environment({}, service), "MKL_DISABLE_FAST_MM": "1"}
    assert child_environment({"MKL_DISABLE_FAST_MM": "0"}, saver)["MKL_DISABLE_FAST_MM"] == "0"


def test_each_gets_a_gpu_of_those_that_are_visible():
    assert [device_numbers(service, {}) for service in (FIRST, SECOND)] == ["0", "1"]
    visible = {"CUDA_VISIBLE_DEVICES": "3, GPU-5"}
    assert [device_numbers(service, visible) for service in (FIRST, SECOND)] == ["3", "GPU-5"]
    assert device_numbers(Service("scheduler", "s"), visible) == ""
    with pytest.raises(StartupError, match="--dp-size 2 needs 2 GPUs, and CUDA_VISIBLE_DEVICES names 1"):
        device_numbers(FIRST, {"CUDA_VISIBLE_DEVICES": "7"})


def test_each_gets_as_many_gpus_as_its_ranks_need():
    assert [device_numbers(service, {}, 2) for service in (FIRST, SECOND)] == ["0,1", "2,3"]
    assert device_numbers(SECOND, {"CUDA_VISIBLE_DEVICES": "a,b,c,d,e"}, 2) == "c,d"
    with pytest.raises(StartupError, match="--dp-size 2 with --tp-size 2 needs 4 GPUs, and CUDA_VISIBLE_DEVICES names"):
        device_numbers(FIRST, {"CUDA_VISIBLE_DEVICES": "0,1"}, 2)
