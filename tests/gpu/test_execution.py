"""The execution path on a GPU: recorded steps, overlap, draws and weights, each against the plain way."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from quartet.runtime.messages import LogprobOptions
from quartet.runtime.model_files import gguf_directory
from quartet.runtime.model_files.gguf import TYPES
from quartet.runtime.sampling import SamplingParams
from quartet.scheduler_service.execution import fused_steps
from quartet.scheduler_service.sampling import choose
from quartet.scheduler_service.sampling.rows import sampling_rows
from quartet.scheduler_service.sampling.state import settings_of
from quartet.scheduler_service.weights import device_staging
from quartet.scheduler_service.weights.blocks import EXPAND
from quartet.scheduler_service.weights.checkpoint import Checkpoint
from tests import gguf_files
from tests.engine import Answer, Engine, floats
from tests.model import tiny
from tests.unit.scheduler_service.test_overlap import CASES, PROMPTS, Overlapped

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is at hand"),
]
GREEDY = SamplingParams(temperature=0.0, max_new_tokens=24, ignore_eos=True)
FAMILIES = ("llama", "qwen2", "qwen3", "gemma2", "qwen2_moe", "cohere2", "glm4_moe", "ministral3")


@pytest.fixture(scope="module", params=FAMILIES)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build(request.param, tmp_path_factory.mktemp("gpu"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build("llama", tmp_path_factory.mktemp("gpu"))


@pytest.fixture
def no_waiting() -> Iterator[Callable[[bool], None]]:
    """Lets a test forbid everything that makes the host wait for the device."""
    yield lambda forbidden: torch.cuda.set_sync_debug_mode("error" if forbidden else "default")
    torch.cuda.set_sync_debug_mode("default")


def on_gpu(directory: Path, kind: type[Engine] = Engine, **settings: Any) -> Engine:
    settings = {"device": "cuda", "dtype": "bfloat16", "page_size": 16, "max_running_requests": 8, **settings}
    engine = kind(directory, **settings)
    if kind is Engine:
        engine.worker.depth = 0
    return engine


def tokens(answers: list[Answer]) -> list[list[int]]:
    return [answer.ids for answer in answers]


def test_recorded_steps_give_what_computed_steps_give(directory):
    expected = on_gpu(directory, disable_cuda_graph=True).generate(PROMPTS, GREEDY)
    engine = on_gpu(directory)
    assert engine.worker.uses_graphs and engine.worker.steps.graphs.replays
    assert tokens(engine.generate(PROMPTS, GREEDY)) == tokens(expected)


def test_recorded_steps_with_prompts_give_what_computed_steps_give(directory):
    settings = {"dtype": "float32", "chunked_prefill_size": 40}
    expected = on_gpu(directory, disable_cuda_graph=True, **settings).generate(PROMPTS, GREEDY)
    engine = on_gpu(directory, cuda_graph_max_prefill_tokens=64, **settings)
    while engine.worker.idle_work():
        pass
    prefill = engine.worker.steps.prefill
    assert tokens(engine.generate(PROMPTS, GREEDY)) == tokens(expected)
    assert prefill.graphs.replays and prefill.graphs.misses


def test_deterministic_answers_have_the_same_bits_alone_and_in_company(directory):
    settings = {"enable_deterministic_inference": True, "chunked_prefill_size": 40}
    together = on_gpu(directory, **settings).generate(PROMPTS, GREEDY, logprobs=LogprobOptions(start=0))
    for prompt, answer in zip(PROMPTS, together, strict=True):
        (alone,) = on_gpu(directory, enable_deterministic_inference=True).generate(
            [prompt], GREEDY, logprobs=LogprobOptions(start=0)
        )
        assert (alone.ids, alone.logprobs.values) == (answer.ids, answer.logprobs.values)


def test_launches_ahead_of_their_inputs_give_what_launches_in_turn_give(directory, monkeypatch):
    expected = on_gpu(directory).generate(PROMPTS, GREEDY)
    monkeypatch.setattr(fused_steps, "DEPENDENT_LAUNCHES", True)
    assert tokens(on_gpu(directory).generate(PROMPTS, GREEDY)) == tokens(expected)


def test_fused_logprobs_are_close_to_those_of_the_cpu(directory):
    options = LogprobOptions(start=0)
    params = SamplingParams(temperature=0.0, max_new_tokens=1)
    expected = Engine(directory).generate(PROMPTS, params, logprobs=options)
    # in bfloat16 a router's near tie falls otherwise now and then
    found = on_gpu(directory, dtype="float32").generate(PROMPTS, params, logprobs=options)
    for ours, theirs in zip(found, expected, strict=True):
        assert floats(ours.input_logprobs.values)[1:] == pytest.approx(
            floats(theirs.input_logprobs.values)[1:], abs=1e-3
        )


@pytest.mark.parametrize("case", CASES)
def test_overlapped_steps_give_what_plain_steps_give(llama, case):
    plain = on_gpu(llama).generate(PROMPTS, CASES[case], seed=5)
    overlapped = on_gpu(llama, Overlapped).generate(PROMPTS, CASES[case], seed=5)
    assert tokens(overlapped) == tokens(plain)


@pytest.mark.parametrize("case", ["greedy", "seeded", "filtered"])
def test_launching_a_decode_step_never_waits_for_the_device(llama, case, no_waiting):
    engine = on_gpu(llama, Overlapped)
    for prompt in PROMPTS:
        engine.add(prompt, CASES[case])
    engine.step()
    engine.step()
    plan = engine.planner.next(9.0)
    no_waiting(True)
    pending = engine.worker.launch(plan)
    no_waiting(False)
    engine.in_flight.append((plan, pending))
    engine.run()


def test_seeded_draws_are_those_of_the_cpu_from_equal_logits(llama):
    served = on_gpu(llama).worker
    logits = torch.randn(40, served.model.vocab_size, generator=torch.Generator().manual_seed(1)) * 3
    params = [CASES["seeded"], CASES["filtered"], CASES["greedy"]] * 14
    rows = sampling_rows([settings_of(params[i], seed=i) for i in range(40)], list(range(40)))
    expected = choose.sample(logits.clone(), rows).tokens
    found = served.steps.sample(logits.cuda(), rows).tokens.cpu()
    assert (found == expected).sum() >= 39  # sums of another order may move a draw at a border


def test_new_weights_are_served_by_graphs_that_were_recorded_before(tmp_path):
    first, second = tiny.build("llama", tmp_path / "a", seed=1), tiny.build("llama", tmp_path / "b", seed=2)
    engine, other = on_gpu(first), on_gpu(second)
    before = tokens(engine.generate(PROMPTS, GREEDY))
    addresses = [buffer.data_ptr() for buffer in engine.worker.model.weights.buffers.values()]
    weights, staged = engine.worker.model.weights, engine.worker.model.weights.staging()
    checkpoint = Checkpoint.open(second)
    device_staging.read_to_device(checkpoint, list(weights.names()), staged)
    weights.take_over(staged, frozenset(weights.names()), weights.pack(staged))
    engine.planner.forget_prefixes()
    assert [buffer.data_ptr() for buffer in weights.buffers.values()] == addresses
    assert tokens(engine.generate(PROMPTS, GREEDY)) == tokens(other.generate(PROMPTS, GREEDY)) != before


def test_staged_tensors_are_those_of_the_file(llama):
    weights = on_gpu(llama).worker.model.weights
    staged = weights.staging()
    device_staging.read_to_device(Checkpoint.open(llama), list(weights.names()), staged, chunk_bytes=4096)
    assert device_staging.changed_tensors(weights, staged, list(weights.names())) == frozenset()


def test_blocks_of_a_gguf_file_are_expanded_on_the_device_to_the_values_of_the_host(llama, tmp_path):
    file = gguf_files.convert(llama, tmp_path / "model.gguf", gguf_files.Q8_0)
    made = gguf_directory.described(file, tmp_path, tokenizer=True)
    device = on_gpu(made).worker.model.weights
    host = Engine(made, device="cpu", dtype="bfloat16", page_size=16, max_total_tokens=256).worker.model.weights
    assert all(torch.equal(device.view(name).cpu(), host.view(name)) for name in host.names())


@pytest.mark.parametrize("name", EXPAND)
def test_every_block_format_is_expanded_on_the_device_to_the_bits_of_the_host(name):
    nbytes = next(kind.nbytes for kind in TYPES.values() if kind.name == name)
    blocks = torch.randint(0, 120, (64, nbytes), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    assert torch.equal(EXPAND[name](blocks.cuda()).cpu(), EXPAND[name](blocks))


def test_retracted_requests_continue_with_the_same_tokens_on_a_gpu(llama):
    params = SamplingParams(temperature=1.0, max_new_tokens=60, ignore_eos=True)
    prompts = [list(range(20, 41)), list(range(40, 19, -1)), list(range(21, 42))]
    # What was computed one by one is computed at once after a retraction: in bfloat16 that moves draws at a border.
    expected = on_gpu(llama, page_size=4, dtype="float32").generate(prompts, params, seed=3)
    tight = on_gpu(llama, Overlapped, page_size=4, dtype="float32", max_total_tokens=140)
    answers = tight.generate(prompts, params, seed=3)
    assert tokens(answers) == tokens(expected) and sum(answer.retractions for answer in answers) > 0
