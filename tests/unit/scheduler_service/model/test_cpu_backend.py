"""The CPU backend gives what the torch backend gives, to the rounding of bfloat16, and follows new weights."""

from pathlib import Path

import pytest
import torch

from quartet.kernels.cpu.native import build, library
from quartet.runtime.sampling import SamplingParams
from quartet.scheduler_service.execution import eager_steps
from quartet.scheduler_service.model.cpu_backend import CpuBackend
from quartet.scheduler_service.model.torch_backend import TorchBackend
from tests.engine import ALL_LOGPROBS, Engine, floats
from tests.model import tiny

pytestmark = pytest.mark.skipif(not build.is_possible(), reason="no compiler, or another kind of machine")

PROMPTS = [[5, 6, 7], list(range(4, 60)), [9, 8] * 70]
PARAMS = SamplingParams(temperature=0, max_new_tokens=1, ignore_eos=True)


def build_model(family: str, directory: Path) -> Path:
    """A model whose heads are as wide as the attention kernel wants them."""
    return tiny.build(family, directory, hidden_size=256, **({} if family == "phi3" else {"head_dim": 64}))


def logprobs(engine: Engine) -> list[torch.Tensor]:
    """Of all prompt positions but the first, which has none, and of the token behind them."""
    answers = engine.generate(PROMPTS, PARAMS, logprobs=ALL_LOGPROBS)
    return [torch.tensor(floats(answer.input_logprobs.values + answer.logprobs.values)[1:]) for answer in answers]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "phi3", "qwen2", "qwen3", "qwen2_moe"])
def test_logprobs_are_those_of_the_torch_backend(family, tmp_path, monkeypatch):
    directory = build_model(family, tmp_path)
    fast = Engine(directory, dtype="bfloat16")
    assert isinstance(fast.worker.model.backend, CpuBackend)
    exact = logprobs(Engine(directory, dtype="float32"))
    with monkeypatch.context() as patch:
        patch.setattr(library, "_loading", None)
        patch.setenv("QUARTET_CPU_ISA", "none")
        plain = Engine(directory, dtype="bfloat16")
        assert isinstance(plain.worker.model.backend, TorchBackend)
        assert plain.worker.steps.attention is eager_steps.paged_attention
        torchs = logprobs(plain)
    ours, theirs, true = torch.cat(logprobs(fast)), torch.cat(torchs), torch.cat(exact)
    bound = 1.5 if family == "qwen2_moe" else 1.1  # rounding may send a token to other experts
    assert (ours - true).abs().mean() <= bound * (theirs - true).abs().mean()


@pytest.mark.parametrize("quantization", ["none", "int4"])
@pytest.mark.parametrize("family", ["llama", "phi3", "qwen3"])
def test_layers_have_the_same_bits_in_one_call_and_one_by_one(family, quantization, tmp_path, monkeypatch):
    directory = build_model(family, tmp_path)
    together = Engine(directory, dtype="bfloat16", quantization=quantization)
    found = logprobs(together)
    kernels = library.library()
    can_attend = kernels is not None and kernels.has_attention
    assert (together.worker.model.backend.together is not None) == can_attend
    monkeypatch.setattr(CpuBackend, "run_layers", lambda *_: False)
    expected = logprobs(Engine(directory, dtype="bfloat16", quantization=quantization))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize("family", ["gemma2", "qwen2_moe"])
def test_layers_that_do_what_the_one_call_does_not_know_are_computed_one_by_one(family, tmp_path):
    engine = Engine(build_model(family, tmp_path), dtype="bfloat16")
    assert logprobs(engine)
    assert engine.worker.model.backend.together is None


def test_the_kernels_compute_with_new_weights_once_these_are_taken_over(tmp_path):
    directory = build_model("qwen2", tmp_path)
    engine = Engine(directory, dtype="bfloat16")
    weights = engine.worker.model.weights
    before = logprobs(engine)
    staged = weights.staging()
    staged.fill_random(seed=7)
    weights.take_over(staged, weights.layout.places, weights.pack(staged))
    engine.planner.forget_prefixes()
    after = logprobs(engine)
    assert not torch.equal(before[1], after[1])
    again = Engine(directory, dtype="bfloat16", disable_radix_cache=True)
    again.worker.model.weights.fill_random(seed=7)
    again.worker.model.weights.after_update()
    assert all(torch.equal(ours, fresh) for ours, fresh in zip(after, logprobs(again), strict=True))


def test_without_a_compiler_torch_serves(tmp_path, monkeypatch, caplog):
    directory = build_model("llama", tmp_path / "model")
    monkeypatch.setattr(library, "_loading", None)
    library.functions.cache_clear()

    def fails(*_: object) -> None:
        raise build.CannotBuild("gcc failed: no space left")

    monkeypatch.setattr(build, "compiled", fails)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    engine = Engine(directory, dtype="bfloat16")
    assert logprobs(engine)
    assert caplog.text.count("The CPU kernels cannot be compiled") == 1
    assert "gcc failed: no space left" in caplog.text
    library.functions.cache_clear()
