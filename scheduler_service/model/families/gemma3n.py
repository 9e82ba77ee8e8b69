"""Gemma 3n (text): several residual streams, an input for each layer, shared keys and values, sparse gates."""

from quartet.scheduler_service.model.families.gemma import GLOBAL_THETA, gemma, local_rope
from quartet.scheduler_service.model.families.gemma_layers import FULL, SLIDING, layer_types, other, readers
from quartet.scheduler_service.model.families.llama import Config, windows
from quartet.scheduler_service.model.rope import rope_parameters, rope_spec
from quartet.scheduler_service.model.spec import DecoderSpec, LayerInputSpec, LayerSpec, StreamSpec

SPARSE_LAYERS, SPARSITY = 10, 0.95  # by default, of deeper models


def gemma3n(config: Config, context_length: int) -> DecoderSpec:
    """Gemma3nForCausalLM."""
    count = config["num_hidden_layers"]
    types = layer_types(config, 5)
    config = {"sliding_window": 512, **config, "layer_types": types}
    widths = config["intermediate_size"]
    widths = widths if isinstance(widths, list) else [widths] * count
    shared = readers(types, config.get("num_kv_shared_layers", 15))
    sparse = config.get("activation_sparsity_pattern") or default_sparsity(count)
    layers = tuple(
        LayerSpec(
            window=window,
            rope=1 if types[layer] == SLIDING else 0,
            intermediate_size=other(widths[layer], widths[0]),
            reads=shared[layer],
            sparsity=sparse[layer],
        )
        for layer, window in enumerate(windows(config, lambda _: False))
    )
    full = rope_parameters(config, FULL, GLOBAL_THETA)
    fields = gemma({**config, "intermediate_size": widths[0]}, context_length, full)
    sliding = rope_spec(local_rope(config), fields["head_dim"], context_length)
    return DecoderSpec(
        **{**fields, "layers": layers, "ropes": (*fields["ropes"], sliding), "attention_scale": 1.0, "norm": "rms"},
        query_key_norm=True,
        value_norm=True,
        layer_inputs=LayerInputSpec(
            config.get("hidden_size_per_layer_input") or 256, config.get("vocab_size_per_layer_input") or 262_144
        ),
        streams=StreamSpec(
            count=config.get("altup_num_inputs", 4),
            active=config.get("altup_active_idx", 0),
            scaled=config.get("altup_correct_scale", True),
            rank=config.get("laurel_rank", 64),
        ),
        logit_softcap=config.get("final_logit_softcapping", 30.0),
    )


def default_sparsity(count: int) -> list[float]:
    sparse = SPARSE_LAYERS if count > SPARSE_LAYERS else 0
    return [SPARSITY] * sparse + [0.0] * (count - sparse)
