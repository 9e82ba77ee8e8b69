"""The settings of LoRA adapters: which are loaded at the start, and how many and how large they may be."""

from typing import Annotated

from quartet.runtime.flag import LORA, LoraRank, Positive, flag
from quartet.runtime.limits import MAX_LORA_RANK
from quartet.runtime.operator_config import OperatorConfig


class LoraConfig(OperatorConfig, frozen=True, kw_only=True):
    """Those of ServerConfig that concern adapters."""

    enable_lora: Annotated[
        bool | None, flag("take LoRA adapters (default: true where --lora-paths names some)", LORA)
    ] = None
    lora_paths: Annotated[
        list[str] | None,
        flag(
            "adapters to load at the start, separated by spaces: NAME=PATH, PATH (which is its name too), or JSON with "
            "lora_name, lora_path and pinned; PATH is a directory or a hub id",
            LORA,
            words=True,
        ),
    ] = None
    max_loras_per_batch: Annotated[Positive, flag("different adapters in one step", LORA)] = 8
    max_loaded_loras: Annotated[
        Positive | None,
        flag(
            "adapters in memory; the one that was not used for longest is evicted, and read again when a request names "
            "it (default: no limit)",
            LORA,
        ),
    ] = None
    max_lora_rank: Annotated[LoraRank, flag("largest rank of an adapter", LORA)] = MAX_LORA_RANK
    lora_target_modules: Annotated[
        list[str] | None,
        flag(
            "weights that an adapter may change, such as q_proj, separated by spaces; all: every one (default: all)",
            LORA,
            words=True,
        ),
    ] = None
