"""What the server says about itself: model, settings, load, metrics."""

import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request as HTTPRequest
from starlette.responses import PlainTextResponse, Response

from quartet.http_gateway.admin.ranks import by_rank, text_services
from quartet.http_gateway.http import errors
from quartet.http_gateway.http.auth import Access
from quartet.http_gateway.ring.counter_cache import Counters
from quartet.http_gateway.routes.endpoint import Endpoint
from quartet.http_gateway.routes.gateway import Gateway
from quartet.runtime.adapters import Adapter
from quartet.runtime.errors import RequestError
from quartet.runtime.settings import flags
from quartet.runtime.version import version

OWNER = "quartet"
FRESH_S = 0.1  # counters younger than this are not asked for again
STALE_S = 10.0  # counters older than this say nothing any more
SECTIONS = ("core", "memory", "spec", "lora", "disagg", "queues")
ONE_RING = {
    "pp_size": 1,
    "ep_size": 1,
    "base_gpu_id": 0,
    "gpu_id_step": 1,
    "disaggregation_mode": "null",
    "encoder_only": False,
}


# model


def model_info(gateway: Gateway) -> dict[str, Any]:
    return {
        "model_path": gateway.model_path,
        "tokenizer_path": gateway.config.tokenizer_path or gateway.config.model_path,
        "is_generation": not gateway.model.is_embedding,
        "preferred_sampling_params": gateway.config.preferred_sampling_params,
        "weight_version": gateway.weight_version,
    }


async def get_model_info(gateway: Gateway, http: HTTPRequest) -> Response:
    """These five keys and no other: clients compare the set."""
    return errors.json_response(model_info(gateway))


async def get_model_info_more(gateway: Gateway, http: HTTPRequest) -> Response:
    """What the server knows of its model."""
    more = {
        "served_model_name": gateway.name,
        "load_format": gateway.config.load_format,
        "model_type": gateway.model.model_type,
        "architectures": [gateway.model.architecture],
        "has_image_understanding": False,
        "has_audio_understanding": False,
        "disaggregation_mode": "null",
        "max_model_len": gateway.facts.context_length,
        "lora_adapters": list(gateway.adapters),
    }
    return errors.json_response({**model_info(gateway), **more})


async def weight_version(gateway: Gateway, http: HTTPRequest) -> Response:
    return errors.json_response({"weight_version": gateway.weight_version})


def model_card(gateway: Gateway) -> dict[str, Any]:
    """The entry of one model in the answer of /v1/models."""
    name = gateway.name
    return {
        "id": name,
        "object": "model",
        "created": int(gateway.started_at),
        "owned_by": OWNER,
        "root": name,
        "parent": None,
        "max_model_len": gateway.facts.context_length,
    }


def adapter_card(gateway: Gateway, adapter: Adapter) -> dict[str, Any]:
    """The entry of an adapter: its root is its path, its parent the base."""
    return {**model_card(gateway), "id": adapter.name, "root": adapter.path, "parent": gateway.name}


async def models(gateway: Gateway, http: HTTPRequest) -> Response:
    """The models, as clients of OpenAI's API know them."""
    cards = [adapter_card(gateway, adapter) for adapter in gateway.adapters]
    return errors.json_response({"object": "list", "data": [model_card(gateway), *cards]})


async def model(gateway: Gateway, http: HTTPRequest) -> Response:
    """One of them by its name; the base by any that it has."""
    asked = http.path_params["model"]
    if asked == gateway.name:
        return errors.json_response(model_card(gateway))
    if asked in gateway.adapters:
        return errors.json_response(adapter_card(gateway, gateway.adapters[asked]))
    if asked in gateway.base_names:
        return errors.json_response(model_card(gateway))
    return errors.model_not_found(asked)


# server


async def server_info(gateway: Gateway, http: HTTPRequest) -> Response:
    """Every setting by its name, and what each scheduler says; without one that has not answered for long."""
    counters = await gateway.counters.read(FRESH_S)
    gone = gateway.counters.unanswered(STALE_S)
    facts = gateway.facts
    body = {
        **ONE_RING,
        **flags.public(gateway.config),
        "status": "ready",
        "max_total_num_tokens": facts.max_total_num_tokens,
        "max_req_input_len": facts.max_req_input_len,
        "max_model_len": facts.context_length,
        "vocab_size": facts.vocab_size,
        "memory_usage": facts.memory_usage,
        "version": version(),
        "weight_version": gateway.weight_version,
        "lora_adapters": list(gateway.adapters),
        "uptime_s": time.time() - gateway.started_at,
        "internal_states": [
            internal_state(gateway, numbers, counters)
            for rank, numbers in by_rank(counters, gateway.rules.schedulers)
            if rank not in gone
        ],
        "unanswered_dp_ranks": gateway.counters.unanswered(),
        "left_out_dp_ranks": gateway.ring.schedulers.left_out,
    }
    return errors.json_response(body)


def internal_state(gateway: Gateway, scheduler: Mapping[str, Any], counters: Counters) -> dict[str, Any]:
    """A scheduler's counters, as /get_server_info lists them."""
    return {
        "last_gen_throughput": scheduler.get("gen_throughput", 0.0),
        "memory_usage": gateway.facts.memory_usage,
        "load": scheduler.get("num_running_reqs", 0) + scheduler.get("num_queue_reqs", 0),
        "effective_max_running_requests_per_dp": gateway.config.max_running_requests,
        **scheduler,
        "ring": text_services(counters),
    }


# load


def load(gateway: Gateway, scheduler: Mapping[str, Any], rank: int = 0) -> dict[str, Any]:
    """The core section of /v1/loads for one scheduler."""
    pool = gateway.facts.max_total_num_tokens
    used = scheduler.get("num_used_tokens", 0)
    return {
        "timestamp": time.time(),
        "dp_rank": rank,
        "num_running_reqs": scheduler.get("num_running_reqs", 0),
        "num_waiting_reqs": scheduler.get("num_queue_reqs", 0),
        "num_reqs": scheduler.get("num_running_reqs", 0) + scheduler.get("num_queue_reqs", 0),
        "num_waiting_uncached_tokens": scheduler.get("num_waiting_uncached_tokens", 0),
        "num_used_tokens": used,
        "num_total_tokens": used + scheduler.get("num_waiting_uncached_tokens", 0),
        "num_active_tokens": scheduler.get("num_active_tokens", used),
        "max_total_num_tokens": pool,
        "max_running_requests": gateway.config.max_running_requests,
        "token_usage": scheduler.get("token_usage", used / pool if pool else 0.0),
        "gen_throughput": scheduler.get("gen_throughput", 0.0),
        "cache_hit_rate": scheduler.get("cache_hit_rate", 0.0),
        "utilization": scheduler.get("utilization", 0.0),
    }


def sections(gateway: Gateway, scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """The sections that this server has something to say in."""
    adapters = list(gateway.adapters)
    return {
        "memory": {**gateway.facts.memory_usage, "token_capacity": gateway.facts.max_total_num_tokens},
        "lora": {"adapters": len(adapters), "loaded": sum(adapter.loaded for adapter in adapters)},
        "queues": {"waiting": scheduler.get("num_queue_reqs", 0), "in_flight": gateway.ring.unfinished},
    }


async def loads(gateway: Gateway, http: HTTPRequest) -> Response:
    """Queue lengths, tokens and throughput, for load balancers."""
    asked = [name.strip() for name in http.query_params.get("include", "core").split(",")]
    if unknown := [name for name in asked if name not in (*SECTIONS, "all")]:
        raise RequestError(f"Unknown section '{unknown[0]}'; known are all, {', '.join(SECTIONS)}.", field="include")
    counters = await gateway.counters.read(FRESH_S)
    ranks = dict(by_rank(counters, gateway.rules.schedulers))
    cores = {rank: load(gateway, scheduler, rank) for rank, scheduler in ranks.items()}
    wanted = http.query_params.get("dp_rank")
    shown = {rank: core for rank, core in cores.items() if wanted in (None, "", str(rank))}
    if http.query_params.get("format") == "prometheus":
        lines = [
            f'sglang:{key}{{dp_rank="{rank}"}} {core[key]}\n'
            for rank, core in shown.items()
            for key in core
            if key not in ("timestamp", "dp_rank")
        ]
        return PlainTextResponse("".join(lines))
    loads = [
        core | {name: body for name, body in sections(gateway, ranks[rank]).items() if name in asked or "all" in asked}
        for rank, core in shown.items()
    ]
    body = {
        "timestamp": datetime.now(UTC).isoformat(),
        "version": version(),
        "accelerator": gateway.config.device,
        "num_accelerators": gateway.rules.schedulers,
        "loads": loads,
    }
    return errors.json_response(body)


async def get_load(gateway: Gateway, http: HTTPRequest) -> Response:
    """A list with one entry for each scheduler, as routers read it."""
    counters = await gateway.counters.read(FRESH_S)
    cores = [load(gateway, scheduler, rank) for rank, scheduler in by_rank(counters, gateway.rules.schedulers)]
    return errors.json_response(
        [
            {
                "dp_rank": core["dp_rank"],
                "load": core["num_reqs"],
                "num_reqs": core["num_reqs"],
                "num_waiting_reqs": core["num_waiting_reqs"],
                "num_tokens": core["num_total_tokens"],
                "ts_tic": time.monotonic(),
            }
            for core in cores
        ]
    )


async def metrics(gateway: Gateway, http: HTTPRequest) -> Response:
    """Answered even when the scheduler hangs: with the counters it last said."""
    await gateway.counters.read(FRESH_S)
    text = await gateway.metrics.text(gateway.counters.last)
    return Response(text, media_type=gateway.metrics.content_type)


ENDPOINTS = [
    Endpoint("/get_model_info", get_model_info),
    Endpoint("/model_info", get_model_info_more),
    Endpoint("/get_weight_version", weight_version),
    Endpoint("/weight_version", weight_version),
    Endpoint("/get_server_info", server_info),
    Endpoint("/server_info", server_info),
    Endpoint("/get_load", get_load),
    Endpoint("/v1/loads", loads, shape=errors.openai),
]
METRICS = Endpoint("/metrics", metrics, ("GET", "HEAD"), access=Access.PUBLIC)
