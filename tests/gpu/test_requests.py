"""What requests ask for and commands change on a GPU: each as on the CPU, in float32."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy
import pytest
import torch

from quartet.runtime.control import ReleaseMemory, ResumeMemory, UpdateWeightsFromDisk
from quartet.runtime.messages import LogprobOptions
from quartet.runtime.sampling import SamplingParams
from quartet.scheduler_service.execution import device_state
from quartet.scheduler_service.execution.eager_steps import EagerSteps
from quartet.scheduler_service.execution.graphs import Graphs
from quartet.scheduler_service.execution.worker import Worker
from tests import checkpoints
from tests.engine import ALL_LOGPROBS, Answer, Engine, floats
from tests.live import Live
from tests.model import tiny
from tests.stepper import tokenized
from tests.unit.scheduler_service.test_overlap import CASES, LONG, PROMPTS, SHORT, Overlapped

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is at hand"),
]
GREEDY = SamplingParams(temperature=0.0, max_new_tokens=12, ignore_eos=True)
OBJECT = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
SETTINGS: dict[str, Any] = {"device": "cuda", "max_running_requests": 8}
FIRST, SECOND = 100, 200  # what the version models answer


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build("llama", tmp_path_factory.mktemp("gpu"))


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build("qwen2_moe", tmp_path_factory.mktemp("gpu"))


def both(directory: Path, run: Callable[[Engine], list[Answer]], **settings: Any) -> tuple[list[Answer], list[Answer]]:
    """What a run gives on the CPU, and overlapped on the GPU."""
    return run(Engine(directory, **settings)), run(Overlapped(directory, **settings, **SETTINGS))


def assert_close(found: bytes, expected: bytes) -> None:
    assert floats(found) == pytest.approx(floats(expected), abs=1e-3, nan_ok=True)


def test_prompts_that_come_later_share_steps_with_decode_rows(llama):
    def run(engine: Engine) -> list[Answer]:
        rids = []
        for i, prompt in enumerate([*PROMPTS, LONG, SHORT]):
            rids.append(engine.add(prompt, GREEDY, seed=i))
            engine.step()
            engine.step()
        engine.run()
        return [engine.answers[rid] for rid in rids]

    expected, found = both(llama, run, chunked_prefill_size=16)
    assert [answer.ids for answer in found] == [answer.ids for answer in expected]


@pytest.mark.parametrize("options", [ALL_LOGPROBS, LogprobOptions(top=3, token_ids=[7, 9])], ids=["prompt", "output"])
def test_logprobs_are_those_of_the_cpu(llama, options):
    expected, found = both(llama, lambda engine: engine.generate(PROMPTS, GREEDY, logprobs=options))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.ids == theirs.ids
        assert_close(ours.logprobs.values, theirs.logprobs.values)
        assert ours.logprobs.top_ids == theirs.logprobs.top_ids
        assert_close(ours.logprobs.asked_values, theirs.logprobs.asked_values)
        if theirs.input_logprobs:
            assert_close(ours.input_logprobs.values, theirs.input_logprobs.values)


def test_hidden_states_are_those_of_the_cpu(llama):
    expected, found = both(llama, lambda engine: engine.generate(PROMPTS, GREEDY, return_hidden_states=True))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.hidden_states == pytest.approx(theirs.hidden_states, abs=1e-3)


@pytest.mark.parametrize("case", CASES)
def test_grammars_constrain_overlapped_steps_on_a_gpu(llama, case):
    constrained = msgspec.structs.replace(CASES[case], json_schema=json.dumps(OBJECT))
    each = [constrained, GREEDY, msgspec.structs.replace(constrained, stop_token_ids=[*range(40, 60)])]

    def run(engine: Engine) -> list[Answer]:
        return engine.generate(PROMPTS, each, seed=3, logprobs=LogprobOptions(top=2))

    expected, found = both(llama, run)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.ids, ours.finish, ours.logprobs.top_ids) == (theirs.ids, theirs.finish, theirs.logprobs.top_ids)
        assert_close(ours.logprobs.values, theirs.logprobs.values)


def test_masks_are_not_written_over_while_the_device_may_still_read_those_of_the_step_before(llama):
    """One request has drawn its last token when another one, in the next step, draws its first."""

    def run(engine: Engine) -> list[Answer]:
        for chunks in range(1, 6):
            for limit in range(1, 6):
                each = [SamplingParams(max_new_tokens=count, json_schema=json.dumps(OBJECT)) for count in (limit, 4)]
                prompts = zip((PROMPTS[0], [chunks, limit, *range(20, 18 + 8 * chunks)]), each, strict=True)
                for prompt, params in prompts:
                    engine.add(prompt, params, seed=5)
                engine.run()
        return list(engine.answers.values())

    expected, found = both(llama, run, chunked_prefill_size=8)
    assert [answer.ids for answer in found] == [answer.ids for answer in expected]


def test_prompts_that_are_embeddings_answer_as_their_ids_do(llama):
    engine = Overlapped(llama, **SETTINGS)
    table = engine.worker.model.embedding.cpu()
    ids = PROMPTS[1]
    by_ids = engine.add(ids, GREEDY)
    by_embeds = engine.add([0] * len(ids), GREEDY, embeds=table[ids].numpy().tobytes())
    engine.run()
    assert engine.answers[by_embeds].ids == engine.answers[by_ids].ids


def test_chosen_experts_are_those_of_the_cpu(experts):
    def run(engine: Engine) -> list[Answer]:
        return engine.generate(PROMPTS, GREEDY, return_routed_experts=True)

    expected, found = both(experts, run, enable_return_routed_experts=True)
    for ours, theirs in zip(found, expected, strict=True):
        pairs = (numpy.frombuffer(answer.routed_experts, "<i4").reshape(-1, 2) for answer in (ours, theirs))
        assert [sorted(pair) for pair in next(pairs)] == [sorted(pair) for pair in next(pairs)]


@pytest.mark.parametrize(
    ("family", "settings"),
    [("cohere", {}), ("llama", {"attention_backend": "torch_native"})],
    ids=["through transformers", "plain operations"],
)
def test_models_without_fused_operations_answer_as_on_the_cpu(family, settings, tmp_path):
    directory = tiny.build(family, tmp_path)
    params = [GREEDY, CASES["penalties"], CASES["filtered"]]
    expected = Engine(directory).generate(PROMPTS, params, seed=4)
    engine = Overlapped(directory, **SETTINGS, **settings)
    assert isinstance(engine.worker.steps, EagerSteps)
    assert [answer.ids for answer in engine.generate(PROMPTS, params, seed=4)] == [answer.ids for answer in expected]


def without_waiting(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every launch fail that waits for the device."""
    launch = worker.launch

    def launched(plan: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return launch(plan)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(worker, "launch", launched)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", ["llama", "qwen2_moe"])
def test_no_launch_waits_for_the_device(llama, experts, family, case, monkeypatch):
    engine = Overlapped({"llama": llama, "qwen2_moe": experts}[family], chunked_prefill_size=32, **SETTINGS)
    without_waiting(engine.worker, monkeypatch)
    engine.generate(PROMPTS, CASES[case], logprobs=LogprobOptions(top=2, token_ids=[5]))
    engine.generate(PROMPTS, CASES[case])


def test_no_launch_of_constrained_requests_waits_for_the_device(llama, monkeypatch):
    engine = Overlapped(llama, **SETTINGS)
    without_waiting(engine.worker, monkeypatch)
    constrained = SamplingParams(temperature=1.0, max_new_tokens=20, json_schema=json.dumps(OBJECT))
    engine.generate(PROMPTS[:2], [constrained, GREEDY])


# the scheduler


def live(directory: Path, tmp_path: Path, **settings: Any) -> Live:
    return Live(directory, tmp_path, depth=1, **SETTINGS, **settings)


def answered(served: Live, rid: str, tokens: int = 12) -> list[int]:
    served.send(tokenized(rid, PROMPTS[1], tokens, temperature=0.0, ignore_eos=True))
    served.run()
    return served.output(rid)


def fail_once(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
    """Have a function raise, once, when it has done its work."""
    method, failures = getattr(owner, name), ["a step failed"]

    def failing(*args: Any) -> Any:
        result = method(*args)
        if failures:
            raise RuntimeError(failures.pop())
        return result

    monkeypatch.setattr(owner, name, failing)


FAILURES = {"replay": (Graphs, "run"), "collect": (Worker, "collect"), "new pages": (device_state, "upload")}


@pytest.mark.parametrize(("owner", "name"), FAILURES.values(), ids=FAILURES)
def test_requests_go_on_after_a_step_that_failed(llama, tmp_path, monkeypatch, owner, name):
    prompts = {"x": PROMPTS[1], "y": PROMPTS[1][::-1]}
    params = {"max_new_tokens": 20, "temperature": 0.0, "ignore_eos": True}
    outputs = []
    for fails in (False, True):
        served = live(llama, tmp_path)
        served.send(*(tokenized(rid, prompt, **params) for rid, prompt in prompts.items()))
        served.step(4)
        if fails:
            fail_once(monkeypatch, owner, name)
        served.run()
        outputs.append([served.output(rid) for rid in prompts])
    assert outputs[1] == outputs[0]


@pytest.mark.parametrize("backup", [True, False], ids=["with a backup", "without a backup"])
def test_memory_that_was_released_serves_again_elsewhere(llama, tmp_path, backup):
    served = live(llama, tmp_path, enable_memory_saver=True, enable_weights_cpu_backup=backup)
    expected = answered(served, "before")
    free, _ = torch.cuda.mem_get_info()
    assert served.call(ReleaseMemory()).success
    assert torch.cuda.mem_get_info()[0] > free and not served.worker.steps.graphs.replays
    assert served.call(ResumeMemory()).success
    if not backup:
        assert served.call(UpdateWeightsFromDisk(model_path=str(llama))).success
    assert answered(served, "computed") == expected
    while served.worker.idle_work():
        pass
    assert served.worker.steps.graphs.replays
    assert answered(served, "recorded") == expected


@pytest.mark.parametrize("graphs", [True, False], ids=["recorded", "computed"])
def test_running_requests_go_on_with_weights_that_were_swapped_in_place(tmp_path, graphs):
    first, second = (checkpoints.version_model(tmp_path / str(token), token) for token in (FIRST, SECOND))
    served = live(first, tmp_path, disable_cuda_graph=not graphs)
    addresses = [buffer.data_ptr() for buffer in served.updates.live.buffers.values()]
    for rid in ("x", "y"):
        served.send(tokenized(rid, PROMPTS[1], 400, ignore_eos=True))
    served.step(4)
    for directory in (second, first, second):
        assert served.call(UpdateWeightsFromDisk(model_path=str(directory), weight_version=directory.name)).success
        served.step(3)
    served.run()
    assert [buffer.data_ptr() for buffer in served.updates.live.buffers.values()] == addresses
    for rid in ("x", "y"):
        assert all(version in ("default", str(token)) for version, token in served.by_version(rid))
        assert {token for _, token in served.by_version(rid)} == {FIRST, SECOND}


@pytest.mark.parametrize("family", ["lfm2", "qwen3_5", "falcon_h1"])
def test_hybrids_answer_as_on_the_cpu_and_find_their_prefixes(family, tmp_path):
    directory = tiny.build(family, tmp_path)
    prompts = [[*LONG, 5], [*LONG, 6, 7], SHORT]
    cpu, gpu = Engine(directory), Engine(directory, **SETTINGS)
    for _ in range(2):
        expected, found = (engine.generate(prompts, GREEDY) for engine in (cpu, gpu))
        assert [answer.ids for answer in found] == [answer.ids for answer in expected]
        assert [answer.cached_tokens for answer in found] == [answer.cached_tokens for answer in expected]
    assert sum(answer.cached_tokens for answer in found) > 0
