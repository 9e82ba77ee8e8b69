"""Settings that contradict each other, with the remedy of each, and what the operator should know about the others."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from quartet.runtime import sampling
from quartet.runtime.config import ServerConfig
from quartet.runtime.errors import RequestError, StartupError
from quartet.runtime.settings.machine import Machine
from quartet.runtime.settings.sites import ANY, allowed_hosts, allowed_origins, is_loopback
from quartet.runtime.shorten import without_password

PAGE_SIZE = 16
LEAST_WATCHDOG_TIMEOUT_S = 3  # an idle scheduler moves once a second
ENDPOINT = re.compile(r"https?://[^\s/:]+(:\d+)?(/\S*)?")
MEETING = re.compile(r"[^\s/:]+:\d{1,5}")
SPECULATIVE_ALGORITHM = "NGRAM"
HIERARCHY_ON_A_CPU = (
    "--enable-hierarchical-cache keeps KV in the memory in which the KV pool of a CPU lies; "
    "a larger --max-total-tokens gives as much without copies, and --kv-cache-dir outlasts a restart"
)


def given_draft_flags(config: ServerConfig) -> list[str]:
    """The flags of drafts that were given, as they are spelled."""
    names = (
        "speculative_num_draft_tokens",
        "speculative_ngram_min_match_window_size",
        "speculative_ngram_max_match_window_size",
    )
    return ["--" + name.replace("_", "-") for name in names if getattr(config, name) is not None]


TLS_FLAGS = ("ssl_keyfile", "ssl_keyfile_password", "ssl_ca_certs", "ssl_cert_reqs")


def given_tls_flags(config: ServerConfig) -> list[str]:
    """The flags that mean nothing without a certificate."""
    return ["--" + name.replace("_", "-") for name in TLS_FLAGS if getattr(config, name) is not None]


def lora_is_on(config: ServerConfig) -> bool:
    return bool(config.lora_paths) if config.enable_lora is None else config.enable_lora


def given_lora_flags(config: ServerConfig) -> list[str]:
    """The flags that mean nothing without adapters."""
    given = {
        "--lora-paths": config.lora_paths is not None,
        "--max-loras-per-batch": config.max_loras_per_batch != ServerConfig().max_loras_per_batch,
        "--max-loaded-loras": config.max_loaded_loras is not None,
        "--max-lora-rank": config.max_lora_rank != ServerConfig().max_lora_rank,
        "--lora-target-modules": config.lora_target_modules is not None,
    }
    return [flag for flag, is_given in given.items() if is_given]


def on_gpu(config: ServerConfig, machine: Machine) -> bool:
    return config.device == "cuda" or (config.device == "auto" and machine.has_gpu and machine.torch_has_cuda)


def given_tier_flags(config: ServerConfig) -> list[str]:
    """The flags that say that there is a tier behind the KV pool."""
    given = {"--enable-hierarchical-cache": config.enable_hierarchical_cache, "--kv-cache-dir": config.kv_cache_dir}
    return [flag for flag, is_given in given.items() if is_given]


Contradiction = tuple[Callable[[ServerConfig, Machine], bool], Callable[[ServerConfig], str]]

CONTRADICTIONS: list[Contradiction] = [
    (
        lambda c, m: c.device == "cuda" and not m.torch_has_cuda,
        lambda c: "--device cuda needs a torch built for CUDA; install one, or use --device cpu",
    ),
    (
        lambda c, m: c.device == "cuda" and not m.has_gpu,
        lambda c: "--device cuda needs an NVIDIA driver, and none is loaded here; use --device cpu",
    ),
    (
        lambda c, m: on_gpu(c, m) and c.attention_backend != "torch_native" and not m.has_triton,
        lambda c: (
            "a GPU needs Triton, which is not installed: pip install 'quartet-serve[gpu]', or use "
            "--attention-backend torch_native or --device cpu"
        ),
    ),
    (
        lambda c, m: c.tp_size > 1 and on_gpu(c, m) and c.attention_backend != "torch_native",
        lambda c: f"--tp-size {c.tp_size} on GPUs needs --attention-backend torch_native; add it",
    ),
    (
        lambda c, m: c.tp_size > 1 and c.enable_deterministic_inference and on_gpu(c, m),
        lambda c: (
            f"--enable-deterministic-inference on GPUs needs the triton backend, which --tp-size {c.tp_size} does not "
            "have; leave one out, or use --device cpu"
        ),
    ),
    (
        lambda c, m: c.dp_size > 1 and c.nnodes > 1,
        lambda c: f"--dp-size {c.dp_size} works on one machine, and --nnodes is {c.nnodes}; leave one out",
    ),
    (
        lambda c, m: c.tp_size % c.nnodes != 0,
        lambda c: f"--tp-size {c.tp_size} cannot be divided among --nnodes {c.nnodes}; use a multiple of it",
    ),
    (
        lambda c, m: c.node_rank >= c.nnodes,
        lambda c: f"--node-rank {c.node_rank}: the {c.nnodes} machines of --nnodes count from 0",
    ),
    (
        lambda c, m: c.nnodes > 1 and not MEETING.fullmatch(c.dist_init_addr or ""),
        lambda c: (
            f"--nnodes {c.nnodes} needs --dist-init-addr HOST:PORT, an address of machine 0 that the others reach, "
            f"not {c.dist_init_addr!r}"
        ),
    ),
    (
        lambda c, m: c.nnodes == 1 and c.dist_init_addr is not None,
        lambda c: "--dist-init-addr has no effect on one machine; add --nnodes, or leave it out",
    ),
    (
        lambda c, m: c.chunked_prefill_size == 0,
        lambda c: "--chunked-prefill-size 0 computes nothing; use -1 for whole prompts or a number of tokens",
    ),
    (
        lambda c, m: c.expert_distribution_recorder_buffer_size == 0,
        lambda c: "--expert-distribution-recorder-buffer-size 0 keeps nothing; use -1 for all or a number of passes",
    ),
    (
        lambda c, m: (c.chunked_prefill_size or 0) > c.max_prefill_tokens,
        lambda c: (
            f"--chunked-prefill-size {c.chunked_prefill_size} exceeds --max-prefill-tokens {c.max_prefill_tokens}; "
            f"use --max-prefill-tokens {c.chunked_prefill_size}"
        ),
    ),
    (
        lambda c, m: c.max_total_tokens is not None and c.max_total_tokens < (c.page_size or PAGE_SIZE),
        lambda c: (
            f"--max-total-tokens {c.max_total_tokens} is less than one page of {c.page_size or PAGE_SIZE} tokens; "
            f"use --page-size {c.max_total_tokens} or less"
        ),
    ),
    (
        lambda c, m: c.enable_priority_scheduling and c.schedule_policy == "lpm",
        lambda c: "--enable-priority-scheduling and --schedule-policy lpm contradict each other; leave one of them out",
    ),
    (
        lambda c, m: c.revision is not None and (c.model_path == "demo" or Path(c.model_path).is_dir()),
        lambda c: f"--revision is for hub ids, and --model-path {c.model_path} is a directory; leave --revision out",
    ),
    (
        lambda c, m: c.disable_cuda_graph and c.cuda_graph_max_bs is not None,
        lambda c: "--disable-cuda-graph and --cuda-graph-max-bs contradict each other; leave one of them out",
    ),
    (
        lambda c, m: c.disable_cuda_graph and c.cuda_graph_max_prefill_tokens > 0,
        lambda c: (
            "--disable-cuda-graph and --cuda-graph-max-prefill-tokens contradict each other; leave one of them out"
        ),
    ),
    (
        lambda c, m: not lora_is_on(c) and bool(given_lora_flags(c)),
        lambda c: f"{given_lora_flags(c)[0]} has no effect without adapters; add --enable-lora, or leave it out",
    ),
    (
        lambda c, m: c.max_loaded_loras is not None and c.max_loaded_loras < c.max_loras_per_batch,
        lambda c: (
            f"--max-loaded-loras {c.max_loaded_loras} is less than --max-loras-per-batch {c.max_loras_per_batch}; "
            f"use --max-loras-per-batch {c.max_loaded_loras}"
        ),
    ),
    (
        lambda c, m: lora_is_on(c) and c.is_embedding,
        lambda c: "--enable-lora is for models that generate, and --is-embedding asks for one that embeds",
    ),
    (
        lambda c, m: not c.enable_hierarchical_cache and (c.hicache_ratio is not None or c.hicache_size > 0),
        lambda c: "--hicache-ratio and --hicache-size have no effect without --enable-hierarchical-cache; add it",
    ),
    (
        lambda c, m: c.kv_cache_dir is None and c.kv_cache_dir_size != ServerConfig().kv_cache_dir_size,
        lambda c: "--kv-cache-dir-size has no effect without --kv-cache-dir; add it, or leave it out",
    ),
    (
        lambda c, m: c.disable_radix_cache and bool(given_tier_flags(c)),
        lambda c: f"{given_tier_flags(c)[0]} keeps what --disable-radix-cache turns off; leave one of them out",
    ),
    (
        lambda c, m: c.is_embedding and bool(given_tier_flags(c)),
        lambda c: f"{given_tier_flags(c)[0]} is for models that generate, and --is-embedding asks for one that embeds",
    ),
    (
        lambda c, m: c.speculative_algorithm not in (None, SPECULATIVE_ALGORITHM),
        lambda c: (
            f"--speculative-algorithm {c.speculative_algorithm} is not supported: Quartet runs no draft model; "
            f"use {SPECULATIVE_ALGORITHM}, which drafts from a request's own text"
        ),
    ),
    (
        lambda c, m: c.speculative_algorithm is None and bool(given_draft_flags(c)),
        lambda c: (
            f"{given_draft_flags(c)[0]} has no effect without speculation; "
            f"add --speculative-algorithm {SPECULATIVE_ALGORITHM}, or leave it out"
        ),
    ),
    (
        lambda c, m: (
            (c.speculative_ngram_min_match_window_size or 0)
            > (c.speculative_ngram_max_match_window_size or sys.maxsize)
        ),
        lambda c: (
            f"--speculative-ngram-min-match-window-size {c.speculative_ngram_min_match_window_size} exceeds "
            f"--speculative-ngram-max-match-window-size {c.speculative_ngram_max_match_window_size}"
        ),
    ),
    (
        lambda c, m: c.speculative_algorithm is not None and c.is_embedding,
        lambda c: "--speculative-algorithm drafts output, and --is-embedding gives none; leave one of them out",
    ),
    (
        lambda c, m: c.speculative_algorithm is not None and c.expert_distribution_recorder_mode is not None,
        lambda c: (
            "--expert-distribution-recorder-mode would count the experts of drafts that are wrong; "
            "leave --speculative-algorithm out"
        ),
    ),
    (
        lambda c, m: 0 < c.watchdog_timeout < LEAST_WATCHDOG_TIMEOUT_S,
        lambda c: (
            f"--watchdog-timeout {c.watchdog_timeout:g} is shorter than a process may take to show that it is well; "
            f"use 0 (never) or at least {LEAST_WATCHDOG_TIMEOUT_S}"
        ),
    ),
    (
        lambda c, m: c.skip_tokenizer_init and (c.tokenizer_path is not None or c.chat_template is not None),
        lambda c: "--skip-tokenizer-init loads no tokenizer; leave --tokenizer-path and --chat-template out",
    ),
    (
        lambda c, m: c.otlp_traces_endpoint is not None and not ENDPOINT.fullmatch(c.otlp_traces_endpoint),
        lambda c: (
            "--otlp-traces-endpoint takes a URL like http://localhost:4318/v1/traces (OTLP over HTTP), without a name "
            f"and password, not {without_password(c.otlp_traces_endpoint or '')!r}"
        ),
    ),
    (
        lambda c, m: c.otlp_traces_endpoint is not None and not m.has_opentelemetry,
        lambda c: "--otlp-traces-endpoint needs OpenTelemetry: pip install 'quartet-serve[otel]'",
    ),
    (
        lambda c, m: c.dp_size > 1 and bool(c.sleep_when_idle_s),
        lambda c: f"--sleep-when-idle-s works with one scheduler, and --dp-size is {c.dp_size}; leave one of them out",
    ),
    (
        lambda c, m: c.disable_tcp and c.uds is None,
        lambda c: "--disable-tcp leaves nothing to listen on; add --uds with the path of a Unix socket",
    ),
    (
        lambda c, m: c.disable_tcp and c.ssl_certfile is not None,
        lambda c: "--ssl-certfile is for TCP, and --disable-tcp leaves that out; leave one of them out",
    ),
    (
        lambda c, m: c.ssl_certfile is None and bool(given_tls_flags(c)),
        lambda c: f"{given_tls_flags(c)[0]} has no effect without --ssl-certfile; add it, or leave that flag out",
    ),
    (
        lambda c, m: c.ssl_cert_reqs in ("optional", "required") and c.ssl_ca_certs is None,
        lambda c: f"--ssl-cert-reqs {c.ssl_cert_reqs} needs --ssl-ca-certs, the authorities to trust",
    ),
]


def refuse_contradictions(config: ServerConfig, machine: Machine) -> None:
    """Raise StartupError for the first contradiction, UsageError for a list that cannot be read."""
    for holds, message in CONTRADICTIONS:
        if holds(config, machine):
            raise StartupError(message(config))
    allowed_origins(config.cors_allow_origins)
    allowed_hosts(config.allowed_hosts)
    if config.preferred_sampling_params is not None:
        try:
            sampling.read_params(msgspec.json.decode(config.preferred_sampling_params, type=dict[str, Any]))
        except (msgspec.MsgspecError, RequestError) as error:
            raise StartupError(f"--preferred-sampling-params must be a JSON object of parameters: {error}") from error


def warn_of_open_network(config: ServerConfig) -> str:
    """The warning for a server that other machines reach and that asks for no key."""
    warning = f"{config.host} is open to the network and no --api-key is set: whoever reaches it can use it"
    if ANY not in (hosts := allowed_hosts(config.allowed_hosts)) and hosts:
        return warning
    return (
        f"{warning}, and so can any web page, under a name of its own that leads here; "
        "--api-key prevents both, --allowed-hosts the web pages"
    )


def notes_on(config: ServerConfig, device: str) -> list[str]:
    """Flags without effect, and effects that the operator may not expect."""
    found = []
    scheduling = ("priority" if config.enable_priority_scheduling else "", config.schedule_policy)
    if not is_loopback(config.host) and config.api_key is None and not config.disable_tcp:
        found.append(warn_of_open_network(config))
    if config.schedule_low_priority_values_first and "priority" not in scheduling:
        found.append("--schedule-low-priority-values-first has no effect without --enable-priority-scheduling")
    if device == "cpu" and config.attention_backend == "triton":
        found.append("--attention-backend triton needs a GPU; torch_native is used on this CPU")
    if device == "cpu" and config.enable_hierarchical_cache:
        found.append(HIERARCHY_ON_A_CPU)
    if device == "cpu" and config.cuda_graph_max_bs is not None:
        found.append("--cuda-graph-max-bs has no effect: a CPU captures no CUDA graphs")
    if device == "cpu" and config.cuda_graph_max_prefill_tokens:
        found.append("--cuda-graph-max-prefill-tokens has no effect: a CPU captures no CUDA graphs")
    return found
