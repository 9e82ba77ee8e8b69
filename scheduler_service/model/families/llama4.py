"""Llama 4 (text): attention in chunks, with full attention that knows no positions in every fourth layer."""

from dataclasses import replace

from quartet.scheduler_service.model.families.llama import Config, common, no_rope
from quartet.scheduler_service.model.spec import DecoderSpec, LayerSpec, MoeSpec, Names, QueryScale

NAMES = Names(mlp="feed_forward")
DEFAULTS: Config = {"rms_norm_eps": 1e-5, "head_dim": 128, "num_key_value_heads": 8}
CHUNK = 8192
THETA = 500_000.0


def llama4(config: Config, context_length: int) -> DecoderSpec:
    """Llama4ForCausalLM. Norms of queries and keys have no weights, so they may as well stand before the rotation."""
    config = {**DEFAULTS, **config}
    fields = common(config, context_length, theta=THETA)
    moe = MoeSpec(
        experts=config.get("num_local_experts", 16),
        top_k=config.get("num_experts_per_tok", 1),
        intermediate_size=config["intermediate_size"],
        renormalize=False,
        scoring="sigmoid",
        scales_inputs=True,
        block="feed_forward",
        router="router",
        shared_intermediate_size=config["intermediate_size"],
        shared_gate=False,
    )
    count, step = config["num_hidden_layers"], config.get("interleave_moe_layer_step", 1)
    sparse = config.get("moe_layers")
    sparse = range(step - 1, count, step) if sparse is None else sparse
    period, chunk = config.get("no_rope_layer_interval", 4), config.get("attention_chunk_size", CHUNK)
    turns = config.get("no_rope_layers") or [(layer + 1) % period for layer in range(count)]
    kinds = config.get("layer_types") or ["chunked_attention" if turned else "full_attention" for turned in turns]
    rotated = LayerSpec(unscaled_queries=True, bare_norms=config.get("use_qk_norm", True))
    layers = tuple(
        replace(
            rotated if turned else LayerSpec(rope=1),
            chunk=chunk if kind == "chunked_attention" else None,
            moe=moe if layer in sparse else None,
        )
        for layer, (turned, kind) in enumerate(zip(turns[:count], kinds, strict=True))
    )
    fields |= {
        "layers": layers,
        "intermediate_size": config.get("intermediate_size_mlp", 16384),
        "ropes": (replace(fields["ropes"][0], interleaved=True), no_rope(fields["head_dim"])),
    }
    scale = QueryScale(config.get("attn_scale", 0.1), config.get("floor_scale", 8192), first=1)
    bias = bool(config.get("attention_bias"))
    return DecoderSpec(
        **fields,
        query_scale=scale if config.get("attn_temperature_tuning", True) else None,
        qkv_bias=bias,
        output_bias=bias,
        names=NAMES,
    )
