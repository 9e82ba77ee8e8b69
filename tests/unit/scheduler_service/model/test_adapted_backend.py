"""The backend of steps with adapters gives what the torch backend gives, to the rounding of bfloat16."""

from pathlib import Path

import pytest
import torch

from quartet.kernels.cpu.native import build, library
from quartet.scheduler_service.model.adapted_backend import AdaptedBackend
from quartet.scheduler_service.model.backend import Backend
from quartet.scheduler_service.model.torch_backend import TorchBackend
from tests.engine import Engine
from tests.unit.scheduler_service.model.test_cpu_backend import build_model, logprobs

pytestmark = pytest.mark.skipif(not build.is_possible(), reason="no compiler, or another kind of machine")


def served_by(kind: type[TorchBackend], directory: Path) -> list[torch.Tensor]:
    engine = Engine(directory, dtype="bfloat16")
    model = engine.worker.model
    backend: Backend = kind(model.spec.ropes, model.dtype, model.device)
    engine.worker.steps.model = model.on(backend)
    return logprobs(engine)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "phi3", "gemma3", "glm4", "ministral3"])
def test_logprobs_are_as_near_to_the_exact_ones_as_those_of_torch(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, rotated = build_model(family, tmp_path), []
    exact = torch.cat(logprobs(Engine(directory, dtype="float32")))
    torchs = torch.cat(served_by(TorchBackend, directory))
    rotate = library.Library.rotate

    def noting(*arguments: object) -> None:
        rotated.append(True)
        rotate(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(library.Library, "rotate", noting)
    ours = torch.cat(served_by(AdaptedBackend, directory))
    assert bool(rotated) == (library.library() is not None)
    assert (ours - exact).abs().mean() <= 1.2 * (torchs - exact).abs().mean()
