"""Compiles the kernels of a model while its weights are read, many kernels at once.

Its first steps are computed on the "meta" device: tensors there have shapes, types and alignments, but no memory, so
the same code asks for the same kernels and nothing runs.
"""

import logging
import os
import time
from array import array
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import product

import torch

from quartet.kernels.ops import Implementation
from quartet.kernels.triton.configs import EXPERT_BLOCKS, FEW_ROWS, SKINNY_ROWS
from quartet.runtime.config import ResolvedConfig
from quartet.runtime.errors import StartupError
from quartet.runtime.messages import Request
from quartet.runtime.model_files.model_info import ModelInfo
from quartet.runtime.sampling import SamplingParams
from quartet.scheduler_service.core.plan import Plan, Slice
from quartet.scheduler_service.core.request import Sequence
from quartet.scheduler_service.execution.device_state import SlotTokens
from quartet.scheduler_service.execution.fused_steps import FusedSteps, make_fused_steps
from quartet.scheduler_service.execution.inputs import make_inputs, to_device
from quartet.scheduler_service.execution.kv_cache import KVCache
from quartet.scheduler_service.model.decoder import Decoder
from quartet.scheduler_service.model.dtype import resolve_dtype
from quartet.scheduler_service.model.fused_backend import can_fuse
from quartet.scheduler_service.model.layout import decoder_layout
from quartet.scheduler_service.model.registry import decoder_spec
from quartet.scheduler_service.model.spec import DecoderSpec, NotNative
from quartet.scheduler_service.model.torch_backend import TorchBackend
from quartet.scheduler_service.sampling.rows import sampling_rows
from quartet.scheduler_service.sampling.state import settings_of
from quartet.scheduler_service.weights.parameters import Weights

log = logging.getLogger(__name__)

META = torch.device("meta")
MOST_THREADS = 16
UNCOMPILED = "A kernel cannot be compiled for this GPU ({}); --attention-backend torch_native does without"
SOME_PAGES = 64  # how many there are decides no kernel
ROWS = (1, 2, FEW_ROWS, 16, 32, SKINNY_ROWS, SKINNY_ROWS + 1)  # the most that each kernel of products takes


def start_compiling(
    config: ResolvedConfig,
    info: ModelInfo,
    device: torch.device,
    slots: int,
    implementation: Implementation | None = None,
) -> "Future[None] | None":
    """Compile the kernels of the model's first steps in a thread; None if it needs no kernels of Quartet.

    `slots`: requests at once. The result raises StartupError for a kernel that cannot be compiled.
    """
    plain = implementation == "torch" or config.attention_backend == "torch_native"
    if device.type != "cuda" or info.embedding is not None or plain:
        return None
    from quartet.kernels.triton.compile import COMPILES_AHEAD  # triton is not there on every machine

    if not COMPILES_AHEAD:
        log.info("This Triton compiles kernels one after the other, when they are needed.")
        return None
    executor = ThreadPoolExecutor(1, "compile-ahead")
    compiled = executor.submit(
        compile_first_steps, config, info, resolve_dtype(config.dtype, info.config, device), slots
    )
    executor.shutdown(wait=False)
    return compiled


def compile_first_steps(config: ResolvedConfig, info: ModelInfo, dtype: torch.dtype, slots: int) -> None:
    """Compile what a model's first steps launch, if it runs on fused operations. Raises StartupError."""
    from quartet.kernels.triton.compile import CompileError

    steps = blank_steps(config, info, dtype, slots)
    if steps is None:
        return
    try:
        compile_ahead(steps)
    except CompileError as error:
        raise StartupError(UNCOMPILED.format(error)) from error


def compile_ahead(steps: FusedSteps) -> None:
    """Compile what the first steps launch; `steps` are on the meta device. Raises CompileError."""
    from quartet.kernels.triton.compile import compiling

    begun = time.monotonic()
    threads = min(len(os.sched_getaffinity(0)), MOST_THREADS)
    with torch.inference_mode(), compiling(threads) as compilers:
        first_steps(steps)
    log.info("Compiled %d kernels with %d threads in %.2f s", compilers.kernels, threads, time.monotonic() - begun)


def blank_steps(config: ResolvedConfig, info: ModelInfo, dtype: torch.dtype, slots: int) -> FusedSteps | None:
    """Steps without memory of the model that `info` describes, where it runs on fused operations."""
    try:
        spec = one_of_each_layer(decoder_spec(info))
    except NotNative:
        return None
    if not can_fuse(spec):
        return None
    model = Decoder(spec, Weights(decoder_layout(spec), dtype, META), TorchBackend(spec.ropes, dtype, META))
    cache = KVCache(model.attention, SOME_PAGES, config.page_size, dtype, META)
    return make_fused_steps(config, model, cache, SlotTokens(slots, META), info.context_length, "triton")


def one_of_each_layer(spec: DecoderSpec) -> DecoderSpec:
    return replace(spec, layers=tuple(dict.fromkeys(spec.layers)))


class BlankAdapters:
    """LoRA adapters without content: each request that names one has that of the first slot."""

    ranks = (1,)

    def slots_of(self, plan: Plan) -> list[int]:
        """See fused_steps.PlacedAdapters."""
        owners = [0 if share.sequence.request.adapter else -1 for share in plan.slices]
        return owners if max(owners) >= 0 else []


def first_steps(steps: FusedSteps) -> None:
    """Decode steps and prompts of each kind of size, and the draws that follow them; with LoRA adapters and without."""
    graphs = steps.graphs
    kinds = (False,) if steps.backend.adapters is None else (False, True)
    steps.adapters = BlankAdapters()
    for tokens, adapters in product(sizes(steps), kinds):
        if graphs is not None and graphs.covers(tokens):
            steps.compute(graphs.key(tokens, 1, adapters=adapters))
        hidden = compute_prompt(steps, tokens, adapters)
        if not adapters:
            draw(steps, hidden[: steps.tokens.null_slot])
    if graphs is not None:
        for adapters in kinds:
            steps.compute(graphs.key(graphs.rows[-1], 1, adapters=adapters))


def sizes(steps: FusedSteps) -> Iterator[int]:
    """QuantizedRows of tokens, one of each way to compute them. In a mixture, more pairs go in larger blocks."""
    yield from ROWS
    for moe in {layer.moe for layer in steps.model.spec.layers if layer.moe}:
        for block in EXPERT_BLOCKS:
            most = block * moe.experts // moe.top_k
            yield from (most - 1, most)  # in whole vectors of pairs or not


def compute_prompt(steps: FusedSteps, tokens: int, adapter: bool) -> torch.Tensor:
    """Hidden states (tokens, hidden) of a prompt, whose request names a LoRA adapter or none."""
    sequence = blank_sequence(tokens, "a" if adapter else "")
    size = steps.cache.page_size
    sequence.pages = [0] * -(-tokens // size)
    plan = Plan([Slice(sequence, 0, tokens, samples=True)])
    inputs = make_inputs(plan, [[(0, len(sequence.pages))]], [0], size)
    to_device(inputs, META)
    return steps.forward(plan, inputs)


def draw(steps: FusedSteps, hidden: torch.Tensor) -> None:
    """Tokens from hidden states (rows, hidden), for requests with wishes, with grammars and without."""
    logits = steps.model.logits(hidden)
    rows = sampling_rows([settings_of(SamplingParams(), 0)] * len(hidden), [1] * len(hidden))
    masks = torch.empty(len(rows), -(-logits.shape[1] // 32), dtype=torch.int32, device=META)
    for allowed in (None, masks):
        steps.model.sample(logits, rows, allowed)


def blank_sequence(tokens: int, adapter: str) -> Sequence:
    return Sequence(Request(rid="", params=SamplingParams(), adapter=adapter), array("i", [0]) * tokens, tokens, slot=0)
