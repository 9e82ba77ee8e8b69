"""Environment variables of SGLang that start scripts and images set: which count here, and what is said of the others.

Those that give a setting its value are named by the fields of `ServerConfig` (runtime/config.py). Pure: names
and values in, lines for the operator out.
"""

import re
from collections.abc import Container, Mapping

PREFIX = re.compile(r"(SGLANG|SGL|VLLM)_[A-Z0-9_]+")
OFF = ("", "0", "false", "no", "off", "none", "-1")

# read where they count, or true of Quartet whatever they say
HONOURED = {
    "SGLANG_HEALTH_CHECK_TIMEOUT",
    "SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR",
    "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION",  # /health never generates; /health_generate does
    "SGLANG_BLOCK_NONZERO_RANK_CHILDREN",
    "SGLANG_DETOKENIZER_MAX_STATES",
    "SGLANG_REQUEST_STATE_WAIT_TIMEOUT",
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE",
    "SGLANG_DISABLE_REQUEST_LOGGING",
    "SGLANG_IS_FIRST_RANK_ON_NODE",
}
# choose among ways to compute the same; images of SGLang set some of them
KERNELS = re.compile(
    r"AFFINITY|AITER|ALLREDUCE|CUDA|DEEPEP|DEEPGEMM|_DG_|DISAGG|FA3|FA4|FLASHINFER|FP4|FP8|FUSE|GEMM|INFERENCE_MODE|INT4|"
    r"MLA|MOE|MOONCAKE|MORI|NCCL|NSA|P2P|PADDING|RECV|ROCM|SYMM|TORCH_COMPILE|TRITON|CACHE_DIR|PREFETCH"
)
WITHOUT_EFFECT = {
    "SGLANG_TIMEOUT_KEEP_ALIVE": "idle connections are closed after 75 s",
    "SGLANG_WARMUP_TIMEOUT": "the warm-up may take 600 s; --skip-server-warmup leaves it out",
    "SGLANG_HOST_IP": "use --host",
    "SGLANG_PORT": "use --port",
    "SGLANG_RETURN_ORIGINAL_LOGPROB": "logprobs are those of the distribution drawn from, temperature included",
    "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "a --context-length beyond the model's positions is refused",
    "SGLANG_USE_MODELSCOPE": "models come from directories or the Hugging Face hub",
    "SGLANG_LOGGING_CONFIG_PATH": "use --log-level and --log-level-http",
    "SGLANG_LOG_REQUEST_EXCEEDED_MS": "slow requests show in /metrics, and each one with --log-requests",
    "SGLANG_LOG_REQUEST_HEADERS": "headers of requests are not logged, but for x-request-id",
    "SGLANG_TORCH_PROFILER_DIR": "no profiles are written",
    "SGLANG_MAX_NEW_TOKENS_LIMIT": "max_new_tokens is bounded by the context length",
    "SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION": "how much room is kept follows from what happens",
    "SGLANG_INIT_NEW_TOKEN_RATIO": "how much room is kept follows from what happens",
    "SGLANG_ENABLE_REQUEST_HEADER_OVERRIDES": "headers override no field of a request",
    "SGLANG_QUEUED_TIMEOUT_MS": "use --req-waiting-timeout, in seconds",
    "SGLANG_FORWARD_TIMEOUT_MS": "use --req-running-timeout, in seconds",
    "SGLANG_FORWARD_UNKNOWN_TOOLS": "how tool calls are read follows from --tool-call-parser",
    "SGL_FORCE_SHUTDOWN": "a second SIGTERM ends the server at once",
    "VLLM_API_KEY": "use QUARTET_API_KEY",
}


def notes(environment: Mapping[str, str], settings: Container[str]) -> list[str]:
    """What is said of variables that are set and do nothing here. `settings`: those that give a setting its value."""
    found = []
    for name in sorted(filter(PREFIX.fullmatch, environment)):
        counts = name in HONOURED or name in settings
        if counts or KERNELS.search(name) or environment[name].strip().lower() in OFF:
            continue
        if name in WITHOUT_EFFECT:
            found.append(f"The variable {name} has no effect here: {WITHOUT_EFFECT[name]}")
        elif not name.startswith("VLLM_"):  # nobody starts this server by those but for its key
            found.append(f"The variable {name} is not known here and has no effect")
    return found
