"""Values of config.json: what cannot be is refused by name, what models really say is taken."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from quartet.runtime.config import ServerConfig
from quartet.runtime.errors import StartupError
from quartet.runtime.model_files import model_info, model_ranges

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 512,
}
NAN, INFINITE = float("nan"), float("inf")


def loaded(directory: Path, **changes: Any) -> model_info.ModelInfo:
    (directory / "config.json").write_text(json.dumps(CONFIG | changes))
    return model_info.load(ServerConfig(model_path=str(directory)))


BAD: list[tuple[str, Any]] = [
    *(("num_hidden_layers", value) for value in (10**9, -5, 0, 2.5, "2", True, [2], NAN)),
    *(("vocab_size", value) for value in (-1, 0, 10**12, "100", INFINITE)),
    *(("hidden_size", value) for value in (0, -8, 1 << 40)),
    *(("head_dim", value) for value in (0, -1, 1 << 30)),
    *(("num_attention_heads", value) for value in (0, "two", 10**9)),
    *(("num_key_value_heads", value) for value in (0, 3, [2, 0], [2] * 2000)),
    *(("intermediate_size", value) for value in (0, "8", [8, -8], {})),
    *(("max_position_embeddings", value) for value in (0, -1, 1 << 40)),
    *(("rope_theta", value) for value in (0, -1, 1, NAN, INFINITE, "1e4", [1.0])),
    *(("rms_norm_eps", value) for value in (-1e-6, NAN, 5, "1e-6")),
    *(("decoder_sparse_step", value) for value in (0, -1)),
    ("sliding_window", -1),
    ("num_experts", 1 << 40),
    ("partial_rotary_factor", -0.5),
    ("final_logit_softcapping", 0),
    ("tie_word_embeddings", "yes"),
    ("hidden_act", 5),
    ("architectures", 5),
    ("architectures", [5]),
    ("architectures", "LlamaForCausalLM"),
    ("rope_scaling", [1]),
    ("layer_types", ["full_attention"]),
    ("layer_types", "full_attention"),
    ("eos_token_id", {"a": 1}),
    ("eos_token_id", ["</s>"]),
    ("pad_token_id", [1]),
    *(("conv_L_cache", value) for value in (-3, 0, 1, "3", 1 << 40)),
    *(("block_multiple_of", value) for value in (0, "a")),
    *(("full_attention_interval", value) for value in (0, -4)),
    *(("linear_num_value_heads", value) for value in (-4, 0)),
    ("linear_value_head_dim", 1 << 40),
    ("linear_conv_kernel_dim", "4"),
    ("block_ffn_dim_multiplier", "a"),
    ("swiglu_limit", "x"),
    ("rope_interleave", "x"),
]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_group": 3, "topk_group": 1}, "n_group is 3, which does not divide the 8 experts"),
        ({"n_group": 4, "topk_group": 9}, "topk_group is 9, more than n_group, 4"),
        ({"n_group": 8, "topk_group": 1, "num_experts_per_tok": 4}, "topk_group, 1, leaves fewer experts"),
    ],
)
def test_groups_of_experts_must_fit_to_each_other(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=words):
        loaded(tmp_path, n_routed_experts=8, **{"num_experts_per_tok": 2, **changes})


def test_null_is_the_default_where_a_model_cannot_go_without(tmp_path: Path) -> None:
    nulls = dict.fromkeys(("conv_L_cache", "swiglu_limit", "num_attention_heads", "sliding_window"))
    config = loaded(tmp_path, **nulls).config
    assert not {"conv_L_cache", "swiglu_limit", "num_attention_heads"} & config.keys()
    assert config["sliding_window"] is None


@pytest.mark.parametrize(("field", "value"), BAD, ids=[f"{field}={value}"[:40] for field, value in BAD])
def test_a_value_that_cannot_be_is_refused_by_name_in_one_line(field: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=field) as refusal:
        loaded(tmp_path, **{field: value})
    message = str(refusal.value)
    assert "\n" not in message and len(message) < 400 and f"{tmp_path}/config.json: " in message


ROPES: list[tuple[dict[str, Any], str]] = [
    ({"type": "yarn", "factor": -1}, "rope_scaling.factor is -1; it must be a number from 1"),
    ({"type": "linear", "factor": 0}, "rope_scaling.factor"),
    ({"rope_type": "linear", "factor": "2"}, "rope_scaling.factor"),
    ({"rope_type": "yarn", "factor": 2.0, "beta_fast": 0}, "rope_scaling.beta_fast"),
    ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}, "low_freq_factor"),
    ({"rope_type": "longrope", "short_factor": [0.0], "long_factor": [1.0]}, "rope_scaling.short_factor"),
    ({"rope_type": 3}, "rope_scaling.rope_type"),
    ({"full_attention": {"rope_type": "default", "rope_theta": 0}}, "rope_scaling.full_attention.rope_theta"),
]


@pytest.mark.parametrize("form", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(("rope", "said"), ROPES)
def test_ropes_are_checked_in_both_forms(form: str, rope: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=said.replace("rope_scaling", form)):
        loaded(tmp_path, **{form: rope})


def test_a_long_value_is_cut(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="characters") as refusal:
        loaded(tmp_path, hidden_act=["silu" * 100_000])
    assert len(str(refusal.value)) < 500


def test_the_text_part_of_a_model_that_wraps_one_is_looked_at(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="num_hidden_layers is -1"):
        loaded(tmp_path, text_config={"num_hidden_layers": -1})


def test_a_vocabulary_must_be_told(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="vocab_size is not there"):
        loaded(tmp_path, vocab_size=None)


def test_the_ends_of_a_generation_config_are_looked_at(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "<end>"}')
    with pytest.raises(StartupError, match=r"generation_config\.json: eos_token_id is '<end>'"):
        loaded(tmp_path)


def test_sizes_may_differ_by_layer(tmp_path: Path) -> None:
    assert loaded(tmp_path, intermediate_size=[8, 16], num_key_value_heads=[1, 2]).hidden_size == 8


TEXT_MODELS = [
    "llama",
    "qwen3_moe",
    "gemma2",
    "gemma3n_text",
    "gemma4_text",
    "mixtral",
    "phi3",
    "gpt2",
    "bert",
    "deepseek_v3",
    "falcon",
]


@pytest.mark.parametrize("kind", [*TEXT_MODELS, "modernbert", "xlm-roberta", "ernie4_5_vl_moe_text", "gpt_oss", "t5"])
def test_the_configs_that_transformers_writes_are_taken(kind: str) -> None:
    config = json.loads(transformers.CONFIG_MAPPING[kind]().to_json_string(use_diff=False))
    absent = {name for name in model_ranges.NULL_IS_ABSENT if name in config and config[name] is None}
    assert model_ranges.checked(config).keys() == config.keys() - absent


def test_null_counts_as_absent_and_whole_numbers_as_integers(tmp_path: Path) -> None:
    info = loaded(tmp_path, head_dim=None, sliding_window=None, rope_scaling=None, hidden_size=8.0)
    assert info.hidden_size == 8 and type(info.config["hidden_size"]) is int


@pytest.mark.parametrize(
    ("changes", "positions"),
    [
        ({}, 512),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 1024),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, 2048),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, 1024),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, 2048),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}}, 512),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64}}, 512),
        ({"rope_scaling": {"rope_type": "default", "factor": 8.0}}, 512),
        ({"model_type": "gemma3_text", "rope_scaling": {"rope_type": "linear", "factor": 8.0}}, 512),
    ],
)
def test_a_stretched_rope_reaches_further_unless_the_positions_include_it(
    changes: dict[str, Any], positions: int, tmp_path: Path
) -> None:
    assert loaded(tmp_path, **changes).context_length == positions


@pytest.mark.parametrize("content", ["{", "[]", "[" * 100_000, '{"a": "\\ud800'])
def test_a_config_that_is_no_json_object_is_one_line(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(StartupError, match=r"config\.json") as refusal:
        model_info.load(ServerConfig(model_path=str(tmp_path)))
    assert "\n" not in str(refusal.value)


def test_a_huge_config_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(200 << 20)
    with pytest.raises(StartupError, match="is larger than"):
        model_info.load(ServerConfig(model_path=str(tmp_path)))
