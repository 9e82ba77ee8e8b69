"""The shapes of the models that are measured, as config.json says them, and what their steps must cost at least."""

from dataclasses import dataclass
from typing import Any

DTYPE_BYTES = 2


def qwen2(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, **more: Any) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "eos_token_id": 0,
        "bos_token_id": 0,
        **more,
    }


def llama(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, **more: Any) -> dict[str, Any]:
    kind = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "rope_theta": 5e5}
    return {**qwen2(hidden, inner, layers, heads, kv_heads), **kind, **more}


QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 128}
QWEN2_MOE = {
    "architectures": ["Qwen2MoeForCausalLM"],
    "model_type": "qwen2_moe",
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "norm_topk_prob": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": qwen2(896, 4864, 24, 14, 2, tie_word_embeddings=True),
    "qwen3-0.6b": qwen2(1024, 3072, 28, 16, 8, tie_word_embeddings=True, **QWEN3),
    "llama-3.2-1b": llama(2048, 8192, 16, 32, 8, tie_word_embeddings=True, head_dim=64),
    "llama-3.1-8b": llama(4096, 14336, 32, 32, 8, tie_word_embeddings=False),
    "qwen1.5-moe-a2.7b": qwen2(2048, 5632, 24, 16, 16, tie_word_embeddings=False, **QWEN2_MOE),
}
SMALL = {"vocab_size": 512, "max_position_embeddings": 512, "torch_dtype": "float32"}
# for a rehearsal without a GPU: the same families, small enough for a CPU
REHEARSAL: dict[str, dict[str, Any]] = {
    name: {
        **shape,
        **SMALL,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        **({"head_dim": 16} if "head_dim" in shape else {}),
        **(
            {"num_experts": 6, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48}
            if "moe" in name
            else {}
        ),
    }
    for name, shape in SHAPES.items()
}


@dataclass(frozen=True, slots=True)
class Limits:
    """What the device can do at best, as measured in the same run."""

    bytes_per_s: float
    flops_per_s: float


@dataclass(frozen=True, slots=True)
class Cost:
    """The bytes and operations of a model's steps."""

    config: dict[str, Any]

    @property
    def head_dim(self) -> int:
        return int(self.config.get("head_dim") or self.config["hidden_size"] // self.config["num_attention_heads"])

    @property
    def kv_bytes(self) -> int:
        """Of one token in all layers."""
        c = self.config
        return int(2 * c["num_hidden_layers"] * c["num_key_value_heads"] * self.head_dim * DTYPE_BYTES)

    def parameters(self, rows: float) -> float:
        """Parameters that a step of so many rows reads: of the experts, those that are expected to be chosen."""
        c = self.config
        hidden = c["hidden_size"]
        attention = hidden * self.head_dim * 2 * (c["num_attention_heads"] + c["num_key_value_heads"])
        mlp = 3 * hidden * c["intermediate_size"]
        if experts := c.get("num_experts"):
            share = 1 - (1 - c["num_experts_per_tok"] / experts) ** rows
            mlp = 3 * hidden * (experts * share * c["moe_intermediate_size"] + c["shared_expert_intermediate_size"])
            mlp += hidden * experts
        return float(c["num_hidden_layers"] * (attention + mlp) + hidden * c["vocab_size"])

    def flops(self, tokens: int, context: float) -> float:
        """Of a step over `tokens` tokens that see `context` keys each; the head counts for decode steps only."""
        c = self.config
        attention = 4 * c["num_hidden_layers"] * c["num_attention_heads"] * self.head_dim * context
        return tokens * (2 * self.parameters(1) + attention)

    def decode_s(self, rows: int, context: float, limits: Limits) -> float:
        """The least time of a decode step."""
        moved = self.parameters(rows) * DTYPE_BYTES + rows * context * self.kv_bytes
        return max(moved / limits.bytes_per_s, self.flops(rows, context) / limits.flops_per_s)

    def prefill_s(self, tokens: int, limits: Limits) -> float:
        """The least time of a prompt."""
        head = 2 * self.config["hidden_size"] * self.config["vocab_size"]
        flops = self.flops(tokens, tokens / 2) - (tokens - 1) * head
        return max(flops / limits.flops_per_s, self.parameters(tokens) * DTYPE_BYTES / limits.bytes_per_s)
