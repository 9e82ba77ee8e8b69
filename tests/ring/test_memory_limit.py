"""Whole servers in a control group that may use little memory."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from deploy.benchmarks import half_billion
from quartet.runtime.launcher.supervisor import ExitStatus
from tests.control_groups import Group, limited
from tests.servers import READY, Server, launched

MB = 1 << 20


@contextlib.contextmanager
def started_in(group: Group, *flags: str) -> Iterator[Server]:
    """A server all of whose processes belong to the group, not yet ready."""
    with contextlib.ExitStack() as stack:
        with group.joined():
            server = stack.enter_context(launched(*flags, ready=False))
        yield server


@pytest.mark.timeout(240)
def test_a_server_in_900_mb_sizes_its_pool_by_them_and_lives_when_the_pool_is_full():
    with limited(900 * MB) as group, started_in(group) as server:
        server.wait_for(READY, 120)
        tokens = requests.get(f"{server.url}/get_server_info", timeout=120).json()["max_total_num_tokens"]
        assert 2048 <= tokens <= 900 * MB // 4096 // 4, tokens  # 4,096 bytes each
        assert "of the control group" in server.log
        for first in range(0, tokens + 1900, 1900):
            ids = [3 + (first + i) % 2000 for i in range(1900)]
            body = {"input_ids": ids, "sampling_params": {"max_new_tokens": 1, "ignore_eos": True}}
            assert requests.post(f"{server.url}/generate", json=body, timeout=60).status_code == 200
        assert group.killed == 0


@pytest.mark.timeout(120)
def test_a_model_that_does_not_fit_a_control_group_is_refused_in_one_line(tmp_path: Path):
    half_billion.config(layers=24).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["Qwen2ForCausalLM"]}))
    flags = ("--model-path", str(tmp_path), "--load-format", "dummy", "--skip-tokenizer-init", "--dtype", "bfloat16")
    with limited(900 * MB) as group, started_in(group, *flags) as server:
        assert server.wait(90) == ExitStatus.STARTUP
        last = server.output().strip().splitlines()[-1]
        assert last.startswith("quartet: no room for the model's weights") and "of the control group" in last
        assert group.killed == 0


@pytest.mark.timeout(60)
def test_a_group_without_room_for_the_processes_alone_is_refused_in_one_line():
    with limited(200 * MB) as group, started_in(group) as server:
        assert server.wait(120) == ExitStatus.STARTUP
        assert "the processes alone take" in server.output() and group.killed == 0
