"""What the metadata of a GGUF file says about the model, as the config.json and generation_config.json it came from.

GGUF names its architectures after their first member: `llama` is also Mistral and, with experts, Mixtral. What the
format leaves out because llama.cpp has it in its code is added here, and for Gemma in gguf_gemma.py.
"""

import math
from collections.abc import Mapping

from quartet.runtime.model_files import model_ranges
from quartet.runtime.model_files.gguf import GgufError, Header, Tensor
from quartet.runtime.model_files.gguf_gemma import gemma2, gemma3, gemma3n, gemma4
from quartet.runtime.model_files.gguf_metadata import ROPE_DIVISORS, Config, Metadata, floats, rows_of
from quartet.runtime.model_files.model_ranges import BadValue
from quartet.runtime.shorten import short

EMBEDDINGS, HEAD = "token_embd.weight", "output.weight"
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # kinds of tokens
ENDS = frozenset(  # control tokens that end an answer, whatever the file calls its end of sequence
    (
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "<|eom_id|>",
        "<|end_of_text|>",
        "<turn|>",
    )
)


FIELDS = {  # key below the architecture → field of config.json
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "rope.freq_base": "rope_theta",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
REQUIRED = ("block_count", "context_length", "embedding_length", "attention.head_count")


def config_of(header: Header) -> Config:
    """The config.json of the model in a file. Raises GgufError, naming the file and the key."""
    metadata = Metadata(header)
    config: Config = {
        "architectures": [metadata.architecture.name],
        "model_type": metadata.architecture.model_type,
        "torch_dtype": dtype_of(header.tensors),
        **{field: metadata.get(key) for key, field in FIELDS.items() if metadata.get(key) is not None},
    }
    for key in REQUIRED:
        if FIELDS[key] not in config:
            raise GgufError(f"{header.file} has no {metadata.name}.{key}")
    config["vocab_size"] = rows_of(header, EMBEDDINGS)
    config["tie_word_embeddings"] = HEAD not in header.tensors
    config = checked(header, config | attention(metadata) | special_ids(header))
    config |= ADDITIONS.get(metadata.architecture.name, nothing)(metadata, config)
    return checked(header, config | rope(metadata, config))


def checked(header: Header, config: Config) -> Config:
    """The config with all values in their ranges. Raises GgufError that names the field."""
    try:
        return model_ranges.checked(config)
    except BadValue as error:
        raise GgufError(f"{header.file}: {error}") from error


def dtype_of(tensors: Mapping[str, Tensor]) -> str:
    """The format to serve in: that of the matrices, bfloat16 where they are quantized."""
    counts: dict[str, int] = {}
    for tensor in tensors.values():
        if len(tensor.shape) > 1:
            counts[tensor.type.name] = counts.get(tensor.type.name, 0) + tensor.nbytes // tensor.type.nbytes
    names = {"F32": "float32", "F16": "float16"}
    return names.get(max(counts, key=counts.__getitem__, default="BF16"), "bfloat16") if counts else "bfloat16"


def attention(metadata: Metadata) -> Config:
    """The size of a head, and which projections have biases. Raises GgufError."""
    key, value = metadata.integer("attention.key_length"), metadata.integer("attention.value_length")
    if None not in (key, value) and key != value:
        raise GgufError(
            f"{metadata.header.file}: keys have {key} values per head and values {value}; they must be as many"
        )
    tensors = metadata.header.tensors
    biased = not {"blk.0.attn_q.bias", "blk.0.attn_output.bias"}.isdisjoint(tensors)
    found: Config = {"attention_bias": biased, "mlp_bias": "blk.0.ffn_up.bias" in tensors}
    rotary = metadata.integer("rope.dimension_count")
    if key is None and rotary is not None and metadata.name == "llama":
        found["head_dim"] = rotary  # of files written before there was attention.key_length
    return found


def nothing(metadata: Metadata, config: Config) -> Config:
    return {}


def mixtral(metadata: Metadata, config: Config) -> Config:
    return {"num_local_experts": metadata.experts, "sliding_window": None}


def qwen_moe(metadata: Metadata, config: Config) -> Config:
    """Experts; qwen3moe makes the chosen ones' weights sum to one, qwen2moe does not."""
    tensors = metadata.header.tensors
    found: Config = {"num_experts": metadata.experts, "norm_topk_prob": metadata.name == "qwen3moe"}
    found |= {"decoder_sparse_step": 1, "mlp_only_layers": [], "qkv_bias": "blk.0.attn_q.bias" in tensors}
    if "moe_intermediate_size" not in config and (experts := tensors.get("blk.0.ffn_gate_exps.weight")):
        found["moe_intermediate_size"] = experts.shape[-2]
    if "shared_expert_intermediate_size" not in config and (shared := tensors.get("blk.0.ffn_gate_shexp.weight")):
        found["shared_expert_intermediate_size"] = shared.shape[0]
    return found


def phi3(metadata: Metadata, config: Config) -> Config:
    """Heads that are rotated in part."""
    head_dim = config.get("head_dim") or max(1, config["hidden_size"] // config["num_attention_heads"])
    return {"partial_rotary_factor": (metadata.integer("rope.dimension_count") or head_dim) / head_dim}


ADDITIONS = {
    "MixtralForCausalLM": mixtral,
    "Qwen2MoeForCausalLM": qwen_moe,
    "Qwen3MoeForCausalLM": qwen_moe,
    "Gemma2ForCausalLM": gemma2,
    "Gemma3ForCausalLM": gemma3,
    "Gemma3nForCausalLM": gemma3n,
    "Gemma4ForCausalLM": gemma4,
    "Phi3ForCausalLM": phi3,
}


def rope(metadata: Metadata, config: Config) -> Config:
    """`rope_scaling`, from the metadata or from tensors of factors. Raises GgufError."""
    if "rope_parameters" in config:
        return {}
    tensors = metadata.header.tensors
    original = metadata.integer("rope.scaling.original_context_length")
    if LONG_FACTORS in tensors or SHORT_FACTORS in tensors:
        return longrope(metadata, config, original or config["max_position_embeddings"])
    if ROPE_DIVISORS in tensors:
        return {"rope_scaling": squeezed(metadata, config)}
    kind = metadata.get("rope.scaling.type") or ("linear" if metadata.get("rope.scale_linear") else "none")
    factor = metadata.number("rope.scaling.factor") or metadata.number("rope.scale_linear")
    if kind == "none" or factor in (None, 1.0):
        return {}
    if kind == "linear":
        return {"rope_scaling": {"rope_type": "linear", "factor": factor}}
    if kind != "yarn":
        raise metadata.misfit("rope.scaling.type", kind)
    optional = {
        "attention_factor": metadata.number("rope.scaling.yarn_attn_factor"),
        "beta_fast": metadata.number("rope.scaling.yarn_beta_fast"),
        "beta_slow": metadata.number("rope.scaling.yarn_beta_slow"),
        "original_max_position_embeddings": original,
    }
    given = {name: value for name, value in optional.items() if value is not None}
    return {"rope_scaling": {"rope_type": "yarn", "factor": factor, **given}}


def longrope(metadata: Metadata, config: Config, original: int) -> Config:
    """Phi 3: a stretch for each pair of dimensions, one list for long contexts and one for short ones."""
    tensors = metadata.header.tensors
    long, short_ones = (tensors.get(name) for name in (LONG_FACTORS, SHORT_FACTORS))
    if long is None or short_ones is None:
        raise GgufError(f"{metadata.header.file} has only one of {LONG_FACTORS} and {SHORT_FACTORS}")
    scaling: Config = {"rope_type": "longrope", "long_factor": floats(long), "short_factor": floats(short_ones)}
    attention_factor = metadata.number("rope.scaling.attn_factor")
    stretch = config["max_position_embeddings"] / max(1, original)
    usual = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 and original > 1 else 1.0
    if attention_factor is not None and not math.isclose(attention_factor, usual, rel_tol=1e-6):
        scaling["attention_factor"] = attention_factor
    return {"rope_scaling": scaling, "original_max_position_embeddings": original}


def squeezed(metadata: Metadata, config: Config) -> Config:
    """The scaling that a tensor of divisors stands for: Llama 3's rule where it fits, else the divisors themselves."""
    divisors = floats(metadata.header.tensors[ROPE_DIVISORS])
    rule = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    scaling = {"rope_type": "llama3", "factor": max(divisors), **rule}
    expected = llama3_divisors(config.get("rope_theta") or 10_000.0, len(divisors), scaling)
    if all(math.isclose(one, other, rel_tol=1e-4) for one, other in zip(divisors, expected, strict=True)):
        return scaling
    return {"rope_type": "longrope", "long_factor": divisors, "short_factor": divisors, "attention_factor": 1.0}


def llama3_divisors(theta: float, pairs: int, scaling: Config) -> list[float]:
    """By how much Llama 3's rule divides the frequency of each pair."""
    low, high, length = (
        scaling[name] for name in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    found = []
    for pair in range(pairs):
        turns = length / (2 * math.pi * theta ** (pair / pairs))  # within the length of pretraining
        blend = min(1.0, max(0.0, (turns - low) / (high - low)))
        found.append(1 / ((1 - blend) / scaling["factor"] + blend))
    return found


def special_ids(header: Header) -> Config:
    """The ids of special tokens that the file names, and of those that end an answer."""
    ids = {
        "bos_token_id": token_id(header, "bos"),
        "pad_token_id": token_id(header, "padding"),
        "eos_token_id": sorted(end_ids(header)) or None,
    }
    return {name: value for name, value in ids.items() if value is not None}


def end_ids(header: Header) -> set[int]:
    """What ends an answer: the file's end of sequence, of turn, of message, and the usual control tokens for it."""
    named = {token_id(header, name) for name in ("eos", "eot", "eom")} - {None}
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    kinds = header.metadata.get("tokenizer.ggml.token_type")
    if not isinstance(tokens, list) or not isinstance(kinds, list):
        return {id for id in named if id is not None}
    known = (
        id for id, (token, kind) in enumerate(zip(tokens, kinds, strict=False)) if kind == CONTROL and token in ENDS
    )
    return {id for id in (*named, *known) if id is not None}


def token_id(header: Header, name: str) -> int | None:
    """The id of `tokenizer.ggml.<name>_token_id`. Raises GgufError for what is none."""
    key = f"tokenizer.ggml.{name}_token_id"
    value = header.metadata.get(key)
    if value is None or value == 0xFFFFFFFF:  # -1: there is none
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise GgufError(f"{header.file}: {key} is {short(value)}, which is no id")
    return value


def generation_config_of(config: Config) -> Config:
    """The generation_config.json beside it."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: config[name] for name in names if name in config}
