"""The one path of a step: what comes back of it, computed as it comes or on buffers that are kept ready."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from quartet.runtime.model_files import model_info
from quartet.runtime.sampling import SamplingParams
from quartet.scheduler_service.core.plan import Plan
from quartet.scheduler_service.execution.eager_steps import EagerSteps
from quartet.scheduler_service.execution.fused_steps import FusedSteps
from quartet.scheduler_service.execution.steps import Computed, Step
from quartet.scheduler_service.execution.worker import Worker
from tests.configs import resolved
from tests.engine import Engine
from tests.model import tiny

PROMPTS = [[5, 6, 7], [8, 9]]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build("llama", tmp_path_factory.mktemp("steps"))


def engine_of(directory: Path, implementation: Any = None) -> Engine:
    own = {"dtype": "float32", "page_size": 4, "max_total_tokens": 4096, "device": "cpu", "max_running_requests": 4}
    config = resolved(model_path=str(directory), model_dir=str(directory), **own)
    return Engine(directory, worker=Worker(config, model_info.load(config), implementation=implementation), **own)


def computed(engine: Engine, params: SamplingParams) -> Iterator[tuple[Step, Computed]]:
    """Every step of two requests, as it comes back."""
    for prompt in PROMPTS:
        engine.add(prompt, params)
    worker, found = engine.worker, []
    run = worker.steps.run

    def noted(step: Step) -> Computed:
        found.append((step, run(step)))
        return found[-1][1]

    worker.steps.run = noted  # type: ignore[method-assign]
    while engine.step():
        yield from found
        found.clear()


def decodes(plan: Plan) -> bool:
    return plan.decodes == len(plan.slices)


def test_eager_steps_give_hidden_states_of_every_step(directory):
    engine = engine_of(directory)
    assert isinstance(engine.worker.steps, EagerSteps)
    for step, given in computed(engine, SamplingParams(temperature=0.0, max_new_tokens=4)):
        assert given.hidden is not None and given.inputs is not None
        assert len(given.hidden) == sum(share.end - share.start for share in step.plan.slices)
        assert given.logits is None and given.draws is None


@pytest.mark.parametrize(("params", "drawn"), [({"temperature": 0.7}, True), ({"top_k": 3}, False)])
def test_fused_steps_draw_plain_decode_steps_at_once_and_leave_others_to_be_drawn_from(directory, params, drawn):
    engine = engine_of(directory, "torch")
    assert isinstance(engine.worker.steps, FusedSteps)
    seen = set()
    for step, given in computed(engine, SamplingParams(max_new_tokens=4, ignore_eos=True, **params)):
        seen.add(decodes(step.plan))
        if decodes(step.plan):
            assert given.logits is not None and given.hidden is None and (given.draws is not None) == drawn
        else:
            assert given.hidden is not None and given.logits is None
    assert seen == {False, True}


def test_logits_of_steps_on_a_cpu_share_their_memory(directory):
    steps = engine_of(directory).worker.steps
    first, second = steps.room_for_logits(3), steps.room_for_logits(2)
    assert first is not None and second is not None
    assert first.data_ptr() == second.data_ptr() and second.shape == (2, steps.model.vocab_size)
    assert first.dtype == torch.float32
