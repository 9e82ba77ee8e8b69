"""Values that other servers give to flags of ours: what each comes to here. Data only, as in foreign_flags.py."""

from typing import NamedTuple


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

STORED_KINDS = {"awq", "awq_marlin", "bitsandbytes", "compressed-tensors", "fbgemm_fp8", "fp8", "gguf", "gptq"} | {
    "gptq_marlin",
    "marlin",
    "mxfp4",
    "torchao",
}

VALUES: dict[tuple[str, str], Value] = {
    ("schedule_policy", "random"): Value("fcfs", "promises no order; fcfs is used"),
    ("schedule_policy", "dfs-weight"): Value("lpm", "groups shared prefixes, as lpm does; that is used"),
    **{
        ("quantization", name): Value(None, "quantizes nothing here; auto is used, which keeps what a checkpoint has")
        for name in sorted(STORED_KINDS)
    },
    **{("quantization", name): Value(None, "is auto here: what a checkpoint has is kept") for name in ("None", "null")},
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
