"""Encoders: BERT, RoBERTa and XLM-R, ELECTRA, DistilBERT, ModernBERT, as vectors or under a classification head."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

from quartet.scheduler_service.model.encoder_spec import EncoderLayerSpec, EncoderNames, EncoderSpec
from quartet.scheduler_service.model.rope import rope_parameters, rope_spec
from quartet.scheduler_service.model.spec import HeadLayer, require

Config = dict[str, Any]
Tensors = Collection[str]  # names in the checkpoint; empty where there is none
EncoderFamily = Callable[[Config, int, Tensors], EncoderSpec]

OLDEST_NORM = ("gamma", "beta")
ROBERTA_PAD = 1
OTHER_HEADS = (
    "cls.",
    "lm_head.",
    "lm_predictions.",
    "mask_predictions.",
    "discriminator_predictions.",
    "vocab_",
    "head.",
    "decoder.",
    "classifier.",
    "pre_classifier.",
)

BERT_NAMES = EncoderNames()
DISTIL_NAMES = EncoderNames(
    layer="transformer.layer.{}.",
    qkv=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
    output="attention.out_lin",
    attention_norm="sa_layer_norm",
    up=("ffn.lin1",),
    down="ffn.lin2",
    mlp_norm="output_layer_norm",
)
MODERN_NAMES = EncoderNames(
    words="embeddings.tok_embeddings",
    embedding_norm="embeddings.norm",
    final_norm="final_norm",
    layer="layers.{}.",
    qkv=("attn.Wqkv",),
    output="attn.Wo",
    attention_norm="attn_norm",
    up=("mlp.Wi",),
    down="mlp.Wo",
    mlp_norm="mlp_norm",
)


def bert(config: Config, labels: int, tensors: Tensors) -> EncoderSpec:
    """BertModel, BertForSequenceClassification."""
    return EncoderSpec(**bert_like(config, tensors, "bert."), head=bert_head(config, labels, "bert."))


def colbert(config: Config, labels: int, tensors: Tensors) -> EncoderSpec:
    """Stanford's ColBERT: BERT with one more matrix, which is no part of it."""
    require(config, {"model_type": "bert"})
    return bert(config, labels, tensors)


def roberta(config: Config, labels: int, tensors: Tensors) -> EncoderSpec:
    """RobertaModel, XLMRobertaModel, CamembertModel and their classifiers: positions begin behind the padding id."""
    fields = bert_like(config, tensors, "roberta.")
    first = config.get("pad_token_id", ROBERTA_PAD) + 1
    return EncoderSpec(**fields, first_position=first, head=roberta_head(config, labels))


def electra(config: Config, labels: int, tensors: Tensors) -> EncoderSpec:
    """ElectraModel, ElectraForSequenceClassification, where embeddings are as wide as hidden states."""
    require(config, {"embedding_size": config["hidden_size"]})
    return EncoderSpec(**bert_like(config, tensors, "electra."), head=roberta_head(config, labels, "gelu"))


def distilbert(config: Config, labels: int, tensors: Tensors) -> EncoderSpec:
    """DistilBertModel, DistilBertForSequenceClassification."""
    size = config["dim"]
    prefix = prefix_of(tensors, ("distilbert.",), DISTIL_NAMES.words)
    head = (
        HeadLayer(name="pre_classifier", inputs=size, outputs=size, activation="relu"),
        HeadLayer(name="classifier", inputs=size, outputs=labels),
    )
    return EncoderSpec(
        vocab_size=config["vocab_size"],
        hidden_size=size,
        intermediate_size=config["hidden_dim"],
        layers=(EncoderLayerSpec(),) * config["n_layers"],
        heads=config["n_heads"],
        norm_epsilon=1e-12,
        activation=config.get("activation", "gelu"),
        positions=config["max_position_embeddings"],
        names=DISTIL_NAMES,
        prefix=prefix,
        head=head if labels else (),
        ignored=unused(tensors, prefix),
    )


def modernbert(config: Config, labels: int, tensors: Tensors) -> EncoderSpec:
    """ModernBertModel, ModernBertForSequenceClassification: rotary positions, and local attention in most layers."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    prefix = prefix_of(tensors, ("model.",), MODERN_NAMES.words)
    head = modern_head(config, labels)
    types = layer_types(config)
    thetas = {"full_attention": "global_rope_theta", "sliding_attention": "local_rope_theta"}
    ropes = [
        rope_spec(rope_parameters(config, kind, config.get(theta) or default), hidden // heads, 0)
        for (kind, theta), default in zip(thetas.items(), (160_000.0, 10_000.0), strict=True)
    ]
    half = config.get("local_attention", 128) // 2
    layers = [
        EncoderLayerSpec(half if kind == "sliding_attention" else None, list(thetas).index(kind), place > 0)
        for place, kind in enumerate(types)
    ]
    return EncoderSpec(
        vocab_size=config["vocab_size"],
        hidden_size=hidden,
        intermediate_size=int(config["intermediate_size"]),
        layers=tuple(layers),
        heads=heads,
        norm_epsilon=config.get("norm_eps", 1e-5),
        activation=config.get("hidden_activation", "gelu"),
        ropes=tuple(ropes),
        norm_first=True,
        gated=True,
        attention_bias=bool(config.get("attention_bias")),
        up_bias=bool(config.get("mlp_bias")),
        down_bias=bool(config.get("mlp_bias")),
        norm_bias=bool(config.get("norm_bias")),
        names=MODERN_NAMES,
        prefix=prefix,
        head=head,
        ignored=unused(tensors, prefix),
    )


def layer_types(config: Config) -> list[str]:
    """By name where the config has them, else every third layer is global."""
    every = config.get("global_attn_every_n_layers", 3)
    by_rule = ["sliding_attention" if i % every else "full_attention" for i in range(config["num_hidden_layers"])]
    return config.get("layer_types") or by_rule


def bert_like(config: Config, tensors: Tensors, prefix: str) -> dict[str, Any]:
    """The fields that BERT and RoBERTa read alike."""
    require(config, {"position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False})
    prefix = prefix_of(tensors, (prefix,), BERT_NAMES.words)
    oldest = any(name.endswith("LayerNorm.gamma") for name in tensors)
    return {
        "vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "intermediate_size": config["intermediate_size"],
        "layers": (EncoderLayerSpec(),) * config["num_hidden_layers"],
        "heads": config["num_attention_heads"],
        "norm_epsilon": config.get("layer_norm_eps", 1e-12),
        "activation": config.get("hidden_act", "gelu"),
        "positions": config["max_position_embeddings"],
        "token_types": config.get("type_vocab_size", 2),
        "names": EncoderNames(norm=OLDEST_NORM) if oldest else BERT_NAMES,
        "prefix": prefix,
        "ignored": unused(tensors, prefix),
    }


def bert_head(config: Config, labels: int, prefix: str) -> tuple[HeadLayer, ...]:
    """BERT's classifier: its pooler belongs to the encoder. Empty for a model without labels."""
    size = config["hidden_size"]
    if not labels:
        return ()
    return (
        HeadLayer(name=f"{prefix}pooler.dense", inputs=size, outputs=size, activation="tanh"),
        HeadLayer(name="classifier", inputs=size, outputs=labels),
    )


def roberta_head(config: Config, labels: int, activation: str = "tanh") -> tuple[HeadLayer, ...]:
    """RoBERTa's classifier; empty for a model without labels."""
    size = config["hidden_size"]
    if not labels:
        return ()
    return (
        HeadLayer(name="classifier.dense", inputs=size, outputs=size, activation=activation),
        HeadLayer(name="classifier.out_proj", inputs=size, outputs=labels),
    )


def modern_head(config: Config, labels: int) -> tuple[HeadLayer, ...]:
    """ModernBERT's classifier; empty for a model without labels."""
    size = config["hidden_size"]
    if not labels:
        return ()
    dense = HeadLayer(
        name="head.dense",
        inputs=size,
        outputs=size,
        bias=bool(config.get("classifier_bias")),
        activation=config.get("classifier_activation", "gelu"),
        norm="head.norm",
        norm_bias=bool(config.get("norm_bias")),
        norm_epsilon=config.get("norm_eps", 1e-5),
    )
    return dense, HeadLayer(name="classifier", inputs=size, outputs=labels)


def prefix_of(tensors: Tensors, prefixes: Sequence[str], words: str) -> str:
    """Models saved under a head name their encoder before each tensor, bare ones do not."""
    return next((prefix for prefix in prefixes if f"{prefix}{words}.weight" in tensors), "")


def unused(tensors: Tensors, prefix: str) -> frozenset[str]:
    """Tensors that vectors are made without: language-model heads, poolers, buffers of position numbers."""
    always = {f"{prefix}{name}" for name in ("pooler.dense.weight", "pooler.dense.bias", "embeddings.position_ids")}
    return frozenset(always.union(name for name in tensors if name.startswith(OTHER_HEADS)))
