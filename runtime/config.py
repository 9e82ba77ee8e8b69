"""The server's configuration: one frozen struct, and for every field its flag, default and help in one place.

Flags, the YAML file and `/get_server_info` are all derived from the fields below.
"""

from typing import Annotated, Any, Literal

import msgspec


class Flag(msgspec.Struct, frozen=True):
    """How a field appears on the command line."""

    help: str
    group: str = "other"
    aliases: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()


def flag(help: str, group: str = "other", *aliases: str, choices: tuple[str, ...] = ()) -> Any:
    return msgspec.Meta(description=help, extra={"flag": Flag(help, group, aliases, choices)})


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """All settings of a server, by their api names."""

    # model
    model_path: Annotated[str, flag("directory or hub id of the model", "model", "--model")] = "demo"
    tokenizer_path: Annotated[str | None, flag("tokenizer directory or hub id (default: the model's)", "model")] = None
    served_model_name: Annotated[str | None, flag("name in answers and /v1/models (default: model path)", "model")] = (
        None
    )
    revision: Annotated[str | None, flag("hub revision", "model")] = None
    is_embedding: Annotated[bool, flag("serve /encode, /classify and rerank", "model")] = False
    context_length: Annotated[int | None, flag("longest sequence in tokens (default: from the model)", "model")] = None
    dtype: Annotated[str, flag("number format of weights and activations", "model")] = "auto"
    device: Annotated[str, flag("auto, cpu or cuda", "model", choices=("auto", "cpu", "cuda"))] = "auto"
    load_format: Annotated[str, flag("auto, safetensors or dummy (random weights)", "model")] = "auto"
    weight_version: Annotated[str, flag("version string of the loaded weights", "model")] = "default"
    skip_tokenizer_init: Annotated[bool, flag("ids in, ids out", "model")] = False
    random_seed: Annotated[int | None, flag("seed of the server's own draws", "model")] = None
    # http
    host: Annotated[str, flag("address to listen on", "http")] = "127.0.0.1"
    port: Annotated[int, flag("port to listen on", "http")] = 30000
    api_key: Annotated[str | None, flag("key that clients must send as a bearer token", "http")] = None
    admin_api_key: Annotated[str | None, flag("key for control endpoints", "http")] = None
    max_inflight_requests: Annotated[int, flag("requests inside the ring before 503", "http")] = 4096
    drain_timeout: Annotated[float, flag("seconds that running requests get after SIGTERM", "http")] = 30.0
    stream_interval: Annotated[int, flag("tokens between two streamed chunks", "http")] = 1
    incremental_streaming_output: Annotated[bool, flag("stream deltas instead of cumulative text", "http")] = False
    preferred_sampling_params: Annotated[str | None, flag("JSON laid under every request's parameters", "http")] = None
    # scheduler
    max_running_requests: Annotated[int | None, flag("requests in a batch (default: by memory)", "scheduler")] = None
    max_queued_requests: Annotated[int | None, flag("waiting requests before 503", "scheduler")] = None
    max_total_tokens: Annotated[int | None, flag("size of the KV pool in tokens (default: by memory)", "scheduler")] = (
        None
    )
    mem_fraction_static: Annotated[float | None, flag("share of memory for weights and KV pool", "scheduler")] = None
    chunked_prefill_size: Annotated[
        int | None, flag("prompt tokens per step (-1: whole prompts; default: by device)", "scheduler")
    ] = None
    max_prefill_tokens: Annotated[int, flag("prompt tokens of one step in all", "scheduler")] = 16384
    schedule_policy: Annotated[
        str, flag("order of the waiting queue", "scheduler", choices=("lpm", "fcfs", "priority"))
    ] = "fcfs"
    page_size: Annotated[int | None, flag("tokens per KV page (default: 16)", "scheduler")] = None
    disable_radix_cache: Annotated[bool, flag("do not reuse the KV of shared prefixes", "scheduler")] = False
    attention_backend: Annotated[str | None, flag("triton or torch_native (default: by device)", "scheduler")] = None
    decode_log_interval: Annotated[int, flag("decode steps between two log lines", "scheduler")] = 40
    # operations
    log_level: Annotated[
        str, flag("debug, info, warning or error", "operations", choices=("debug", "info", "warning", "error"))
    ] = "info"
    log_level_http: Annotated[str | None, flag("log level of access lines", "operations")] = None
    enable_metrics: Annotated[bool, flag("metrics are always on; accepted for compatibility", "operations")] = True
    skip_server_warmup: Annotated[bool, flag("do not send a request before reporting ready", "operations")] = False
    expert_distribution_recorder_mode: Annotated[
        Literal["stat", "stat_approx", "per_pass", "per_token"] | None,
        flag("record which experts a MoE model chooses", "operations"),
    ] = None

    @property
    def name(self) -> str:
        return self.served_model_name or self.model_path
