"""Bamba and Falcon-H1: state spaces (Mamba-2) in place of attention, or beside it in every layer."""

import math
from dataclasses import replace
from typing import Any

from quartet.scheduler_service.model.families.llama import Config, common
from quartet.scheduler_service.model.rope import rope_parameters
from quartet.scheduler_service.model.spec import DecoderSpec, Factors, LayerSpec, Names, require
from quartet.scheduler_service.model.state_space import NormPlace, StateSpaceSpec

NAMES = Names(mlp="feed_forward", norm="final_layernorm", before_mlp="pre_ff_layernorm")


def bamba(config: Config, context_length: int) -> DecoderSpec:
    """BambaForCausalLM."""
    config = {"rms_norm_eps": 1e-5, "num_key_value_heads": 8, **config}
    space, attending = state_space(config), config.get("attn_layer_indices") or ()
    fields = common(config, context_length, rope_parameters({**config, "partial_rotary_factor": 0.5}))
    layers = (LayerSpec(recurrent=None if i in attending else space) for i in range(config["num_hidden_layers"]))
    return DecoderSpec(**{**fields, "layers": tuple(layers)}, **biases(config), names=NAMES)


def falcon_h1(config: Config, context_length: int) -> DecoderSpec:
    """FalconH1ForCausalLM: parts of each layer are multiplied with numbers of the config.

    What attention reads is multiplied by m: scores by m squared, and what it gives by m.
    """
    require(config, dict.fromkeys(("mamba_proj_bias", "projectors_bias", "attention_bias", "mlp_bias"), False))
    config = {"rms_norm_eps": 1e-5, "mamba_d_ssm": 1024, "num_key_value_heads": 8, **config}
    reads = config.get("attention_in_multiplier", 1.0)
    gate, down = config.get("mlp_multipliers") or (1.0, 1.0)
    space_reads = config.get("ssm_in_multiplier", 1.0)
    norm: NormPlace = "before gates" if config.get("mamba_norm_before_gate", True) else "behind gates"
    space = replace(
        state_space(config),
        norm=norm if config.get("mamba_rms_norm") else "none",
        factors=tuple(space_reads * factor for factor in config.get("ssm_multipliers") or (1.0,) * 5),
        output_factor=config.get("ssm_out_multiplier", 1.0),
    )
    fields = common(config, context_length)
    fields["attention_scale"] *= reads**2 * config.get("key_multiplier", 1.0)
    layer = LayerSpec(recurrent=space, beside=True)
    return DecoderSpec(
        **{**fields, "layers": (layer,) * config["num_hidden_layers"]},
        factors=Factors(reads * config.get("attention_out_multiplier", 1.0), gate, down),
        embedding_scale=config.get("embedding_multiplier", 1.0),
        logit_scale=config.get("lm_head_multiplier", 1.0),
        names=NAMES,
    )


def state_space(config: Config) -> StateSpaceSpec:
    """The state space of configs that have Mamba's fields behind `mamba_`."""
    heads, dim = config.get("mamba_n_heads", 128), config.get("mamba_d_head", "auto")
    values = config.get("mamba_d_ssm") or int(config.get("mamba_expand", 2) * config["hidden_size"])
    least, most = map(number, config.get("time_step_limit") or (0.0, math.inf))
    bias = bool(config.get("mamba_proj_bias"))
    return StateSpaceSpec(
        taps=config.get("mamba_d_conv", 4),
        heads=heads,
        head_dim=values // heads if dim == "auto" else dim,
        groups=config.get("mamba_n_groups", 1),
        state_dim=config.get("mamba_d_state", 256),
        epsilon=config.get("rms_norm_eps", 1e-6),
        convolution_bias=config.get("mamba_conv_bias", True),
        bias=bias,
        output_bias=bias,
        least_step=least,
        most_step=most,
    )


def number(value: Any) -> float:
    """A number of a config; transformers writes {"__float__": "Infinity"} for what JSON does not have."""
    return float(value["__float__"] if isinstance(value, dict) else value)


def biases(config: Config) -> dict[str, Any]:
    bias = bool(config.get("attention_bias"))
    return {"qkv_bias": bias, "output_bias": bias, "mlp_bias": bool(config.get("mlp_bias"))}
