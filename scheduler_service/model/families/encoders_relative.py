"""Encoders whose attention knows how far apart two tokens are: MPNet and DeBERTa."""

from dataclasses import replace

from quartet.scheduler_service.model.encoder_spec import (
    DistanceBias,
    DistanceVectors,
    EncoderLayerSpec,
    EncoderNames,
    EncoderSpec,
)
from quartet.scheduler_service.model.families.encoders import Config, Tensors, prefix_of, roberta_head, unused
from quartet.scheduler_service.model.spec import HeadLayer, require

MPNET_NAMES = EncoderNames(
    qkv=("attention.attn.q", "attention.attn.k", "attention.attn.v"),
    output="attention.attn.o",
    attention_norm="attention.LayerNorm",
)
DEBERTA_NAMES = EncoderNames(
    qkv=("attention.self.query_proj", "attention.self.key_proj", "attention.self.value_proj"),
)
DEBERTA1_NAMES = EncoderNames(qkv=("attention.self.in_proj",))
DEBERTA1_SWITCHES = {"relative_attention": True, "talking_head": False, "pos_att_type": ["c2p", "p2c"]}
MPNET_FIRST_POSITION = 2  # whatever the config calls the padding id
DEBERTA_SWITCHES = {"relative_attention": True, "share_att_key": True, "conv_kernel_size": 0, "talking_head": False}
DEBERTA_DEFAULTS = {"relative_attention": False, "share_att_key": False}  # of configs that do not say


def mpnet(config: Config, labels: int, tensors: Tensors) -> EncoderSpec:
    """MPNetModel, MPNetForSequenceClassification: all-mpnet-base-v2 and its kin."""
    bias = DistanceBias()
    require(config, {"relative_attention_num_buckets": bias.classes})
    prefix = prefix_of(tensors, ("mpnet.",), MPNET_NAMES.words)
    return EncoderSpec(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        layers=(EncoderLayerSpec(),) * config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        norm_epsilon=config.get("layer_norm_eps", 1e-12),
        activation=config.get("hidden_act", "gelu"),
        positions=config["max_position_embeddings"],
        first_position=MPNET_FIRST_POSITION,
        relative=bias,
        names=MPNET_NAMES,
        prefix=prefix,
        head=roberta_head(config, labels),
        ignored=unused(tensors, prefix),
    )


def deberta(config: Config, labels: int, tensors: Tensors) -> EncoderSpec:
    """DebertaV2Model, DebertaV2ForSequenceClassification: DeBERTa v2 without its convolution, and v3."""
    require({**DEBERTA_DEFAULTS, **config}, {**DEBERTA_SWITCHES, **widths(config)})
    return debertas(config, labels, tensors, DEBERTA_NAMES)


def deberta1(config: Config, labels: int, tensors: Tensors) -> EncoderSpec:
    """DebertaModel, DebertaForSequenceClassification: the first DeBERTa."""
    given = {"relative_attention": False, **config, "pos_att_type": sorted(kinds_of(config))}
    require(given, {**DEBERTA1_SWITCHES, **widths(config)})
    config = {**config, "norm_rel_ebd": "none", "position_buckets": -1}
    return replace(debertas(config, labels, tensors, DEBERTA1_NAMES), head_by_head=True)


def widths(config: Config) -> Config:
    return {"embedding_size": config["hidden_size"], "pooler_hidden_size": config["hidden_size"]}


def debertas(config: Config, labels: int, tensors: Tensors, names: EncoderNames) -> EncoderSpec:
    """What all of them read alike."""
    size = config["hidden_size"]
    prefix = prefix_of(tensors, ("deberta.",), names.words)
    absolute = config.get("position_biased_input", True)
    head = (
        HeadLayer(name="pooler.dense", inputs=size, outputs=size, activation=config.get("pooler_hidden_act", "gelu")),
        HeadLayer(name="classifier", inputs=size, outputs=labels),
    )
    return EncoderSpec(
        vocab_size=config["vocab_size"],
        hidden_size=size,
        intermediate_size=config["intermediate_size"],
        layers=(EncoderLayerSpec(),) * config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        norm_epsilon=config.get("layer_norm_eps", 1e-7),
        activation=config.get("hidden_act", "gelu"),
        positions=config["max_position_embeddings"] if absolute else 0,
        token_types=config.get("type_vocab_size", 0),
        relative=distances(config),
        names=names,
        prefix=prefix,
        head=head if labels else (),
        ignored=unused(tensors, prefix) | {f"{prefix}embeddings.position_embeddings.weight"},
    )


def kinds_of(config: Config) -> list[str]:
    """What distances meet: "c2p", queries; "p2c", keys."""
    given = config.get("pos_att_type") or []
    return [kind.strip() for kind in given.lower().split("|")] if isinstance(given, str) else list(given)


def distances(config: Config) -> DistanceVectors:
    """How attention counts distances."""
    kinds = kinds_of(config)
    farthest, classes = config.get("max_relative_positions", -1), config.get("position_buckets", -1)
    if farthest < 1:
        farthest = config["max_position_embeddings"]
    norms = [name.strip() for name in str(config.get("norm_rel_ebd") or "").lower().split("|")]
    return DistanceVectors(
        norm="encoder.LayerNorm" if "layer_norm" in norms else "",
        span=classes if classes > 0 else farthest,
        farthest=farthest,
        grows=classes > 0,
        keys="c2p" in kinds,
        queries="p2c" in kinds,
    )
