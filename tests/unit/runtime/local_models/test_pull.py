"""Models fetched from a stand-in of the hub."""

import os
import subprocess
import sys

import pytest

from quartet.runtime.local_models.pull import main
from tests import hub

MODEL = {
    "config.json": b"{}",
    "model.safetensors": b"w" * 2000,
    "tokenizer.json": b"{}",
    "pytorch_model.bin": b"p" * 2000,
    "README.md": b"read me",
}
PICKLED = {"config.json": b"{}", "pytorch_model.bin": b"p" * 3000}
VISION = {
    "config.json": b'{"architectures": ["SightModel"], "model_type": "sight", "vision_config": {}}',
    "model.safetensors": b"w" * 2000,
}
GGUF = {"small-Q4_K_M.gguf": b"GGUF" + b"q" * 1000, "small-Q8_0.gguf": b"GGUF" + b"q" * 2000}


@pytest.fixture(scope="module")
def the_hub():
    with hub.serving(
        {"o/model": MODEL, "o/old": PICKLED, "o/gguf": GGUF, "gated/model": MODEL, "o/vision": VISION}
    ) as found:
        yield found


@pytest.fixture
def pull(the_hub, tmp_path):
    """Run `quartet pull` with these arguments; `url` may be another hub."""

    def run(*arguments: str, url: str = the_hub[0]) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_TELEMETRY": "1"}
        environment.pop("HF_HUB_OFFLINE", None)
        command = [sys.executable, "-m", "quartet.runtime.cli", "pull", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)

    return run


def test_a_model_is_fetched_as_serving_it_would_and_listed_and_served_from_there(pull, tmp_path):
    ran = pull("o/model")
    assert ran.returncode == 0, ran.stderr
    place = tmp_path / "hub" / "models--o--model" / "snapshots" / hub.COMMIT
    first, second = ran.stdout.splitlines()
    assert first == f"o/model is here: {place} (2.0 kB)"
    assert second == "Serve it: quartet serve o/model    Talk to it: quartet chat o/model"
    assert {file.name for file in place.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json"}


def test_old_weights_are_fetched_where_there_are_no_others(pull, tmp_path):
    assert pull("o/old", "--download-dir", str(tmp_path / "own")).returncode == 0
    assert list((tmp_path / "own").glob("models--o--old/snapshots/*/pytorch_model.bin"))


def test_one_of_several_gguf_files_is_fetched_alone(pull, tmp_path):
    ran = pull("o/gguf:q4_k_m")
    assert ran.returncode == 0, ran.stderr
    assert "small-Q4_K_M.gguf (1.0 kB)" in ran.stdout
    assert not list(tmp_path.rglob("small-Q8_0.gguf"))


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["o/gguf"], 2, "it has no config.json; there are o/gguf:small-Q4_K_M, o/gguf:small-Q8_0"),
        (["o/gguf:Q2_K"], 2, "of the type Q2_K; there are o/gguf:small-Q4_K_M, o/gguf:small-Q8_0"),
        (["gated/model"], 1, "is gated: accept its terms at http"),
        (["o/none"], 1, "the hub shows none to you; check the name"),
        (["o/model", "--revision", "v9"], 1, "no revision v9"),
        (["o/vision"], 1, "is a model of images or sound"),
    ],
)
def test_what_cannot_be_fetched_is_one_line_that_says_what_to_do(pull, arguments, status, said):
    ran = pull(*arguments)
    (line,) = ran.stderr.splitlines()
    assert (ran.returncode, ran.stdout) == (status, "")
    assert line.startswith("quartet: ") and said in line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["demo"], "it needs no download"),
        ([".."], "on this machine already"),
        (["a b"], "it looks like owner/name"),
        ([], "model"),
        (["o/n", "--token", "s3cr3t"], "unknown flag --token"),
    ],
)
def test_what_is_no_model_of_the_hub_is_refused_without_asking_it(arguments, said, capsys, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    assert main(arguments) == 2
    shown = capsys.readouterr().err
    assert said in shown and "s3cr3t" not in shown


def test_weights_that_nobody_can_serve_are_not_fetched(pull, tmp_path):
    pull("o/vision")
    assert list(tmp_path.rglob("config.json"))
    assert not list(tmp_path.rglob("model.safetensors"))


def test_without_a_network_it_says_so(pull):
    ran = pull("o/model", url="http://127.0.0.1:1")
    assert ran.returncode == 1
    assert "could not be fetched from the hub" in ran.stderr.splitlines()[-1]
    assert "Traceback" not in ran.stderr
