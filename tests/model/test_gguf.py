"""A GGUF file made of a model serves the same weights and the same config as the model's own directory."""

from pathlib import Path
from typing import Any

import pytest
import torch

from quartet.runtime.errors import StartupError
from quartet.runtime.model_files import gguf_directory, model_info
from quartet.scheduler_service.model import same_model
from quartet.scheduler_service.model.batch import ServedModel
from quartet.scheduler_service.model.registry import decoder_spec
from tests import gguf_files
from tests.configs import resolved
from tests.model import tiny
from tests.model.dense import DenseRunner, serve
from tests.model.test_families import TOLERANCE, prompt

FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True, "head_dim": 24}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("mixtral", {}),
    ("qwen2", {}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen3", {}),
    ("qwen2_moe", {}),
    ("qwen3_moe", {}),
    ("gemma2", {}),
    ("gemma3", {"sliding_window_pattern": 6, "num_hidden_layers": 7, "query_pre_attn_scalar": 16}),
    ("gemma3n", {}),
    ("gemma3n", {"activation_sparsity_pattern": [0.95] * 5, "intermediate_size": [96] * 5}),
    ("gemma4", {}),
    ("gemma4", {"num_kv_shared_layers": 0, "use_double_wide_mlp": False, "final_logit_softcapping": 30.0}),
    ("gemma4_moe", {}),
    ("phi3", {}),
    ("phi3", {"partial_rotary_factor": 0.5}),
]


SHIFTED = ("gemma2", "gemma3")  # files hold their norms with one added


def both(family: str, directory: Path, type: int = gguf_files.F32, **overrides: Any) -> tuple[Path, Path]:
    """A model of a family as transformers saves it, and the directory made of its GGUF file."""
    original = tiny.build(family, directory / "original", **overrides)
    file = gguf_files.convert(original, directory / "model.gguf", type)
    return original, gguf_directory.described(file, directory, tokenizer=True)


def differing(one: ServedModel, other: ServedModel) -> list[str]:
    assert one.weights is not None and other.weights is not None
    assert one.weights.names() == other.weights.names()
    return [name for name in one.weights.names() if not torch.equal(one.weights.view(name), other.weights.view(name))]


@pytest.mark.parametrize(("family", "overrides"), FAMILIES)
def test_a_file_of_every_family_serves_the_weights_of_the_original(
    family: str, overrides: dict[str, Any], tmp_path: Path
) -> None:
    if family == "gemma2":
        overrides = {**overrides, "query_pre_attn_scalar": 16}  # the format does not hold another than the head's size
    original, made = both(family, tmp_path, **overrides)
    loaded = [serve(directory, dtype="float32") for directory in (original, made)]
    names = [name for name in differing(*loaded) if family in SHIFTED and "norm" in name]
    assert differing(*loaded) == names
    for name in names:  # one was added and taken away again
        first, second = (model.weights.view(name) for model in loaded)
        torch.testing.assert_close(first, second, rtol=0, atol=2e-7)


@pytest.mark.parametrize(("family", "overrides"), FAMILIES)
def test_a_file_of_every_family_means_the_model_of_the_original(
    family: str, overrides: dict[str, Any], tmp_path: Path
) -> None:
    if family == "gemma2":
        overrides = {**overrides, "query_pre_attn_scalar": 16}
    original, made = both(family, tmp_path, **overrides)
    one, other = (model_info.load(resolved(model_path=str(directory))) for directory in (original, made))
    assert list(same_model.differences(one, other)) == []
    assert (one.vocab_size, one.context_length) == (other.vocab_size, other.context_length)


# ropes that are stretched

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG, SHORT = [1.0, 1.5, 2.0, 4.0, 8.0, 16.0, 30.0, 32.5], [1.0, 1.0, 1.1, 1.2, 1.5, 1.75, 2.0, 2.25]
STRETCHED: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    (
        "qwen2",
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        {"type": "yarn", "factor": 4.0, "original_context_length": 32},
    ),
    (
        "qwen3",
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 16, "beta_slow": 2},
        {"type": "yarn", "factor": 4.0, "original_context_length": 32, "yarn_beta_fast": 16.0, "yarn_beta_slow": 2.0},
    ),
    ("llama", {"rope_type": "linear", "factor": 3.0}, {"type": "linear", "factor": 3.0}),
    ("llama", {"rope_type": "default"}, {"type": "none", "factor": 3.0}),
]


@pytest.mark.parametrize(("family", "rope", "keys"), STRETCHED)
def test_a_stretched_rope_means_what_the_original_says(
    family: str, rope: dict[str, Any], keys: dict[str, Any], tmp_path: Path
) -> None:
    original = tiny.build(family, tmp_path / "original", rope_parameters={"rope_theta": 10000.0, **rope})
    more = {f"{family}__rope__scaling__{key}": value for key, value in keys.items()}
    assert differences(original, gguf_files.convert(original, tmp_path / "model.gguf", **more)) == []


def differences(original: Path, file: Path) -> list[Any]:
    made = gguf_directory.described(file, original.parent, tokenizer=True)
    one, other = (model_info.load(resolved(model_path=str(directory))) for directory in (original, made))
    return list(same_model.differences(one, other))


def divisors(original: Path) -> torch.Tensor:
    """What a converter computes of the rope of a directory: by how much each frequency is divided."""
    info = model_info.load(resolved(model_path=str(original)))
    found = torch.tensor(decoder_spec(info).ropes[0].frequencies)
    theta = info.config["rope_parameters"]["rope_theta"]
    return theta ** -(torch.arange(len(found)) / len(found)) / found


def test_the_frequencies_of_llama_3_are_known_by_their_tensor(tmp_path: Path) -> None:
    rope = {**LLAMA3, "rope_theta": 500000.0, "original_max_position_embeddings": 8192}
    original = tiny.build("llama", tmp_path / "original", rope_parameters=rope, max_position_embeddings=16384)
    vectors = {"rope_freqs.weight": divisors(original)}
    assert differences(original, gguf_files.convert(original, tmp_path / "model.gguf", vectors=vectors)) == []


def test_other_frequencies_are_divided_as_their_tensor_says(tmp_path: Path) -> None:
    rope = {**LLAMA3, "rope_theta": 500000.0, "original_max_position_embeddings": 64}
    original = tiny.build("llama", tmp_path / "original", rope_parameters=rope)
    vectors = {"rope_freqs.weight": divisors(original)}
    gguf_files.convert(original, tmp_path / "model.gguf", vectors=vectors)
    made = gguf_directory.described(tmp_path / "model.gguf", tmp_path, tokenizer=True)
    ropes = [decoder_spec(model_info.load(resolved(model_path=str(path)))).ropes[0] for path in (original, made)]
    torch.testing.assert_close(*(torch.tensor(rope.frequencies) for rope in ropes), rtol=1e-5, atol=0)
    assert ropes[0].factor == ropes[1].factor == 1.0


@pytest.mark.parametrize("attention", [None, 1.3])
def test_both_lists_of_factors_of_phi_3_are_read(attention: float | None, tmp_path: Path) -> None:
    rope: dict[str, Any] = {"rope_type": "longrope", "long_factor": LONG, "short_factor": SHORT, "rope_theta": 10000.0}
    if attention:
        rope["attention_factor"] = attention
    original = tiny.build("phi3", tmp_path / "original", rope_parameters=rope, original_max_position_embeddings=64)
    vectors = {f"rope_factors_{name}.weight": torch.tensor(rope[f"{name}_factor"]) for name in ("long", "short")}
    more: dict[str, Any] = {"phi3__rope__scaling__original_context_length": 64}
    if attention:
        more["phi3__rope__scaling__attn_factor"] = attention
    file = gguf_files.convert(original, tmp_path / "model.gguf", vectors=vectors, **more)
    assert differences(original, file) == []
    del vectors["rope_factors_long.weight"]
    file = gguf_files.convert(original, tmp_path / "model.gguf", vectors=vectors, **more)
    with pytest.raises(StartupError, match="has only one of rope_factors_long"):
        differences(original, file)


@pytest.mark.parametrize("values", [[1.0, float("nan")], [1.0, -1.0], [0.0, 1.0], [float("inf"), 1.0]])
def test_factors_that_are_no_positive_numbers_are_refused(values: list[float], tmp_path: Path) -> None:
    original = tiny.build("llama", tmp_path / "original")
    file = gguf_files.convert(original, tmp_path / "model.gguf", vectors={"rope_freqs.weight": torch.tensor(values)})
    with pytest.raises(StartupError, match="the factors of the rotary frequencies must be positive numbers"):
        differences(original, file)


def test_blocks_are_served_by_every_native_family(tmp_path: Path) -> None:
    for family in ("llama", "qwen3_moe", "gemma3"):
        original, made = both(family, tmp_path / family, gguf_files.Q8_0, hidden_size=64, intermediate_size=96)
        loaded = [serve(directory, dtype="float32") for directory in (original, made)]
        for name in differing(*loaded):
            first, second = (model.weights.view(name) for model in loaded)
            torch.testing.assert_close(first, second, rtol=0, atol=0.02)


@pytest.mark.parametrize("family", ["gemma3n", "gemma4", "gemma4_moe"])
def test_a_file_of_8_bits_gives_the_logits_of_transformers_with_its_values(family: str, tmp_path: Path) -> None:
    made = both(family, tmp_path, gguf_files.Q8_0)[1]
    peer = tiny.random_model(family)
    with torch.no_grad():
        for tensor in peer.state_dict().values():
            if tensor.dim() > 1 and tensor.shape[-1] % 32 == 0:
                tensor.copy_(gguf_files.rounded_q8_0(tensor))
        expected = peer(torch.tensor([prompt()])).logits[0]
    found = DenseRunner(serve(made, dtype="float32")).feed([prompt()])
    assert torch.equal(found.argmax(-1), expected.argmax(-1))
    difference = (found.log_softmax(-1) - expected.log_softmax(-1)).abs().max()
    assert difference <= TOLERANCE


@pytest.mark.parametrize("family", ["gemma3n", "gemma4"])
def test_keys_of_layers_that_read_others_are_left_out(family: str, tmp_path: Path) -> None:
    original = tiny.build(family, tmp_path / "original")
    vectors = {f"blk.4.attn_{part}.weight": torch.ones(3, 5) for part in ("k", "v", "k_norm")}
    file = gguf_files.convert(original, tmp_path / "model.gguf", vectors=vectors)
    assert serve(gguf_directory.described(file, tmp_path, tokenizer=True), dtype="float32")


@pytest.mark.parametrize(
    ("key", "value"),
    [("feed_forward_length", [96, 96, 96, 96, 64]), ("attention.head_count_kv", [2, 2, 2, 3, 2])],
)
def test_sizes_by_layer_that_gemma_4_cannot_have_are_refused(key: str, value: list[int], tmp_path: Path) -> None:
    original = tiny.build("gemma4", tmp_path / "original")
    more = {f"gemma4__{key.replace('.', '__')}": value}
    file = gguf_files.convert(original, tmp_path / "model.gguf", **more)
    with pytest.raises(StartupError, match=f"gemma4.{key} is"):
        gguf_directory.described(file, tmp_path, tokenizer=True)


@pytest.mark.parametrize(("pattern", "types"), [([True, False], "sf"), ([True, True], "ss"), (1, "ff"), (None, "ss")])
def test_the_layers_of_gemma_3_slide_as_the_file_says(pattern: Any, types: str, tmp_path: Path) -> None:
    original = tiny.build("gemma3", tmp_path / "original")
    more = {} if pattern is None else {"gemma3__attention__sliding_window_pattern": pattern}
    made = gguf_directory.described(gguf_files.convert(original, tmp_path / "a.gguf", **more), tmp_path, tokenizer=True)
    found = model_info.load(resolved(model_path=str(made))).config["layer_types"]
    assert "".join(kind[0] for kind in found) == types
