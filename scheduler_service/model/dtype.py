"""The number format that a model is served in."""

import logging
from typing import Any

import torch

from quartet.runtime.errors import StartupError

log = logging.getLogger(__name__)

DTYPES = {
    "half": torch.float16,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float": torch.float32,
    "float32": torch.float32,
}


def resolve_dtype(flag: str, config: dict[str, Any], device: torch.device) -> torch.dtype:
    """The dtype of --dtype, or for `auto` the checkpoint's own (on a GPU, half precision at most)."""
    if flag != "auto":
        if flag not in DTYPES:
            raise StartupError(f"--dtype {flag} is unknown; choose one of auto, {', '.join(DTYPES)}")
        return DTYPES[flag]
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in DTYPES:
        raise StartupError(f"the model's dtype {name} is not supported; set --dtype to one of {', '.join(DTYPES)}")
    if DTYPES[name] is torch.float32 and device.type == "cuda":
        log.info("Downcasting torch.float32 to torch.float16.")
        return torch.float16
    return DTYPES[name]
