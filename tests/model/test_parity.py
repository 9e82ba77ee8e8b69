"""Every family gives what transformers gives, in fp32, under everything the scheduler may do to a request."""

from pathlib import Path

import pytest

from tests.model import parity, tiny

QUICK = ("llama", "qwen3", "gemma2", "mixtral")


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in parity.FAMILIES],
)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, parity.Peer, int]:
    directory = tiny.build(request.param, tmp_path_factory.mktemp(request.param))
    return directory, parity.Peer(directory), parity.new_tokens(request.param)


def outcome(served: tuple[Path, parity.Peer, int], case: str) -> parity.Outcome:
    directory, peer, tokens = served
    found = parity.compare(peer, *parity.CASES[case](directory, tokens), tokens)
    assert found.tokens_equal and found.error <= parity.TOLERANCE, found
    return found


def test_one_request_agrees_with_transformers(served):
    outcome(served, "one request")


def test_sixteen_concurrent_requests_agree_with_transformers(served):
    outcome(served, "16 at once")


def test_prompts_in_chunks_of_16_agree_with_transformers(served):
    outcome(served, "chunks of 16")


def test_prefix_hits_agree_with_transformers(served):
    assert outcome(served, "prefix hits").cached_tokens == 5 * 148 + 36


def test_retracted_requests_agree_with_transformers(served):
    assert outcome(served, "retraction").retractions > 0
