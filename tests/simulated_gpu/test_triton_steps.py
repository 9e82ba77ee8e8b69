"""Steps on Triton's kernels themselves, recorded and replayed: what `plain_kernels` leaves out of the other tests."""

from typing import Any

import pytest

from quartet.runtime.sampling import SamplingParams
from tests.engine import Engine
from tests.model import tiny
from tests.unit.scheduler_service.test_overlap import Overlapped

SMALL = {"num_hidden_layers": 1, "vocab_size": 300, "max_position_embeddings": 128}
SETTINGS: dict[str, Any] = {"max_running_requests": 2, "max_total_tokens": 512}
PARAMS = [
    SamplingParams(temperature=0.0, max_new_tokens=4, ignore_eos=True),
    SamplingParams(temperature=1.0, max_new_tokens=3, ignore_eos=True),
]
SHORT, LONG = [5, 6, 7], [(7 * i) % 250 + 4 for i in range(70)]

pytestmark = pytest.mark.interpreted


@pytest.mark.parametrize(("family", "prompts"), [("qwen3", [SHORT, LONG]), ("qwen2_moe", [SHORT, SHORT[1:]])])
def test_recorded_steps_of_tritons_kernels_answer_as_the_cpu_does(family, prompts, tmp_path):
    directory = tiny.build(family, tmp_path, **SMALL)
    engine = Overlapped(directory, device="cuda", **SETTINGS)
    assert engine.worker.steps.backend.ops.gemv.__module__ == "quartet.kernels.triton.gemv"
    assert engine.worker.steps.graphs.replays
    expected = Engine(directory, **SETTINGS).generate(prompts, PARAMS, seed=3)
    found = engine.generate(prompts, PARAMS, seed=3)
    assert [answer.ids for answer in found] == [answer.ids for answer in expected]


@pytest.mark.parametrize("family", ["lfm2", "olmo_hybrid", "falcon_h1"])
def test_recurrent_layers_decode_by_tritons_kernels_as_the_cpu_does(family, tmp_path):
    directory = tiny.build(family, tmp_path, vocab_size=300)
    engine = Engine(directory, device="cuda", **SETTINGS)
    assert engine.worker.state_cache.ops.convolve_row.__module__ == "quartet.kernels.triton.recurrent"
    expected = Engine(directory, **SETTINGS).generate([SHORT, LONG], PARAMS, seed=3)
    found = engine.generate([SHORT, LONG], PARAMS, seed=3)
    assert [answer.ids for answer in found] == [answer.ids for answer in expected]
