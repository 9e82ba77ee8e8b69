"""OLMo 2, 3 and Hybrid: norms behind each block, none in front; queries and keys are normed over all heads together."""

from typing import Any

from quartet.scheduler_service.model.families.llama import Config, common, no_rope, windows
from quartet.scheduler_service.model.gated_delta import DeltaNames, GatedDeltaSpec
from quartet.scheduler_service.model.rope import rope_parameters, rope_spec
from quartet.scheduler_service.model.spec import DecoderSpec, LayerSpec, Names

BEHIND = Names(
    before_attention=None,
    after_attention="post_attention_layernorm",
    before_mlp=None,
    after_mlp="post_feedforward_layernorm",
)
BEFORE = Names(before_attention="attention_layer_norm", before_mlp="feedforward_layer_norm")  # of linear attention
DELTA_NAMES = DeltaNames(
    inner=("q_proj", "k_proj", "v_proj", "g_proj"),
    rates=("b_proj", "a_proj"),
    convolution=("q_conv1d", "k_conv1d", "v_conv1d"),
    norm="o_norm",
    output="o_proj",
)
DELTA_EPSILON = 1e-5  # whatever the config's is
THETA = 500_000.0


def olmo2(config: Config, context_length: int) -> DecoderSpec:
    """Olmo2ForCausalLM."""
    return DecoderSpec(**behind(common({"rms_norm_eps": 1e-5, **config}, context_length), config))


def olmo3(config: Config, context_length: int) -> DecoderSpec:
    """Olmo3ForCausalLM: three of four layers slide, with a rope that is never stretched."""
    full = rope_parameters(config, "full_attention", THETA)
    fields = common({"rms_norm_eps": 1e-5, **config}, context_length, full)
    local = config
    if not config.get("rope_parameters"):  # the old form: rope_scaling is for full attention
        local = {**config, "rope_scaling": None}
    sliding = rope_spec(rope_parameters(local, "sliding_attention", THETA), fields["head_dim"], context_length)
    layers = tuple(
        LayerSpec(window, rope=0 if window is None else 1)
        for window in windows(config, lambda layer: (layer + 1) % 4 != 0)
    )
    return DecoderSpec(**behind({**fields, "ropes": (*fields["ropes"], sliding), "layers": layers}, config))


def hybrid(config: Config, context_length: int) -> DecoderSpec:
    """OlmoHybridForCausalLM: linear attention in three of four layers, whose norms stand in front of each block."""
    turns = (config.get("rope_parameters") or {}).get("rope_theta") or config.get("rope_theta")
    fields = common(config if turns else {**config, "rope_parameters": None}, context_length)
    heads = config["num_attention_heads"]
    key_heads = config.get("linear_num_key_heads") or heads
    key_dim = config.get("linear_key_head_dim") or int(0.75 * config["hidden_size"] / key_heads)
    delta = GatedDeltaSpec(
        taps=config.get("linear_conv_kernel_dim", 4),
        key_heads=key_heads,
        value_heads=config.get("linear_num_value_heads") or heads,
        key_dim=key_dim,
        value_dim=config.get("linear_value_head_dim") or 2 * key_dim,
        epsilon=DELTA_EPSILON,
        beta_factor=2.0 if config.get("linear_allow_neg_eigval", True) else 1.0,
        names=DELTA_NAMES,
    )
    count = config["num_hidden_layers"]
    kinds = config.get("layer_types") or ["" if (i + 1) % 4 else "full_attention" for i in range(count)]
    linear = LayerSpec(recurrent=delta, names=BEFORE)
    fields["layers"] = tuple(LayerSpec() if kind == "full_attention" else linear for kind in kinds)
    if not turns:
        fields["ropes"] = (no_rope(fields["head_dim"]),)  # as in all that are released
    return DecoderSpec(**behind(fields, config))


def behind(fields: dict[str, Any], config: Config) -> dict[str, Any]:
    """The fields that both generations add."""
    bias = bool(config.get("attention_bias"))
    return {
        **fields,
        "names": BEHIND,
        "query_key_norm": True,
        "query_key_norm_over": "heads",
        "qkv_bias": bias,
        "output_bias": bias,
    }
