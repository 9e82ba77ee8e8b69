"""Errors that people meet at a start: one line with the way out, said by the launcher before torch is imported."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from quartet.runtime.launcher.supervisor import ExitStatus
from tests import gguf_files
from tests import hub as stand_in_hub
from tests.servers import ROOT

WITHOUT_TORCH = """
import builtins, sys
real = builtins.__import__
def imports(name, *rest, **named):
    assert name.split(".")[0] not in ("torch", "transformers", "triton", "numpy"), name
    return real(name, *rest, **named)
builtins.__import__ = imports
from quartet.runtime.launcher import launch
sys.exit(launch.serve(sys.argv[1:], ()))  # there are no services to start
"""
DIRECTORIES = {
    "adapter": ("adapter_config.json", {"base_model_name_or_path": "o/n"}),
    "vision": (
        "config.json",
        {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "vision_config": {}},
    ),
    "remote": ("config.json", {"architectures": ["A"], "model_type": "a", "auto_map": {"AutoModel": "a.A"}}),
}


LLAVA = json.dumps(DIRECTORIES["vision"][1]).encode()
REPOSITORIES = {
    "gated/model": {},
    "owner/vision": {"config.json": LLAVA, "model.safetensors": b"never fetched"},
    "owner/gguf": {"README.json": b"{}", "model-Q4_K_M.gguf": b"never fetched"},
}


@pytest.fixture(scope="module")
def hub():
    """The address of one, and what it is asked for."""
    with stand_in_hub.serving(REPOSITORIES) as found:
        yield found


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A directory of what people take for models."""
    directory = tmp_path_factory.mktemp("models")
    for name, (file, content) in DIRECTORIES.items():
        (directory / name).mkdir()
        (directory / name / file).write_text(json.dumps(content))
    (directory / "none.gguf").write_text("<html>")
    whole = gguf_files.write(directory / "whole.gguf", {}, {"a": gguf_files.stored(torch.zeros(64))})
    (directory / "cut.gguf").write_bytes(whole.read_bytes()[:-100])
    return directory


def refusal(*flags: str, hub: str = "", directory: Path = ROOT) -> str:
    """The one line that a start with these flags ends with."""
    settings = {"HF_ENDPOINT": hub, "HF_HOME": str(directory), "HF_TOKEN": "", "HF_HUB_OFFLINE": ""}
    settings |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_VERBOSITY": "error"}
    ran = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, "--port", "0", *flags],
        cwd=directory,
        env=os.environ | settings | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.returncode == ExitStatus.STARTUP, ran.stdout + ran.stderr
    [line] = (ran.stdout + ran.stderr).splitlines()
    return line


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("adapter", "is a LoRA adapter of o/n"),
        ("vision", "is a model of images or sound (LlavaForConditionalGeneration)"),
        ("remote", "Quartet never runs code from a model directory"),
        ("none.gguf", "it does not begin with GGUF; check what was downloaded"),
        ("cut.gguf", "the file is cut off, so download it again"),
        ("missing.gguf", "there is no such file"),
        ("./missing", "it takes a directory, a hub id (owner/name), a GGUF file or demo"),
        ("owner/vision", "is a model of images or sound (LlavaForConditionalGeneration)"),
        ("owner/gguf", "if it has GGUF files, name one: owner/gguf:Q4_K_M"),
        ("gated/model", "is gated: accept its terms at "),
        ("owner/missing", "the hub shows none to you"),
    ],
)
def test_what_cannot_be_served_is_refused_before_torch_is_imported(models, hub, name, said):
    address, asked = hub
    line = refusal("--model-path", name, hub=address, directory=models)
    assert line.startswith("quartet: ") and said in line
    assert not any(request.endswith((".safetensors", ".gguf")) for request in asked)


def test_a_port_in_use_is_refused_with_the_process_that_has_it():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        line = refusal("--port", str(listener.getsockname()[1]))
    assert f"process {os.getpid()} (" in line and "choose another --port" in line
