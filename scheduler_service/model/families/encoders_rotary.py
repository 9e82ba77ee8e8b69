"""Encoders with rotary positions beside ModernBERT: nomic, GTE, jina v3 and EuroBERT.

Checkpoints are in their makers' layout, or in that of transformers; the tensors tell.
"""

from dataclasses import replace
from typing import Any

from quartet.scheduler_service.model.encoder_spec import EncoderLayerSpec, EncoderMoe, EncoderNames, EncoderSpec
from quartet.scheduler_service.model.families.encoders import (
    Config,
    Tensors,
    bert_head,
    prefix_of,
    roberta_head,
    unused,
)
from quartet.scheduler_service.model.rope import rope_parameters, rope_spec
from quartet.scheduler_service.model.spec import HeadLayer, RopeSpec, require

PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
NAMES = EncoderNames(
    layer="layers.{}.",
    qkv=PROJECTIONS,
    output="self_attn.o_proj",
    attention_norm="post_attention_layernorm",
    up=("mlp.gate_proj", "mlp.up_proj"),
    down="mlp.down_proj",
    mlp_norm="post_mlp_layernorm",
)
NOMIC_NAMES = EncoderNames(
    embedding_norm="emb_ln",
    layer="encoder.layers.{}.",
    qkv=("attn.Wqkv",),
    output="attn.out_proj",
    attention_norm="norm1",
    up=("mlp.fc12", "mlp.fc11"),
    down="mlp.fc2",
    mlp_norm="norm2",
)
NOMIC_PLAIN_NAMES = replace(NOMIC_NAMES, up=("mlp.fc1",))  # without a gate
GTE_NAMES = EncoderNames(
    qkv=("attention.qkv_proj",),
    output="attention.o_proj",
    attention_norm="attn_ln",
    up=("mlp.up_gate_proj",),
    down="mlp.down_proj",
    mlp_norm="mlp_ln",
)
JINA_NAMES = EncoderNames(
    embedding_norm="emb_ln",
    layer="encoder.layers.{}.",
    qkv=("mixer.Wqkv",),
    output="mixer.out_proj",
    attention_norm="norm1",
    up=("mlp.fc1",),
    down="mlp.fc2",
    mlp_norm="norm2",
)
JINA_NEW_NAMES = EncoderNames(
    layer="layers.{}.",
    qkv=PROJECTIONS,
    output="self_attn.o_proj",
    attention_norm="post_attention_layernorm",
    up=("mlp.fc1",),
    down="mlp.fc2",
    mlp_norm="post_mlp_layernorm",
)
BESIDE_ADAPTERS = "parametrizations.weight.original"  # a weight, where its makers keep adapters beside it
EURO_NAMES = EncoderNames(
    words="embed_tokens",
    final_norm="norm",
    layer="layers.{}.",
    qkv=PROJECTIONS,
    output="self_attn.o_proj",
    attention_norm="input_layernorm",
    up=("mlp.gate_proj", "mlp.up_proj"),
    down="mlp.down_proj",
    mlp_norm="post_attention_layernorm",
)
NOMIC_FIELDS = {  # as nomic's own configs call them
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_inner": "intermediate_size",
    "n_layer": "num_hidden_layers",
    "layer_norm_epsilon": "layer_norm_eps",
    "rotary_emb_base": "rope_theta",
}
NOMIC_SWITCHES = {
    "rotary_emb_fraction": 1.0,
    "rotary_emb_interleaved": False,
    "prenorm": False,
    "use_rms_norm": False,
    "parallel_block": False,
    "expert_choice_router": False,
    "num_shared_experts": 0,
    "moe_normalize_expert_weights": False,
}
NOMIC_GATED = {"qkv_proj_bias": False, "mlp_fc1_bias": False, "mlp_fc2_bias": False, "moe_every_n_layers": 0}


def nomic(config: Config, labels: int, tensors: Tensors) -> EncoderSpec:
    """NomicBertModel, NomicBertForSequenceClassification: nomic-embed-text v1, v1.5 and, with experts, v2."""
    require({name: value for name, value in config.items() if value is not None}, NOMIC_SWITCHES)
    config = {**config, **{name: config[own] for own, name in NOMIC_FIELDS.items() if config.get(own) is not None}}
    activation = config.get("activation_function") or config.get("hidden_act") or "silu"
    gated = config.get("activation_function") != "gelu"
    if gated:
        require(config, NOMIC_GATED)
    prefix = prefix_of(tensors, ("nomic_bert.", "bert."), NAMES.words)
    fields = shape(config, 1000.0)
    moe = nomic_experts(config)
    if moe is not None:
        step = config["moe_every_n_layers"]
        fields["layers"] = tuple(EncoderLayerSpec(experts=layer % step == 1) for layer in range(len(fields["layers"])))
    return EncoderSpec(
        **fields,
        activation="silu" if activation == "swiglu" else activation,
        gated=gated,
        moe=moe,
        attention_bias=bool(config.get("qkv_proj_bias", not gated)),
        up_bias=bool(config.get("mlp_fc1_bias", not gated)),
        down_bias=bool(config.get("mlp_fc2_bias", not gated)),
        names=names_in(tensors, NOMIC_NAMES, NAMES) if gated else NOMIC_PLAIN_NAMES,
        prefix=prefix,
        head=bert_head(config, labels, prefix or "nomic_bert."),
        ignored=unused(tensors, prefix),
    )


def nomic_experts(config: Config) -> EncoderMoe | None:
    """The mixture of every second or so layer; None: there are no experts."""
    if not config.get("moe_every_n_layers"):
        return None
    experts, top_k = config["num_experts"], config["moe_top_k"]
    if not 1 <= top_k <= experts:
        raise ValueError(f"moe_top_k is {top_k}, and there are {experts} experts")
    return EncoderMoe(experts, top_k)


def gte(config: Config, labels: int, tensors: Tensors) -> EncoderSpec:
    """GteModel, GteForSequenceClassification: gte v1.5, gte-multilingual, arctic-embed-m-v2.0."""
    require(config, {"logn_attention_scale": False, "position_embedding_type": "rope", "layer_norm_type": "layer_norm"})
    prefix = prefix_of(tensors, ("gte.", "new."), NAMES.words)
    names = names_in(tensors, GTE_NAMES, NAMES)
    return EncoderSpec(
        **shape(config, 160_000.0),
        activation=config.get("hidden_act", "gelu"),
        gated=True,
        gate_last=names is GTE_NAMES,
        up_bias=False,
        names=names,
        prefix=prefix,
        head=bert_head(config, labels, prefix or "gte."),
        ignored=unused(tensors, prefix),
    )


def jina(config: Config, labels: int, tensors: Tensors) -> EncoderSpec:
    """JinaEmbeddingsV3Model, JinaEmbeddingsV3ForSequenceClassification."""
    own = replace(JINA_NAMES, weight=BESIDE_ADAPTERS)
    with_adapters = any(name.endswith(f"{own.words}.{own.weight}") for name in tensors)
    words = f"{own.words}.{own.weight}" if with_adapters else f"{own.words}.weight"
    prefix = "roberta." if f"roberta.{words}" in tensors else ""
    theta = config.get("rotary_emb_base") or 20_000.0
    pooler = frozenset(name for name in tensors if ".pooler." in f".{name}")
    return EncoderSpec(
        **shape(config, theta),
        activation=config.get("hidden_act", "gelu"),
        names=own if with_adapters else names_in(tensors, JINA_NAMES, JINA_NEW_NAMES),
        prefix=prefix,
        head=roberta_head(config, labels),
        ignored=unused(tensors, prefix) | pooler,
    )


def eurobert(config: Config, labels: int, tensors: Tensors) -> EncoderSpec:
    """EuroBertModel, EuroBertForSequenceClassification: a decoder of the Llama kind that looks both ways."""
    heads = config["num_attention_heads"]
    require(config, {"head_dim": config["hidden_size"] // heads})
    prefix = prefix_of(tensors, ("model.",), EURO_NAMES.words)
    size = config["hidden_size"]
    head = (
        HeadLayer(name="dense", inputs=size, outputs=size, activation="gelu"),
        HeadLayer(name="classifier", inputs=size, outputs=labels),
    )
    return EncoderSpec(
        **{**shape(config, 10_000.0), "token_types": 0, "norm_epsilon": config.get("rms_norm_eps", 1e-5)},
        kv_heads=config.get("num_key_value_heads") or heads,
        activation=config.get("hidden_act", "silu"),
        norm="rms",
        embedding_norm=False,
        norm_first=True,
        gated=True,
        attention_bias=bool(config.get("attention_bias")),
        up_bias=bool(config.get("mlp_bias")),
        down_bias=bool(config.get("mlp_bias")),
        norm_bias=False,
        names=EURO_NAMES,
        prefix=prefix,
        head=head if labels else (),
        ignored=unused(tensors, prefix),
    )


def shape(config: Config, theta: float) -> dict[str, Any]:
    """The fields that all of them read alike; `theta`: of the rotation, where the config has none."""
    return {
        "vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "intermediate_size": config["intermediate_size"],
        "layers": (EncoderLayerSpec(),) * config["num_hidden_layers"],
        "heads": config["num_attention_heads"],
        "norm_epsilon": config.get("layer_norm_eps", 1e-12),
        "token_types": config.get("type_vocab_size", 0),
        "ropes": (rotation(config, theta),),
    }


def rotation(config: Config, theta: float) -> RopeSpec:
    return rope_spec(rope_parameters(config, None, theta), config["hidden_size"] // config["num_attention_heads"], 0)


def names_in(tensors: Tensors, own: EncoderNames, new: EncoderNames) -> EncoderNames:
    """The makers' names where the checkpoint has them, else those of transformers."""
    fused = f"{own.layer.format(0)}{own.qkv[0]}.weight"
    return own if any(name.endswith(fused) for name in tensors) else new
