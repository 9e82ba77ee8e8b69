"""Flags of a model that several processes compute together."""

from typing import Annotated

from quartet.runtime.flag import DEVICE, Natural, Positive, flag
from quartet.runtime.lora_config import LoraConfig


class RanksConfig(LoraConfig, frozen=True, kw_only=True):
    """How many processes compute one model, and on which machines."""

    tp_size: Annotated[
        Positive,
        flag(
            "processes that compute one model together, each with a part of it",
            DEVICE,
            "--tp",
            "--tensor-parallel-size",
            "-tp",
        ),
    ] = 1
    nnodes: Annotated[Positive, flag("machines on which these processes run", DEVICE)] = 1
    node_rank: Annotated[Natural, flag("which of the machines this one is; 0 has the server", DEVICE)] = 0
    dist_init_addr: Annotated[
        str | None, flag("HOST:PORT of machine 0, where the others meet it over a private network", DEVICE)
    ] = None

    @property
    def ranks_here(self) -> int:
        """How many processes compute the model on each machine."""
        return self.tp_size // self.nnodes
