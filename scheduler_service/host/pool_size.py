"""How many pages the KV pool gets: by what memory allows, what requests can need, and what the operator asked for."""

import logging
from dataclasses import dataclass, replace

import msgspec

from quartet.runtime import records
from quartet.runtime.config import ResolvedConfig
from quartet.runtime.errors import StartupError
from quartet.runtime.process.memory import GB, Memory, in_words

log = logging.getLogger(__name__)

RECORD = "pool.json"

# Defaults. On a CPU the memory is shared with whatever else the machine is for; on a GPU it is all for the server.
CPU_SHARE = 0.25  # of what is left beside the other processes and a weight update
CPU_MOST_BYTES = 4 * GB
CPU_LEAST_SHARE = 0.5  # of what is left, where one request of full length needs that
GPU_SHARE = 0.85  # of what is free
GPU_LARGEST_SHARE = 0.95  # for a size that the operator asked for
MOST = in_words(CPU_MOST_BYTES)
SLOTS_SHARE = 0.5  # of the pool's budget, at most, for the recurrent states of running requests
SNAPSHOTS_SHARE = 0.25  # the same for the states that the prefix cache keeps
SNAPSHOTS_PER_REQUEST = 4  # at most
OTHERS_BYTES = 512 << 20  # what the other processes will still take, and steps: buffers, compiled kernels


@dataclass(frozen=True, slots=True)
class Room:
    """What there is once the weights are loaded."""

    memory: Memory
    second_set: int = 0  # bytes that a weight update takes

    @property
    def others(self) -> int:
        """Bytes that are not for the pool; where there is little, the processes must do with half of it."""
        return min(OTHERS_BYTES, self.memory.available // 2)


@dataclass(frozen=True, slots=True)
class Need:
    """What requests can use."""

    page_size: int
    bytes_per_token: int
    most_tokens: int  # of all requests together; more would lie idle
    context_length: int
    state_bytes: int = 0  # recurrent states, which lie beside the pool

    @property
    def bytes_per_page(self) -> int:
        return self.page_size * self.bytes_per_token


class PoolRecord(msgspec.Struct):
    """Outlasts a scheduler, where there are several."""

    tokens: int


@dataclass(frozen=True, slots=True)
class PoolPlan:
    """The size of the KV pool."""

    page_size: int  # tokens
    page_count: int  # usable ones
    reason: str  # why so many

    @property
    def tokens(self) -> int:
        return self.page_count * self.page_size


@dataclass(frozen=True, slots=True)
class StatePlan:
    """How many requests can run at once by the memory of their recurrent states, and how many snapshots there are."""

    slots: int
    snapshots: int


def plan_states(
    config: ResolvedConfig, need: Need, room: Room, bytes_per_state: int, states_per_slot: int
) -> StatePlan:
    """Size the memory of recurrent states, as shares of what pool and states have together. Raises StartupError."""
    room = own_part(config, room)
    budget, _ = budget_by_default(config, need, room)
    slots = min(config.max_running_requests, int(budget * SLOTS_SHARE / (bytes_per_state * states_per_slot)))
    if slots < 1:
        raise StartupError(
            f"no room for the recurrent state of one request ({in_words(bytes_per_state * states_per_slot)}): "
            f"{in_words(room.memory.available)} may still be used by {room.memory.limit}"
        )
    if config.disable_radix_cache:
        return StatePlan(slots, 0)
    return StatePlan(slots, min(slots * SNAPSHOTS_PER_REQUEST, int(budget * SNAPSHOTS_SHARE / bytes_per_state)))


def plan_pool(config: ResolvedConfig, need: Need, room: Room) -> PoolPlan:
    """Size the pool. Raises StartupError when not one page fits."""
    room = own_part(config, room)
    given = config.max_total_tokens
    if not need.bytes_per_token:  # an encoder keeps no KV: its pages are only counted
        tokens = need.most_tokens if given is None else given
        return PoolPlan(need.page_size, max(1, tokens // need.page_size), "only a count of tokens")
    if given is None:
        count, reason = pages_by_default(config, need, room)
        advice = "free some memory or raise --mem-fraction-static"
    else:
        count, reason = pages_given(given, config.device, need, room)
        advice = "allow the server more memory, or serve a smaller model"
    if count < 1:
        raise StartupError(
            f"no room for a KV pool ({need.bytes_per_token} bytes per token): {in_words(room.memory.available)} may "
            f"still be used by {room.memory.limit}; {advice}"
        )
    return PoolPlan(need.page_size, count, reason)


def own_part(config: ResolvedConfig, room: Room) -> Room:
    """The part of this scheduler, where several take their memory from one machine at the same time."""
    if config.device != "cpu" or config.dp_size == 1:
        return room
    memory, schedulers = room.memory, config.dp_size
    part = replace(memory, available=memory.available // schedulers, total=memory.total // schedulers)
    return replace(room, memory=part)


def sized_as_before(config: ResolvedConfig, own_dir: str) -> ResolvedConfig:
    """The settings of one of several schedulers, which gets the pool of the one before: the others have theirs."""
    before = records.read_record(own_dir, RECORD, PoolRecord) if config.dp_size > 1 else None
    if before is None:
        return config
    return msgspec.structs.replace(config, max_total_tokens=before.tokens, dp_size=1)


def note_size(config: ResolvedConfig, own_dir: str, tokens: int) -> None:
    """Keep the size of the pool for `sized_as_before`."""
    if config.dp_size > 1:
        records.write(own_dir, RECORD, PoolRecord(tokens=tokens))


def pages_given(max_total_tokens: int, device: str, need: Need, room: Room) -> tuple[int, str]:
    """Pages of --max-total-tokens, or as many of them as fit."""
    available = room.memory.available
    most = available - room.others if device == "cpu" else available * GPU_LARGEST_SHARE
    count, largest = max_total_tokens // need.page_size, int((most - need.state_bytes) / need.bytes_per_page) - 1
    if count <= largest:
        return count, "that of --max-total-tokens"
    log.warning(
        "--max-total-tokens %d does not fit: %s may still be used by %s; the KV pool gets %d",
        count * need.page_size,
        in_words(available),
        room.memory.limit,
        largest * need.page_size,
    )
    return largest, "as much of --max-total-tokens as fits"


def pages_by_default(config: ResolvedConfig, need: Need, room: Room) -> tuple[int, str]:
    """As many pages as memory allows and requests can need."""
    budget, reason = budget_by_default(config, need, room)
    count = int((budget - need.state_bytes) / need.bytes_per_page) - 1  # one is the null page
    most = -(-need.most_tokens // need.page_size)
    return (count, reason) if count < most else (most, "all that --max-running-requests of full length can hold")


def budget_by_default(config: ResolvedConfig, need: Need, room: Room) -> tuple[float, str]:
    """Bytes for the pool and its null page, and why so many."""
    memory = room.memory
    if config.mem_fraction_static is not None:
        budget = memory.available - memory.total * (1 - config.mem_fraction_static)
        return budget, f"what --mem-fraction-static {config.mem_fraction_static:g} leaves beside the weights"
    if config.device != "cpu":
        return memory.available * GPU_SHARE, f"{GPU_SHARE:.0%} of what is free (--mem-fraction-static, by default)"
    return budget_on_cpu(need, room)


def budget_on_cpu(need: Need, room: Room) -> tuple[float, str]:
    """A share of what is left, and not more than a server needs that others share a machine with."""
    left = room.memory.available - room.others
    if room.second_set < left:
        left -= room.second_set
    else:
        log.warning("A weight update needs %s more than there is room for.", in_words(room.second_set - left))
    least = min(left * CPU_LEAST_SHARE, (need.context_length + 2 * need.page_size) * need.bytes_per_token)
    budget = max(least, min(left * CPU_SHARE, CPU_MOST_BYTES))
    return budget, (
        f"{in_words(int(budget))} of the {in_words(left)} that {room.memory.limit} leaves for it: a quarter, {MOST} at "
        "most, but enough for one request of full length; --max-total-tokens or --mem-fraction-static choose another"
    )
