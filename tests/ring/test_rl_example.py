"""The reinforcement learning example, shortened: it starts its server, learns, and swaps weights under streams."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.servers import ROOT

pytestmark = pytest.mark.slow

ITERATIONS = 3
STREAMS = 2
FLAGS = ("--iterations", f"{ITERATIONS}", "--streams", f"{STREAMS}", "--learning-rate", "6e-4")
FLOAT32_NOISE = 1e-4
RISE = 0.08  # of a reward that starts near 0.3; the mean of 48 rollouts errs by 0.04
RUN_TIMEOUT_S = 180


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """The directory of a finished run."""
    directory = tmp_path_factory.mktemp("rl")
    command = [sys.executable, "-m", "deploy.examples.rl_hot_swap.train", *FLAGS, "--out", str(directory)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=RUN_TIMEOUT_S)
    assert run.returncode == 0, run.stdout + run.stderr
    return directory


@pytest.fixture(scope="module")
def history(out) -> list[dict[str, Any]]:
    return json.loads((out / "history.json").read_text())


def test_the_reward_rises(history):
    assert len(history) == ITERATIONS
    assert history[-1]["reward"] >= history[0]["reward"] + RISE, [entry["reward"] for entry in history]


def test_the_trainer_and_the_server_agree_on_every_logprob_after_every_swap(history):
    assert max(entry["logprob_disagreement"] for entry in history) < FLOAT32_NOISE


def test_every_stream_outlives_the_swap_and_is_made_by_both_versions(history):
    for entry in history:
        update = entry["update"]
        assert update["faults"] == []
        assert update["complete_streams"] == update["streams_across"] == STREAMS, update


def test_the_last_checkpoint_and_the_picture_remain(out):
    assert [path.parent.name for path in out.glob("*/model.safetensors")] == [f"step-{ITERATIONS - 1}"]
    assert (out / "rl_hot_swap.png").read_bytes().startswith(b"\x89PNG")
