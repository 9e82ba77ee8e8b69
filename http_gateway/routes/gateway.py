"""What the endpoints share: the server's settings and state, and the ring."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import msgspec

from quartet.http_gateway.generation.adapters import Adapters
from quartet.http_gateway.generation.health_probe import HealthProbe, Progress, Pulse
from quartet.http_gateway.generation.intake import Rules
from quartet.http_gateway.generation.output import Output
from quartet.http_gateway.http.call_record import Tracer
from quartet.http_gateway.http.metrics import Metrics
from quartet.http_gateway.parsers import reasoning
from quartet.http_gateway.ring.counter_cache import CounterCache
from quartet.http_gateway.ring.ring_client import RingClient
from quartet.http_gateway.routes.background_runs import BackgroundRuns
from quartet.http_gateway.routes.event_log import EventLogs
from quartet.http_gateway.routes.file_store import file_store_of
from quartet.http_gateway.routes.response_store import store_of
from quartet.runtime.adapters import Adapter
from quartet.runtime.config import ServerConfig
from quartet.runtime.limits import CALL_BYTES_PER_BODY_BYTE
from quartet.runtime.messages import Facts, Request, Thought
from quartet.runtime.model_files.model_info import ModelInfo
from quartet.runtime.model_files.reranker import answer_ranking


class Phase(Enum):
    STARTING = "the server is starting"
    UP = "up"
    DRAINING = "the server is shutting down"


class News(msgspec.Struct):
    """What the scheduler's facts say of the server's state; other keys are for the ring."""

    model_path: str | None = None
    weight_version: str | None = None
    paused: bool | None = None
    asleep: bool | None = None
    lacks: list[str] | None = None
    sleeping: bool | None = None
    adapters: list[Adapter] | None = None


@dataclass
class Gateway:
    """Handed to every endpoint."""

    config: ServerConfig
    model: ModelInfo
    facts: Facts
    ring: RingClient
    metrics: Metrics
    progress: Progress
    hops: Mapping[str, Pulse] = field(default_factory=dict)  # by role, of the services that go on without HTTP
    health_timeout_s: float = 20.0
    run_dir: str = ""  # where large payloads are put
    tracer: Tracer | None = None  # None: calls are not traced
    phase: Phase = Phase.STARTING
    started_at: float = field(default_factory=time.time)
    at_drain: list[Callable[[], None]] = field(default_factory=list)  # called when the server is told to stop

    def __post_init__(self) -> None:
        self.adapters = Adapters(bool(self.config.enable_lora))
        self.rules = rules(self.config, self.model, self.facts, self.adapters)
        self.model_path = self.config.model_path  # of the weights that serve; an update may change both
        self.weight_version = self.config.weight_version
        self.paused = False  # by /pause_generation
        self.asleep = False  # by /release_memory_occupation
        self.lacks: Sequence[str] = ()  # what was released and is needed; none while asleep: weights are to be written
        self.sleeping = False  # memory is given back until somebody asks: --sleep-when-idle-s
        self.learn(self.facts.state)
        self.ring.on_facts = self.on_facts
        self.counters = CounterCache(self.ring)
        self.answer_ranking = answer_ranking(self.model, self.config)
        self.stored_responses = store_of(self.config, self.run_dir)
        self.files = file_store_of(self.config, self.run_dir)
        self.background = BackgroundRuns()
        self.event_logs = EventLogs()  # of those runs
        self.health_probe = HealthProbe(
            self.ring, self.progress, self.health_timeout_s, "embed" if self.model.is_embedding else "generate"
        )

    @property
    def base_names(self) -> tuple[str, ...]:
        """What the base model is called, where adapters have names too; a GGUF file by its file name as well."""
        file = [Path(self.model_path).name] if self.model_path.endswith(".gguf") else []
        return self.name, self.model_path, self.config.model_path, *file

    @property
    def name(self) -> str:
        """The model's name in answers: as configured, else the path of the weights that serve."""
        return self.config.served_model_name or self.model_path

    def output(self, request: Request, received_at: float) -> Output:
        several = self.rules.schedulers > 1
        return Output(request, received_at, self.weight_version, text=self.rules.tokenizer, with_rank=several)

    def on_facts(self, facts: Facts) -> None:
        """The scheduler was started again or asked, or has carried out a command."""
        self.learn(facts.state)
        self.facts = facts

    def learn(self, said: dict[str, Any]) -> None:
        """Take note of what the scheduler says about the weights that serve, and whether they generate.

        Raises ValueError, and has learnt nothing, where that is not what a scheduler says.
        """
        news = msgspec.convert(said, News)
        self.model_path = news.model_path or self.model_path
        self.weight_version = news.weight_version or self.weight_version
        self.paused = self.paused if news.paused is None else news.paused
        self.asleep = self.asleep if news.asleep is None else news.asleep
        self.lacks = self.lacks if news.lacks is None else news.lacks
        self.sleeping = self.sleeping if news.sleeping is None else news.sleeping
        if news.adapters is not None:
            self.adapters.learn(news.adapters)


def rules(config: ServerConfig, model: ModelInfo, facts: Facts, adapters: Adapters) -> Rules:
    """What this server allows in a request, from its configuration, model and facts."""
    preferred = config.preferred_sampling_params
    return Rules(
        vocab_size=facts.vocab_size,
        hidden_size=model.hidden_size,
        adapters=adapters,
        tokenizer=not config.skip_tokenizer_init,
        prefix_cache=not config.disable_radix_cache,
        priorities=config.schedule_policy == "priority",
        routed_experts=config.enable_return_routed_experts,
        hidden_states=config.enable_return_hidden_states,
        most_requests=config.max_inflight_requests,
        most_bytes=CALL_BYTES_PER_BODY_BYTE * config.max_body_size,
        schedulers=config.dp_size,
        longest_prompt=min(facts.context_length, facts.max_total_num_tokens),
        auto_truncate=config.allow_auto_truncate,
        thought=thought(config.reasoning_parser),
        preferred=msgspec.json.decode(preferred, type=dict[str, Any]) if preferred else {},
    )


def thought(family: str | None) -> Thought | None:
    """How a family of models thinks."""
    if family is None:
        return None
    found = reasoning.family(family)
    return Thought(opening=found.marks.opening, closing=found.marks.closing, place=found.place)
