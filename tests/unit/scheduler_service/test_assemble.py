from typing import Any

import pytest

from runtime.config import ServerConfig
from runtime.model_info import ModelInfo
from scheduler_service.assemble import planner_config
from tests.fakes import FakeWorker


def info(model_type: str = "llama") -> ModelInfo:
    return ModelInfo(
        path="",
        architecture="",
        model_type=model_type,
        vocab_size=100,
        hidden_size=8,
        context_length=64,
        eos_ids=[2, 3],
        config={},
    )


def test_the_planner_gets_what_worker_model_and_configuration_say() -> None:
    worker = FakeWorker(page_size=16, page_count=10, max_running_requests=4)
    config = ServerConfig(chunked_prefill_size=32, schedule_policy="lpm", max_queued_requests=7)
    made = planner_config(config, info(), worker)
    assert (made.page_size, made.total_pages, made.max_running, made.total_tokens) == (16, 10, 4, 160)
    assert (made.context_length, made.vocab_size, made.eos_ids) == (64, 100, frozenset({2, 3}))
    assert (made.chunked_prefill_size, made.policy, made.max_queued, made.reuse_prefixes) == (32, "lpm", 7, True)
    assert (made.default_new_tokens, made.max_input_len) == (128, 63)


@pytest.mark.parametrize(
    ("settings", "model_type", "chunk", "reuse"),
    [
        ({"disable_radix_cache": True, "chunked_prefill_size": 8}, "llama", 8, False),
        ({"chunked_prefill_size": 8}, "bert", -1, False),
    ],
)
def test_prefixes_are_not_reused_where_told_or_where_every_position_sees_every_other(
    settings: dict[str, Any], model_type: str, chunk: int, reuse: bool
) -> None:
    made = planner_config(ServerConfig(**settings), info(model_type), FakeWorker())
    assert (made.chunked_prefill_size, made.reuse_prefixes) == (chunk, reuse)
