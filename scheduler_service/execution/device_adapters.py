"""LoRA adapters on the fused operations: those in memory are on the host, those of the steps in slots of the device.

A slot is written between two steps, on the stream of the steps: what was launched before still reads what was there.
"""

import logging
from collections.abc import Sequence

from quartet.runtime.config import ResolvedConfig
from quartet.runtime.errors import StartupError
from quartet.runtime.process.memory import in_words
from quartet.scheduler_service.core.plan import Plan
from quartet.scheduler_service.execution.adapters import AdapterStore, Read, named_by
from quartet.scheduler_service.host.background import yield_point
from quartet.scheduler_service.host.device import shortage
from quartet.scheduler_service.model.adapter_pool import AdapterPool, HostAdapter
from quartet.scheduler_service.model.decoder import Decoder
from quartet.scheduler_service.weights.adapters import AdapterTensors
from quartet.scheduler_service.weights.checkpoint import CheckpointError

log = logging.getLogger(__name__)

NOT_FUSED = "{} cannot have an adapter on a GPU: the fused operations have none for its product"
NO_ROOM = (
    "no room for {} LoRA adapters of rank {} at once: {}; lower --max-loras-per-batch or --max-lora-rank, or let "
    "--lora-target-modules name the weights that adapters change"
)


class DeviceAdapters(AdapterStore):
    """The adapters of a model on fused operations."""

    def __init__(self, model: Decoder, config: ResolvedConfig, run_dir: str, pool: AdapterPool) -> None:
        super().__init__(model, config, run_dir)
        self.pool = pool

    def pack(self, tensors: AdapterTensors) -> HostAdapter:
        """See AdapterStore.pack."""
        if strange := self.pool.lacks(tensors):
            places = self.layout.places.items()
            names = (name for name, place in places if (place.buffer, place.index) in strange)
            raise CheckpointError(NOT_FUSED.format(next(names).removesuffix(".weight")))
        return self.pool.packed(tensors, yield_point)

    def put(self, name: str, read: Read) -> None:
        """See AdapterStore.put. A free slot gets it at once, another one with the first step that needs it."""
        super().put(name, read)
        if self.pool.has_room:
            self.pool.place([read.weights])

    def take_out(self, name: str) -> None:
        """See AdapterStore.take_out."""
        if name in self.loaded:
            self.pool.drop(self.loaded[name])
        super().take_out(name)

    @property
    def ranks(self) -> Sequence[int]:
        """Of the adapters by slot."""
        return self.pool.ranks

    def slots_of(self, plan: Plan) -> list[int]:
        """The slot of each slice's adapter, which is there for the next step, or -1. Empty where all have none."""
        named = named_by(plan)
        names = sorted({name for name in named if name})
        if not names:
            return []
        slots = dict(zip(names, self.pool.place([self.loaded[name] for name in names]), strict=True))
        return [slots.get(name, -1) for name in named]


def adapter_pool(config: ResolvedConfig, model: Decoder) -> AdapterPool | None:
    """The slots of a model on fused operations; None without --enable-lora. Raises StartupError."""
    if not config.enable_lora:
        return None
    slots, rank = config.max_loras_per_batch, config.max_lora_rank
    pool = AdapterPool(model.weights, slots, rank, config.lora_target_modules)
    if model.device.type != "meta":
        if reason := shortage(pool.nbytes, model.device):
            raise StartupError(NO_ROOM.format(slots, rank, reason))
        log.info("%d LoRA adapters of rank %d at once take %s of the device.", slots, rank, in_words(pool.nbytes))
    pool.allocate()
    return pool
