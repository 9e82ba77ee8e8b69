"""Flags of other servers that start scripts carry: what Quartet does with each.

A flag whose meaning is Quartet's own way, or its default, is accepted, and the log says so. Every other one is refused
with what to do instead. Data only; `runtime/settings/flags.py` reads the command line.
"""

from typing import NamedTuple


class Foreign(NamedTuple):
    """One flag. `accepts`: the values that mean what Quartet does anyway; "true" is the flag alone, "*" any value."""

    advice: str  # what to do instead; where the value is accepted, what holds
    accepts: tuple[str, ...] = ()

    def takes(self, value: str) -> bool:
        return "*" in self.accepts or value.lower() in self.accepts


ANY, ON, OFF = ("*",), ("true",), ("false",)


def ours(flag: str) -> Foreign:
    return Foreign(f"use {flag}")


def always(what: str) -> Foreign:
    """A switch for what is always so."""
    return Foreign(what, ON)


def detail(what: str) -> Foreign:
    """A choice among ways that give the same answers, of which Quartet has its own."""
    return Foreign(what, ANY)


def one(what: str) -> Foreign:
    """A size that may only be one."""
    return Foreign(
        f"one process computes the model, so there is no {what}; start several servers behind a router", ("1",)
    )


NO_LORA = Foreign("LoRA adapters are not supported; merge the adapter into the model and serve that")
NO_LORA_SWITCH = NO_LORA._replace(accepts=OFF)
NO_DRAFT_MODEL = Foreign("Quartet runs no draft model; --speculative-algorithm NGRAM needs none")
NO_QUANTIZATION = Foreign("use --quantization int8 or int4, or serve a quantized checkpoint")
NO_OFFLOAD = Foreign("weights and KV pool are not offloaded; take a smaller model, or less --max-total-tokens", ("0",))
NO_DISAGGREGATION = Foreign("prefill and decode run in one server; leave it out", ("null", "none"))
NO_HIERARCHY = Foreign("the prefix cache lives in the KV pool only; leave it out", OFF)
NO_MEDIA = Foreign("images and audio are not supported; leave it out", OFF)
NO_CRASH_DUMP = Foreign("requests that run when a server dies are sent again, so none are dumped; leave it out", OFF)
ATTENTION = detail("the attention backend is chosen by device (see --attention-backend)")
GRAMMARS = Foreign(
    "grammars are compiled with llguidance and cannot be turned off",
    ("auto", "xgrammar", "outlines", "llguidance", "guidance", "lm-format-enforcer"),
)
GPU_DETAIL = detail("it chooses among GPU kernels that Quartet does not have; the answers are the same")
HUB_ID = Foreign("name it first, with the type of a GGUF file: quartet serve OWNER/NAME:Q4_K_M")
OVERLAP = always("steps overlap where that pays, which changes no answer")
SAMPLING = Foreign("use --preferred-sampling-params, for example '{\"temperature\": 0.7}'")
ONE_NODE = Foreign("a server runs on one machine; start several behind a router")

SGLANG = {
    "--trust-remote-code": Foreign("Quartet never runs code that comes with a model", OFF),
    "--tokenizer-mode": Foreign("there is one tokenizer, the fast one", ("auto", "fast")),
    "--tokenizer-worker-num": Foreign("there is one tokenizer process", ("1",)),
    "--enable-tokenizer-batch-encode": always("waiting texts are always tokenized in one batch"),
    "--disable-tokenizer-batch-decode": detail("how answers are detokenized changes no answer"),
    "--model-loader-extra-config": Foreign("weights are read one way; leave it out", ("{}",)),
    "--json-model-override-args": Foreign("edit the config.json of a copy of the model instead", ("{}",)),
    "--model-impl": Foreign("native families first, transformers for the rest", ("auto",)),
    "--enable-multimodal": NO_MEDIA,
    "--quantization-param-path": NO_QUANTIZATION,
    "--modelopt-quant": NO_QUANTIZATION,
    "--torchao-config": NO_QUANTIZATION._replace(accepts=("",)),
    "--kv-cache-dtype": Foreign("the KV pool has the model's number format", ("auto", "bf16", "bfloat16")),
    "--enable-fp32-lm-head": Foreign("the head computes in the model's number format; use --dtype float32", OFF),
    "--warmups": Foreign("there is one warm-up, which --skip-server-warmup leaves out"),
    "--nccl-port": detail("process groups take their port from /init_weights_update_group"),
    "--grpc-mode": Foreign("Quartet speaks HTTP only", OFF),
    "--fastapi-root-path": Foreign("let the proxy in front strip the prefix", ("",)),
    "--schedule-conservativeness": Foreign("how much room is kept follows from what happens", ("1", "1.0")),
    "--abort-on-priority-when-disabled": always("a priority is a 400 unless priorities are scheduled by"),
    "--default-priority-value": Foreign("a request without a priority has priority 0", ("0", "null", "none")),
    "--prefill-max-requests": ours("--max-prefill-tokens"),
    "--enable-dynamic-chunking": Foreign("chunks have one size, --chunked-prefill-size", OFF),
    "--enable-mixed-chunk": always("chunks of prompts always share steps with decoding requests"),
    "--radix-eviction-policy": Foreign("prefixes are evicted least recently used first", ("lru",)),
    "--disable-overlap-schedule": OVERLAP,
    "--num-continuous-decode-steps": detail("requests are looked at before every step"),
    "--scheduler-recv-interval": detail("requests are looked at before every step"),
    "--stream-output": ours("--incremental-streaming-output"),
    "--constrained-json-whitespace-pattern": Foreign("white space in constrained JSON is the grammar's; leave it out"),
    "--constrained-json-disable-any-whitespace": Foreign("white space stays allowed in constrained JSON", OFF),
    "--soft-watchdog-timeout": ours("--watchdog-timeout"),
    "--sleep-on-idle": always("an idle server sleeps always"),
    "--base-gpu-id": Foreign("choose the GPU with the variable CUDA_VISIBLE_DEVICES", ("0",)),
    "--gpu-id-step": Foreign("a server uses one GPU", ("1",)),
    "--log-requests-level": ours("--log-requests metadata or full"),
    "--log-requests-format": ours("--log-format"),
    "--log-requests-target": Foreign("requests are logged on stderr, like everything else", ("stdout", "stderr")),
    "--enable-request-time-stats-logging": ours("--log-requests, whose lines have the times"),
    "--crash-dump-folder": NO_CRASH_DUMP,
    "--show-time-cost": Foreign("use the metrics, or py-spy", OFF),
    "--enable-metrics-for-all-schedulers": always("there is one scheduler, and it reports"),
    "--collect-tokens-histogram": Foreign("there are no histograms of token counts; leave it out", OFF),
    "--enable-trace": ours("--otlp-traces-endpoint"),
    "--oltp-traces-endpoint": ours("--otlp-traces-endpoint"),
    "--kv-events-config": Foreign("there are no KV events; leave it out"),
    "--hf-chat-template-name": ours("--chat-template, with a file that holds that template"),
    "--completion-template": Foreign("/v1/completions takes the prompt as it is; leave it out"),
    "--file-storage-path": Foreign("there are no files to store; leave it out"),
    "--tool-server": Foreign("tools run with the client; leave it out"),
    "--pp-size": one("pipeline parallelism"),
    "--pp": one("pipeline parallelism"),
    "--pipeline-parallel-size": one("pipeline parallelism"),
    "--dp": one("data parallelism"),
    "--dp-size": one("data parallelism"),
    "--data-parallel-size": one("data parallelism"),
    "--ep": one("expert parallelism"),
    "--ep-size": one("expert parallelism"),
    "--expert-parallel-size": one("expert parallelism"),
    "--load-balance-method": detail("there is one scheduler to give requests to"),
    "--enable-dp-attention": Foreign("there is no data parallelism; leave it out", OFF),
    "--enable-dp-lm-head": Foreign("there is no data parallelism; leave it out", OFF),
    "--dist-init-addr": ONE_NODE,
    "--nnodes": ONE_NODE._replace(accepts=("1",)),
    "--node-rank": ONE_NODE._replace(accepts=("0",)),
    "--dist-timeout": detail("nothing is distributed"),
    "--disable-custom-all-reduce": always("nothing is distributed"),
    "--enable-p2p-check": always("nothing is distributed"),
    "--enable-nccl-nvls": always("nothing is distributed"),
    "--enable-lora": NO_LORA_SWITCH,
    "--lora-paths": NO_LORA,
    "--max-lora-rank": NO_LORA,
    "--lora-target-modules": NO_LORA,
    "--max-loras-per-batch": NO_LORA,
    "--max-loaded-loras": NO_LORA,
    "--lora-backend": NO_LORA,
    "--prefill-attention-backend": ATTENTION,
    "--decode-attention-backend": ATTENTION,
    "--mm-attention-backend": NO_MEDIA,
    "--sampling-backend": detail("there is one sampler, and every draw follows from the request's seed"),
    "--grammar-backend": GRAMMARS,
    "--fp8-gemm-backend": GPU_DETAIL,
    "--moe-runner-backend": GPU_DETAIL,
    "--moe-a2a-backend": Foreign("there is no expert parallelism; leave it out", ("none",)),
    "--deepep-mode": detail("there is no expert parallelism"),
    "--enable-eplb": Foreign("there is no expert parallelism; leave it out", OFF),
    "--enable-flashinfer-allreduce-fusion": GPU_DETAIL,
    "--disable-shared-experts-fusion": GPU_DETAIL,
    "--flashinfer-mla-disable-ragged": GPU_DETAIL,
    "--triton-attention-reduce-in-fp32": always("attention always sums in float32"),
    "--triton-attention-num-kv-splits": GPU_DETAIL,
    "--disable-chunked-prefix-cache": GPU_DETAIL,
    "--speculative-draft-model-path": NO_DRAFT_MODEL,
    "--speculative-draft-model": NO_DRAFT_MODEL,
    "--speculative-draft-model-revision": NO_DRAFT_MODEL,
    "--speculative-num-steps": NO_DRAFT_MODEL,
    "--speculative-eagle-topk": NO_DRAFT_MODEL,
    "--speculative-token-map": NO_DRAFT_MODEL,
    "--enable-hierarchical-cache": NO_HIERARCHY,
    "--hicache-ratio": NO_HIERARCHY,
    "--hicache-size": NO_HIERARCHY,
    "--hicache-write-policy": NO_HIERARCHY,
    "--hicache-storage-backend": NO_HIERARCHY,
    "--enable-lmcache": NO_HIERARCHY,
    "--cpu-offload-gb": NO_OFFLOAD,
    "--cuda-graph-bs": ours("--cuda-graph-max-bs"),
    "--disable-cuda-graph-padding": GPU_DETAIL,
    "--enable-piecewise-cuda-graph": ours("--cuda-graph-max-prefill-tokens"),
    "--enable-torch-compile": GPU_DETAIL,
    "--torch-compile-max-bs": GPU_DETAIL,
    "--enable-two-batch-overlap": OVERLAP,
    "--enable-single-batch-overlap": OVERLAP,
    "--enable-nan-detection": always("logits that are no numbers end their request always"),
    "--delete-ckpt-after-loading": Foreign("Quartet deletes no checkpoint", OFF),
    "--custom-weight-loader": Foreign("Quartet runs no code of others; use /update_weights_from_tensor"),
    "--weight-loader-disable-mmap": detail("how weights are read changes no weight"),
    "--enable-custom-logit-processor": Foreign("Quartet runs no code that comes with a request", OFF),
    "--rl-on-policy-target": ours("--enable-deterministic-inference"),
    "--disaggregation-mode": NO_DISAGGREGATION,
    "--disaggregation-transfer-backend": NO_DISAGGREGATION,
    "--disaggregation-bootstrap-port": NO_DISAGGREGATION,
    "--disaggregation-ib-device": NO_DISAGGREGATION,
}

VLLM = {
    "--max-model-len": ours("--context-length"),
    "--gpu-memory-utilization": ours("--mem-fraction-static"),
    "--max-num-seqs": ours("--max-running-requests"),
    "--max-num-batched-tokens": ours("--max-prefill-tokens or --chunked-prefill-size"),
    "--block-size": ours("--page-size"),
    "--num-gpu-blocks-override": ours("--max-total-tokens"),
    "--kv-cache-memory-bytes": ours("--max-total-tokens"),
    "--swap-space": NO_OFFLOAD,
    "--enforce-eager": ours("--disable-cuda-graph"),
    "--max-seq-len-to-capture": ours("--cuda-graph-max-bs"),
    "--enable-prefix-caching": always("prefixes are cached unless --disable-radix-cache says otherwise"),
    "--no-enable-prefix-caching": ours("--disable-radix-cache"),
    "--enable-chunked-prefill": always("prompts are computed in chunks unless --chunked-prefill-size is -1"),
    "--no-enable-chunked-prefill": ours("--chunked-prefill-size -1"),
    "--seed": ours("--random-seed"),
    "--tokenizer": ours("--tokenizer-path"),
    "--tokenizer-revision": ours("--revision"),
    "--config-format": detail("models are described by their config.json"),
    "--task": Foreign("use --is-embedding for models that embed", ("auto", "generate")),
    "--runner": Foreign("use --is-embedding for models that embed", ("auto", "generate")),
    "--convert": Foreign("use --is-embedding for models that embed", ("auto", "none")),
    "--scheduling-policy": ours("--schedule-policy"),
    "--enable-auto-tool-choice": always("a request may always leave the choice of tools to the model"),
    "--enable-reasoning": ours("--reasoning-parser"),
    "--enable-sleep-mode": ours("--enable-memory-saver"),
    "--disable-log-requests": always("requests are not logged unless --log-requests says so"),
    "--no-enable-log-requests": always("requests are not logged unless --log-requests says so"),
    "--enable-log-requests": ours("--log-requests"),
    "--collect-detailed-traces": detail("traces have a span for each hop always"),
    "--disable-log-stats": ours("--decode-log-interval, with a large number"),
    "--uvicorn-log-level": ours("--log-level-http"),
    "--allowed-origins": ours("--cors-allow-origins"),
    "--allow-credentials": detail("origins that are named may send credentials"),
    "--root-path": Foreign("let the proxy in front strip the prefix", ("",)),
    "--generation-config": ours("--sampling-defaults"),
    "--override-generation-config": SAMPLING,
    "--chat-template-content-format": Foreign("found out from the template", ("auto",)),
    "--limit-mm-per-prompt": NO_MEDIA,
    "--mm-processor-kwargs": NO_MEDIA,
    "--guided-decoding-backend": GRAMMARS,
    "--structured-outputs-config": GRAMMARS,
    "--speculative-config": ours("--speculative-algorithm"),
    "--hf-token": Foreign("use the variable HF_TOKEN, which no list of processes shows"),
    "--hf-overrides": Foreign("edit the config.json of a copy of the model instead"),
    "--rope-scaling": Foreign("edit the config.json of a copy of the model instead"),
    "--lora-modules": NO_LORA,
    "--max-loras": NO_LORA,
    "--max-logprobs": Foreign("a request may ask for up to 128 logprobs"),
    "--distributed-executor-backend": detail("nothing is distributed"),
    "--disable-frontend-multiprocessing": detail("the gateway is always a process of its own"),
    "--api-server-count": Foreign("there is one gateway", ("1",)),
    "--num-scheduler-steps": detail("requests are looked at before every step"),
    "--async-scheduling": OVERLAP,
    "--enable-expert-parallel": Foreign("there is no expert parallelism; leave it out", OFF),
    "--compilation-config": GPU_DETAIL,
    "-O": GPU_DETAIL,
    "-pp": one("pipeline parallelism"),
    "-dp": one("data parallelism"),
    "-q": ours("--quantization"),
    "--enable-prompt-tokens-details": ours("--enable-cache-report"),
    "--disable-uvicorn-access-log": ours("--log-level-http warning"),
    "--enable-server-load-tracking": always("/v1/loads always tells what runs"),
    "--disable-fastapi-docs": Foreign("/docs says nothing of this server; leave it out", OFF),
    "--kv-transfer-config": NO_DISAGGREGATION,
    "--kv-offloading-size": NO_HIERARCHY,
    "--tool-parser-plugin": Foreign("Quartet runs no code of others; see --tool-call-parser"),
    "--reasoning-parser-plugin": Foreign("Quartet runs no code of others; see --reasoning-parser"),
    "--logits-processors": Foreign("Quartet runs no code of others; leave it out"),
    "--middleware": Foreign("Quartet runs no code of others; put a proxy in front"),
}

LLAMA_CPP = {
    "-m": ours("--model-path, with a directory or a hub id"),
    "-hf": HUB_ID,
    "-hfr": HUB_ID,
    "--hf-repo": HUB_ID,
    "-hff": HUB_ID,
    "--hf-file": HUB_ID,
    "-mu": HUB_ID,
    "--model-url": HUB_ID,
    "-a": ours("--served-model-name"),
    "--alias": ours("--served-model-name"),
    "-c": ours("--context-length"),
    "--ctx-size": ours("--context-length"),
    "-np": ours("--max-running-requests"),
    "--parallel": ours("--max-running-requests"),
    "-cb": always("requests always share steps"),
    "--cont-batching": always("requests always share steps"),
    "-b": ours("--max-prefill-tokens"),
    "--batch-size": ours("--max-prefill-tokens"),
    "-ub": ours("--chunked-prefill-size"),
    "--ubatch-size": ours("--chunked-prefill-size"),
    "-t": Foreign("use the variable OMP_NUM_THREADS"),
    "--threads": Foreign("use the variable OMP_NUM_THREADS"),
    "-tb": Foreign("use the variable OMP_NUM_THREADS"),
    "--threads-batch": Foreign("use the variable OMP_NUM_THREADS"),
    "--threads-http": detail("the gateway has one event loop"),
    "-ngl": ours("--device: a model runs on the GPU or on the CPU, whole"),
    "--gpu-layers": ours("--device: a model runs on the GPU or on the CPU, whole"),
    "--n-gpu-layers": ours("--device: a model runs on the GPU or on the CPU, whole"),
    "--n-cpu-moe": NO_OFFLOAD,
    "-fa": ATTENTION,
    "--flash-attn": ATTENTION,
    "-ctk": Foreign("the KV pool has the model's number format", ("f16", "bf16")),
    "-ctv": Foreign("the KV pool has the model's number format", ("f16", "bf16")),
    "--cache-type-k": Foreign("the KV pool has the model's number format", ("f16", "bf16")),
    "--cache-type-v": Foreign("the KV pool has the model's number format", ("f16", "bf16")),
    "--cache-reuse": detail("prefixes are cached unless --disable-radix-cache says otherwise"),
    "--mlock": Foreign("memory is not locked; leave it out"),
    "--no-mmap": detail("how weights are read changes no weight"),
    "--numa": Foreign("start the server under numactl"),
    "--jinja": always("chat templates are always Jinja"),
    "--chat-template-file": ours("--chat-template"),
    "--reasoning-format": ours("--reasoning-parser"),
    "--embedding": ours("--is-embedding"),
    "--embeddings": ours("--is-embedding"),
    "--rerank": ours("--is-embedding"),
    "--reranking": ours("--is-embedding"),
    "--pooling": Foreign("pooling follows from the model's own settings"),
    "--metrics": always("/metrics is served unless --enable-metrics is false"),
    "--slots": Foreign("there are no slots to show; /v1/loads tells what runs"),
    "--no-webui": always("there are no web pages but /docs"),
    "--timeout": ours("--req-running-timeout"),
    "-to": ours("--req-running-timeout"),
    "--no-warmup": ours("--skip-server-warmup"),
    "-n": SAMPLING,
    "--predict": SAMPLING,
    "--n-predict": SAMPLING,
    "--temp": SAMPLING,
    "--top-k": SAMPLING,
    "--top-p": SAMPLING,
    "--min-p": SAMPLING,
    "--repeat-penalty": SAMPLING,
    "--grammar": Foreign("a request brings its own grammar (ebnf, json_schema or regex)"),
    "-p": Foreign("prompts come over HTTP, or by `quartet chat`"),
    "--prompt": Foreign("prompts come over HTTP, or by `quartet chat`"),
    "-i": Foreign("to talk to a model, use `quartet chat`"),
    "--interactive": Foreign("to talk to a model, use `quartet chat`"),
    "-cnv": Foreign("to talk to a model, use `quartet chat`"),
    "-dev": ours("--device"),
    "-sm": one("way to split a model")._replace(accepts=("none",)),
    "--split-mode": one("way to split a model")._replace(accepts=("none",)),
    "-ts": ONE_NODE,
    "--tensor-split": ONE_NODE,
    "-mg": Foreign("choose the GPU with the variable CUDA_VISIBLE_DEVICES", ("0",)),
    "--main-gpu": Foreign("choose the GPU with the variable CUDA_VISIBLE_DEVICES", ("0",)),
    "-ot": NO_OFFLOAD,
    "--override-tensor": NO_OFFLOAD,
    "--cpu-moe": NO_OFFLOAD,
    "--no-kv-offload": NO_OFFLOAD,
    "--kv-unified": always("requests always share one KV pool"),
    "--context-shift": Foreign("a conversation that is too long is a 400; see --allow-auto-truncate"),
    "--no-context-shift": always("no text is dropped from a conversation unless a request asks for it"),
    "--reasoning-budget": Foreign("a request has its own thinking_budget", ("-1",)),
    "--draft": ours("--speculative-num-draft-tokens"),
    "--draft-max": ours("--speculative-num-draft-tokens"),
    "--log-disable": ours("--log-level error"),
    "--api-prefix": Foreign("let the proxy in front strip the prefix", ("",)),
    "-s": ours("--random-seed"),
    "--lora": NO_LORA,
    "--mmproj": NO_MEDIA,
    "-md": NO_DRAFT_MODEL,
    "--model-draft": NO_DRAFT_MODEL,
    "-v": ours("--log-level debug"),
    "--verbose": ours("--log-level debug"),
    "--ssl-key-file": ours("--ssl-keyfile"),
    "--ssl-cert-file": ours("--ssl-certfile"),
}

FLAGS: dict[str, Foreign] = {**LLAMA_CPP, **VLLM, **SGLANG}


class Value(NamedTuple):
    """A value that others give to a flag of ours: what it becomes here (None: the flag's default), and why."""

    instead: str | None
    why: str


NOT_HERE = Value(None, "is not one of ours; the backend is chosen by device")

OTHER_BACKENDS = {"aiter", "cutlass_mla", "dual_chunk_flash_attn", "fa3", "fa4", "flashinfer", "flashmla"} | {
    "flex_attention",
    "intel_amx",
    "trtllm_mha",
    "trtllm_mla",
    "wave",
}

VALUES: dict[tuple[str, str], Value] = {
    ("schedule_policy", "random"): Value("fcfs", "promises no order; fcfs is used"),
    ("schedule_policy", "dfs-weight"): Value("lpm", "groups shared prefixes, as lpm does; that is used"),
    **{
        ("quantization", name): Value(None, "is found in the checkpoint; auto is used")
        for name in ("None", "null", "gguf", "gptq", "awq", "fp8", "fbgemm_fp8")
    },
    ("ssl_cert_reqs", "0"): Value("none", "is the value none here"),
    ("ssl_cert_reqs", "1"): Value("optional", "is the value optional here"),
    ("ssl_cert_reqs", "2"): Value("required", "is the value required here"),
    ("log_requests", "true"): Value("metadata", "is the value metadata here"),
    ("log_requests", "True"): Value("metadata", "is the value metadata here"),
    ("log_requests", "false"): Value("off", "is the value off here"),
    ("log_requests", "False"): Value("off", "is the value off here"),
    ("tool_call_parser", ""): Value("none", "is empty: calls stay in the text"),
    ("reasoning_parser", ""): Value("none", "is empty: thoughts stay in the text"),
    **{("attention_backend", name): NOT_HERE for name in sorted(OTHER_BACKENDS)},
}
