"""What llama.cpp has in its code for the generations of Gemma, or writes in its own form, as config.json has it."""

from statistics import NormalDist

from quartet.runtime.model_files.gguf_metadata import ROPE_DIVISORS, Config, Metadata, floats, rows_of

FULL, SLIDING = "full_attention", "sliding_attention"
GEMMA2_27B_LAYERS, GEMMA3_27B_LAYERS = 46, 62  # the models whose queries are scaled by their width
LOCAL_BASE, LOCAL_THETA = "rope.freq_base_swa", 10_000.0
GLOBAL_THETA = 1_000_000.0
SHARED = "attention.shared_kv_layers"
LAYER_EMBEDDINGS = "per_layer_token_embd.weight"
OWN_KEYS = 20  # layers of Gemma 3n with keys of their own, where the file does not say
MOST_DIVISOR = 1e20  # a frequency that is divided by more is none
ACTIVATION: Config = {"hidden_activation": "gelu_pytorch_tanh"}


def gemma2(metadata: Metadata, config: Config) -> Config:
    return gemma(config, period=2, wide=GEMMA2_27B_LAYERS)


def gemma3(metadata: Metadata, config: Config) -> Config:
    found = {**gemma(config, period=6, wide=GEMMA3_27B_LAYERS), **layer_types(metadata, config, 6)}
    return {**found, "rope_local_base_freq": metadata.number(LOCAL_BASE) or LOCAL_THETA}


def gemma(config: Config, period: int, wide: int) -> Config:
    """Every `period`th layer sees the whole context; in models of `wide` layers queries are scaled by the width."""
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    types = [FULL if (layer + 1) % period == 0 else SLIDING for layer in range(layers)]
    scalar = config["hidden_size"] // heads if layers == wide else config.get("head_dim", 256)
    return {"hidden_activation": "gelu_pytorch_tanh", "layer_types": types, "query_pre_attn_scalar": scalar}


def layer_types(metadata: Metadata, config: Config, period: int) -> Config:
    """Which layers slide: a flag for each, or one layer of so many sees the whole context."""
    layers, pattern = config["num_hidden_layers"], metadata.get("attention.sliding_window_pattern")
    if isinstance(pattern, list):
        return {"layer_types": [SLIDING if slides else FULL for slides in pattern]}
    if isinstance(pattern, bool):
        return {"layer_types": [SLIDING if pattern else FULL] * layers}
    period = pattern if isinstance(pattern, int) and pattern > 0 else period
    return {"layer_types": [FULL if (layer + 1) % period == 0 else SLIDING for layer in range(layers)]}


def gemma3n(metadata: Metadata, config: Config) -> Config:
    """Several residual streams, embeddings for each layer, and sparse gates. Raises GgufError."""
    layers, tensors = config["num_hidden_layers"], metadata.header.tensors
    deviations = metadata.by_layer("activation_sparsity_scale", layers)
    shared = shared_layers(metadata)
    found = {
        **ACTIVATION,
        **layer_types(metadata, config, 5),
        "rope_local_base_freq": metadata.number(LOCAL_BASE) or LOCAL_THETA,
        "num_kv_shared_layers": max(0, layers - OWN_KEYS) if shared is None else shared,
        "hidden_size_per_layer_input": metadata.integer("embedding_length_per_layer_input"),
        "vocab_size_per_layer_input": rows_of(metadata.header, LAYER_EMBEDDINGS),
        "altup_num_inputs": metadata.integer("altup.num_inputs"),
        "altup_active_idx": metadata.integer("altup.active_idx"),
        "altup_correct_scale": "blk.0.altup_correct_scale.weight" in tensors,
        "laurel_rank": rows_of(metadata.header, "blk.0.laurel_l.weight"),
        "activation_sparsity_pattern": deviations and [share_below(deviation) for deviation in deviations],
    }
    return {name: value for name, value in found.items() if value is not None}


def share_below(deviation: float) -> float:
    """Of a normal distribution, what lies below so many deviations above its mean; 0.95 for float32's 1.6448536."""
    return round(NormalDist().cdf(deviation), 6)


def shared_layers(metadata: Metadata) -> int | None:
    """How many of the last layers take keys and values from earlier ones. Raises GgufError."""
    value = metadata.number(SHARED)  # a float32 in some files
    if value is not None and not float(value).is_integer():
        raise metadata.misfit(SHARED, value)
    return None if value is None else int(value)


def gemma4(metadata: Metadata, config: Config) -> Config:
    """Layers that differ in size, shared keys and values, embeddings for each layer, experts. Raises GgufError."""
    types = layer_types(metadata, config, 6)["layer_types"]
    size = metadata.integer("embedding_length_per_layer_input") or 0
    found = {
        **ACTIVATION,
        **gemma4_keys(metadata, config, types),
        **gemma4_blocks(metadata, config),
        "layer_types": types,
        "num_kv_shared_layers": shared_layers(metadata) or 0,
        "hidden_size_per_layer_input": size,
        "vocab_size_per_layer_input": rows_of(metadata.header, LAYER_EMBEDDINGS) if size else None,
        "rope_parameters": gemma4_rope(metadata),
    }
    return {name: value for name, value in found.items() if value is not None}


def gemma4_keys(metadata: Metadata, config: Config, types: list[str]) -> Config:
    """The heads of each layer, and whether values of whole layers are made of keys. Raises GgufError."""
    key, heads, tensors = "attention.head_count_kv", config["num_attention_heads"], metadata.header.tensors
    own = metadata.by_layer(key, len(types)) or [heads] * len(types)
    if not all(type(count) is int and 0 < count <= heads and heads % count == 0 for count in own):
        raise metadata.misfit(key, own)
    whole = [layer for layer, kind in enumerate(types) if kind == FULL]
    sizes = {"head_dim": metadata.integer("attention.key_length") or config.get("head_dim", 512)}
    return {
        "head_dim": metadata.integer("attention.key_length_swa") or sizes["head_dim"],
        "num_key_value_heads": next((own[layer] for layer, kind in enumerate(types) if kind == SLIDING), own[0]),
        "per_layer_config": {str(layer): {**sizes, "num_key_value_heads": own[layer]} for layer in whole},
        "attention_k_eq_v": any(
            f"blk.{layer}.attn_k.weight" in tensors and f"blk.{layer}.attn_v.weight" not in tensors for layer in whole
        ),
    }


def gemma4_blocks(metadata: Metadata, config: Config) -> Config:
    """The widths of feed-forward blocks, and experts. Raises GgufError."""
    key, layers = "feed_forward_length", config["num_hidden_layers"]
    found: Config = {}
    if (widths := metadata.by_layer(key, layers)) is not None:
        first, own = widths[0], layers - (shared_layers(metadata) or 0)
        wide = first != widths[-1]
        if wide and widths != [first if layer < own else 2 * first for layer in range(layers)]:
            raise metadata.misfit(key, widths)
        found = {"intermediate_size": first, "use_double_wide_mlp": wide}
    if metadata.experts:
        found |= {"enable_moe_block": True, "num_experts": metadata.experts}
        found["top_k_experts"] = metadata.integer("expert_used_count")
        down = metadata.header.tensors.get("blk.0.ffn_down_exps.weight")
        if "moe_intermediate_size" not in config and down is not None and len(down.shape) == 3:
            found["moe_intermediate_size"] = down.shape[2]
    return found


def gemma4_rope(metadata: Metadata) -> Config:
    """The rotations of both types of layers; of whole ones a part is turned, whose frequencies are not divided away."""
    full: Config = {"rope_type": "proportional", "partial_rotary_factor": 0.25}
    if (divisors := metadata.header.tensors.get(ROPE_DIVISORS)) is not None:
        values = floats(divisors)
        full["partial_rotary_factor"] = sum(value < MOST_DIVISOR for value in values) / max(1, len(values))
    full["rope_theta"] = metadata.number("rope.freq_base") or GLOBAL_THETA
    sliding = {"rope_type": "default", "rope_theta": metadata.number(LOCAL_BASE) or LOCAL_THETA}
    return {FULL: full, SLIDING: sliding}
