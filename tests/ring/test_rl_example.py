"""The reinforcement learning example, shortened: weights and an adapter learn in turn, and change under streams."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.servers import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ITERATIONS = 3
STREAMS = 2
FLAGS = ("--iterations", f"{ITERATIONS}", "--streams", f"{STREAMS}", "--learning-rate", "6e-4")
LEARNERS = ("weights", "adapter")
FLOAT32_NOISE = 1e-4
RISE = 0.08  # of a reward that starts near 0.3; the mean of 48 rollouts errs by 0.04
SMALL = 0.2  # the largest share of a checkpoint's bytes that an adapter of it may have
RUN_TIMEOUT_S = 600


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, str]:
    """The directory of a finished run, and what it printed."""
    pytest.importorskip("peft", reason="peft is not installed (pip install peft)")
    directory = tmp_path_factory.mktemp("rl")
    command = [sys.executable, "-m", "deploy.examples.rl_hot_swap.train", "--learn", "both", *FLAGS]
    done = subprocess.run(
        [*command, "--out", str(directory)], cwd=ROOT, capture_output=True, text=True, timeout=RUN_TIMEOUT_S
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return directory, done.stdout


@pytest.fixture(scope="module", params=LEARNERS)
def out(run, request) -> Path:
    """The directory of a learner."""
    return run[0] / request.param


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
    name = "adapter_model.safetensors" if out.name == "adapter" else "model.safetensors"
    assert [path.parent.name for path in out.glob(f"*/{name}")] == [f"step-{ITERATIONS - 1}"]
    assert (out / "rl_hot_swap.png").read_bytes().startswith(b"\x89PNG")


def test_both_begin_alike_and_the_adapter_sends_a_small_part_of_the_bytes(run):
    directory, printed = run
    weights, adapter = (json.loads((directory / learner / "history.json").read_text()) for learner in LEARNERS)
    assert abs(weights[0]["reward"] - adapter[0]["reward"]) < 0.01, "an adapter changes nothing before it has learned"
    assert adapter[-1]["update"]["bytes"] < SMALL * weights[-1]["update"]["bytes"]
    assert all(f"\n{learner:8}  " in printed for learner in LEARNERS), printed
