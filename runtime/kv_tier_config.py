"""Flags of the tier behind the KV pool: host memory and files that keep the KV of prefixes."""

from typing import Annotated

import msgspec

from quartet.runtime.flag import SCHEDULER, Natural, Positive, flag
from quartet.runtime.ranks_config import RanksConfig

HICACHE_RATIO = 2.0


class KvTierConfig(RanksConfig, frozen=True, kw_only=True):
    """Where KV is kept that the pool has no room for, and how much of it."""

    enable_hierarchical_cache: Annotated[
        bool,
        flag("keep the KV of prefixes in host memory too, from where it comes back when a prompt matches", SCHEDULER),
    ] = False
    hicache_ratio: Annotated[
        Annotated[float, msgspec.Meta(gt=0)] | None,
        flag("size of that memory, as a multiple of the KV pool's (default: 2)", SCHEDULER),
    ] = None
    hicache_size: Annotated[
        Natural, flag("its size in gigabytes, of each process, in place of the ratio; 0: by the ratio", SCHEDULER)
    ] = 0
    kv_cache_dir: Annotated[
        str | None,
        flag("directory that keeps the KV of prefixes in files, for this server and those after it", SCHEDULER),
    ] = None
    kv_cache_dir_size: Annotated[
        Positive, flag("bytes that these files may take; what was not used for longest goes first", SCHEDULER)
    ] = 8 << 30

    @property
    def has_kv_tier(self) -> bool:
        """Whether there is anything behind the KV pool."""
        return self.enable_hierarchical_cache or self.kv_cache_dir is not None
