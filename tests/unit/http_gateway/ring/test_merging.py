"""One answer of the answers of several schedulers."""

from quartet.http_gateway.ring.merging import merge
from quartet.runtime.control import CheckWeights, FlushCache, Probe, UpdateWeightsFromDisk
from quartet.runtime.messages import Reply


def test_messages_of_updates_are_joined_and_counts_added() -> None:
    answers = {
        rank: Reply(id="c", rank=rank, message="Done.", body={"num_paused_requests": 2, "weight_version": "v1"})
        for rank in (1, 0)
    }
    merged = merge(UpdateWeightsFromDisk(id="c", model_path="m"), answers, 2)
    assert isinstance(merged, Reply)
    assert (merged.success, merged.message) == (True, "Done. | Done.")
    assert merged.body == {"num_paused_requests": 4, "weight_version": "v1"}


def test_equal_messages_of_other_commands_are_said_once() -> None:
    merged = merge(FlushCache(id="c"), {rank: Reply(id="c", rank=rank, message="Flushed.") for rank in (0, 1)}, 2)
    assert isinstance(merged, Reply)
    assert (merged.message, merged.body) == ("Flushed.", None)


def test_one_refusal_refuses_all() -> None:
    answers = {0: Reply(id="c"), 1: Reply(id="c", rank=1, success=False, message="no", status=409)}
    merged = merge(FlushCache(id="c"), answers, 2)
    assert isinstance(merged, Reply)
    assert (merged.success, merged.message, merged.status) == (False, "no", 409)


def test_checksums_are_listed_by_rank() -> None:
    answers = {
        rank: Reply(id="c", rank=rank, body={"ranks": [{"rank": 0, "checksums": {}}], "per_engine_checksum": "a"})
        for rank in (0, 1)
    }
    merged = merge(CheckWeights(id="c"), answers, 2)
    assert isinstance(merged, Reply) and merged.body is not None
    assert [entry["rank"] for entry in merged.body["ranks"]] == [0, 1]
    assert merged.body["per_engine_checksum"] == "a"


def test_counters_are_added_and_shares_averaged_and_each_scheduler_has_its_own() -> None:
    own = {"num_running_reqs": 2, "token_usage": 0.5, "weight_version": "v", "sleeping": 0}
    answers = {
        rank: Probe(id="p", rank=rank, counters={"tokenizer": {"prompts": 3}, "scheduler": own}) for rank in (0, 1)
    }
    merged = merge(Probe(id="p"), answers, 2)
    assert isinstance(merged, Probe)
    assert merged.counters["scheduler"] == own | {"num_running_reqs": 4}
    assert merged.counters["scheduler DP1"] == own
    assert merged.counters["tokenizer"] == {"prompts": 3}
