from typing import Any

import pytest

from quartet.runtime.model_files.embedding import Embedding
from quartet.runtime.model_files.model_info import ModelInfo
from quartet.scheduler_service.assemble import planner_config
from tests.configs import resolved
from tests.fakes import FakeWorker


def info(embedding: Embedding | None = None) -> ModelInfo:
    return ModelInfo(
        path="",
        architecture="",
        model_type="",
        vocab_size=100,
        hidden_size=8,
        context_length=64,
        eos_ids=[2, 3],
        config={},
        embedding=embedding,
    )


def test_the_planner_gets_what_worker_model_and_configuration_say() -> None:
    worker = FakeWorker(page_size=16, page_count=10, max_running_requests=4)
    config = resolved(chunked_prefill_size=32, schedule_policy="lpm", max_queued_requests=7)
    made = planner_config(config, info(), worker)
    assert (made.page_size, made.total_pages, made.max_running, made.total_tokens) == (16, 10, 4, 160)
    assert (made.context_length, made.vocab_size, made.eos_ids) == (64, 100, frozenset({2, 3}))
    assert (made.chunked_prefill_size, made.policy, made.max_queued, made.reuse_prefixes) == (32, "lpm", 7, True)
    assert (made.default_new_tokens, made.max_input_len) == (128, 63)


@pytest.mark.parametrize(
    ("settings", "embedding", "chunk", "step", "reuse"),
    [
        ({"disable_radix_cache": True, "chunked_prefill_size": 8}, None, 8, 16384, False),
        ({"chunked_prefill_size": 8}, Embedding(pooling=("cls",), causal=False), -1, 8, False),
        ({"chunked_prefill_size": -1}, Embedding(pooling=("mean",)), -1, 16384, False),
        ({"chunked_prefill_size": 8}, Embedding(pooling=("lasttoken",)), 8, 16384, True),
    ],
)
def test_prefixes_are_not_reused_where_told_or_where_every_position_sees_every_other(
    settings: dict[str, Any], embedding: Embedding | None, chunk: int, step: int, reuse: bool
) -> None:
    made = planner_config(resolved(**settings), info(embedding), FakeWorker())
    assert (made.chunked_prefill_size, made.max_prefill_tokens, made.reuse_prefixes) == (chunk, step, reuse)
