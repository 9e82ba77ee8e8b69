"""The worker: turns a plan into tokens. It owns the model, the KV pool and what each admitted request needs to sample.

    launch(plan)    compute the step (steps.py), fill in what requests ask of the forward pass, draw, logprobs
    collect(step)   the results, one per slice

With `depth` 1 the next step is launched before the tokens of the last one are known here: it reads them on the device.
Requests whose next token needs the earlier ones on the host (penalties, grammars) take part too: between such a step's
forward pass and its draw, the last step is finished. What few requests ask for (prompt logprobs, hidden states, chosen
experts, vectors) is read at once, and the host waits for it. Drafts need all earlier tokens on the host, so `depth` is
0 then.

It decides nothing about requests: which run, on which pages and when they end is the planner's business.
"""

import logging
from collections.abc import Callable
from functools import partial

import torch

from quartet.kernels.ops import Implementation
from quartet.runtime.config import ResolvedConfig
from quartet.runtime.errors import StartupError
from quartet.runtime.messages import Facts, Logprobs, Request
from quartet.runtime.model_files.model_info import ModelInfo
from quartet.runtime.process import stopwatch
from quartet.runtime.process.memory import GB
from quartet.scheduler_service.core.plan import Plan, Result, Slice
from quartet.scheduler_service.core.request import Sequence
from quartet.scheduler_service.execution.adapters import NOT_ON_THIS_MODEL, AdapterStore, CpuAdapters, adapter_store
from quartet.scheduler_service.execution.compile_ahead import start_compiling
from quartet.scheduler_service.execution.constraints import Constraints, make_masks, matcher_of
from quartet.scheduler_service.execution.device_adapters import DeviceAdapters, adapter_pool
from quartet.scheduler_service.execution.device_state import SlotTokens
from quartet.scheduler_service.execution.eager_steps import Attention, EagerSteps, choose_attention
from quartet.scheduler_service.execution.experts import Chosen, expert_shape, make_recorder
from quartet.scheduler_service.execution.fused_steps import FusedSteps, fused_steps_of, is_fused
from quartet.scheduler_service.execution.inputs import Inputs, PageRuns
from quartet.scheduler_service.execution.kv_cache import make_kv_cache
from quartet.scheduler_service.execution.launched_step import Drawn, LaunchedStep, State
from quartet.scheduler_service.execution.logprobs import as_bytes, output_logprobs, prompt_logprobs
from quartet.scheduler_service.execution.pooling import make_pooler
from quartet.scheduler_service.execution.rank_adapters import LeadingAdapters
from quartet.scheduler_service.execution.ranks import Followers, LeadingSteps
from quartet.scheduler_service.execution.state_cache import make_state_cache, snapshot_options
from quartet.scheduler_service.execution.steps import Computed, Step, Steps
from quartet.scheduler_service.execution.verification import LogitRows, logit_rows
from quartet.scheduler_service.grammar.masks import Begun
from quartet.scheduler_service.host.device import available_gb, limit_threads
from quartet.scheduler_service.host.transfer import Arrival, fetch, send, upload
from quartet.scheduler_service.model.adapter_pool import AdapterPool
from quartet.scheduler_service.model.batch import ServedModel
from quartet.scheduler_service.model.decoder import Decoder
from quartet.scheduler_service.model.deterministic import is_asked_for, keep_order
from quartet.scheduler_service.model.registry import load_model
from quartet.scheduler_service.sampling.adjust import adjust_single_tokens
from quartet.scheduler_service.sampling.rows import sampling_rows
from quartet.scheduler_service.sampling.state import make_row

log = logging.getLogger(__name__)

NOT_AN_EMBEDDER = "this model generates text and gives no embeddings"

Load = Callable[[ResolvedConfig, ModelInfo, torch.device], ServedModel]


class Worker:
    """One device's share of the work."""

    def __init__(
        self,
        config: ResolvedConfig,
        info: ModelInfo,
        load: Load = load_model,
        depth: int | None = None,
        implementation: Implementation | None = None,
        followers: Followers | None = None,
    ) -> None:
        """`depth`: see `Scheduler`; without one, steps overlap where there is a device that works on its own.

        `implementation`: run on the fused operations of kernels/ops.py; without one, on a GPU if --attention-backend
        says so. `followers`: the other ranks of tensor parallel.
        """
        self.info, self.weight_version = info, config.weight_version
        self.device = torch.device(config.device)
        free_gb, running = available_gb(self.device), config.max_running_requests
        kernels = start_compiling(config, info, self.device, running, implementation)
        self.model = load(config, info, self.device)
        stopwatch.mark("model")
        if not info.is_embedding:
            limit_threads(self.device, self.model.hidden_size)
        deterministic = is_asked_for(config, self.device)
        if deterministic:
            keep_order(self.model.weights)  # with as many threads as will compute
        attention = choose_attention(self.device, self.model, deterministic)
        self.pooler = make_pooler(config, info, self.model)
        sharing = config.ranks_here if self.device.type == "cpu" else 1  # of the same memory
        self.state_cache = make_state_cache(config, self.model, self.device, info.context_length, sharing)
        self.weight_gb = max(0.0, free_gb - available_gb(self.device))
        self.adapter_pool = self.make_adapter_pool(config, implementation)
        self.cache = make_kv_cache(
            config,
            self.model.attention,
            self.model.dtype,
            self.device,
            most_tokens=running * info.context_length,
            context_length=info.context_length,
            second_set_bytes=self.model.weights.served_bytes(),
            state_bytes=sharing * self.state_cache.nbytes if self.state_cache else 0,
            sharing=sharing,
        )
        stopwatch.mark("KV pool")
        self.page_size, self.page_count = self.cache.page_size, self.cache.page_count
        self.max_running_requests = min(running, self.page_count)
        if self.state_cache is not None:
            self.max_running_requests = min(self.max_running_requests, self.state_cache.slots)
        self.snapshots = snapshot_options(self.state_cache, self.page_size)
        self.depth = int(self.can_overlap(config)) if depth is None else depth
        self.can_jump = not self.depth and config.speculation is None and self.state_cache is None
        self.states: dict[Sequence, State] = {}
        self.unfinished: list[LaunchedStep] = []  # in the order of their launch
        self.tokens = SlotTokens(self.max_running_requests, self.device)
        if kernels is not None:
            kernels.result()
        self.steps = self.make_steps(config, attention, implementation, followers)
        self.constraints = Constraints(make_masks(self.model.vocab_size, self.device, self.max_running_requests))
        self.expert_shape = expert_shape(config, self.model)
        self.expert_recorder = make_recorder(config, self.expert_shape)
        self.log_limits(config)

    def make_adapter_pool(self, config: ResolvedConfig, implementation: Implementation | None) -> AdapterPool | None:
        """The slots of LoRA adapters on fused operations; they come before the KV pool, which gets what is left."""
        fused = is_fused(config, self.info, self.model, self.device, implementation)
        return adapter_pool(config, self.model) if fused and isinstance(self.model, Decoder) else None

    def make_steps(
        self,
        config: ResolvedConfig,
        attention: Attention,
        implementation: Implementation | None,
        followers: Followers | None,
    ) -> Steps:
        """What computes the steps: see `__init__`."""
        if followers is not None:
            return LeadingSteps(self.model, self.cache, self.tokens, attention, followers, self.state_cache)
        pool = self.adapter_pool
        fused = fused_steps_of(config, self.info, self.model, self.cache, self.tokens, implementation, pool)
        return fused or EagerSteps(self.model, self.cache, self.tokens, attention, self.state_cache)

    def can_overlap(self, config: ResolvedConfig) -> bool:
        """Whether a step may be launched before the results of the last one are known."""
        return (
            self.device.type == "cuda"
            and self.pooler is None  # an embedding is read as soon as it is there
            and config.speculation is None
            and self.state_cache is None  # a step that failed is computed again from the last state but one
        )

    @property
    def is_apart(self) -> bool:
        """Whether the device computes while the host goes on."""
        return self.device.type != "cpu"

    @property
    def keeps_tokens(self) -> bool:
        """Whether the next step takes drawn tokens from the slots."""
        return bool(self.depth) or self.steps.reads_slots

    @property
    def uses_graphs(self) -> bool:
        """Whether decode steps are replayed as CUDA graphs."""
        return self.steps.uses_graphs

    def forget_graphs(self) -> None:
        """Drop recorded steps: memory whose address they contain has moved."""
        self.steps.forget_graphs()

    def load_adapters(self, config: ResolvedConfig, run_dir: str) -> AdapterStore | None:
        """Compute with LoRA adapters from now on; None without --enable-lora. Raises StartupError."""
        if not config.enable_lora:
            return None
        steps, of = self.steps, (self.model, self.info.architecture, config, run_dir)
        if isinstance(steps, FusedSteps) and self.adapter_pool is not None:
            steps.adapters = placed = adapter_store(*of, partial(DeviceAdapters, pool=self.adapter_pool))
            return placed
        if not isinstance(steps, EagerSteps) or self.device.type != "cpu":
            raise StartupError(NOT_ON_THIS_MODEL.format(self.info.architecture))
        followers = steps.followers if isinstance(steps, LeadingSteps) else None
        make = CpuAdapters if followers is None else partial(LeadingAdapters, followers=followers)
        steps.adapters = store = adapter_store(*of, make)
        return store

    def idle_work(self) -> bool:
        """Do a piece of work while the server is idle; returns whether there is more to do."""
        with torch.inference_mode():
            return self.steps.idle_work()

    def log_limits(self, config: ResolvedConfig) -> None:
        """Log the limits that follow from the memory and the flags."""
        log.info(
            "max_total_num_tokens=%d, chunked_prefill_size=%s, max_prefill_tokens=%d, max_running_requests=%d, "
            "context_len=%d, available_%s_mem=%.2f GB",
            self.page_count * self.page_size,
            config.chunked_prefill_size,
            config.max_prefill_tokens,
            self.max_running_requests,
            self.info.context_length,
            "cpu" if self.device.type == "cpu" else "gpu",
            available_gb(self.device),
        )

    def facts(self) -> Facts:
        """What the loaded model and its memory allow."""
        tokens = self.page_count * self.page_size
        return Facts(
            max_total_num_tokens=tokens,
            max_req_input_len=min(tokens, self.info.context_length) - 1,
            context_length=self.info.context_length,
            vocab_size=self.model.vocab_size,
            memory_usage={
                "weight": round(self.weight_gb, 2),
                "kvcache": round(sum(self.cache.gigabytes), 2),
                **({} if self.state_cache is None else {"state": round(self.state_cache.gigabytes, 2)}),
                **({} if self.adapter_pool is None else {"adapters": round(self.adapter_pool.nbytes / GB, 2)}),
                "token_capacity": tokens,
                "graph": round(self.steps.graph_gigabytes, 2),
            },
        )

    # A request's state

    def state_of(self, sequence: Sequence) -> State:
        """The state of a sequence, made when it is seen for the first time, or again after a retraction."""
        state = self.states.get(sequence)
        if state is None:
            row, matcher = make_row(sequence, self.info.eos_ids), matcher_of(sequence)
            jumps = self.can_jump and matcher is not None and wants_output_only(sequence.request)
            state = self.states[sequence] = State(row, PageRuns(), matcher=matcher, jumps=jumps)
        return state

    def forget(self, sequence: Sequence) -> None:
        """Drop the state of a sequence that has ended or was retracted."""
        self.states.pop(sequence, None)

    def reset(self) -> None:
        """After an exception: drop all that was launched and every state. Raises where the device itself has failed."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.states.clear()
        self.unfinished.clear()
        self.steps.forget()

    # A step

    @torch.inference_mode()
    def launch(self, plan: Plan) -> LaunchedStep:
        """Start a step. On a CPU it is finished when this returns."""
        for sequence in plan.retracted:
            self.forget(sequence)
        step = self.describe(plan)
        masks = None if self.is_apart or self.behind(step) else self.constraints.start(step)
        computed = self.steps.run(step)
        launched = LaunchedStep([Result() for _ in plan.slices])
        self.fill_results(step, computed, launched.results)
        if step.drawing.sampled:
            launched.drawn = self.draw(step, computed, masks)
            self.unfinished.append(launched)
        return launched

    def describe(self, plan: Plan) -> Step:
        """What is to be computed for a plan."""
        states = [self.state_of(share.sequence) for share in plan.slices]
        sampled = [i for i, share in enumerate(plan.slices) if share.samples and self.pooler is None]
        return Step(plan, states, logit_rows(plan, sampled), self.watch_experts(plan))

    def collect(self, launched: LaunchedStep) -> list[Result]:
        """Wait for a launched step; its results are in the order of the plan's slices."""
        while launched.drawn is not None:
            self.unfinished.pop(0).finish()
        if launched.verified and self.keeps_tokens:
            self.tokens.write(list(launched.verified), upload(list(launched.verified.values()), self.device))
        return launched.results

    def finish_steps_for(self, states: list[State]) -> None:
        """Wait for all launched steps, if one of these sequences needs its earlier tokens on the host."""
        if any(state.needs_tokens_on_host for state in states):
            while self.unfinished:
                self.unfinished.pop(0).finish()

    def fill_results(self, step: Step, computed: Computed, results: list[Result]) -> None:
        """Fill in what requests ask of the forward pass itself: prompt logprobs, hidden states, experts, embeddings."""
        plan, inputs, hidden = step.plan, computed.inputs, computed.hidden
        if inputs is None or hidden is None:
            return  # a decode step of requests that ask for tokens only
        if step.experts is not None:
            self.note_experts(plan, inputs, step.experts, results)
        for share, result, row in zip(plan.slices, results, inputs.offsets, strict=False):
            own = hidden[row : row + share.end - share.start]
            if share.score_from >= 0:
                result.input_logprobs = self.score_prompt(share, own)
            if share.sequence.request.return_hidden_states:
                result.hidden_states = as_bytes(own, torch.float32)
            if share.sequence.request.task == "embed" and self.pooler is None:
                result.error = NOT_AN_EMBEDDER
        if self.pooler is not None:
            self.pooler.fill(plan, inputs.offsets, hidden, results)

    def watch_experts(self, plan: Plan) -> Chosen | None:
        """What collects this step's choices of experts; None if no request asks for them."""
        if self.expert_shape is None:
            return None
        recording = self.expert_recorder is not None and self.expert_recorder.recording
        needed = recording or any(share.sequence.request.return_routed_experts for share in plan.slices)
        return Chosen(self.expert_shape) if needed else None

    def note_experts(self, plan: Plan, inputs: Inputs, chosen: Chosen, results: list[Result]) -> None:
        """Record a step's choices of experts, and hand each request its own where it asked for them."""
        if self.expert_recorder is not None and self.expert_recorder.recording:
            self.expert_recorder.add(inputs, plan.decodes, chosen)
        asking = [i for i, share in enumerate(plan.slices) if share.sequence.request.return_routed_experts]
        ids = chosen.ids() if asking else None  # (tokens, layers, top_k)
        for i in asking:
            assert ids is not None
            results[i].routed_experts = as_bytes(ids[inputs.offsets[i] : inputs.offsets[i + 1]], torch.int32)

    def score_prompt(self, share: Slice, hidden: torch.Tensor) -> Logprobs:
        """Logprobs of prompt positions, from `score_from` on: hidden (positions of the slice, hidden) predicts them."""
        sequence = share.sequence
        assert sequence.request.logprobs is not None
        first, last = share.score_from, min(share.end + 1, sequence.prompt_len)
        return prompt_logprobs(
            hidden[first - 1 - share.start : last - 1 - share.start],
            torch.tensor(sequence.ids[first:last], dtype=torch.int64, device=hidden.device),
            self.steps.to_logits,
            self.model.vocab_size,
            sequence.request.logprobs,
        )

    # The draw

    def behind(self, step: Step) -> bool:
        """Whether tokens of the last step, which the grammars of this one have to know, are still on the device."""
        return any(state.unseen and state.matcher is not None for state in step.states)

    def draw(self, step: Step, computed: Computed, masks: Begun | None = None) -> Drawn:
        """Draw the tokens of a step, unless the step did it itself, and compute their logprobs.

        `masks`: of its rows, if they were begun already.
        """
        plan, drawing, draws = step.plan, step.drawing, computed.draws
        logits = self.steps.logits(step, computed)  # (rows, vocab)
        states = [step.states[i] for i in drawing.slices]  # by row
        rows = sampling_rows([state.row.settings for state in states], drawing.positions)
        options = [plan.slices[i].sequence.request.logprobs for i in drawing.slices]
        if draws is None:
            self.finish_steps_for(states)
            masks = self.constraints.start(step, awaited=True) if masks is None else masks
            made = self.constraints.finish(step, masks)
            allowed = None if made is None else send(made, self.device)
            adjust_single_tokens(logits, [state.row for state in states], drawing.positions)
            draws = self.steps.sample(logits, rows, allowed, keep_logits=any(options))
            if self.keeps_tokens:
                self.keep_tokens(plan, drawing, draws.tokens)
        logprobs = output_logprobs(logits, draws.tokens, options, rows)
        tokens, valid = fetch(draws.tokens), fetch(draws.valid)
        slices, theirs = [plan.slices[i] for i in drawing.sampled], [step.states[i] for i in drawing.sampled]
        return Drawn(drawing.sampled, slices, theirs, tokens, valid, logprobs, Arrival(self.device))

    def keep_tokens(self, plan: Plan, drawing: LogitRows, tokens: torch.Tensor) -> None:
        """Leave tokens (rows,) for the next step, but those of verifications: `collect` sees which of them count."""
        slices = [plan.slices[i] for i in drawing.slices]
        if plan.verifications:
            kept = [row for row, share in enumerate(slices) if not share.drafts]
            slices, tokens = [slices[row] for row in kept], tokens[upload(kept, self.device, torch.int64)]
        self.tokens.write([share.sequence.slot for share in slices], tokens)


def wants_output_only(request: Request) -> bool:
    """Whether nothing is to be told of a token but the token itself."""
    return request.logprobs is None and not request.return_hidden_states and not request.return_routed_experts
