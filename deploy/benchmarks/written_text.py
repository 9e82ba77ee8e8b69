"""A scheduler in this process whose requests write given texts, whatever the model says: with and without a grammar,
and with drafts, the tokens are the same, so what differs is the work.

The scheduler, the planner, the worker, the grammars and the steps are the real ones; only the tokens that a step has
drawn are replaced by those of the texts, one for each request, as a good model would write them under the schema.
"""

import json
import random
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer

from quartet.runtime.errors import RequestError
from quartet.runtime.messages import Message, Request, Tokenized, pack_ids
from quartet.runtime.model_files import model_info
from quartet.runtime.sampling import SamplingParams
from quartet.runtime.sockets import encode
from quartet.scheduler_service.assemble import planner_config
from quartet.scheduler_service.core.plan import Slice
from quartet.scheduler_service.core.planner import Planner
from quartet.scheduler_service.core.request import Sequence
from quartet.scheduler_service.execution.eager_steps import Attention, EagerSteps
from quartet.scheduler_service.execution.steps import Computed, Step, Steps
from quartet.scheduler_service.execution.worker import Worker
from quartet.scheduler_service.grammar.matchers import Grammar, GrammarCompiler
from quartet.scheduler_service.sampling.rows import Draws, SamplingRows
from quartet.scheduler_service.scheduler import Scheduler
from tests.configs import resolved

FIRST_ID = 1000
PROMPT_LEN = 16
SETTINGS: dict[str, Any] = {"dtype": "bfloat16", "page_size": 16, "max_total_tokens": 65536}
DRAFTS = {"speculative_algorithm": "NGRAM"}
CITIES = (
    "Paris",
    "London",
    "Berlin",
    "Madrid",
    "Rome",
    "Lisbon",
    "Vienna",
    "Prague",
    "Warsaw",
    "Budapest",
    "Athens",
    "Dublin",
    "Oslo",
    "Stockholm",
    "Bern",
    "Brussels",
)

Texts = dict[int, list[int]]  # the output of each request, by the first id of its prompt


class Round(NamedTuple):
    """Concurrent requests, all together."""

    tokens_per_s: float
    cpu_ms_per_token: float  # of all processes that take part


def written(number: int, tokens: int) -> str:
    """A list as the schema wants it, of at least so many tokens."""
    draw = random.Random(number)
    entries = [
        {"city": draw.choice(CITIES), "people": draw.randrange(100_000, 10_000_000), "coast": draw.random() < 0.5}
        for _ in range(tokens // 8)
    ]
    return json.dumps(entries)


class Writing:
    """What a step draws: the next tokens of the texts."""

    def __init__(self, texts: Texts) -> None:
        self._texts = texts
        self._tokens: list[int] = []  # by row
        self._counts: list[bool] = []  # by row: whether the drafts in front of it are right, so that its draw counts

    def look(self, step: Step) -> None:
        """See which rows are drawn next."""
        drawing = step.drawing
        slices = [step.plan.slices[i] for i in drawing.slices]
        rows = list(zip(slices, drawing.positions, strict=True))
        self._tokens = [self._token(share.sequence, position) for share, position in rows]
        self._counts = [self._is_right(share, position) for share, position in rows]

    def draws(self) -> Draws:
        tokens = torch.tensor(self._tokens)
        return Draws(tokens, torch.ones(len(tokens), dtype=torch.bool))

    def check(self, allowed: torch.Tensor | None) -> None:
        """Assert that the masks, int32 (rows, words), allow these tokens."""
        if allowed is not None:
            tokens = np.array(self._tokens)
            bits = allowed.numpy()[np.arange(len(tokens)), tokens // 32] >> tokens % 32 & 1
            assert bits[self._counts].all(), tokens[bits == 0]

    def _is_right(self, share: Slice, position: int) -> bool:
        first = share.end - len(share.drafts)
        drafts = share.drafts[: position - first]
        return all(self._token(share.sequence, first + i) == draft for i, draft in enumerate(drafts))

    def _token(self, sequence: Sequence, position: int) -> int:
        return self._texts[sequence.ids[0]][position - sequence.prompt_len]


class WritingSteps(EagerSteps):
    """Steps on a CPU that compute, mask and draw, and then write the next tokens of the texts."""

    writing: Writing

    def logits(self, step: Step, computed: Computed) -> torch.Tensor:
        self.writing.look(step)
        return super().logits(step, computed)

    def sample(
        self, logits: torch.Tensor, rows: SamplingRows, allowed: torch.Tensor | None = None, keep_logits: bool = False
    ) -> Draws:
        super().sample(logits, rows, allowed, keep_logits)
        self.writing.check(allowed)
        return self.writing.draws()


class WritingWorker(Worker):
    """A worker on a CPU that writes the texts."""

    def __init__(self, directory: Path, streams: int, texts: Texts, drafts: bool, **options: Any) -> None:
        """`options`: of Worker."""
        self.writing = Writing(texts)
        settings = {**SETTINGS, "max_running_requests": streams, **(DRAFTS if drafts else {})}
        self.config = resolved(model_path=str(directory), model_dir=str(directory), **settings)
        super().__init__(self.config, model_info.load(self.config), **options)

    def make_steps(self, config: Any, attention: Attention, *_: Any) -> Steps:
        steps = WritingSteps(self.model, self.cache, self.tokens, attention)
        steps.writing = self.writing
        return steps


class Inbox:
    """Gives what was put in, once."""

    def __init__(self) -> None:
        self.messages: list[Message] = []

    def recv(self, timeout_s: float | None = 0.0) -> list[Any]:
        messages, self.messages = self.messages, []
        return messages


class Outbox:
    """Encodes what is sent."""

    def send(self, messages: Any) -> None:
        encode(messages)


class NoProgress:
    def beat(self, busy: bool) -> None:
        pass


class AtOnce:
    """Compiles a grammar when it is asked for."""

    def __init__(self, compiler: GrammarCompiler) -> None:
        self.compiler = compiler
        self.compiled: list[tuple[str, Grammar | RequestError]] = []

    def submit(self, rid: str, kind: str, text: str, call: str = "") -> None:
        self.compiled.append((rid, self.compiler.compile(kind, text)))

    def cancel(self, rid: str) -> None:
        self.compiled = [one for one in self.compiled if one[0] != rid]

    def ready(self) -> list[tuple[str, Grammar | RequestError]]:
        compiled, self.compiled = self.compiled, []
        return compiled


class LoneScheduler(ABC):
    """A scheduler, and the requests that it is given."""

    def __init__(self, directory: Path, streams: int, tokens: int, drafts: bool = False) -> None:
        tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self.streams = streams
        texts = {FIRST_ID + i: tokenizer.encode(written(i, tokens)).ids for i in range(streams)}
        worker = self.make_worker(directory, texts, drafts)
        self.compiler = GrammarCompiler(directory, worker.model.vocab_size, worker.info.eos_ids)
        self.inbox = Inbox()
        self.planner = Planner(planner_config(worker.config, worker.info, worker))
        self.scheduler = Scheduler(
            self.planner,
            worker,
            self.inbox,
            Outbox(),
            NoProgress(),  # type: ignore[arg-type]
            depth=worker.depth,
            grammars=AtOnce(self.compiler),
        )

    @abstractmethod
    def make_worker(self, directory: Path, texts: Texts, drafts: bool) -> WritingWorker:
        """What computes the steps."""

    @property
    @abstractmethod
    def now_s(self) -> float:
        """The clock by which rates are measured."""

    def run(self, params: dict[str, Any]) -> Round:
        """Serve all streams, from when the prompts of all have been computed."""
        wanted = SamplingParams(temperature=0.8, ignore_eos=True, **params)
        for i in range(self.streams):
            ids = pack_ids([FIRST_ID + i, *range(PROMPT_LEN - 1)])
            self.inbox.messages.append(Tokenized(request=Request(rid=f"{i:032x}", params=wanted), prompt_ids=ids))
        self.scheduler.step()
        while any(sequence.needs_prefill for sequence in self.planner.running):
            self.scheduler.step()
        stats = self.planner.stats
        started_s, cpu_before_s, made_before = self.now_s, time.process_time(), stats.generation_tokens
        while not self.scheduler.idle:
            self.scheduler.step()
        taken_s, cpu_s = self.now_s - started_s, time.process_time() - cpu_before_s
        made = stats.generation_tokens - made_before
        return Round(made / taken_s, cpu_s * 1000 / made)

    def close(self) -> None:
        self.compiler.close()


class WritingScheduler(LoneScheduler):
    """On a CPU."""

    def make_worker(self, directory: Path, texts: Texts, drafts: bool) -> WritingWorker:
        return WritingWorker(directory, self.streams, texts, drafts)

    @property
    def now_s(self) -> float:
        return time.monotonic()
