"""What a start compiles ahead, against what its steps then launch; and kernels that cannot be compiled."""

from array import array
from collections import Counter
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import triton.language as tl
from triton import knobs

from deploy.benchmarks.gpu.engine import model_info
from deploy.benchmarks.gpu.shapes import REHEARSAL, SHAPES
from quartet.kernels.triton import compile as triton_compile
from quartet.kernels.triton import operations
from quartet.kernels.triton.compile import CompileError, Kernel, compiling, kernel
from quartet.runtime.config import ResolvedConfig
from quartet.runtime.messages import Request
from quartet.runtime.sampling import SamplingParams
from quartet.scheduler_service.core.plan import Plan, Slice
from quartet.scheduler_service.core.request import Sequence
from quartet.scheduler_service.execution.compile_ahead import META, BlankAdapters, start_compiling
from quartet.scheduler_service.execution.device_state import SlotTokens
from quartet.scheduler_service.execution.fused_steps import FusedSteps, make_fused_steps
from quartet.scheduler_service.execution.inputs import make_inputs, to_device
from quartet.scheduler_service.execution.kv_cache import KVCache
from quartet.scheduler_service.model.decoder import Decoder
from quartet.scheduler_service.model.layout import decoder_layout
from quartet.scheduler_service.model.registry import decoder_spec
from quartet.scheduler_service.model.torch_backend import TorchBackend
from quartet.scheduler_service.sampling.rows import sampling_rows
from quartet.scheduler_service.sampling.state import settings_of
from quartet.scheduler_service.weights.parameters import Weights
from tests.configs import resolved
from tests.kernels_sm90.compiler import use_compiler_only

RECORDER = use_compiler_only()
CONTEXT, SLOTS, PAGE = 4096, 96, 16
TINY = {"torch_dtype": "bfloat16", "max_position_embeddings": CONTEXT}
MODELS = {
    "tiny with head norms": {**REHEARSAL["qwen3-0.6b"], **TINY},
    "tiny with experts": {**REHEARSAL["qwen1.5-moe-a2.7b"], **TINY},
    "half a billion": {**SHAPES["qwen2.5-0.5b"], "num_hidden_layers": 2},
}
# decode rows, and the lengths of the prompts beside them
STEPS = [(1, []), (3, []), (7, []), (70, []), (0, [1]), (0, [21]), (3, [5, 40]), (5, [300]), (90, [9])]
CONFIG = resolved(device="cuda", cuda_graph_max_prefill_tokens=64)
WITH_ADAPTERS = resolved(device="cuda", cuda_graph_max_prefill_tokens=64, enable_lora=True, max_lora_rank=64)


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Kernels by name, as they are compiled with empty caches."""
    for module in {import_module(getattr(operations, name).__module__) for name in operations.__all__}:
        for value in vars(module).values():
            if isinstance(value, Kernel):
                value.device_caches.clear()
    counts: Counter[str] = Counter()
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", lambda *, fn, **_: counts.update([fn.name]))
    yield counts
    RECORDER.loaded.clear()


def whole_steps(config: dict[str, Any], settings: ResolvedConfig) -> FusedSteps:
    """Steps of all layers with the first graphs recorded, on another number of pages, as a server makes them."""
    spec = decoder_spec(model_info(config, CONTEXT))
    torch_backend = TorchBackend(spec.ropes, torch.bfloat16, META)
    model = Decoder(spec, Weights(decoder_layout(spec), torch.bfloat16, META), torch_backend)
    cache = KVCache(model.attention, 1000, PAGE, torch.bfloat16, META)
    steps = make_fused_steps(settings, model, cache, SlotTokens(SLOTS, META), CONTEXT, "triton")
    steps.begin()
    steps.adapters = BlankAdapters()
    return steps


def sequence(slot: int, tokens: int, adapter: str = "") -> Sequence:
    request = Request(rid=str(slot), params=SamplingParams(top_k=5), adapter=adapter)
    pages = list(range(1, 2 - -tokens // PAGE))
    return Sequence(request, array("i", [1]) * (tokens + 1), tokens, slot=slot, pages=pages)


def step(steps: FusedSteps, rows: int, prompts: list[int], adapter: str = "") -> None:
    """Decode rows at different positions beside prompts, then a draw of one token for each."""
    slices = [Slice(sequence(i, 20 + i, adapter), 19 + i, 20 + i, True) for i in range(rows)]
    slices += [Slice(sequence(rows + i, tokens, adapter), 0, tokens, True) for i, tokens in enumerate(prompts)]
    plan = Plan(slices, decodes=rows)
    params = [share.sequence.request.params for share in slices]
    rows_drawn = sampling_rows([settings_of(each, seed=0) for each in params], [1] * len(slices))
    if steps.decodes(plan):
        logits = steps.replay(plan, None).logits
    else:
        inputs = make_inputs(plan, [[(1, len(s.sequence.pages))] for s in slices], [0] * len(slices), PAGE)
        to_device(inputs, META)
        last = torch.tensor(inputs.offsets[1:], device=META)
        logits = steps.model.logits(steps.forward(plan, inputs)[last])
    masks = torch.empty(len(slices), -(-logits.shape[1] // 32), dtype=torch.int32, device=META)
    for allowed in (None, masks):
        steps.model.sample(logits, rows_drawn, allowed)


@pytest.mark.parametrize(
    ("name", "adapters"),
    [*((name, False) for name in MODELS), ("tiny with head norms", True), ("tiny with experts", True)],
)
@torch.inference_mode()
def test_steps_find_every_kernel_compiled(name: str, adapters: bool, compiled: Counter[str]) -> None:
    settings = WITH_ADAPTERS if adapters else CONFIG
    kernels = start_compiling(settings, model_info(MODELS[name], CONTEXT), torch.device("cuda"), SLOTS)
    assert kernels is not None
    kernels.result()
    assert compiled.total() == len(RECORDER.loaded) > 30
    assert ("_shrink" in compiled) == adapters
    compiled.clear()
    steps = whole_steps(MODELS[name], settings)
    for rows, prompts in STEPS:
        for adapter in ("", "a") if adapters else ("",):
            step(steps, rows, prompts, adapter)
    while steps.idle_work():
        pass
    assert not compiled


@kernel
def _right(x_ptr):
    tl.store(x_ptr, 1.0)


@kernel
def _wrong(x_ptr):
    tl.static_assert(False, "not like this")


def test_a_kernel_that_cannot_be_compiled_is_named_and_others_are_compiled(compiled: Counter[str]) -> None:
    x = torch.empty(1, device=META)
    with pytest.raises(CompileError, match=r"^_wrong: (.|\n)*not like this"), compiling(2):
        _wrong[(1,)](x)
        _right[(1,)](x)
    assert compiled.total() == 1
    _right[(1,)](x)
    assert compiled.total() == 1


def test_a_step_that_raises_leaves_nothing_behind(compiled: Counter[str]) -> None:
    with pytest.raises(ZeroDivisionError), compiling(2):
        raise ZeroDivisionError
    with compiling(2) as compilers:
        _right[(1,)](torch.empty(1, device=META, dtype=torch.float64))
    assert compilers.kernels == 1


def test_what_needs_no_kernels_is_not_compiled(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    info, gpu = model_info(MODELS["half a billion"], CONTEXT), torch.device("cuda")
    assert start_compiling(CONFIG, info, torch.device("cpu"), SLOTS) is None
    assert start_compiling(CONFIG, info, gpu, SLOTS, "torch") is None
    assert start_compiling(resolved(device="cuda", attention_backend="torch_native"), info, gpu, SLOTS) is None
    monkeypatch.setattr(triton_compile, "COMPILES_AHEAD", False)
    with caplog.at_level("INFO"):
        assert start_compiling(CONFIG, info, gpu, SLOTS) is None
    assert "one after the other" in caplog.text
