"""What loading a model starts besides."""

from pathlib import Path

import pytest

from quartet.runtime.errors import StartupError
from quartet.scheduler_service.model import registry
from tests.model import embedders, tiny
from tests.model.dense import serve


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Notes that the kernels are being loaded."""
    notes: list[str] = []
    monkeypatch.setattr(registry.native, "start_loading", lambda: notes.append("kernels"))
    return notes


def test_a_model_that_generates_loads_the_kernels_for_draws_in_float32_too(begun: list[str], tmp_path: Path) -> None:
    serve(tiny.build("qwen3", tmp_path))
    assert begun == ["kernels"]


def test_an_embedding_model_in_float32_needs_none(begun: list[str], tmp_path: Path) -> None:
    embedders.build("BertModel", tmp_path)
    serve(tmp_path, model_dir=str(tmp_path), is_embedding=True)
    assert not begun


@pytest.mark.parametrize("deterministic", [False, True])
def test_deterministic_inference_waits_for_the_kernels(
    deterministic: bool, begun: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else logprobs would have other bits before they are there."""
    monkeypatch.setattr(registry.native, "library", lambda: begun.append("waited"))
    serve(tiny.build("qwen3", tmp_path), enable_deterministic_inference=deterministic)
    assert ("waited" in begun) == deterministic


def test_an_instruction_set_that_does_not_exist_is_refused_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUARTET_CPU_ISA", "avx3")
    with pytest.raises(StartupError, match="QUARTET_CPU_ISA is avx3; it may be one of avx2, "):
        serve(tiny.build("qwen3", tmp_path))
