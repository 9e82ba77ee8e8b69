"""Steps with prompts on fixed buffers, with the torch operations and a recorder that records nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch

from quartet.runtime.messages import LogprobOptions
from quartet.scheduler_service.execution.fused_prefill import CHUNKS, row_sizes, token_sizes
from quartet.scheduler_service.execution.graphs import Key
from tests.engine import ALL_LOGPROBS, Engine, floats
from tests.model import tiny
from tests.unit.scheduler_service.execution.test_graphs import GREEDY, PROMPTS, fused, outcome
from tests.unit.scheduler_service.test_overlap import CASES, Overlapped

LARGEST = 64


def recorded(directory: Path, kind: type[Engine] = Engine, **settings: Any) -> Engine:
    """An engine that runs steps with up to LARGEST prompt tokens on buffers."""
    engine = fused(directory, kind, cuda_graph_max_prefill_tokens=LARGEST, **settings)
    assert engine.worker.steps.prefill is not None
    return engine


def sizes(engine: Engine) -> list[Key]:
    """The sizes that steps had."""
    return sorted(engine.worker.steps.prefill.graphs.misses)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build("qwen3", tmp_path_factory.mktemp("prefill"))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gemma3", "phi3", "qwen2_moe", "mixtral"])
def test_prompts_on_buffers_give_what_the_plain_decoder_gives(family, tmp_path):
    path = tiny.build(family, tmp_path)
    plain = Engine(path).generate(PROMPTS, GREEDY, logprobs=ALL_LOGPROBS)
    engine = recorded(path, chunked_prefill_size=40)
    found = engine.generate(PROMPTS, GREEDY, logprobs=ALL_LOGPROBS)
    assert sizes(engine)
    tokens, values = outcome(plain)
    found_tokens, found_values = outcome(found)
    assert found_tokens == tokens
    torch.testing.assert_close(found_values, values, atol=1e-4, rtol=1e-4)
    for ours, theirs in zip(found, plain, strict=True):
        assert floats(ours.input_logprobs.values)[1:] == pytest.approx(
            floats(theirs.input_logprobs.values)[1:], abs=1e-4
        )


def test_a_chunk_beside_decode_rows_has_a_size_of_both(directory):
    engine = recorded(directory, chunked_prefill_size=32)
    engine.add(PROMPTS[0], GREEDY)
    engine.step()
    engine.add(PROMPTS[1], GREEDY)
    engine.step()
    assert sizes(engine) == [Key(0, 512, 16), Key(8, 512, 32)]


@pytest.mark.parametrize("case", CASES)
def test_overlapped_requests_that_come_one_after_another_get_the_same_tokens(directory, case):
    def answers(engine: Engine) -> list[list[int]]:
        rids = []
        for i in range(6):
            rids.append(engine.add(PROMPTS[i % 3][i:] or PROMPTS[0], CASES[case], seed=i))
            engine.step()
        engine.run()
        return [engine.answers[rid].ids for rid in rids]

    engine = recorded(directory, Overlapped, chunked_prefill_size=24)
    assert answers(engine) == answers(Engine(directory))
    assert {key.rows for key in sizes(engine)} == {0, 8} or case == "one token"


def test_hidden_states_come_out_of_the_buffers(directory):
    def states(engine: Engine) -> list[list[float]]:
        answers = engine.generate(PROMPTS[:2], GREEDY, return_hidden_states=True)
        return [answer.hidden_states for answer in answers]

    for ours, theirs in zip(states(recorded(directory)), states(Engine(directory)), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)


def test_what_does_not_fit_runs_as_it_comes(directory):
    too_long = recorded(directory)
    too_long.generate([PROMPTS[2]], GREEDY)  # more tokens than the largest size
    too_many = recorded(directory, max_running_requests=CHUNKS + 2)
    too_many.generate([[i + 5] for i in range(CHUNKS + 1)], GREEDY)
    assert not sizes(too_long) and not sizes(too_many)


def test_prompts_that_bring_embeddings_run_as_they_come(directory):
    engine, plain = recorded(directory), Engine(directory)
    embeds = torch.randn(3, engine.worker.model.hidden_size).numpy().tobytes()
    rids = [each.add([0, 0, 0], GREEDY, embeds=embeds) for each in (engine, plain)]
    for each in (engine, plain):
        each.run()
    assert engine.answers[rids[0]].ids == plain.answers[rids[1]].ids and not sizes(engine)


def test_padding_touches_nothing_but_the_null_page(directory):
    engine = recorded(directory)
    prefill, cache = engine.worker.steps.prefill, engine.worker.cache
    for pool in cache.keys.values():
        pool.fill_(7.0)
    prefill.page_table.values[: prefill.null_slot].fill_(3)
    prefill.clear()
    with torch.inference_mode():
        prefill.compute(Key(8, 512, 32))
    assert all((pool[:, cache.page_size :] == 7.0).all() for pool in cache.keys.values())
    assert prefill.hidden[:40].isfinite().all()


def test_a_step_is_padded_whatever_the_one_before_left(directory):
    alone = recorded(directory).generate([PROMPTS[0]], GREEDY, logprobs=LogprobOptions())[0]
    engine = recorded(directory)
    engine.generate([PROMPTS[1], PROMPTS[2][:30]], GREEDY)
    engine.worker.steps.prefill.hidden.fill_(float("nan"))
    assert engine.generate([PROMPTS[0]], GREEDY, logprobs=LogprobOptions())[0].ids == alone.ids


def test_the_sizes_wait_to_be_recorded_the_largest_first_and_are_recorded_anew_when_memory_has_moved(directory):
    fused_steps = recorded(directory).worker.steps
    graphs = fused_steps.prefill.graphs
    assert [key.tokens for key in graphs.waiting] == [64, 32, 16]
    while fused_steps.idle_work():
        pass
    assert sorted(key.tokens for key in graphs.replays) == [16, 32, 64]
    fused_steps.forget_graphs()
    assert not graphs.replays and [key.tokens for key in graphs.waiting] == [64, 32, 16]


def test_sizes_double_up_to_the_largest():
    assert token_sizes(16) == [16] and token_sizes(100) == [16, 32, 64, 100]
    assert row_sizes(1) == [0, 1] and row_sizes(40) == [0, 8, 32, 40] and row_sizes(512) == [0, 8, 32, 128]
