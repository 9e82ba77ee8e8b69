"""Decode steps on fused operations and fixed buffers, with the torch operations and a recorder that records nothing.

What this cannot show is that a CUDA graph holds what was recorded: tests/gpu does.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quartet.runtime.messages import LogprobOptions
from quartet.runtime.model_files import model_info
from quartet.runtime.sampling import SamplingParams
from quartet.scheduler_service.execution.fused_steps import FusedSteps
from quartet.scheduler_service.execution.graphs import PATIENCE, Graphs, Key, PlainRecorder, length_sizes, row_sizes
from quartet.scheduler_service.execution.worker import Worker
from tests.configs import resolved
from tests.engine import Answer, Engine, floats
from tests.model import tiny
from tests.unit.scheduler_service.test_overlap import CASES, Overlapped

GREEDY = SamplingParams(temperature=0.0, max_new_tokens=10, ignore_eos=True)
PROMPTS = [[5, 6, 7], list(range(20, 41)), [(7 * i) % 300 + 4 for i in range(70)]]


def fused(directory: Path, kind: type[Engine] = Engine, **settings: Any) -> Engine:
    """An engine whose worker runs on the fused operations."""
    own = {"dtype": "float32", "page_size": 4, "max_total_tokens": 8192, "device": "cpu", "max_running_requests": 12}
    settings = {**own, **settings}
    config = resolved(model_path=str(directory), model_dir=str(directory), **settings)
    worker = Worker(config, model_info.load(config), implementation="torch")
    return kind(directory, worker=worker, **settings)


def outcome(answers: list[Answer]) -> tuple[list[list[int]], torch.Tensor]:
    values = [floats(answer.logprobs.values) for answer in answers if answer.logprobs]
    return [answer.ids for answer in answers], torch.tensor([x for row in values for x in row])


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build("qwen3", tmp_path_factory.mktemp("fused"))


@pytest.mark.parametrize(
    "family", ["llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3", "qwen2_moe", "qwen3_moe", "mixtral"]
)
def test_fused_operations_answer_as_the_plain_decoder_does(family, tmp_path):
    path = tiny.build(family, tmp_path)
    options = LogprobOptions()
    tokens, values = outcome(Engine(path).generate(PROMPTS, GREEDY, logprobs=options))
    engine = fused(path, chunked_prefill_size=32)
    fused_tokens, fused_values = outcome(engine.generate(PROMPTS, GREEDY, logprobs=options))
    assert isinstance(engine.worker.steps, FusedSteps)
    assert fused_tokens == tokens
    torch.testing.assert_close(fused_values, values, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("prompts", [1, 3, 7, 12])
def test_a_step_of_any_size_gives_each_request_what_it_gets_alone(directory, prompts):
    several = [PROMPTS[i % 3][: 3 + i] for i in range(prompts)]
    alone = [fused(directory).generate([prompt], GREEDY)[0].ids for prompt in several[-2:]]
    assert [answer.ids for answer in fused(directory).generate(several, GREEDY)][-2:] == alone


@pytest.mark.parametrize("case", CASES)
def test_overlapped_decode_steps_on_buffers_give_the_same_tokens(directory, case):
    plain = Engine(directory).generate(PROMPTS, CASES[case], seed=9)
    engine = fused(directory, Overlapped)
    assert [answer.ids for answer in engine.generate(PROMPTS, CASES[case], seed=9)] == [answer.ids for answer in plain]


def test_decode_steps_run_on_the_buffers_and_mixed_steps_do_not(directory):
    graphs = (engine := fused(directory)).worker.steps.graphs
    graphs.replays.clear()
    engine.generate(PROMPTS, GREEDY)
    assert dict(graphs.misses) == {Key(3, 512): GREEDY.max_new_tokens - 1}


def test_padding_touches_nothing_but_the_null_slot_and_the_null_page(directory):
    engine = fused(directory)
    steps, cache = engine.worker.steps, engine.worker.cache
    for pool in cache.keys.values():
        pool.fill_(7.0)
    steps.page_table.values.zero_()
    steps.tokens.values.fill_(3)
    steps.clear()
    with torch.inference_mode():
        steps.compute(Key(8, 512))
    assert all((pool[:, cache.page_size :] == 7.0).all() for pool in cache.keys.values())
    assert (steps.tokens.values[:-1] == 3).all() and steps.buffers.logits[:8].isfinite().all()


# The sizes and when they are recorded


def test_row_sizes_ascend_and_end_with_the_largest():
    assert row_sizes(1) == [1]
    assert row_sizes(4) == [1, 2, 3, 4]
    assert row_sizes(100)[-4:] == [64, 80, 96, 100]
    assert row_sizes(512) == sorted(set(row_sizes(512)))
    assert length_sizes(512) == [512]
    assert length_sizes(40_000) == [2048, 8192, 32768, 40_000]


class Noted:
    """Steps that only say which size they had, and a recorder that marks what it replays."""

    def __init__(self, rows: list[int], lengths: list[int]) -> None:
        self.log: list[tuple[str, Any]] = []
        self.graphs = Graphs(self.compute, lambda: self.log.append(("clear", None)), self, rows, lengths)

    def compute(self, key: Key) -> None:
        self.log.append(("compute", key))

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        work()
        recorded = self.log.pop()[1]
        return lambda: self.log.append(("replay", recorded))


def test_the_largest_sizes_are_recorded_first_and_the_rest_when_there_is_time(caplog):
    noted = Noted([1, 2, 3, 4, 6, 8], [512])
    with caplog.at_level("INFO"):
        noted.graphs.begin(torch.device("cpu"))
    assert [key.rows for key in noted.graphs.replays] == [8, 4, 2, 1]
    assert "Capture cuda graph bs [1, 2, 4, 8]" in caplog.text
    assert "Capture cuda graph end. Time elapsed: " in caplog.text
    assert noted.graphs.idle_work() and not noted.graphs.idle_work() and not noted.graphs.idle_work()
    assert sorted(key.rows for key in noted.graphs.replays) == [1, 2, 3, 4, 6, 8]


def test_what_is_not_recorded_is_computed_and_recorded_once_it_was_missed_often():
    noted = Noted([1, 2], [64, 256])
    key = noted.graphs.key(2, 65)
    assert key == Key(2, 256)
    for _ in range(PATIENCE + 1):
        noted.graphs.prepare(key)
        noted.graphs.run(key)
    assert [what for what, _ in noted.log].count("compute") == PATIENCE + 2  # and the warm-up of the recording
    assert noted.log[-1] == ("replay", key)
    assert not noted.graphs.idle_work()


def test_recording_points_the_buffers_at_the_null_slot_before_it_computes():
    noted = Noted([1], [64])
    noted.graphs.record(Key(1, 64))
    assert noted.log[0][0] == "clear"


def test_what_was_recorded_is_dropped_when_addresses_change_and_recorded_again_later():
    noted = Noted([1, 2], [64])
    noted.graphs.begin(torch.device("cpu"))
    noted.graphs.forget()
    assert not noted.graphs.replays
    while noted.graphs.idle_work():
        pass
    assert sorted(noted.graphs.replays) == [Key(1, 64), Key(2, 64)]


def test_no_graphs_are_made_when_they_are_switched_off_and_their_sizes_end_where_the_flag_says(directory):
    assert fused(directory, disable_cuda_graph=True).worker.steps.graphs is None
    small = fused(directory, cuda_graph_max_bs=2)
    assert small.worker.steps.graphs.rows == [1, 2]
    tokens = [answer.ids for answer in small.generate(PROMPTS, GREEDY)]  # three rows: beyond the largest size
    assert tokens == [answer.ids for answer in Engine(directory).generate(PROMPTS, GREEDY)]


def test_a_recorder_that_records_nothing_repeats_by_doing():
    done: list[int] = []
    repeat = PlainRecorder().record(lambda: done.append(1))
    repeat()
    assert done == [1]


def test_new_weights_are_served_by_steps_that_were_recorded_before(tmp_path):
    first, second = tiny.build("llama", tmp_path / "a", seed=1), tiny.build("llama", tmp_path / "b", seed=2)
    engine = fused(first)
    before = [answer.ids for answer in engine.generate(PROMPTS, GREEDY)]
    other = fused(second)
    engine.worker.model.weights.copy_from(other.worker.model.weights)
    engine.planner.forget_prefixes()
    after = [answer.ids for answer in engine.generate(PROMPTS, GREEDY)]
    assert before != after == [answer.ids for answer in other.generate(PROMPTS, GREEDY)]


def test_temperatures_are_sent_when_the_batch_changes_and_not_in_between(directory):
    engine = fused(directory)
    buffers = engine.worker.steps.buffers
    short, long = (SamplingParams(temperature=t, max_new_tokens=n, ignore_eos=True) for t, n in ((0.5, 4), (2.0, 8)))
    for prompt, params in zip(PROMPTS, (short, long), strict=False):
        engine.add(prompt, params)
    sent = []
    while engine.step():
        if not sent or sent[-1][0] is not buffers.drawing:
            sent.append((buffers.drawing, buffers.temperatures[:2].tolist()))
    assert [temperatures for _, temperatures in sent] == [[0.0, 0.0], [0.5, 2.0], [2.0, 0.0]]
