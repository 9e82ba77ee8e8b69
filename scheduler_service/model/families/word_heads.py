"""The heads by which encoders say what word may stand at a place: from hidden states to the vocabulary.

Their last matrix is that of the word embeddings. Sparse embedders (SPLADE) make weights of words of them.
"""

from collections.abc import Callable
from dataclasses import replace

from quartet.scheduler_service.model.encoder_spec import WordHead
from quartet.scheduler_service.model.families.encoders import OLDEST_NORM, Config, Tensors
from quartet.scheduler_service.model.spec import HeadLayer, NotNative

OWN_MATRICES = ("cls.predictions.decoder.weight", "lm_head.decoder.weight", "vocab_projector.weight", "decoder.weight")


def word_head(family: str, config: Config, tensors: Tensors) -> WordHead:
    """Of a family, for example Bert. Raises NotNative."""
    make = HEADS.get(family)
    if make is None:
        raise NotNative(f"a sparse embedder of the family {family}")
    if config.get("tie_word_embeddings") is False and any(name in tensors for name in OWN_MATRICES):
        raise NotNative("tie_word_embeddings=False in a sparse embedder")
    head = make(config)
    if head.transform.norm and f"{head.transform.norm}.{OLDEST_NORM[0]}" in tensors:
        return replace(head, transform=replace(head.transform, norm_names=OLDEST_NORM))
    return head


def bert(config: Config) -> WordHead:
    """BertForMaskedLM."""
    inside = "cls.predictions.transform"
    activation = config.get("hidden_act", "gelu")
    return WordHead(transform(config, f"{inside}.dense", f"{inside}.LayerNorm", activation), "cls.predictions.bias")


def roberta(config: Config) -> WordHead:
    """RobertaForMaskedLM and its kin, MPNetForMaskedLM."""
    return WordHead(transform(config, "lm_head.dense", "lm_head.layer_norm"), "lm_head.bias")


def distilbert(config: Config) -> WordHead:
    """DistilBertForMaskedLM."""
    activation = config.get("activation", "gelu")
    return WordHead(transform(config, "vocab_transform", "vocab_layer_norm", activation), "vocab_projector.bias")


def modernbert(config: Config) -> WordHead:
    """ModernBertForMaskedLM."""
    layer = HeadLayer(
        name="head.dense",
        inputs=config["hidden_size"],
        outputs=config["hidden_size"],
        bias=bool(config.get("classifier_bias")),
        activation=config.get("classifier_activation", "gelu"),
        norm="head.norm",
        norm_bias=bool(config.get("norm_bias")),
        norm_epsilon=config.get("norm_eps", 1e-5),
    )
    return WordHead(layer, "decoder.bias" if config.get("decoder_bias", True) else "")


def transform(config: Config, name: str, norm: str, activation: str = "gelu") -> HeadLayer:
    """The layer in front of the words."""
    size = config.get("hidden_size") or config["dim"]
    epsilon = config.get("layer_norm_eps", 1e-12)
    return HeadLayer(
        name=name, inputs=size, outputs=size, activation=activation, norm=norm, norm_bias=True, norm_epsilon=epsilon
    )


HEADS: dict[str, Callable[[Config], WordHead]] = {
    "Bert": bert,
    "Camembert": roberta,
    "DistilBert": distilbert,
    "ModernBert": modernbert,
    "MPNet": roberta,
    "Roberta": roberta,
    "XLMRoberta": roberta,
}
