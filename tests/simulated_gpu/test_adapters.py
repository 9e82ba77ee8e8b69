"""LoRA adapters on the simulated device: what they give, against peft, where they lie, and what recorded steps know."""

import gc
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from quartet.kernels.ops import resolve
from quartet.runtime.adapters import LoadAdapter, UnloadAdapter
from quartet.runtime.control import ReleaseMemory, ResumeMemory, UpdateWeightsFromDisk
from quartet.runtime.errors import StartupError
from quartet.runtime.messages import LogprobOptions, Tokenized
from quartet.scheduler_service.execution.adapter_tiles import TileBuffer, runs_of
from quartet.scheduler_service.execution.graphs import Graphs, Key
from tests import adapters
from tests.engine import Engine
from tests.live import DEADLINE_S, Live
from tests.model import test_adapters_of_peft as of_peft
from tests.model import tiny
from tests.model.test_adapters import GREEDY, PROMPT
from tests.simulated_gpu import cuda, memory
from tests.simulated_gpu.memory import Memory
from tests.stepper import tokenized
from tests.unit.scheduler_service.test_overlap import Overlapped

NAMES = ["", "a0", "a1", "a2"]  # of ranks 3, 8 and 16
DEVICE: dict[str, Any] = {"device": "cuda", "max_lora_rank": 64, "max_loras_per_batch": 3}
LONG = [(7 * i) % 250 + 4 for i in range(40)]


class OnDevice(of_peft.PeftServed):
    """Served by recorded steps, launched ahead of the results of the ones before."""

    def start(self, **settings: Any) -> Engine:
        engine = Overlapped(self.base, **DEVICE, cuda_graph_max_prefill_tokens=64, **settings)
        while engine.worker.idle_work():
            pass
        return engine


@pytest.fixture(scope="module", params=["qwen2", "qwen3_moe"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> OnDevice:
    return OnDevice(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Key, bool]]:
    """The recorded steps that ran, and whether they had been recorded."""
    found: list[tuple[Key, bool]] = []
    run = Graphs.run

    def noted(graphs: Graphs, key: Key) -> None:
        found.append((key, key in graphs.replays))
        run(graphs, key)

    monkeypatch.setattr(Graphs, "run", noted)
    return found


@pytest.fixture
def no_waiting() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


def test_adapters_and_the_base_in_one_batch_of_recorded_steps_give_what_peft_gives(served, keys):
    for names in ([""], ["a1"], NAMES, NAMES * 2):
        for name, answer in zip(names, served.ask(names), strict=True):
            served.check(answer, name)
    while served.engine.worker.idle_work():  # sizes that were missing
        pass
    keys.clear()
    for name, answer in zip(NAMES * 2, served.ask(NAMES * 2), strict=True):
        served.check(answer, name)
    assert all(recorded and key.adapters for key, recorded in keys) and len(keys) == GREEDY.max_new_tokens


def test_prefix_hits_retraction_and_a_replaced_adapter_give_what_peft_gives(served):
    served.ask(NAMES, LONG)
    for name, answer in zip(NAMES, served.ask(NAMES, LONG), strict=True):
        assert answer.cached_tokens > 0
        served.check(answer, name, LONG)
    rids = [served.engine.add(LONG, GREEDY, adapter=name, logprobs=LogprobOptions()) for name in NAMES]
    for _ in range(3):
        served.engine.step()
    while served.engine.in_flight:
        served.engine.collect_oldest(*served.engine.in_flight.popleft())
    served.engine.planner.retract_all()
    served.engine.run()
    for rid, name in zip(rids, NAMES, strict=True):
        assert served.engine.answers[rid].retractions == 1
        served.check(served.engine.answers[rid], name, LONG)
    served.load("a1", seed=77, rank=5)
    for name, answer in zip(NAMES, served.ask(NAMES, LONG), strict=True):
        assert (answer.cached_tokens == 0) == (name == "a1")
        served.check(answer, name, LONG)


def test_more_adapters_than_slots_take_turns(served):
    for names in (["a0", "a1", "a2"], ["a3"], ["", "a0", "a3"], ["a1", "a2"], [*NAMES, "a3"]):
        for name, answer in zip(names, served.ask(names), strict=True):
            served.check(answer, name)
    assert len(served.store.pool.slot_of) == 3


def test_an_adapter_is_written_to_its_slot_without_waiting_for_the_device(served, no_waiting):
    engine = served.engine
    served.ask(["a0", "a1", "a2"])
    rids = [engine.add(PROMPT, GREEDY, adapter=name, logprobs=LogprobOptions()) for name in ("", "a3")]
    assert served.store.loaded["a3"] not in served.store.pool.slot_of
    plan = engine.planner.next(0.0)
    torch.cuda.set_sync_debug_mode("error")
    pending = engine.worker.launch(plan)
    torch.cuda.set_sync_debug_mode("default")
    engine.in_flight.append((plan, pending))
    engine.run()
    for rid, name in zip(rids, ("", "a3"), strict=True):
        served.check(engine.answers[rid], name)


def test_steps_without_adapters_are_those_of_a_server_that_takes_none(tmp_path, keys):
    directory, prompts = tiny.build("qwen3", tmp_path), [PROMPT, LONG]
    plain = Overlapped(directory, device="cuda").generate(prompts, GREEDY, logprobs=LogprobOptions())
    without = [key for key, _ in keys]
    keys.clear()
    engine = Overlapped(directory, enable_lora=True, **DEVICE)
    engine.worker.load_adapters(engine.config, str(tmp_path))
    found = engine.generate(prompts, GREEDY, logprobs=LogprobOptions())
    assert [key for key, _ in keys] == without and not any(key.adapters for key in without)
    for ours, theirs in zip(found, plain, strict=True):
        assert (ours.ids, ours.logprobs.values) == (theirs.ids, theirs.logprobs.values)


def live(directory: Path, **settings: Any) -> Live:
    base = adapters.telling_base(directory / "base")
    for number in range(4):
        adapters.telling_adapter(directory / f"t{number}", number, rank=1 + number)
    return Live(base, directory, depth=1, **DEVICE, max_running_requests=6, **settings)


def load(served: Live, directory: Path, number: int) -> None:
    reply = served.call(LoadAdapter(lora_name=f"t{number}", lora_path=str(directory / f"t{number}")))
    assert reply.success, reply.message


def request(rid: str, tokens: int, adapter: str) -> Tokenized:
    message = tokenized(rid, list(range(10, 31)), tokens, temperature=0.0, ignore_eos=True)
    return msgspec.structs.replace(message, request=msgspec.structs.replace(message.request, adapter=adapter))


def tell(served: Live, rid: str, numbers: list[int | None]) -> None:
    """Requests by adapters, or by the base, answer what theirs say."""
    for i, number in enumerate(numbers):
        served.send(request(f"{rid}{i}", 4, "" if number is None else f"t{number}"))
    served.run()
    for i, number in enumerate(numbers):
        expected = adapters.BASE_TOKEN if number is None else adapters.FIRST_TOKEN + number
        assert served.output(f"{rid}{i}") == [expected] * 4, number


@pytest.mark.parametrize("backup", [True, False], ids=["backup", "update"])
def test_slots_are_given_back_and_written_again(tmp_path, backup):
    served = live(tmp_path, enable_lora=True, enable_memory_saver=True, enable_weights_cpu_backup=backup)
    for number in range(4):
        load(served, tmp_path, number)
    tell(served, "before", [None, 0, 1, 2])
    pool, before = served.adapters.pool, Memory.used_bytes
    assert served.call(ReleaseMemory()).success
    assert before - Memory.used_bytes > pool.nbytes and not pool.slot_of
    assert served.call(ResumeMemory()).success
    if not backup:
        assert served.call(UpdateWeightsFromDisk(model_path=str(tmp_path / "base"))).success
    tell(served, "after", [3, None, 0, 2])
    while served.worker.idle_work():
        pass
    tell(served, "recorded", [None, 1, 3])


def test_a_server_that_slept_has_its_slots_again(tmp_path):
    now = [0.0]
    more = {"sleep_when_idle_s": 60.0, "model_dir": str(tmp_path / "base"), "clock": lambda: now[0]}
    served = live(tmp_path, enable_lora=True, **more)
    for number in range(3):
        load(served, tmp_path, number)
    tell(served, "before", [None, 0, 1, 2])
    pool, before = served.adapters.pool, Memory.used_bytes
    now[0] = 200.0
    served.step()
    assert served.scheduler.sleeping and before - Memory.used_bytes > pool.nbytes and not pool.products
    served.send(request("first", 4, "t1"))
    deadline = time.monotonic() + DEADLINE_S
    while served.scheduler.sleeping:
        assert time.monotonic() < deadline
        served.step()
    served.run()
    assert served.output("first") == [adapters.FIRST_TOKEN + 1] * 4
    tell(served, "after", [2, None, 0, 1])


def test_adapters_come_and_go_while_others_run_and_the_base_is_swapped(tmp_path):
    served = live(tmp_path, enable_lora=True)
    load(served, tmp_path, 0)
    served.send(request("long", 60, "t0"))
    served.step(4)
    for number in (1, 2, 3):
        load(served, tmp_path, number)
        tokens = len(served.output("long"))
        served.step(2)
        assert len(served.output("long")) > tokens, "it goes on meanwhile"
    assert served.call(UpdateWeightsFromDisk(model_path=str(tmp_path / "base"))).success
    assert served.call(UnloadAdapter(lora_name="t1")).success
    replaced = LoadAdapter(lora_name="t2", lora_path=str(tmp_path / "t3"), load_inplace=True)
    assert served.call(replaced).success
    served.run()
    assert served.output("long") == [adapters.FIRST_TOKEN] * 60
    served.send(request("other", 4, "t2"))
    served.run()
    assert served.output("other") == [adapters.FIRST_TOKEN + 3] * 4


def test_the_kv_pool_gets_what_the_slots_leave(tmp_path, monkeypatch):
    directory = tiny.build("qwen2", tmp_path)
    settings = {"device": "cuda", "max_total_tokens": None, "max_running_requests": 64, "disable_cuda_graph": True}
    gc.collect()
    for module in (memory, cuda):
        monkeypatch.setattr(module, "TOTAL_BYTES", Memory.used_bytes + (12 << 20))
    plain = Engine(directory, **settings)
    size, per_page = plain.worker.page_count, sum(plain.worker.cache.gigabytes) * (1 << 30) / plain.worker.page_count
    del plain
    gc.collect()
    engine = Engine(directory, enable_lora=True, **settings, max_lora_rank=32, max_loras_per_batch=2)
    size_beside, pool = engine.worker.page_count, engine.worker.adapter_pool
    assert pool.nbytes > 10 * per_page
    assert size - size_beside == pytest.approx(0.85 * pool.nbytes / per_page, rel=0.1)
    assert engine.worker.facts().memory_usage["adapters"] == round(pool.nbytes / (1 << 30), 2)
    del engine
    gc.collect()
    with pytest.raises(StartupError, match=r"no room for 8 LoRA adapters of rank 256 at once: .*--max-lora-rank"):
        Engine(directory, enable_lora=True, **settings)


def test_a_model_without_fused_operations_refuses_adapters_on_a_gpu(tmp_path):
    engine = Engine(tiny.build("gpt_oss", tmp_path), enable_lora=True, **DEVICE)
    with pytest.raises(StartupError, match="on a GPU one that runs on the fused operations"):
        engine.worker.load_adapters(engine.config, str(tmp_path))


@pytest.mark.interpreted
def test_recorded_kernels_follow_the_tiles_of_each_step():
    ops, generator = resolve("cuda"), torch.Generator().manual_seed(0)

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    x, a, bs = made(5, 48), made(2, 2, 16, 48), [made(2, 20, 16), made(2, 12, 16)]
    on_device = [tensor.cuda() for tensor in (x, a, *bs)]
    out, buffer = torch.zeros(5, 32, device="cuda"), TileBuffer(5, 2, torch.device("cuda"))

    def work() -> None:
        tiles, given = buffer.of(5), on_device[0]
        inner = given.new_empty(5, 32)
        ops.adapter_shrink(given, on_device[1], tiles.tiles, tiles.order, inner)
        for first, column, b in ((0, 0, on_device[2]), (16, 20, on_device[3])):
            ops.adapter_expand(inner, first, b, tiles.tiles, tiles.order, out, column)

    work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    for owners, ranks in (([0, -1, 1, 0, -1], [16, 5]), ([-1, 1, 1, 1, 1], [0, 9]), ([-1] * 4 + [0], [3, 0])):
        buffer.send(5, runs_of(owners, range(6)), ranks)
        out.zero_()
        graph.replay()
        expected = torch.zeros(5, 32)
        for token, slot in enumerate(owners):
            if slot >= 0:
                inner = a[slot, :, : ranks[slot]] @ x[token]  # (parts, rank)
                parts = [b[slot, :, : ranks[slot]] @ own for b, own in zip(bs, inner, strict=True)]
                expected[token] = torch.cat(parts)
        torch.testing.assert_close(out.cpu(), expected, atol=1e-3, rtol=1e-4)
