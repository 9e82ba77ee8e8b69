"""Decides every default of a configuration that does not depend on the model, in one place and purely.

What contradicts itself is refused before (`contradictions.py`). What only the worker knows is decided there: see
`ResolvedConfig`.
"""

from typing import Any, Literal

import msgspec

from quartet.runtime.adapter_sources import read_sources
from quartet.runtime.config import ResolvedConfig, ServerConfig, Speculation
from quartet.runtime.kv_tier_config import HICACHE_RATIO
from quartet.runtime.settings.contradictions import PAGE_SIZE, lora_is_on, notes_on, refuse_contradictions
from quartet.runtime.settings.machine import Machine

MAX_RUNNING_REQUESTS = 256
MIN_QUEUED_REQUESTS = 1024
CHUNKED_PREFILL_SIZE = {"cpu": 512, "cuda": 8192}
LOW_MEMORY_CHUNK = 256
RECORDER_BUFFER_SIZE = 1000  # forward passes
DRAFT_TOKENS = 8
MATCH_WINDOW = (2, 8)  # tokens, at least and at most
MAX_GRAPH_ROWS = 512
DUMMY_SEED = 0


class Resolution(msgspec.Struct, frozen=True):
    """A configuration with every default decided, and what the operator should know about it."""

    config: ResolvedConfig
    notes: list[str]


def resolve(config: ServerConfig, machine: Machine) -> Resolution:
    """Decide all defaults. Raises StartupError for a contradiction, UsageError for a list that cannot be read."""
    refuse_contradictions(config, machine)
    device = device_of(config, machine)
    decided = decide_flags(config, machine, device) | decide_derived(config)
    resolved = ResolvedConfig(**(msgspec.structs.asdict(config) | decided))
    return Resolution(resolved, notes_on(config, device))


def decide_flags(config: ServerConfig, machine: Machine, device: Literal["cpu", "cuda"]) -> dict[str, Any]:
    """Values of flags that were not given, and of those that give way to others."""
    running = config.max_running_requests or MAX_RUNNING_REQUESTS
    usual = LOW_MEMORY_CHUNK if config.low_memory and device == "cpu" else CHUNKED_PREFILL_SIZE[device]
    chunk = config.chunked_prefill_size or min(usual, config.max_prefill_tokens)
    decided: dict[str, Any] = {
        "device": device,
        "attention_backend": "torch_native" if device == "cpu" else config.attention_backend or "triton",
        "page_size": config.page_size or PAGE_SIZE,
        "enable_lora": lora_is_on(config),
        "max_running_requests": running,
        "max_queued_requests": config.max_queued_requests or max(MIN_QUEUED_REQUESTS, 4 * running),
        "chunked_prefill_size": chunk,
        "schedule_policy": policy_of(config),
        "expert_distribution_recorder_dir": config.expert_distribution_recorder_dir or machine.recorder_dir,
        "expert_distribution_recorder_buffer_size": config.expert_distribution_recorder_buffer_size
        or RECORDER_BUFFER_SIZE,
    }
    if config.enable_hierarchical_cache:
        decided["hicache_ratio"] = config.hicache_ratio or HICACHE_RATIO
    if speculation := speculation_of(config):
        decided |= {
            "speculative_num_draft_tokens": speculation.max_draft_tokens,
            "speculative_ngram_min_match_window_size": speculation.min_match,
            "speculative_ngram_max_match_window_size": speculation.max_match,
        }
    return decided


def decide_derived(config: ServerConfig) -> dict[str, Any]:
    """Values of the fields that no flag gives."""
    preempts = policy_of(config) == "priority" and not config.disable_priority_preemption
    return {
        "adapters": read_sources(config.lora_paths),
        "access_log_level": config.log_level_http or config.log_level,
        "dummy_seed": config.random_seed or DUMMY_SEED,
        "max_graph_rows": 0 if config.disable_cuda_graph else config.cuda_graph_max_bs or MAX_GRAPH_ROWS,
        "preemption_threshold": config.priority_scheduling_preemption_threshold if preempts else None,
        "speculation": speculation_of(config),
        "waiting_timeout_s": config.req_waiting_timeout if config.req_waiting_timeout > 0 else None,
        "running_timeout_s": config.req_running_timeout if config.req_running_timeout > 0 else None,
    }


def device_of(config: ServerConfig, machine: Machine) -> Literal["cpu", "cuda"]:
    """The device of --device; "auto" takes a GPU where there is one."""
    if config.device != "auto":
        return config.device
    return "cuda" if machine.has_gpu and machine.torch_has_cuda else "cpu"


def policy_of(config: ServerConfig) -> str:
    return "priority" if config.enable_priority_scheduling else config.schedule_policy


def speculation_of(config: ServerConfig) -> Speculation | None:
    """Sizes of drafts; None without speculation. Where one end of the window is given, the other gives way to it."""
    if config.speculative_algorithm is None:
        return None
    shortest, longest = config.speculative_ngram_min_match_window_size, config.speculative_ngram_max_match_window_size
    return Speculation(
        max_draft_tokens=config.speculative_num_draft_tokens or DRAFT_TOKENS,
        min_match=shortest or min(MATCH_WINDOW[0], longest or MATCH_WINDOW[0]),
        max_match=longest or max(MATCH_WINDOW[1], shortest or MATCH_WINDOW[1]),
    )
