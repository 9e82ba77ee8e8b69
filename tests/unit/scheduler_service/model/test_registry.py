"""What loading a model starts besides."""

from pathlib import Path

import pytest

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
