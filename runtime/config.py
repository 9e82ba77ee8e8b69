"""The server's configuration: one frozen struct, and for every field its type, default and help in one place.

Flags, the YAML file, `quartet config show` and `/get_server_info` are derived from the fields below by
`runtime/settings/flags.py`. Names and types are those of the wire contract. Where a default differs, the help says
which. `resolve` (runtime/settings/resolve.py) decides once what `None` and "auto" stand for; services read the
result, a `ResolvedConfig`.
"""

from typing import Annotated, Literal

import msgspec

from quartet.runtime.adapter_sources import AdapterSource
from quartet.runtime.flag import (
    DEVICE,
    HTTP,
    MODEL,
    OPERATIONS,
    SCHEDULER,
    SPECULATION,
    BufferSize,
    ChunkSize,
    DraftSize,
    LogLevel,
    Natural,
    PortNumber,
    Positive,
    Seconds,
    Share,
    TimeLimit,
    flag,
)
from quartet.runtime.format_names import ReasoningParser, ToolCallParser
from quartet.runtime.kv_tier_config import KvTierConfig


class ServerConfig(KvTierConfig, frozen=True, kw_only=True):
    """All settings of a server, by their api names. Those of logs, files and traces, and of adapters, it inherits."""

    model_path: Annotated[
        str, flag("directory, GGUF file or hub id of the model; demo: the embedded one", MODEL, "--model")
    ] = "demo"
    tokenizer_path: Annotated[
        str | None, flag("directory or hub id of the tokenizer (default: the model's)", MODEL)
    ] = None
    served_model_name: Annotated[
        str | None, flag("name in answers and /v1/models (default: the model path)", MODEL)
    ] = None
    revision: Annotated[str | None, flag("branch, tag or commit of a hub id", MODEL)] = None
    download_dir: Annotated[str | None, flag("where hub models are kept (default: the hub's own cache)", MODEL)] = None
    chat_template: Annotated[str | None, flag("file with a chat template (default: the tokenizer's)", MODEL)] = None
    is_embedding: Annotated[bool, flag("serve /encode, /classify and rerank instead of generation", MODEL)] = False
    skip_tokenizer_init: Annotated[bool, flag("token ids in, token ids out; load no tokenizer", MODEL)] = False
    context_length: Annotated[
        Positive | None, flag("longest sequence in tokens (default: the model's; never more)", MODEL)
    ] = None
    dtype: Annotated[
        Literal["auto", "half", "float16", "bfloat16", "float", "float32"],
        flag("number format of weights and activations; auto: by model and device", MODEL),
    ] = "auto"
    quantization: Annotated[
        Literal["auto", "none", "int8", "int4"],
        flag(
            "keep weights in 8 or 4 bits (bfloat16 on a CPU); auto: as a quantized model has them, else not; none: "
            "expand those of a quantized model",
            MODEL,
        ),
    ] = "auto"
    load_format: Annotated[
        Literal["auto", "safetensors", "dummy"], flag("format of the weights; dummy: random ones", MODEL)
    ] = "auto"
    weight_version: Annotated[str, flag("version string of the loaded weights", MODEL)] = "default"
    enable_memory_saver: Annotated[
        bool, flag("let /release_memory_occupation give the memory of weights and KV pool back for a while", MODEL)
    ] = False
    enable_weights_cpu_backup: Annotated[
        bool, flag("keep a copy of released weights, so that they need no update when resumed", MODEL)
    ] = False

    host: Annotated[str, flag("address to listen on", HTTP)] = "127.0.0.1"
    port: Annotated[PortNumber, flag("port to listen on; 0: any free one", HTTP)] = 30000
    api_key: Annotated[
        str | None,
        flag(
            "key that clients must send as a bearer token; several are separated by commas",
            HTTP,
            secret=True,
            several=True,
            variable="QUARTET_API_KEY",
        ),
    ] = None
    api_key_file: Annotated[
        str | None, flag("file with such keys, one a line; lines that begin with # are comments", HTTP)
    ] = None
    admin_api_key: Annotated[
        str | None,
        flag(
            "key for the control endpoints, likewise",
            HTTP,
            secret=True,
            several=True,
            variable="QUARTET_ADMIN_API_KEY",
        ),
    ] = None
    admin_api_key_file: Annotated[str | None, flag("file with such keys", HTTP)] = None
    cors_allow_origins: Annotated[
        str | None,
        flag(
            "origins (scheme://host[:port], separated by commas) whose web pages may call the server besides its own "
            "and those of this machine; *: any, without credentials",
            HTTP,
            several=True,
        ),
    ] = None
    allowed_hosts: Annotated[
        str | None,
        flag(
            "names (separated by commas) that requests may give the server, for a proxy in front; *: any "
            "(default: any, but on loopback only its own); addresses always count where it does not listen on loopback",
            HTTP,
            several=True,
        ),
    ] = None
    max_inflight_requests: Annotated[Positive, flag("requests inside the ring before a 503", HTTP)] = 4096
    max_body_size: Annotated[
        Positive, flag("bytes of a request's body before a 413, but for weights; JSON, so escapes count", HTTP)
    ] = 8 << 20
    max_weight_body_size: Annotated[
        Positive, flag("the same for /update_weights_from_tensor, whose body holds weights", HTTP)
    ] = 2 << 30
    responses_store: Annotated[
        str | None,
        flag(
            "file (SQLite) that keeps what /v1/responses has answered, for previous_response_id; a path of its own "
            "outlasts the server (default: in the run directory)",
            HTTP,
        ),
    ] = None
    responses_store_size: Annotated[
        Natural, flag("bytes of responses that are kept; what was not used for longest goes first; 0: none", HTTP)
    ] = 64 << 20
    responses_store_age: Annotated[Seconds, flag("seconds that a response is kept after its last use", HTTP)] = (
        30.0 * 86400
    )
    drain_timeout: Annotated[Seconds, flag("seconds that running requests get after SIGTERM", HTTP)] = 30.0
    stream_interval: Annotated[Positive, flag("tokens between two streamed chunks", HTTP)] = 1
    incremental_streaming_output: Annotated[
        bool, flag("stream only what is new in each chunk, instead of the text so far", HTTP)
    ] = False
    allow_auto_truncate: Annotated[
        bool, flag("cut the end of a prompt that is too long, and output that would not fit, rather than refuse", HTTP)
    ] = False
    preferred_sampling_params: Annotated[
        str | None, flag("JSON object of sampling parameters laid under every request's own", HTTP)
    ] = None

    sampling_defaults: Annotated[
        Literal["model", "openai"],
        flag("where /v1 requests take what they leave out from: the model's generation_config.json or OpenAI", HTTP),
    ] = "model"
    tool_call_parser: Annotated[
        ToolCallParser | None,
        flag("how the model writes tool calls; auto: as its chat template says; none: they stay in the text", HTTP),
    ] = "auto"
    reasoning_parser: Annotated[
        ReasoningParser | None,
        flag("how the model marks its thought; auto: as its chat template says; none: it stays in the text", HTTP),
    ] = "auto"
    leave_out_hosted_tools: Annotated[
        bool, flag("on /v1/responses, leave out hosted tools (web_search, …) beside functions, not answer 400", HTTP)
    ] = False
    enable_cache_report: Annotated[bool, flag("say in the usage of /v1 answers how much was cached", HTTP)] = False

    max_running_requests: Annotated[Positive | None, flag("requests in one batch (default: 256)", SCHEDULER)] = None
    max_queued_requests: Annotated[
        Positive | None, flag("waiting requests before a 503 (default: 4 batches, at least 1024)", SCHEDULER)
    ] = None
    max_total_tokens: Annotated[
        Positive | None, flag("size of the KV pool in tokens (default: by memory, on a CPU 4 GB at most)", SCHEDULER)
    ] = None
    mem_fraction_static: Annotated[
        Share | None, flag("share of memory for weights and KV pool (default: by device)", SCHEDULER)
    ] = None
    chunked_prefill_size: Annotated[
        ChunkSize | None, flag("prompt tokens in one step; -1: whole prompts (default: by device)", SCHEDULER)
    ] = None
    max_prefill_tokens: Annotated[Positive, flag("prompt tokens of one step, all requests together", SCHEDULER)] = 16384
    schedule_policy: Annotated[
        Literal["fcfs", "lpm", "priority"],
        flag("order of the waiting queue; lpm: longest cached prefix first", SCHEDULER),
    ] = "fcfs"
    enable_priority_scheduling: Annotated[bool, flag("the same as --schedule-policy priority", SCHEDULER)] = False
    schedule_low_priority_values_first: Annotated[
        bool, flag("lower values of a request's priority come first, instead of higher ones", SCHEDULER)
    ] = False
    priority_scheduling_preemption_threshold: Annotated[
        Natural,
        flag(
            "a waiting request without room sends running ones back to the queue whose priorities are lower by more "
            "than this; they go on later where they were",
            SCHEDULER,
        ),
    ] = 10
    disable_priority_preemption: Annotated[
        bool, flag("send no running request back for one of higher priority", SCHEDULER)
    ] = False
    req_waiting_timeout: Annotated[
        TimeLimit,
        flag(
            "seconds after which a request that waits to be started ends with a 503; -1 or 0: never",
            SCHEDULER,
            variable="SGLANG_REQ_WAITING_TIMEOUT",
        ),
    ] = -1.0
    req_running_timeout: Annotated[
        TimeLimit,
        flag(
            "seconds after which a request that was started ends with a 503, time in which it was sent back to the "
            "queue included; -1 or 0: never",
            SCHEDULER,
            variable="SGLANG_REQ_RUNNING_TIMEOUT",
        ),
    ] = -1.0
    page_size: Annotated[
        Positive | None, flag("tokens per KV page (default: 16; 1 counts cached tokens exactly)", SCHEDULER)
    ] = None
    disable_radix_cache: Annotated[bool, flag("do not reuse the KV of shared prefixes", SCHEDULER)] = False
    decode_log_interval: Annotated[Positive, flag("decode steps between two log lines", SCHEDULER)] = 40
    random_seed: Annotated[
        Natural | None, flag("seed of the server's own draws (default: a random one)", SCHEDULER)
    ] = None

    speculative_algorithm: Annotated[
        str | None,
        flag(
            "NGRAM: draft tokens that followed the same ones earlier in the request's own text, and verify several in "
            "one step; the answers stay the same (default: no speculation)",
            SPECULATION,
        ),
    ] = None
    speculative_num_draft_tokens: Annotated[
        DraftSize | None, flag("tokens of a draft, at most (default: 8)", SPECULATION)
    ] = None
    speculative_ngram_min_match_window_size: Annotated[
        Positive | None, flag("tokens that must have occurred before for a draft to be made (default: 2)", SPECULATION)
    ] = None
    speculative_ngram_max_match_window_size: Annotated[
        Positive | None,
        flag("tokens up to which occurrences are compared: the longest match is continued (default: 8)", SPECULATION),
    ] = None

    device: Annotated[Literal["auto", "cpu", "cuda"], flag("where the model runs", DEVICE)] = "auto"
    attention_backend: Annotated[
        Literal["triton", "torch_native"] | None,
        flag("triton needs a GPU; a CPU falls back to torch_native and says so (default: by device)", DEVICE),
    ] = None
    enable_deterministic_inference: Annotated[
        bool,
        flag("bits of an answer depend on its request alone, not on what shares its steps; slower", DEVICE),
    ] = False
    cuda_graph_max_bs: Annotated[
        Positive | None,
        flag("largest batch captured as a CUDA graph (default: 512, or --max-running-requests)", DEVICE),
    ] = None
    cuda_graph_max_prefill_tokens: Annotated[
        Natural,
        flag("most prompt tokens of a step that is captured as a CUDA graph too (default: 0, none is)", DEVICE),
    ] = 0
    disable_cuda_graph: Annotated[
        bool, flag("capture no CUDA graphs: every step is launched piece by piece", DEVICE)
    ] = False

    log_level: Annotated[LogLevel, flag("least severe lines to log", OPERATIONS)] = "info"
    log_level_http: Annotated[LogLevel | None, flag("the same for access lines (default: log level)", OPERATIONS)] = (
        None
    )
    max_restarts: Annotated[
        Natural,
        flag("how often within a minute a process that died is started again before the server ends", OPERATIONS),
    ] = 5
    disable_standby: Annotated[
        bool,
        flag(
            "keep no second scheduler process at hand: 200 MB less, and a restart takes 2 s longer",
            OPERATIONS,
        ),
    ] = False
    low_memory: Annotated[
        bool,
        flag(
            "take less memory: no second scheduler process, prompts in smaller pieces, embeddings read from a GGUF "
            "file token by token where the head is apart, what grammars need loaded with the first one",
            OPERATIONS,
        ),
    ] = False
    watchdog_timeout: Annotated[
        Seconds,
        flag(
            "seconds without a step after which a process is replaced (10 at most if it is stopped); 0: never",
            OPERATIONS,
        ),
    ] = 300.0
    exit_with_parent: Annotated[
        Natural | None,
        flag(
            "stop when the process that started the server ends (shells are seen through); with a process id: when "
            "that ancestor does, and refuse to start when it has",
            OPERATIONS,
            bare="0",
        ),
    ] = None
    enable_metrics: Annotated[bool, flag("serve /metrics", OPERATIONS)] = True
    skip_server_warmup: Annotated[bool, flag("report ready without a first request", OPERATIONS)] = False
    expert_distribution_recorder_mode: Annotated[
        Literal["stat", "stat_approx", "per_pass", "per_token"] | None,
        flag(
            "record which experts a MoE model chooses, when /start_expert_distribution_record says so: "
            "sums (stat), by pass or by token; stat_approx is as exact as stat",
            OPERATIONS,
        ),
    ] = None
    expert_distribution_recorder_buffer_size: Annotated[
        BufferSize | None,
        flag("forward passes kept between two dumps; -1: all that fit in 1 GiB (default: 1000)", OPERATIONS),
    ] = None
    expert_distribution_recorder_dir: Annotated[
        str | None,
        flag(
            "where dumps are written (default: the variable SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR, then /tmp)",
            OPERATIONS,
        ),
    ] = None
    enable_return_routed_experts: Annotated[
        bool, flag("let requests ask for the experts that each of their tokens chose", OPERATIONS)
    ] = False
    enable_return_hidden_states: Annotated[
        bool, flag("let requests ask for the hidden states behind the last layer", OPERATIONS)
    ] = False

    # not flags: the launcher fills them in, the services read them
    listen_address: str = ""  # what `host` stands for
    model_dir: str = ""  # local directory of model_path
    tokenizer_dir: str = ""  # local directory of tokenizer_path

    @property
    def name(self) -> str:
        return self.served_model_name or self.model_path


class Speculation(msgspec.Struct, frozen=True):
    """Sizes of drafts, in tokens."""

    max_draft_tokens: int
    min_match: int  # shortest text that must have occurred before
    max_match: int  # longest text that is compared


class WeightScheme(msgspec.Struct, frozen=True, array_like=True):
    """How one slab of the weights is quantized (kernels/cpu/native/quantized.py)."""

    buffer: str
    index: tuple[int, ...]
    bits: int
    group_size: int
    offsets: bool
    zero_point: int
    rotated: int = 0
    row_bits: int = 8
    scale_bits: int = 16


class ResolvedConfig(ServerConfig, frozen=True, kw_only=True):
    """A configuration in which every default is decided; made by `resolve` alone.

    A flag that can still be None here is a feature that is off (keys, parsers, ...) or a limit of which only the model
    or the device knows the default: `context_length` (`model_info.load`), `max_total_tokens` and `mem_fraction_static`
    (`scheduler_service/host/pool_size.py`). `dtype` "auto" is decided by `scheduler_service/model/dtype.py`.
    """

    # flags, with narrower types
    device: Literal["cpu", "cuda"]
    attention_backend: Literal["triton", "torch_native"]
    page_size: int
    enable_lora: bool
    max_running_requests: int
    max_queued_requests: int
    chunked_prefill_size: int  # -1: whole prompts
    expert_distribution_recorder_buffer_size: int  # -1: no limit
    expert_distribution_recorder_dir: str

    # what other flags come to; not shown
    adapters: list[AdapterSource] = []  # those of lora_paths
    access_log_level: LogLevel
    dummy_seed: int  # of random weights
    weight_schemes: list[WeightScheme] | None = None  # those that served before a restart; None: by --quantization
    max_graph_rows: int  # of a decode step that is captured as a CUDA graph; 0: none is
    preemption_threshold: int | None  # None: nobody preempts
    speculation: Speculation | None
    waiting_timeout_s: float | None  # None: no limit
    running_timeout_s: float | None
