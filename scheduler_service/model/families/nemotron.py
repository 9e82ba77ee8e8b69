"""Nemotron-H (Nemotron Nano 2, Nemotron 3 Nano): each layer is one block: a state space, attention, an MLP, experts."""

from dataclasses import replace

from quartet.scheduler_service.model.families.glm import scored_layers
from quartet.scheduler_service.model.families.llama import Config, common, no_rope
from quartet.scheduler_service.model.spec import DecoderSpec, LayerSpec, Names, NotNative, require
from quartet.scheduler_service.model.state_space import StateSpaceSpec

NAMES = Names(
    embeddings="embeddings",
    attention="mixer",
    gate_up=("up_proj",),
    mlp="mixer",
    norm="norm_f",
    before_attention="norm",
    before_mlp="norm",
)
LETTERS = {"M": "linear_attention", "E": "moe", "*": "full_attention", "-": "mlp"}
OLD = {"mamba": "linear_attention", "attention": "full_attention"}
DEFAULTS: Config = {"head_dim": 128, "num_key_value_heads": 8, "hidden_act": "relu2", "n_group": 1, "topk_group": 1}


def nemotron_h(config: Config, context_length: int) -> DecoderSpec:
    """NemotronHForCausalLM."""
    require(config, {"moe_latent_size": None, "mamba_hidden_act": "silu", "sliding_window": None})
    config = {**DEFAULTS, **config, "hidden_act": config.get("mlp_hidden_act", "relu2")}
    config["rms_norm_eps"] = config.get("layer_norm_epsilon", 1e-5)
    kinds = layer_types(config)
    config["num_hidden_layers"] = len(kinds)
    if config["hidden_act"] != "relu2":
        raise NotNative(f"mlp_hidden_act={config['hidden_act']!r}")
    fields = common(config, context_length)
    return DecoderSpec(
        **{**fields, "layers": tuple(map(layers(config).__getitem__, kinds)), "ropes": (no_rope(fields["head_dim"]),)},
        mlp_bias=bool(config.get("mlp_bias")),
        ungated=True,
        names=NAMES,
        prefix="backbone.",
    )


def layer_types(config: Config) -> list[str]:
    """The kind of each layer, which configs of all ages say in another way."""
    named = config.get("layers_block_type") or config.get("layer_types")
    if named is None:
        return [LETTERS[letter] for letter in config["hybrid_override_pattern"]]
    return [OLD.get(kind, kind) for kind in named]


def layers(config: Config) -> dict[str, LayerSpec]:
    """A layer of each kind."""
    found = {
        "linear_attention": LayerSpec(recurrent=state_space(config), feeds=False),
        "full_attention": LayerSpec(feeds=False),
        "mlp": LayerSpec(mixes=False),
    }
    if config.get("n_routed_experts"):
        moe = scored_layers({**config, "n_shared_experts": 1, "first_k_dense_replace": 0, "num_hidden_layers": 1})[
            0
        ].moe
        assert moe is not None
        shared = config["moe_shared_expert_intermediate_size"]
        own = replace(moe, block="mixer", gate_up=("up_proj",), ungated=True, shared_intermediate_size=shared)
        found["moe"] = LayerSpec(mixes=False, moe=replace(own, shared_gate_up=("up_proj",)))
    return found


def state_space(config: Config) -> StateSpaceSpec:
    """The state space of a config, whose fields differ in name from those of other families."""
    bias = bool(config.get("use_bias"))
    return StateSpaceSpec(
        taps=config.get("conv_kernel", 4),
        heads=config.get("mamba_num_heads", 128),
        head_dim=config.get("mamba_head_dim", 64),
        groups=config.get("n_groups", 8),
        state_dim=config.get("ssm_state_size", 128),
        epsilon=config["rms_norm_eps"],
        convolution_bias=config.get("use_conv_bias", True),
        bias=bias,
        output_bias=bias,
        least_step=config.get("time_step_min", 0.001),
        block="mixer",
    )
