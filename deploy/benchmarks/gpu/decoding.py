"""The engine's loop: one stream, batches, prompts beside streams, the nano-vllm benchmark, batch invariance."""

import gc
import random
import statistics
import time
from typing import Any

import msgspec
import torch

from deploy.benchmarks.gpu.engine import Engine, Run
from deploy.benchmarks.gpu.setting import Setting
from deploy.benchmarks.gpu.shapes import Cost
from deploy.benchmarks.gpu.timing import seconds
from quartet.scheduler_service.execution.fused_steps import FusedSteps, make_fused_steps
from quartet.scheduler_service.model.decoder import Decoder

PROMPT = 32
SINGLE_GOALS = {"qwen2.5-0.5b": 2030, "llama-3.2-1b": 1200, "llama-3.1-8b": 235, "qwen1.5-moe-a2.7b": 600}
BATCH_GOALS = {
    ("llama-3.1-8b", 64): 8_700,
    ("llama-3.1-8b", 256): 16_000,
    ("qwen2.5-0.5b", 64): 77_000,
    ("qwen2.5-0.5b", 256): 118_000,
}
NANO_GOALS = {"qwen3-0.6b": 23_700, "qwen2.5-0.5b": 75_000}


def made(setting: Setting, name: str, **settings: Any) -> Engine:
    """An engine; the memory of the one before is given back first."""
    gc.collect()
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()
    begun = time.perf_counter()
    if setting.rehearsal:
        settings = {
            **settings,
            "context_length": 256,
            "running": min(settings.get("running", 8), 8),
            "pool_tokens": 4096,
        }
    engine = Engine(setting.shapes[name], setting.device, **settings)
    setting.report.put(**{f"made {name} s": round(time.perf_counter() - begun, 2)})
    return engine


def single(setting: Setting) -> None:
    """One stream: 32 prompt tokens, 512 new ones; through the loop, and the recorded step alone."""
    new = setting.size(512, 8)
    for name, goal in SINGLE_GOALS.items():
        engine = made(setting, name, context_length=1024, running=4, pool_tokens=8192)
        runs = []
        for repeat in range(4):
            engine.add(engine.prompt(PROMPT, repeat), new)
            runs.append(engine.run())
        cost = Cost(engine.worker.info.config)
        ceiling = 1 / cost.decode_s(1, PROMPT + new / 2, setting.limits)
        rate = statistics.median((run.tokens - 1) / (run.ended - run.step_ends[0]) for run in runs[1:])
        setting.report.figure(f"{name}, one stream, engine loop", rate, "tok/s", ceiling, goal)
        fused = engine.worker.steps
        if isinstance(fused, FusedSteps):
            taken = recorded_step_s(setting, fused, PROMPT + new)
            setting.report.figure(f"{name}, recorded step of the null slot alone", taken * 1e6, "us", 1e6 / ceiling)
            if setting.device.type == "cuda":
                taken = recorded_step_s(setting, ahead(engine), PROMPT + new)
                setting.report.figure(f"{name}, the same launched ahead", taken * 1e6, "us", 1e6 / ceiling)
        del engine


def ahead(engine: Engine) -> FusedSteps:
    """Steps of the same model with dependent launches (quartet.kernels.triton.configs.DEPENDENT_LAUNCHES)."""
    worker = engine.worker
    assert isinstance(worker.model, Decoder)
    length = worker.info.context_length
    settings = msgspec.structs.replace(engine.config, cuda_graph_max_bs=1)
    return make_fused_steps(settings, worker.model, worker.cache, worker.tokens, length, "triton", dependent=True)


def recorded_step_s(setting: Setting, fused: FusedSteps, longest: int) -> float:
    """Seconds of one recorded decode step of one row."""
    graphs = fused.graphs
    assert graphs is not None
    key = graphs.key(1, longest)
    with torch.inference_mode():
        if key not in graphs.replays:
            graphs.record(key)
        graphs.clear()
        return seconds(lambda: [graphs.run(key) for _ in range(20)], setting.device) / 20


def batches(setting: Setting) -> None:
    """Many streams with 1k tokens of context each: steps once all prompts are in."""
    prompt, steps = setting.size(1024, 24), setting.size(200, 5)
    for name in ("llama-3.1-8b", "qwen2.5-0.5b"):
        engine = made(setting, name, context_length=2048)
        for rows in (64, 256):
            count = setting.size(rows, 4)
            for i in range(count):
                engine.add(engine.prompt(prompt, i), steps + 50)
            run = Run()
            while any(sequence.needs_prefill for sequence in engine.planner.running) or engine.planner.waiting:
                engine.step(run)
            for _ in range(8):
                engine.step(run)
            measured = engine.run(steps)
            rate = measured.tokens / measured.seconds
            step_s = Cost(engine.worker.info.config).decode_s(rows, prompt + steps / 2, setting.limits)
            goal = BATCH_GOALS[name, rows]
            setting.report.figure(f"{name}, {rows} streams at {prompt} tokens", rate, "tok/s", rows / step_s, goal)
            if rows == 64:
                idle(setting, engine, f"{name}, {rows} streams")
            engine.abort_all()
            engine.run()
        del engine


def idle(setting: Setting, engine: Engine, name: str) -> None:
    """The share of time in which no kernel ran, over 50 steps."""
    if setting.device.type != "cuda":
        return
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        engine.run(50)
        torch.cuda.synchronize()
    spans = sorted((e.time_range.start, e.time_range.end) for e in trace.events() if e.device_type.name == "CUDA")
    if not spans:
        setting.report.put(idle="the profiler saw no kernels")
        return
    busy, reached = 0.0, spans[0][0]
    for start, end in spans:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    setting.report.figure(f"{name}, device idle", 100 * (1 - busy / (reached - spans[0][0])), "%", goal=5)


def first_token_ms(engine: Engine, length: int) -> float:
    """The median time to the first token of a prompt that comes alone."""
    firsts = []
    for repeat in range(6):
        engine.add(engine.prompt(length, repeat), 1)
        firsts.append(next(iter(engine.run().first_token_s.values())))
    return statistics.median(firsts[1:]) * 1e3


def beside_prompts(setting: Setting, engine: Engine, kind: str) -> None:
    """The gaps that streams see while long prompts come."""
    new = setting.size(400, 12)
    for i in range(setting.size(32, 3)):
        engine.add(engine.prompt(setting.size(1024, 24), i), new)
    run = Run()
    for step in range(new // 2):
        if step % 40 == 20:
            engine.add(engine.prompt(setting.size(6000, 60), step), 4)
        engine.step(run)
    gaps = sorted(b - a for a, b in zip(run.step_ends, run.step_ends[1:], strict=False))
    setting.report.figure(f"streams beside 6k prompts, {kind}: median gap", statistics.median(gaps) * 1e3, "ms")
    setting.report.figure(f"streams beside 6k prompts, {kind}: largest gap", gaps[-1] * 1e3, "ms")


def mixed(setting: Setting) -> None:
    """Prompts alone, the time to a first token, and streams beside long prompts."""
    limits = setting.limits
    for most in (0, 2048):
        engine = made(setting, "qwen2.5-0.5b", context_length=8192, cuda_graph_max_prefill_tokens=most)
        kind = "recorded" if most else "launched one by one"
        for length, goal in ((setting.size(1024, 24), 3), (setting.size(128, 12), None)):
            ceiling = Cost(engine.worker.info.config).prefill_s(length, limits) * 1e3
            taken = first_token_ms(engine, length)
            setting.report.figure(f"qwen2.5-0.5b, first token of {length}, {kind}", taken, "ms", ceiling, goal)
        beside_prompts(setting, engine, kind)
        del engine
    engine = made(setting, "llama-3.1-8b", context_length=8192, running=16, pool_tokens=65536)
    length, count = setting.size(4096, 24), setting.size(4, 1)
    rates = []
    for repeat in range(3):
        for i in range(count):
            engine.add(engine.prompt(length, 10 * repeat + i), 1)
        rates.append(count * length / engine.run().seconds)
    ceiling = length / Cost(engine.worker.info.config).prefill_s(length, limits)
    setting.report.figure("llama-3.1-8b, prompts of 4k", statistics.median(rates[1:]), "tok/s", ceiling, 36_000)


def nano_requests(setting: Setting) -> tuple[list[list[int]], list[int]]:
    """The requests of nano-vllm's bench.py: 142,827 tokens in, 133,966 out."""
    random.seed(0)
    count, largest, highest = setting.size(256, 6), setting.size(1024, 110), setting.size(10_000, 500)
    prompts = [[random.randint(0, highest) for _ in range(random.randint(100, largest))] for _ in range(count)]
    return prompts, [random.randint(100, largest) for _ in range(count)]


def nano(setting: Setting) -> None:
    """256 requests at once, temperature 0.6."""
    prompts, news = nano_requests(setting)
    for name, goal in NANO_GOALS.items():
        engine = made(setting, name, context_length=4096)
        cost = Cost(engine.worker.info.config)
        context = statistics.mean(len(p) + n / 2 for p, n in zip(prompts, news, strict=True))
        best = sum(cost.decode_s(sum(n > step for n in news), context, setting.limits) for step in range(max(news)))
        best += sum(cost.prefill_s(len(prompt), setting.limits) for prompt in prompts)
        for repeat in range(2):
            for i, (prompt, new) in enumerate(zip(prompts, news, strict=True)):
                engine.add(prompt, new, temperature=0.6, seed=i)
            run = engine.run()
            setting.report.figure(
                f"{name}, nano bench, run {repeat + 1}", run.tokens_per_s, "tok/s", sum(news) / best, goal
            )
        del engine


def determinism(setting: Setting) -> None:
    """What --enable-deterministic-inference costs, and how many requests give the same tokens alone and in company."""
    rates = {}
    for promised in (False, True):
        engine = made(setting, "qwen3-0.6b", context_length=1024, running=64, enable_deterministic_inference=promised)
        kind = "deterministic" if promised else "as ever"
        rates[promised] = compared(setting, engine, kind)
        del engine
    setting.report.figure("cost of determinism", 100 * (1 - rates[True] / rates[False]), "%", goal=15)


def compared(setting: Setting, engine: Engine, kind: str) -> float:
    """Some requests alone and among others; returns the tokens per second of all together."""
    count, new = setting.size(48, 5), setting.size(64, 8)
    prompts = [engine.prompt(20 + 7 * i % 200, i) for i in range(count)]
    rates = []
    for temperature in (0.0, 1.0):
        rids = [engine.add(prompt, new, temperature, seed=i) for i, prompt in enumerate(prompts)]
        run = engine.run()
        rates.append(run.tokens_per_s)
        together = [run.outputs[rid] for rid in rids]
        alone = []
        for i in range(0, count, 6):
            rid = engine.add(prompts[i], new, temperature, seed=i)
            alone.append(engine.run().outputs[rid] == together[i])
        drawn = "drawn" if temperature else "greedy"
        name = f"{kind}, {drawn} requests equal alone and among {count}"
        setting.report.figure(name, sum(alone), f"of {len(alone)}")
    return max(rates)
