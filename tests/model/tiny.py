"""Small random models on disk, with a tokenizer, as a server would find them. Needs transformers.

`build("llama", directory, tie_word_embeddings=True)` writes config, weights, tokenizer and generation config.
"""

import re
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.model.cases import VOCAB_SIZE

BOS, EOS, PAD = 0, 1, 2
TEXT = ["the quick brown fox jumps over the lazy dog", "hello world, the capital of France is Paris", "1 2 3 4 5"]

SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    "tie_word_embeddings": False,
}
EXPERTS: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
GEMMA: dict[str, Any] = {"head_dim": 16, "query_pre_attn_scalar": 24, "tie_word_embeddings": True}
PATTERN: dict[str, Any] = {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]}
GLM4_MOE: dict[str, Any] = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.5,
    "use_qk_norm": True,
    "num_hidden_layers": 3,
}
DEEPSEEK: dict[str, Any] = {
    **GLM4_MOE,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
MINIMAX: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "rotary_dim": 8}
GROWING: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 32,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.3,
}
SINKS: dict[str, Any] = {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}

LINEAR: dict[str, Any] = {
    "head_dim": 16,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "num_hidden_layers": 3,
}

SPACE: dict[str, Any] = {
    "mamba_n_heads": 8,
    "mamba_d_state": 16,
    "mamba_n_groups": 2,
    "mamba_expand": 2,
    "num_hidden_layers": 3,
}
GRANITE: dict[str, Any] = {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.7}
FALCON: dict[str, Any] = {
    "mamba_d_ssm": 96,
    "num_hidden_layers": 2,
    "ssm_multipliers": [0.5, 1.5, 0.7, 1.2, 0.8],
    "mlp_multipliers": [0.8, 0.6],
    "ssm_in_multiplier": 1.3,
    "ssm_out_multiplier": 0.7,
    "attention_in_multiplier": 1.2,
    "attention_out_multiplier": 0.9,
    "key_multiplier": 0.6,
    "embedding_multiplier": 2.0,
    "lm_head_multiplier": 0.5,
}
NEMOTRON: dict[str, Any] = {
    "layer_types": ["linear_attention", "mlp", "full_attention", "moe", "linear_attention", "moe"],
    "head_dim": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "n_groups": 2,
    "ssm_state_size": 16,
    "moe_intermediate_size": 48,
    "moe_shared_expert_intermediate_size": 80,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.5,
}

LLAMA4: dict[str, Any] = {
    "head_dim": 16,
    "intermediate_size": 48,
    "intermediate_size_mlp": 96,
    "num_local_experts": 4,
    "moe_layers": [1],
    "no_rope_layers": [1, 0],
    "attention_chunk_size": 32,
    "floor_scale": 16,
}
SHARING: dict[str, Any] = {  # the last two layers read keys and values of the second and the third
    "head_dim": 16,
    "sliding_window": 24,
    "num_hidden_layers": 5,
    "layer_types": [f"{kind}_attention" for kind in ("sliding", "full", "sliding", "sliding", "full")],
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": VOCAB_SIZE,
    "tie_word_embeddings": True,
}
GEMMA3N: dict[str, Any] = {
    **SHARING,
    "intermediate_size": [96, 96, 64, 96, 64],
    "activation_sparsity_pattern": [0.8, 0.0, 0.5, 0.0, 0.0],
    "laurel_rank": 8,
}
GEMMA4: dict[str, Any] = {**SHARING, "global_head_dim": 32, "use_double_wide_mlp": True}
GEMMA4_UNIFIED: dict[str, Any] = {name: value for name, value in GEMMA4.items() if not name.endswith("per_layer_input")}
GEMMA4_MOE: dict[str, Any] = {
    **SHARING,
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 0,
    "global_head_dim": 32,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "enable_moe_block": True,
    "num_experts": 8,
    "top_k_experts": 2,
    "moe_intermediate_size": 48,
}
MIXED_LAYERS = ["linear_attention", "full_attention", "linear_attention"]
KIMI: dict[str, Any] = {
    **{name: DEEPSEEK[name] for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")},
    "num_key_value_heads": 4,
    "num_hidden_layers": 3,
    "layer_types": MIXED_LAYERS,
    "linear_head_dim": 16,
    "linear_num_heads": 4,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
}
OLMO_HYBRID: dict[str, Any] = {
    "num_hidden_layers": 3,
    "layer_types": MIXED_LAYERS,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 16,
}

# family → (config class of transformers, what it has besides SHAPE)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {"sliding_window": 24}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "phi3": ("Phi3Config", {}),
    "gemma": ("GemmaConfig", {"head_dim": 16, "tie_word_embeddings": True}),
    "gemma2": ("Gemma2Config", {**GEMMA, "sliding_window": 24}),
    "gemma3": ("Gemma3TextConfig", {**GEMMA, "sliding_window": 24, "sliding_window_pattern": 2}),
    "gemma3n": ("Gemma3nTextConfig", GEMMA3N),
    "gemma4": ("Gemma4TextConfig", GEMMA4),
    "gemma4_moe": ("Gemma4TextConfig", GEMMA4_MOE),
    "gemma4_unified": ("Gemma4UnifiedTextConfig", GEMMA4_UNIFIED),
    "qwen2_moe": ("Qwen2MoeConfig", {**EXPERTS, "shared_expert_intermediate_size": 80}),
    "qwen3_moe": ("Qwen3MoeConfig", {**EXPERTS, "head_dim": 16, "norm_topk_prob": True}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "lfm2": (
        "Lfm2Config",
        {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3, "tie_embedding": False},
    ),
    "qwen3_next": ("Qwen3NextConfig", {**EXPERTS, **LINEAR, "shared_expert_intermediate_size": 80}),
    "qwen3_5": ("Qwen3_5TextConfig", LINEAR),
    "qwen3_5_moe": ("Qwen3_5MoeTextConfig", {**EXPERTS, **LINEAR, "shared_expert_intermediate_size": 80}),
    "llama4": ("Llama4TextConfig", LLAMA4),
    "kimi_linear": ("KimiLinearConfig", KIMI),
    "olmo_hybrid": ("OlmoHybridConfig", OLMO_HYBRID),
    "bamba": ("BambaConfig", {**SPACE, "attn_layer_indices": [1]}),
    "falcon_h1": ("FalconH1Config", {**SPACE, **FALCON}),
    "granite_hybrid": (
        "GraniteMoeHybridConfig",
        {
            **SPACE,
            **GRANITE,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "num_local_experts": 4,
            "shared_intermediate_size": 80,
        },
    ),
    "nemotron_h": ("NemotronHConfig", NEMOTRON),
    "cohere2": ("Cohere2Config", {"logit_scale": 0.5, **PATTERN}),
    "deepseek_v2": ("DeepseekV2Config", {**DEEPSEEK, "topk_method": "group_limited_greedy", "norm_topk_prob": False}),
    "deepseek_v3": ("DeepseekV3Config", DEEPSEEK),
    "ernie4_5": ("Ernie4_5Config", {"head_dim": 16}),
    "exaone4": ("Exaone4Config", {"head_dim": 16, "sliding_window_pattern": 2, **PATTERN}),
    "glm4": ("Glm4Config", {"head_dim": 16}),
    "glm4_moe_lite": ("Glm4MoeLiteConfig", DEEPSEEK),
    "glm4_moe": ("Glm4MoeConfig", GLM4_MOE),
    "gpt_oss": ("GptOssConfig", {**SINKS, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 24}),
    "granite": ("GraniteConfig", GRANITE),
    "minimax_m2": ("MiniMaxM2Config", MINIMAX),
    "ministral": ("MinistralConfig", {"head_dim": 16, **PATTERN}),
    "ministral3": ("Ministral3Config", {"head_dim": 16, "rope_parameters": GROWING}),
    "olmo2": ("Olmo2Config", {}),
    "olmo3": ("Olmo3Config", PATTERN),
    "seed_oss": ("SeedOssConfig", {"head_dim": 16}),
    "smollm3": ("SmolLM3Config", {"no_rope_layer_interval": 2}),
    # through transformers' own model
    "cohere": ("CohereConfig", {"logit_scale": 0.5}),
    "starcoder2": ("Starcoder2Config", {"sliding_window": None}),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "gpt2": ("GPT2Config", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}),
    "opt": ("OPTConfig", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "olmoe": ("OlmoeConfig", {"num_experts": 4, "num_experts_per_tok": 2}),
    # those that cannot be served
    "bloom": ("BloomConfig", {"n_layer": 2, "n_head": 4}),
    "mamba": ("MambaConfig", {}),
    "bert": ("BertConfig", {}),
}


# family → names that transformers saves → those of released checkpoints
RENAMED: dict[str, dict[str, str]] = {
    "kimi_linear": {r"(layers\.0\.)block_sparse_moe": r"\1mlp"},
    "olmo_hybrid": {r"(layers\.1\.)feedforward_layer_norm": r"\1post_attention_layernorm"},
}


def build(family: str, directory: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> Path:
    """Write a random model of the family with config fields overridden; returns the directory."""
    model = random_model(family, dtype=dtype, seed=seed, **overrides)
    model.save_pretrained(directory)
    if family in RENAMED:
        as_released(directory / "model.safetensors", RENAMED[family])
    save_tokenizer(directory, model.config.vocab_size)
    return directory


def as_released(file: Path, renamed: dict[str, str]) -> None:
    """Undo what transformers does to a checkpoint beyond its own inverse: names, and convolutions cut into thirds."""
    tensors = load_file(file)
    tensors = {
        next((re.sub(old, new, name) for old, new in renamed.items() if re.search(old, name)), name): tensors[name]
        for name in tensors
    }
    for name in [name for name in tensors if name.endswith("q_conv1d.weight")]:
        names = [name.replace("q_conv1d", f"{part}_conv1d") for part in "qkv"]
        sizes = [len(tensors[part.replace("conv1d", "proj")]) for part in names]
        whole = torch.cat([tensors[part] for part in names])
        tensors |= {part: piece.clone() for part, piece in zip(names, whole.split(sizes), strict=True)}
    save_file(tensors, file, metadata={"format": "pt"})


def random_model(
    family: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any
) -> transformers.PreTrainedModel:
    """A random model whose logits differ by whole units, so that its greedy tokens do not hang on rounding."""
    name, extra = FAMILIES[family]
    config = getattr(transformers, name)(**{**SHAPE, **extra, **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        randomize(model)
    return model.to(dtype).eval()


@torch.no_grad()
def randomize(model: torch.nn.Module) -> None:
    """Matrices keep the variance of what passes them; vectors (norms, biases) stray a little from their start."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(torch.randn_like(parameter) * 0.2)
        else:
            parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):  # what experts are chosen with, beside their scores
            buffer.normal_(0.0, 0.3)
        if name.endswith("layer_scalar"):
            buffer.normal_(1.0, 0.2)
    model.get_input_embeddings().weight.normal_(0.0, 0.5)


def save_tokenizer(directory: Path, vocab_size: int) -> None:
    """A byte-level BPE tokenizer: every text can be encoded, and ids up to 3 are special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<bos>", "<eos>", "<pad>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT * 4, trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )
    fast.save_pretrained(directory)
