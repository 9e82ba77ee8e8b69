"""The CPU backend gives what the torch backend gives, to the rounding of bfloat16, and follows new weights."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from quartet.kernels.cpu.native import build, library
from quartet.runtime.messages import LogprobOptions
from quartet.runtime.sampling import SamplingParams
from quartet.scheduler_service.execution import eager_steps
from quartet.scheduler_service.model.batch import Batch
from quartet.scheduler_service.model.cpu_backend import CpuBackend, described_layer, has_only
from quartet.scheduler_service.model.decoder import Decoder
from quartet.scheduler_service.model.torch_backend import TorchBackend
from tests.engine import ALL_LOGPROBS, Engine, floats
from tests.model import tiny

pytestmark = pytest.mark.skipif(not build.is_possible(), reason="no compiler, or another kind of machine")

PROMPTS = [[5, 6, 7], list(range(4, 60)), [9, 8] * 70]
PARAMS = SamplingParams(temperature=0, max_new_tokens=1, ignore_eos=True)


BESIDES: dict[str, dict[str, object]] = {
    "gemma3n": {"hidden_size_per_layer_input": 32},
    "gemma4": {"hidden_size_per_layer_input": 32},
    "gemma4_unified": {"attention_k_eq_v": True, "num_global_key_value_heads": 1},
}


def build_model(family: str, directory: Path) -> Path:
    """A model whose heads are as wide as the attention kernel wants them."""
    heads = {} if family == "phi3" else {"head_dim": 64}
    return tiny.build(family, directory, hidden_size=256, **heads, **BESIDES.get(family, {}))


def logprobs(engine: Engine) -> list[torch.Tensor]:
    """Of all prompt positions but the first, which has none, and of the token behind them."""
    answers = engine.generate(PROMPTS, PARAMS, logprobs=ALL_LOGPROBS)
    return [torch.tensor(floats(answer.input_logprobs.values + answer.logprobs.values)[1:]) for answer in answers]


OLD = ["llama", "gemma2", "gemma3", "phi3", "qwen2", "qwen3", "qwen2_moe"]
NEW = ["olmo2", "smollm3", "granite", "ministral3", "cohere2", "glm4", "glm4_moe"]  # each has something of its own
GEMMA = ["gemma3n", "gemma4", "gemma4_moe", "gemma4_unified"]


@pytest.mark.parametrize("family", [*OLD, *NEW, *GEMMA])
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
    bound = 1.5 if family.endswith("_moe") else 1.1  # rounding may send a token to other experts
    assert (ours - true).abs().mean() <= bound * (theirs - true).abs().mean()


TOGETHER = [
    "llama",
    "phi3",
    "qwen3",
    "gemma2",
    "gemma3",
    "qwen2_moe",
    "qwen3_moe",
    "mixtral",
    "granite",
    "smollm3",
    "exaone4",
    "gemma4",
    "gemma4_moe",
    "gemma4_unified",
]


@pytest.mark.parametrize("quantization", ["none", "int4"])
@pytest.mark.parametrize("family", TOGETHER)
def test_layers_have_the_same_bits_in_one_call_and_one_by_one(family, quantization, tmp_path, monkeypatch):
    directory = build_model(family, tmp_path)
    together = Engine(directory, dtype="bfloat16", quantization=quantization)
    found = logprobs(together)
    kernels = library.library()
    can_attend = kernels is not None and kernels.has_attention
    assert (together.worker.model.backend.together is not None) == can_attend
    monkeypatch.setattr(CpuBackend, "run_layers", lambda *_, **__: None)
    expected = logprobs(Engine(directory, dtype="bfloat16", quantization=quantization))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize("family", [*TOGETHER, "gemma3n"])
@pytest.mark.parametrize("quantization", ["none", "int4"])
def test_tokens_that_nobody_looks_at_are_left_out_of_the_last_layer_and_all_bits_stay(
    family, quantization, tmp_path, monkeypatch
):
    directory = build_model(family, tmp_path)
    settings = {"quantization": quantization, "enable_deterministic_inference": True, "chunked_prefill_size": 100}
    params = SamplingParams(temperature=0, max_new_tokens=5, ignore_eos=True)
    sizes = list[int]()
    forward = Decoder.forward

    def run() -> list[tuple[list[int], list[float]]]:
        engine = Engine(directory, dtype="bfloat16", **settings)
        answers = engine.generate(PROMPTS, params, logprobs=LogprobOptions())
        return [(answer.ids, floats(answer.logprobs.values)) for answer in answers]

    def noted(self: Decoder, batch: Batch) -> torch.Tensor:
        hidden = forward(self, batch)
        sizes.append(len(batch.input_ids) - len(hidden))
        return hidden

    monkeypatch.setattr(Decoder, "forward", noted)
    found, left_out = run(), max(sizes)
    monkeypatch.setattr(eager_steps, "add_wanted", lambda *_: None)
    sizes.clear()
    assert found == run() and not any(sizes)
    kernels = library.library()
    if kernels is not None and kernels.has_attention and family not in ("gemma3n", "gemma4"):
        assert left_out >= 97  # of a chunk that ends amid a prompt, and of whole ones


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_several_streams_have_one_call_whose_bits_do_not_depend_on_other_requests(quantization, tmp_path):
    settings = {"dtype": "bfloat16", "quantization": quantization, "enable_deterministic_inference": True}
    engine = Engine(build_model("gemma3n", tmp_path), disable_radix_cache=True, **settings)
    together = logprobs(engine)
    kernels = library.library()
    assert (engine.worker.model.backend.together is not None) == (kernels is not None and kernels.has_attention)
    for prompt, expected in zip(PROMPTS, together, strict=True):
        (alone,) = engine.generate([prompt], PARAMS, logprobs=ALL_LOGPROBS)
        assert floats(alone.input_logprobs.values + alone.logprobs.values)[1:] == expected.tolist()


def test_layers_with_something_that_the_one_call_does_not_know_are_computed_one_by_one(tmp_path):
    layer = Engine(build_model("llama", tmp_path), dtype="bfloat16").worker.model.layers[0]
    assert described_layer(layer) is not None
    spec = replace(layer.attention.spec, sinks=torch.ones(4))
    assert described_layer(replace(layer, mixer=replace(layer.attention, spec=spec))) is None
    described = described_layer(replace(layer, feed_forward=replace(layer.feed_forward, activation="gelu")))
    assert described is not None and not described.feed_forward.can_run()


@pytest.mark.parametrize("family", ["cohere2", "ernie4_5", "glm4_moe", "minimax_m2", "ministral3"])
def test_models_with_something_that_the_one_call_does_not_know_are_computed_layer_by_layer(family, tmp_path):
    engine = Engine(build_model(family, tmp_path), dtype="bfloat16")
    assert logprobs(engine)
    assert engine.worker.model.backend.together is None


@dataclass(frozen=True)
class Later:
    """A part of a layer to which somebody adds fields."""

    own: int
    multiplier: float = 1.0
    biases: torch.Tensor | None = None
    adapters: bool = False


@pytest.mark.parametrize("change", [{"multiplier": 0.5}, {"biases": torch.zeros(2)}, {"adapters": True}])
def test_a_field_that_is_added_later_and_set_is_not_taken_for_known(change):
    assert has_only(Later(own=3), {"own"})
    assert not has_only(Later(own=3, **change), {"own"})


def test_recording_the_chosen_experts_changes_no_bits(tmp_path):
    engine = Engine(build_model("qwen3_moe", tmp_path), dtype="bfloat16", disable_radix_cache=True)
    plain = logprobs(engine)
    recorded = engine.generate(PROMPTS, PARAMS, logprobs=ALL_LOGPROBS, return_routed_experts=True)
    assert all(answer.routed_experts for answer in recorded)
    for answer, before in zip(recorded, plain, strict=True):
        assert floats(answer.input_logprobs.values + answer.logprobs.values)[1:] == before.tolist()


SWAPPED = [
    *(("qwen2", "none"), ("qwen2_moe", "none"), ("mixtral", "int8"), ("olmo2", "int8"), ("cohere2", "int4")),
    *(("gemma3n", "int8"), ("gemma4", "none"), ("gemma4_moe", "none"), ("gemma4_unified", "int8")),
    *(("gpt_oss", "int8"), ("deepseek_v3", "none"), ("deepseek_v3", "int4"), ("minimax_m2", "none")),
]


@pytest.mark.parametrize(("family", "quantization"), SWAPPED)
def test_the_kernels_compute_with_new_weights_once_these_are_taken_over(family, quantization, tmp_path):
    directory = build_model(family, tmp_path)
    engine = Engine(directory, dtype="bfloat16", quantization=quantization)
    weights = engine.worker.model.weights
    before = logprobs(engine)
    staged = weights.staging()
    staged.fill_random(seed=7)
    weights.take_over(staged, weights.layout.places, weights.pack(staged))
    engine.planner.forget_prefixes()
    after = logprobs(engine)
    assert not torch.equal(before[1], after[1])
    again = Engine(directory, dtype="bfloat16", quantization=quantization, disable_radix_cache=True)
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
