"""The flags of a server as keyword arguments, with their types. Made by `python -m tests.server_flags`."""

from typing import Literal, TypedDict

from quartet.runtime.format_names import ReasoningParser, ToolCallParser


class ServerFlags(TypedDict, total=False):
    """Every flag of `quartet serve`, with underscores."""

    model_path: str
    tokenizer_path: str | None
    served_model_name: str | None
    revision: str | None
    download_dir: str | None
    chat_template: str | None
    is_embedding: bool
    skip_tokenizer_init: bool
    context_length: int | None
    dtype: Literal["auto", "half", "float16", "bfloat16", "float", "float32"]
    quantization: Literal["auto", "none", "int8", "int4"]
    load_format: Literal["auto", "safetensors", "dummy"]
    weight_version: str
    enable_memory_saver: bool
    enable_weights_cpu_backup: bool
    uds: str | None
    disable_tcp: bool
    ssl_certfile: str | None
    ssl_keyfile: str | None
    ssl_keyfile_password: str | None
    ssl_ca_certs: str | None
    ssl_cert_reqs: Literal["none", "optional", "required"] | None
    files_store: str | None
    files_store_size: int
    files_store_age: float
    host: str
    port: int
    api_key: str | list[str] | None
    api_key_file: str | None
    admin_api_key: str | list[str] | None
    admin_api_key_file: str | None
    cors_allow_origins: str | list[str] | None
    allowed_hosts: str | list[str] | None
    max_inflight_requests: int
    max_body_size: int
    max_weight_body_size: int
    responses_store: str | None
    responses_store_size: int
    responses_store_age: float
    drain_timeout: float
    stream_interval: int
    incremental_streaming_output: bool
    allow_auto_truncate: bool
    preferred_sampling_params: str | None
    sampling_defaults: Literal["model", "openai"]
    tool_call_parser: ToolCallParser | None
    reasoning_parser: ReasoningParser | None
    leave_out_hosted_tools: bool
    enable_cache_report: bool
    enable_hierarchical_cache: bool
    hicache_ratio: float | None
    hicache_size: int
    kv_cache_dir: str | None
    kv_cache_dir_size: int
    max_running_requests: int | None
    max_queued_requests: int | None
    max_total_tokens: int | None
    mem_fraction_static: float | None
    chunked_prefill_size: int | None
    max_prefill_tokens: int
    schedule_policy: Literal["fcfs", "lpm", "priority"]
    enable_priority_scheduling: bool
    schedule_low_priority_values_first: bool
    priority_scheduling_preemption_threshold: int
    disable_priority_preemption: bool
    req_waiting_timeout: float
    req_running_timeout: float
    page_size: int | None
    disable_radix_cache: bool
    decode_log_interval: int
    random_seed: int | None
    speculative_algorithm: str | None
    speculative_num_draft_tokens: int | None
    speculative_ngram_min_match_window_size: int | None
    speculative_ngram_max_match_window_size: int | None
    enable_lora: bool | None
    lora_paths: list[str] | None
    max_loras_per_batch: int
    max_loaded_loras: int | None
    max_lora_rank: int
    lora_target_modules: list[str] | None
    dp_size: int
    tp_size: int
    nnodes: int
    node_rank: int
    dist_init_addr: str | None
    device: Literal["auto", "cpu", "cuda"]
    attention_backend: Literal["triton", "torch_native"] | None
    enable_deterministic_inference: bool
    cuda_graph_max_bs: int | None
    cuda_graph_max_prefill_tokens: int
    disable_cuda_graph: bool
    ready_file: str | None
    sleep_when_idle_s: float
    otlp_traces_endpoint: str | None
    otlp_traces_sample_ratio: float
    log_format: Literal["text", "json"]
    log_requests: Literal["off", "metadata", "full"]
    log_level: Literal["debug", "info", "warning", "error"]
    log_level_http: Literal["debug", "info", "warning", "error"] | None
    max_restarts: int
    disable_standby: bool
    low_memory: bool
    watchdog_timeout: float
    exit_with_parent: int | None
    enable_metrics: bool
    skip_server_warmup: bool
    expert_distribution_recorder_mode: Literal["stat", "stat_approx", "per_pass", "per_token"] | None
    expert_distribution_recorder_buffer_size: int | None
    expert_distribution_recorder_dir: str | None
    enable_return_routed_experts: bool
    enable_return_hidden_states: bool
