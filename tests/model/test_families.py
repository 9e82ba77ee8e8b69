"""Every native family gives transformers' numbers in float32, on small random models read from disk."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quartet.runtime.config import ServerConfig
from quartet.runtime.errors import StartupError
from quartet.runtime.model_files import model_info
from quartet.scheduler_service.model.batch import ServedModel
from quartet.scheduler_service.model.decoder import Decoder
from quartet.scheduler_service.model.registry import decoder_spec
from quartet.scheduler_service.model.spec import NotNative
from quartet.scheduler_service.weights.formats import checkpoint_of
from quartet.scheduler_service.weights.staging import check_checkpoint
from tests import checkpoints
from tests.model import parity, tiny
from tests.model.dense import DenseRunner, serve

NATIVE = parity.FAMILIES
MOE = ["qwen2_moe", "qwen3_moe", "mixtral", "gpt_oss"]
LENGTH = 60  # longer than the sliding windows of tiny models
TOLERANCE = 1e-4
LINEAR_TOLERANCE = 3e-4  # of linear attention, whose sums over 64 tokens are taken in another order than transformers'

STRETCHED: dict[str, Any] = {  # as DeepSeek V3's, with other numbers for scores and for cosines
    "rope_type": "yarn",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
}
VARIATIONS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 24}),
    ("mistral", {"sliding_window": None, "head_dim": 32}),
    ("qwen2", {"tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}),
    ("qwen3", {"tie_word_embeddings": True, "attention_bias": True}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 0}),
    ("phi3", {"sliding_window": 24, "tie_word_embeddings": True}),
    ("phi3", {"partial_rotary_factor": 0.75, "num_attention_heads": 2}),
    ("gemma2", {"tie_word_embeddings": False, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0}),
    ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    ("gemma3", {"tie_word_embeddings": False, "final_logit_softcapping": 5.0, "num_hidden_layers": 4}),
    (
        "gemma3n",
        {"num_kv_shared_layers": 0, "altup_active_idx": 1, "altup_correct_scale": False, "altup_num_inputs": 3},
    ),
    ("gemma3n", {"layer_types": None, "num_kv_shared_layers": 0, "tie_word_embeddings": False}),
    ("gemma4", {"num_kv_shared_layers": 0, "attention_k_eq_v": True, "num_global_key_value_heads": 1}),
    ("gemma4", {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "attention_bias": True}),
    ("gemma4_moe", {"attention_k_eq_v": False, "hidden_size_per_layer_input": 16}),
    ("qwen2_moe", {"norm_topk_prob": True, "decoder_sparse_step": 2, "num_hidden_layers": 4}),
    ("qwen3_moe", {"norm_topk_prob": False, "mlp_only_layers": [1], "num_hidden_layers": 3}),
    ("mixtral", {"sliding_window": 24, "tie_word_embeddings": True}),
    ("olmo2", {"attention_bias": True, "num_key_value_heads": 4}),
    ("olmo3", {"sliding_window": 24, "layer_types": None, "num_hidden_layers": 5}),
    ("smollm3", {"use_sliding_window": True, "sliding_window": 24, "attention_bias": True, "mlp_bias": True}),
    ("granite", {"attention_multiplier": 0.2, "residual_multiplier": 0.22, "embedding_multiplier": 12.0}),
    ("granite", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("seed_oss", {"attention_out_bias": True, "mlp_bias": True}),
    ("exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 2}),
    ("exaone4", {"layer_types": None, "sliding_window_pattern": 4, "num_hidden_layers": 5}),
    ("ministral3", {"sliding_window": 24}),
    ("cohere2", {"attention_bias": True, "tie_word_embeddings": True, "layer_types": None, "num_hidden_layers": 5}),
    ("ernie4_5", {"use_bias": True, "tie_word_embeddings": True}),
    ("glm4", {"attention_bias": False}),
    (
        "glm4_moe",
        {"use_qk_norm": False, "attention_bias": True, "n_group": 1, "topk_group": 1, "norm_topk_prob": False},
    ),
    ("glm4_moe", {"first_k_dense_replace": 0, "n_shared_experts": 2}),
    ("minimax_m2", {"rotary_dim": 16}),
    ("deepseek_v2", {"topk_method": "greedy", "q_lora_rank": None, "first_k_dense_replace": 0}),
    ("deepseek_v3", {"rope_parameters": STRETCHED, "rope_interleave": False}),
    ("deepseek_v3", {"q_lora_rank": None, "attention_bias": True, "n_group": 1, "topk_group": 1}),
    ("granite_hybrid", {"num_local_experts": 0, "position_embedding_type": "rope"}),
    ("granite_hybrid", {"num_local_experts": 0, "layer_types": ["full_attention"] * 3}),
    ("granite_hybrid", {"mamba_proj_bias": True, "mamba_conv_bias": False, "attention_bias": True}),
    ("bamba", {"attention_bias": True, "mlp_bias": True, "mamba_n_groups": 1, "time_step_limit": (0.1, 1.0)}),
    ("falcon_h1", {"mamba_rms_norm": True, "mamba_norm_before_gate": False}),
    ("falcon_h1", {"mamba_rms_norm": True, "mamba_norm_before_gate": True, "tie_word_embeddings": True}),
    ("llama4", {"num_experts_per_tok": 2, "use_qk_norm": False, "attention_bias": True, "moe_layers": None}),
    ("llama4", {"no_rope_layers": None, "num_hidden_layers": 5, "attn_temperature_tuning": False}),
    (
        "olmo_hybrid",
        {"linear_allow_neg_eigval": False, "rope_parameters": {"rope_type": "default", "rope_theta": None}},
    ),
    ("kimi_linear", {"q_lora_rank": 24, "attention_bias": True, "num_local_experts": 4, "mlp_layer_types": None}),
    ("nemotron_h", {"use_bias": True, "mlp_bias": True, "layer_types": ["full_attention", "mlp"]}),
    ("gpt_oss", {"attention_bias": False, "tie_word_embeddings": True, "rope_parameters": None}),
]

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
ROPES: list[dict[str, Any]] = [
    {"rope_type": "linear", "factor": 3.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    YARN,
    {**YARN, "attention_factor": 0.7},
    {**YARN, "mscale": 0.9, "mscale_all_dim": 0.4, "beta_fast": 16, "beta_slow": 2},
    {**YARN, "truncate": False},
]


def prompt(seed: int = 1, length: int = LENGTH) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, tiny.VOCAB_SIZE, (length,), generator=generator).tolist()


@torch.inference_mode()
def expected_logits(family: str, ids: list[int], **overrides: Any) -> torch.Tensor:
    return tiny.random_model(family, **overrides)(torch.tensor([ids])).logits[0].float()


def served(family: str, directory: Path, **overrides: Any) -> ServedModel:
    return serve(tiny.build(family, directory, **overrides))


def assert_parity(model: ServedModel, family: str, **overrides: Any) -> None:
    ids = prompt()
    expected = expected_logits(family, ids, **overrides)
    assert expected.std() > 0.3, "degenerate model"
    assert (DenseRunner(model).feed([ids]) - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("family", NATIVE)
def test_whole_prompt_gives_the_logits_of_transformers(family: str, tmp_path: Path) -> None:
    model = served(family, tmp_path)
    assert isinstance(model, Decoder)
    assert_parity(model, family)


@pytest.mark.parametrize("family", NATIVE)
def test_chunks_and_single_tokens_beside_another_sequence_give_the_same_logits(family: str, tmp_path: Path) -> None:
    ids, other = prompt(), prompt(seed=2, length=40)
    runner = DenseRunner(served(family, tmp_path))
    first = runner.feed([ids[:30], other[:17]])
    steps = [runner.feed([[ids[at]], [other[at - 13]]]) for at in range(30, 40)]
    last = runner.feed([ids[40:], other[27:]])
    found = torch.cat([first[:30], *[step[:1] for step in steps], last[:20]])
    beside = torch.cat([first[30:], *[step[1:] for step in steps], last[20:]])
    most = (
        LINEAR_TOLERANCE
        if family in ("qwen3_next", "qwen3_5", "qwen3_5_moe", "olmo_hybrid", "kimi_linear")
        else TOLERANCE
    )
    assert (found - expected_logits(family, ids)).abs().max() <= most
    assert (beside - expected_logits(family, other)).abs().max() <= most


@pytest.mark.parametrize(("family", "overrides"), VARIATIONS)
def test_variations_of_a_family_are_followed(family: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    model = served(family, tmp_path, **overrides)
    assert isinstance(model, Decoder)
    assert_parity(model, family, **overrides)


@pytest.mark.parametrize("factor", [2.0, 3.0])
def test_a_dynamic_rope_is_that_of_a_sequence_as_long_as_the_context(factor: float, tmp_path: Path) -> None:
    rope = {"rope_theta": 5000.0, "rope_type": "dynamic", "factor": factor}
    overrides = {"rope_parameters": rope, "max_position_embeddings": round(LENGTH / factor)}
    assert_parity(served("llama", tmp_path, **overrides), "llama", **overrides)


def test_a_dynamic_rope_is_the_plain_one_in_a_context_that_training_reached(tmp_path: Path) -> None:
    rope = {"rope_theta": 5000.0, "rope_type": "dynamic", "factor": 2.0}
    directory = tiny.build("llama", tmp_path, rope_parameters=rope)
    assert_parity(serve(directory, context_length=512), "llama", rope_parameters=rope)


@pytest.mark.parametrize("rope", ROPES)
def test_rope_variants_of_new_configs(rope: dict[str, Any], tmp_path: Path) -> None:
    overrides = {"rope_parameters": {"rope_theta": 5000.0, **rope}}
    assert_parity(served("llama", tmp_path, **overrides), "llama", **overrides)


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("type_key", ["type", "rope_type"])
def test_rope_variants_of_old_configs(rope: dict[str, Any], type_key: str, tmp_path: Path) -> None:
    overrides = {"rope_parameters": {"rope_theta": 5000.0, **rope}}
    tiny.build("qwen2", tmp_path, **overrides)
    scaling = {type_key: rope["rope_type"], **{key: rope[key] for key in rope if key != "rope_type"}}
    rewrite_config(tmp_path, remove=["rope_parameters"], rope_theta=5000.0, rope_scaling=scaling)
    assert_parity(serve(tmp_path), "qwen2", **overrides)


def test_old_gemma3_config_with_its_two_thetas(tmp_path: Path) -> None:
    tiny.build("gemma3", tmp_path)
    rewrite_config(tmp_path, remove=["rope_parameters", "layer_types"], rope_theta=1e6, rope_local_base_freq=1e4)
    rewrite_config(tmp_path, rope_scaling={"rope_type": "linear", "factor": 4.0}, sliding_window_pattern=2)
    ropes = {
        "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    assert_parity(serve(tmp_path), "gemma3", rope_parameters=ropes)


@pytest.mark.parametrize(("context_length", "length"), [(32, 30), (512, 60)])
def test_longrope_takes_its_factors_by_the_servers_context_length(
    context_length: int, length: int, tmp_path: Path
) -> None:
    factors = {"short_factor": [1.0 + i / 8 for i in range(8)], "long_factor": [2.0 + i for i in range(8)]}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, **factors}
    overrides = {"rope_parameters": rope, "original_max_position_embeddings": 32}
    model = serve(tiny.build("phi3", tmp_path, **overrides), context_length=context_length)
    ids = prompt(length=length)
    found = DenseRunner(model).feed([ids])
    assert (found - expected_logits("phi3", ids, **overrides)).abs().max() <= TOLERANCE


@pytest.mark.parametrize("old_name", ["su", "yarn"])
def test_old_phi3_config_with_longrope_by_another_name(old_name: str, tmp_path: Path) -> None:
    factors = {"short_factor": [1.0 + i / 8 for i in range(8)], "long_factor": [2.0 + i for i in range(8)]}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, **factors}
    overrides = {"rope_parameters": rope, "original_max_position_embeddings": 32}
    tiny.build("phi3", tmp_path, **overrides)
    rewrite_config(tmp_path, remove=["rope_parameters"], rope_theta=1e4, rope_scaling={"type": old_name, **factors})
    assert_parity(serve(tmp_path), "phi3", **overrides)


@pytest.mark.parametrize(
    "family",
    ["llama", "gemma2", "qwen2_moe", "granite", "cohere2", "minimax_m2", "gpt_oss", "deepseek_v3", "falcon_h1"],
)
def test_bfloat16_is_as_close_to_float32_as_transformers_is(family: str, tmp_path: Path) -> None:
    ids = prompt()
    exact = expected_logits(family, ids)
    theirs = (expected_logits(family, ids, dtype=torch.bfloat16) - exact).square().mean().sqrt()
    model = serve(tiny.build(family, tmp_path), dtype="bfloat16")
    found = DenseRunner(model).feed([ids])
    assert found.dtype is torch.float32
    assert (found - exact).square().mean().sqrt() <= 1.5 * theirs


def test_float16_checkpoint_is_served_as_it_is(tmp_path: Path) -> None:
    model = serve(tiny.build("qwen2", tmp_path, dtype=torch.float16))
    assert model.dtype is torch.float16
    ids = prompt()
    assert (DenseRunner(model).feed([ids]) - expected_logits("qwen2", ids)).abs().max() <= 0.05


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gemma3"])
def test_logits_have_the_same_bits_alone_and_in_any_batch(family: str, dtype: str, tmp_path: Path) -> None:
    model = serve(tiny.build(family, tmp_path), dtype=dtype)
    ids = prompt(length=20)
    together = DenseRunner(model).feed([ids, prompt(2), prompt(3), prompt(4, length=3)])[:20]
    alone = DenseRunner(model)
    one_by_one = torch.cat([alone.feed([[token]]) for token in ids])
    assert torch.equal(DenseRunner(model).feed([ids]), together)
    assert (one_by_one - together).abs().max() <= (1e-5 if dtype == "float32" else 0.1)  # the test's attend differs


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_embeddings_given_by_the_request_replace_those_of_its_tokens(family: str, tmp_path: Path) -> None:
    model = served(family, tmp_path)
    assert isinstance(model, Decoder)
    ids = prompt()
    embeds = model.embedding[torch.tensor(ids)] * model.embedding_scale
    mask = torch.arange(LENGTH) < 25
    hidden_ids = [5 if masked else token for token, masked in zip(ids, mask.tolist(), strict=True)]
    found = DenseRunner(model).feed([hidden_ids], embeds=embeds, embeds_mask=mask)
    assert torch.equal(found, DenseRunner(model).feed([ids]))


def test_layers_that_predict_further_tokens_are_left_out(tmp_path: Path) -> None:
    directory = tiny.build("deepseek_v3", tmp_path, num_nextn_predict_layers=1)
    tensors = load_file(directory / "model.safetensors")
    layers = tiny.DEEPSEEK["num_hidden_layers"]
    tensors[f"model.layers.{layers}.eh_proj.weight"] = torch.ones(4, 8)
    save_file(tensors, directory / "model.safetensors")
    model = serve(directory)
    check_checkpoint(checkpoint_of(directory), model.weights)  # it would be taken as an update
    assert_parity(model, "deepseek_v3")


def test_parts_of_qwen3_next_that_predict_further_tokens_are_left_out(tmp_path: Path) -> None:
    directory = tiny.build("qwen3_next", tmp_path)
    tensors = load_file(directory / "model.safetensors")
    save_file({**tensors, "mtp.fc.weight": torch.ones(4, 8)}, directory / "model.safetensors")
    check_checkpoint(checkpoint_of(directory), serve(directory).weights)


def test_latent_attention_with_deterministic_inference_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="--enable-deterministic-inference is not there for the latent attention"):
        serve(tiny.build("deepseek_v3", tmp_path), enable_deterministic_inference=True)


def test_attention_chunks_that_end_within_a_page_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="--page-size 5 does not divide the attention chunks of 32 tokens"):
        serve(tiny.build("llama4", tmp_path), page_size=5)


def test_embeddings_given_to_granite_are_multiplied_as_its_own_are(tmp_path: Path) -> None:
    ids = prompt()
    given = torch.randn(LENGTH, tiny.SHAPE["hidden_size"])
    with torch.inference_mode():
        expected = tiny.random_model("granite")(inputs_embeds=given.unsqueeze(0)).logits[0]
    everywhere = torch.ones(LENGTH, dtype=torch.bool)
    found = DenseRunner(served("granite", tmp_path)).feed([ids], embeds=given, embeds_mask=everywhere)
    assert (found - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("family", MOE)
def test_chosen_experts_are_recorded_for_every_sparse_layer(family: str, tmp_path: Path) -> None:
    recorded: dict[int, torch.Tensor] = {}
    ids = prompt()
    DenseRunner(served(family, tmp_path)).feed([ids], record_experts=recorded.__setitem__)
    with torch.inference_mode():
        output = tiny.random_model(family)(torch.tensor([ids]), output_router_logits=True)
    assert sorted(recorded) == [0, 1]
    for layer, logits in enumerate(output.router_logits):
        expected = logits.view(LENGTH, -1).topk(2, dim=-1).indices
        assert torch.equal(recorded[layer].sort().values, expected.sort().values)


def test_dummy_weights_are_the_same_for_the_same_seed(tmp_path: Path) -> None:
    tiny.build("llama", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    one, two, other = (serve(tmp_path, load_format="dummy", random_seed=seed) for seed in (1, 1, 2))
    name = "model.layers.1.self_attn.k_proj.weight"
    assert one.weights.checksum(name) == two.weights.checksum(name) != other.weights.checksum(name)
    assert abs(one.weights.view(name).std().item() - 0.02) < 0.002


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"dtype": "int3"}, "--dtype int3 is unknown"),
        ({"load_format": "layered"}, "--load-format layered is unknown"),
    ],
)
def test_unknown_settings_are_named(settings: dict[str, str], complaint: str, tmp_path: Path) -> None:
    tiny.build("llama", tmp_path)
    with pytest.raises(StartupError, match=complaint):
        serve(tmp_path, **settings)


def test_quantized_and_incomplete_configs_are_refused_in_one_line(tmp_path: Path) -> None:
    tiny.build("llama", tmp_path)
    rewrite_config(tmp_path, quantization_config={"quant_method": "hqq"})
    with pytest.raises(StartupError, match="is quantized by hqq, which is not read"):
        serve(tmp_path)
    rewrite_config(tmp_path, remove=["quantization_config", "num_attention_heads"])
    with pytest.raises(StartupError, match="does not describe a LlamaForCausalLM: num_attention_heads is missing"):
        serve(tmp_path)


def rewrite_config(directory: Path, remove: list[str] | None = None, **values: Any) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    for name in remove or []:
        config.pop(name)
    path.write_text(json.dumps({**config, **values}))


@pytest.mark.parametrize("sizes", [{"intermediate_size": [96, 48]}, {"num_key_value_heads": [1, 2]}])
def test_a_model_whose_layers_differ_in_size_is_not_for_our_layers(sizes: dict[str, Any], tmp_path: Path) -> None:
    directory = checkpoints.write_config(tmp_path / "model", **sizes)
    with pytest.raises(NotNative, match="layers differ in size"):
        decoder_spec(model_info.load(ServerConfig(model_path=str(directory))))
