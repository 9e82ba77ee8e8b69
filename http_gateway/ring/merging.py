"""One answer of the answers that several schedulers give to a command."""

from collections.abc import Iterable, Mapping
from typing import Any

from quartet.runtime.control import CheckWeights, ControlCommand, Probe, UpdateWeightVersion, WeightChange
from quartet.runtime.messages import SCHEDULER, Message, Reply, title_of

BETWEEN = " | "  # messages
MEANS = {"token_usage", "utilization", "cache_hit_rate", "new_token_ratio"}  # of all; other numbers are added
MEAN_PREFIXES = ("spec_", "avg_")
ADDED = ("num_paused_requests", "num_aborted_requests")  # numbers of replies; the rest says the same of all


def merge(command: ControlCommand, answers: Mapping[int, Message], count: int) -> Message:
    """The answer for the client; `answers` are by rank, of `count` schedulers."""
    in_order = [answers[rank] for rank in sorted(answers)]
    probes = {rank: answer for rank, answer in sorted(answers.items()) if isinstance(answer, Probe)}
    if probes:
        return merge_probes(command.id, probes, count)
    replies = [answer for answer in in_order if isinstance(answer, Reply)]
    if not replies or (len(replies) == 1 and len(in_order) == 1 and not isinstance(command, CheckWeights)):
        return in_order[0]
    if failed := next((reply for reply in replies if not reply.success), None):
        return failed
    messages = [reply.message for reply in replies]
    if not isinstance(command, WeightChange | UpdateWeightVersion):
        messages = list(dict.fromkeys(messages))
    return Reply(id=command.id, message=BETWEEN.join(messages), body=merge_bodies(replies))


def merge_bodies(replies: list[Reply]) -> dict[str, Any] | None:
    """The first body, with what is counted added up, and what is listed by rank joined."""
    bodies = [(reply.rank, reply.body) for reply in replies if reply.body is not None]
    if not bodies:
        return None
    merged = dict(bodies[0][1])
    for name in ADDED:
        if name in merged:
            merged[name] = sum(body.get(name, 0) for _, body in bodies)
    if "ranks" in merged:
        merged["ranks"] = [
            {**entry, "rank": rank * len(body["ranks"]) + number}
            for rank, body in bodies
            for number, entry in enumerate(body.get("ranks", []))
        ]
        digests = dict.fromkeys(str(body.get("per_engine_checksum")) for _, body in bodies)
        if len(digests) > 1:
            merged["per_engine_checksum"] = BETWEEN.join(digests)
    return merged


def merge_probes(id: str, probes: Mapping[int, Probe], count: int) -> Probe:
    """The counters of the text services, of all schedulers together, and of each by its title."""
    counters = dict(next(iter(probes.values())).counters)
    by_rank = {rank: probe.counters.get(SCHEDULER, {}) for rank, probe in probes.items()}
    counters[SCHEDULER] = added(by_rank.values())
    counters |= {title_of(SCHEDULER, rank, count): numbers for rank, numbers in by_rank.items()}
    return Probe(id=id, counters=counters)


def added(all_numbers: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The counters of several schedulers as those of one."""
    numbers = list(all_numbers)
    merged: dict[str, Any] = {}
    for name, first in numbers[0].items():
        values = [own[name] for own in numbers if isinstance(own.get(name), int | float)]
        if not values:
            merged[name] = first
        elif name in MEANS or name.startswith(MEAN_PREFIXES):
            merged[name] = sum(values) / len(values)
        else:
            merged[name] = sum(values)
    return merged
