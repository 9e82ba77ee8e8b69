"""The help of a server's flags: a first page of those that people set, and all of them behind --help-all."""

from quartet.runtime.settings.flags import build_parser, settings

MOST_FLAGS = 60  # of the first page, --config and --help included
WORDS = {"config": "config show [--yaml]"}  # as a command is called, where that is more than its name
FIRST_PAGE = {
    "model_path",
    "tokenizer_path",
    "served_model_name",
    "revision",
    "download_dir",
    "chat_template",
    "is_embedding",
    "context_length",
    "dtype",
    "quantization",
    "enable_memory_saver",
    "host",
    "port",
    "uds",
    "ssl_certfile",
    "ssl_keyfile",
    "api_key",
    "api_key_file",
    "admin_api_key",
    "cors_allow_origins",
    "allowed_hosts",
    "drain_timeout",
    "responses_store",
    "files_store",
    "preferred_sampling_params",
    "sampling_defaults",
    "tool_call_parser",
    "reasoning_parser",
    "leave_out_hosted_tools",
    "enable_cache_report",
    "max_running_requests",
    "max_queued_requests",
    "max_total_tokens",
    "mem_fraction_static",
    "chunked_prefill_size",
    "schedule_policy",
    "enable_priority_scheduling",
    "req_waiting_timeout",
    "req_running_timeout",
    "disable_radix_cache",
    "kv_cache_dir",
    "kv_cache_dir_size",
    "random_seed",
    "speculative_algorithm",
    "device",
    "enable_deterministic_inference",
    "log_level",
    "log_level_http",
    "log_format",
    "log_requests",
    "ready_file",
    "max_restarts",
    "exit_with_parent",
    "enable_metrics",
    "otlp_traces_endpoint",
    "sleep_when_idle_s",
    "skip_server_warmup",
}


def page(command: str, everything: bool) -> str:
    """The help of `quartet <command>`."""
    parser = build_parser(command, None if everything else FIRST_PAGE)
    parser.usage = f"quartet {WORDS.get(command, command)} [MODEL] [flags]"
    parser.description = "MODEL: a directory, a GGUF file, a hub id (owner/name, owner/name:Q4_K_M) or demo."
    left = len(settings().keys() - FIRST_PAGE)
    if not everything:
        parser.epilog = f"{left} more flags, for special cases: quartet {command} --help-all"
    return parser.format_help().rstrip("\n")
