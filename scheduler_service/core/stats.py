"""The planner's counters."""

from dataclasses import dataclass


@dataclass(slots=True)
class Stats:
    """Totals since the start."""

    requests: int = 0
    aborted: int = 0
    refused: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generation_tokens: int = 0
    proposed_drafts: int = 0  # tokens
    correct_drafts: int = 0  # tokens
    retractions: int = 0
    preemptions: int = 0
    queue_s: float = 0.0  # sum of the times that admitted requests waited
