"""Constrained output is the same however its tokens are chosen: by our kernel, by torch, with and without logprobs."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from quartet.kernels.cpu.native import library
from quartet.runtime.messages import LogprobOptions
from quartet.runtime.sampling import SamplingParams
from tests.engine import Engine
from tests.model import tiny

SCHEMA = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "people": {"type": "integer"}, "coast": {"type": "boolean"}},
        "required": ["city", "people", "coast"],
        "additionalProperties": False,
    },
    "minItems": 10_000,
}
GRAMMARS: list[dict[str, str]] = [{}, {"json_schema": json.dumps(SCHEMA)}, {"regex": "([a-c]{1,9} )*"}, {"regex": ".*"}]
PROMPTS = [[5, 6, 7] * 4, list(range(20, 41)), [9] * 30, [8]]
SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.8},
    {"temperature": 1.3, "top_k": 7},
    {"temperature": 1.0, "top_p": 0.8, "min_p": 0.02},
    {"temperature": 0.7, "frequency_penalty": 0.5, "logit_bias": {"9": 3.0}},
]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    if library.library() is None:
        pytest.skip("no CPU kernels on this machine")
    engine = Engine(tiny.build("qwen3", tmp_path_factory.mktemp("draws")))
    yield engine
    engine.compiler.close()


def tokens(engine: Engine, settings: dict[str, Any], logprobs: LogprobOptions | None = None) -> list[list[int]]:
    """Of one batch: each request has another grammar, or none."""
    made = [SamplingParams(max_new_tokens=40, ignore_eos=True, **settings, **grammar) for grammar in GRAMMARS]
    return [answer.ids for answer in engine.generate(PROMPTS, made, seed=3, logprobs=logprobs)]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_kernel_and_torch_choose_the_same_tokens(engine, settings, monkeypatch):
    by_kernel = tokens(engine, settings)
    assert tokens(engine, settings, LogprobOptions(top=2)) == by_kernel
    monkeypatch.setattr(library, "at_hand", lambda: None)
    assert tokens(engine, settings) == by_kernel
    assert sum(map(len, by_kernel)) > 80
