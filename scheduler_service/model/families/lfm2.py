"""LFM2: short gated convolutions, with attention in some layers."""

from quartet.scheduler_service.model.families.llama import Config, common
from quartet.scheduler_service.model.recurrent import ShortConvSpec
from quartet.scheduler_service.model.spec import DecoderSpec, LayerSpec, Names

NAMES = Names(
    gate_up=("w1", "w3"),
    down="w2",
    mlp="feed_forward",
    output="out_proj",
    query_norm="q_layernorm",
    key_norm="k_layernorm",
    norm="embedding_norm",
    before_attention="operator_norm",
    before_mlp="ffn_norm",
)
THETA = 1_000_000.0


def decoder_spec(config: Config, context_length: int) -> DecoderSpec:
    """Lfm2ForCausalLM."""
    convolution = ShortConvSpec(config["hidden_size"], config.get("conv_L_cache", 3), bool(config.get("conv_bias")))
    count = config["num_hidden_layers"]
    attending = config.get("full_attn_idxs")
    attending = range(count) if attending is None else attending
    types = config.get("layer_types") or ["full_attention" if i in attending else "conv" for i in range(count)]
    given = {"rms_norm_eps": config.get("norm_eps", 1e-5), "tie_word_embeddings": config.get("tie_embedding", True)}
    fields = common({**given, **config, "intermediate_size": mlp_size(config)}, context_length, theta=THETA)
    layers = tuple(LayerSpec(recurrent=convolution if kind == "conv" else None) for kind in types)
    return DecoderSpec(**{**fields, "layers": layers}, query_key_norm=True, names=NAMES)


def mlp_size(config: Config) -> int:
    """The width of the feed-forward blocks: the given one is adjusted unless the config says otherwise."""
    size = int(config.get("block_ff_dim") or config["intermediate_size"])
    if not config.get("block_auto_adjust_ff_dim", True):
        return size
    size = int(2 * size / 3)
    if (multiplier := config.get("block_ffn_dim_multiplier", 1.0)) is None:
        return size
    multiple = int(config.get("block_multiple_of", 256))
    return multiple * -(-int(multiplier * size) // multiple)
