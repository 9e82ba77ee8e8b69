"""How what was learned reaches the server: as a whole checkpoint, or as a LoRA adapter of the weights that serve."""

import time
from pathlib import Path
from typing import Any

from deploy.examples.rl_hot_swap.server import Server

ADAPTER = "policy"


class WholeWeights:
    """The server's weights are replaced."""

    lora_path: str | None = None  # that requests name
    version_key = "version"  # of a run in meta_info.weight_versions: what changes with each update

    def __init__(self, server: Server) -> None:
        self._server = server

    def send(self, checkpoint: Path, version: str) -> tuple[str, float]:
        """Serve a checkpoint from now on: its version, and the seconds from the request to the answer."""
        body = {"model_path": str(checkpoint), "weight_version": version}
        return version, timed(self._server, "/update_weights_from_disk", body)


class Adapter:
    """An adapter is replaced by its name; the server's weights stay."""

    lora_path: str | None = ADAPTER
    version_key = "adapter_version"

    def __init__(self, server: Server) -> None:
        self._server = server

    def send(self, checkpoint: Path, version: str) -> tuple[str, float]:
        """As above. The server gives adapters their versions itself."""
        body = {"lora_name": ADAPTER, "lora_path": str(checkpoint), "load_inplace": True}
        latency_s = timed(self._server, "/load_lora_adapter", body)
        known = self._server.call("/model_info")["lora_adapters"]
        return next(adapter["version"] for adapter in known if adapter["name"] == ADAPTER), latency_s


Sync = WholeWeights | Adapter


def timed(server: Server, path: str, body: dict[str, Any]) -> float:
    started = time.perf_counter()
    server.call(path, body)
    return time.perf_counter() - started


def sent_bytes(checkpoint: Path) -> int:
    """The bytes of a checkpoint's tensors, which the server reads."""
    return sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
