"""EXAONE 4: norms behind each block, normed queries and keys; full attention beside sliding one knows no positions."""

from quartet.scheduler_service.model.families.llama import Config, common, no_rope, windows
from quartet.scheduler_service.model.families.olmo import BEHIND
from quartet.scheduler_service.model.spec import DecoderSpec, LayerSpec


def exaone4(config: Config, context_length: int) -> DecoderSpec:
    """Exaone4ForCausalLM."""
    period = pattern(config.get("sliding_window_pattern", 4))
    slides = windows(config, lambda layer: (layer + 1) % period != 0)
    hybrid = config.get("sliding_window", 4096) is not None
    layers = tuple(LayerSpec(window, rope=1 if hybrid and window is None else 0) for window in slides)
    fields = common({"rms_norm_eps": 1e-5, **config}, context_length)
    fields |= {"layers": layers, "ropes": (*fields["ropes"], no_rope(fields["head_dim"]))}
    return DecoderSpec(**fields, names=BEHIND, query_key_norm=True)


def pattern(value: object) -> int:
    """Old configs write the period as letters, one for each layer: LLLG."""
    return len(value) if isinstance(value, str) else int(str(value or 1))
