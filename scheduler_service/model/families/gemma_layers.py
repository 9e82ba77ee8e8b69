"""What the layers of Gemma 3n and Gemma 4 are: which slide, whose keys and values they read, their sizes."""

from typing import Any

from quartet.scheduler_service.model.families.llama import Config
from quartet.scheduler_service.model.spec import LayerSpec, NotNative

FULL, SLIDING = "full_attention", "sliding_attention"
BY_LAYER = {"head_dim", "num_key_value_heads"}  # what may differ between layers
GLOBAL_HEAD_DIM = 512  # by default


def layer_types(config: Config, period: int) -> list[str]:
    """By default every `period`th layer is a full one."""
    count = config["num_hidden_layers"]
    types = config.get("layer_types") or [FULL if (layer + 1) % period == 0 else SLIDING for layer in range(count)]
    return list(types[:count])


def readers(types: list[str], shared: int) -> list[int | None]:
    """For each of the last `shared` layers the last one of its type before them. Raises ValueError if there is none."""
    first = max(0, len(types) - shared)
    last = {kind: layer for layer, kind in enumerate(types[:first])}
    if missing := set(types[first:]) - last.keys():
        raise ValueError(f"num_kv_shared_layers leaves no layer of the type {missing.pop()}")
    return [None] * first + [last[kind] for kind in types[first:]]


def other(own: int | None, usual: int) -> int | None:
    """A layer's own size; None where it is the usual one."""
    return None if own in (None, usual) else own


def sizes_of(config: Config, layer: int) -> dict[str, Any]:
    """`head_dim` and `num_key_value_heads` of a layer: as transformers writes them down, else by the layer's type."""
    usual = {name: config.get(name) for name in BY_LAYER}
    if (by_layer := config.get("per_layer_config")) is not None:
        own: Config = next((own for number, own in by_layer.items() if int(number) == layer), {})
        if strange := sorted(own.keys() - BY_LAYER):
            raise NotNative(f"layers that differ in {strange[0]}")
        return {**usual, **own}
    if config["layer_types"][layer] == SLIDING:
        return usual
    heads = config.get("num_global_key_value_heads") if config.get("attention_k_eq_v") else None
    head_dim = config.get("global_head_dim") or GLOBAL_HEAD_DIM
    return {"head_dim": head_dim, "num_key_value_heads": heads or usual["num_key_value_heads"]}


def head_dim_of(types: list[str], layers: tuple[LayerSpec, ...], kind: str, usual: int) -> int:
    """The size of the heads of a type of layers. Raises NotNative where they differ."""
    found = {layer.head_dim or usual for layer, its in zip(layers, types, strict=True) if its == kind} or {usual}
    if len(found) > 1:
        raise NotNative(f"{kind} with heads of different sizes")
    return found.pop()
