"""Writes GGUF files for tests: any header, sound or not, and whole models made of a Hugging Face directory."""

import json
import math
import struct
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

ALIGNMENT = 32
F32, F16, Q4_0, Q8_0, Q4_K, Q6_K, BF16 = 0, 1, 2, 8, 12, 14, 30
K_BLOCKS: dict[int, tuple[int, dict[int, float]]] = {  # bytes, and the scales of 16 bits by their place
    Q4_K: (144, {0: 3e-4, 2: 2.2e-3}),
    Q6_K: (210, {208: 6e-5}),
}
UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64 = 4, 5, 6, 7, 8, 9, 10
CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


class Value(NamedTuple):
    """A value of the metadata whose type is chosen."""

    type: int
    value: Any


class Stored(NamedTuple):
    """A tensor as it is written; `offset`: another than the one that it has."""

    type: int
    shape: tuple[int, ...]  # in the order of torch
    data: bytes
    offset: int | None = None


def text(value: str | bytes) -> bytes:
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


def typed(value: Any) -> Value:
    match value:
        case Value():
            return value
        case bool():
            return Value(BOOL, value)
        case int():
            return Value(UINT32, value)
        case float():
            return Value(FLOAT32, value)
        case list():
            return Value(ARRAY, value)
        case _:
            return Value(STRING, value)


def payload(type: int, value: Any) -> bytes:
    if type == STRING:
        return text(value)
    if type != ARRAY:
        return struct.pack("<" + CODES[type], value)
    kinds = {typed(entry).type for entry in value} or {UINT32}
    kind = INT32 if kinds == {UINT32} else kinds.pop()
    return struct.pack("<IQ", kind, len(value)) + b"".join(payload(kind, typed(entry).value) for entry in value)


def header(
    metadata: list[tuple[str, Any]], tensors: list[tuple[str, Stored]], version: int = 3, **counts: int
) -> bytes:
    """Everything before the data. `counts`: `tensors` and `keys` to claim."""
    parts = [b"GGUF", struct.pack("<I", version)]
    parts.append(struct.pack("<QQ", counts.get("tensors", len(tensors)), counts.get("keys", len(metadata))))
    for key, value in metadata:
        kind, content = typed(value)
        parts += [text(key), struct.pack("<I", kind), payload(kind, content)]
    position = 0
    for name, tensor in tensors:
        offset = position if tensor.offset is None else tensor.offset
        dimensions = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *reversed(tensor.shape))
        parts += [text(name), dimensions, struct.pack("<IQ", tensor.type, offset)]
        position += padded(len(tensor.data))
    found = b"".join(parts)
    return found + bytes(padded(len(found)) - len(found))


def padded(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT


def write(file: Path, metadata: dict[str, Any], tensors: dict[str, Stored]) -> Path:
    data = b"".join(tensor.data + bytes(padded(len(tensor.data)) - len(tensor.data)) for tensor in tensors.values())
    file.write_bytes(header(list(metadata.items()), list(tensors.items())) + data)
    return file


def stored(values: torch.Tensor, type: int = F32) -> Stored:
    """A tensor in one of the plain formats, or in Q8_0; in formats with blocks of 256 random values of its shape."""
    if type in K_BLOCKS and values.dim() > 1 and values.shape[-1] % 256 == 0:
        return Stored(type, tuple(values.shape), random_blocks(type, values.numel() // 256))
    if type == Q8_0 and values.dim() > 1 and values.shape[-1] % 32 == 0:
        return Stored(Q8_0, tuple(values.shape), q8_0(values))
    dtype = {F16: torch.float16, BF16: torch.bfloat16}.get(type if values.dim() > 1 else F32, torch.float32)
    data = values.to(dtype).contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return Stored({torch.float16: F16, torch.bfloat16: BF16}.get(dtype, F32), tuple(values.shape), data)


def random_blocks(type: int, count: int) -> bytes:
    """Blocks of small numbers with a mean near zero."""
    size, scales = K_BLOCKS[type]
    blocks = torch.randint(0, 256, (count, size), dtype=torch.uint8)
    for place, scale in scales.items():
        blocks[:, place : place + 2] = torch.tensor([scale]).half().view(torch.uint8)
    return blocks.numpy().tobytes()


def q8_0(values: torch.Tensor) -> bytes:
    blocks = values.float().reshape(-1, 32)
    scale = (blocks.abs().amax(1, keepdim=True) / 127).half()
    numbers = (blocks / scale.float().clamp(min=1e-8)).round().clamp(-127, 127).to(torch.int8)
    return torch.cat((scale.view(torch.uint8), numbers.view(torch.uint8)), 1).numpy().tobytes()


def rounded_q8_0(values: torch.Tensor) -> torch.Tensor:
    """What is read of such blocks."""
    blocks = values.float().reshape(-1, 32)
    scale = (blocks.abs().amax(1, keepdim=True) / 127).half().float()
    return ((blocks / scale.clamp(min=1e-8)).round().clamp(-127, 127) * scale).view(values.shape)


# models: what llama.cpp's converter makes of a directory of transformers

ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "gemma3n_text": "gemma3n",
    "gemma4_text": "gemma4",
    "phi3": "phi3",
}
KEYS = {
    "num_hidden_layers": "block_count",
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "head_dim": "attention.key_length",
    "num_experts": "expert_count",
    "num_local_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "num_kv_shared_layers": "attention.shared_kv_layers",
    "hidden_size_per_layer_input": "embedding_length_per_layer_input",
    "altup_num_inputs": "altup.num_inputs",
    "altup_active_idx": "altup.active_idx",
    "top_k_experts": "expert_used_count",
}
PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "block_sparse_moe.gate": "ffn_gate_inp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
}
GEMMA_PARTS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "pre_feedforward_layernorm_2": "pre_ffw_norm_2",
    "post_feedforward_layernorm_1": "post_ffw_norm_1",
    "post_feedforward_layernorm_2": "post_ffw_norm_2",
    "per_layer_input_gate": "inp_gate",
    "per_layer_projection": "proj",
    "post_per_layer_input_norm": "post_norm",
    "altup.correction_coefs": "altup_correct_coef",
    "altup.prediction_coefs": "altup_predict_coef",
    "altup.modality_router": "altup_router",
    "altup.router_norm": "altup_router_norm",
    "laurel.linear_left": "laurel_l",
    "laurel.linear_right": "laurel_r",
    "laurel.post_laurel_norm": "laurel_post_norm",
    "router.proj": "ffn_gate_inp",
}
WHOLE_PARTS = {  # tensors whose names end otherwise
    "altup.correct_output_scale": "altup_correct_scale.weight",
    "layer_scalar": "layer_output_scale.weight",
    "router.scale": "ffn_gate_inp.scale",
    "router.per_expert_scale": "ffn_down_exps.scale",
    "experts.gate_up_proj": "ffn_gate_up_exps.weight",
    "experts.down_proj": "ffn_down_exps.weight",
}
TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "model.embed_tokens_per_layer.weight": "per_layer_token_embd.weight",
    "model.per_layer_model_projection.weight": "per_layer_model_proj.weight",
    "model.per_layer_projection_norm.weight": "per_layer_proj_norm.weight",
}
STACKED = {
    "model.altup_projections": "altup_proj.weight",
    "model.altup_unembed_projections": "altup_unembd_proj.weight",
}
NORMS_PLUS_ONE = ("gemma2", "gemma3_text")
SLIDING = "sliding_attention"
UNTURNED = 1e30  # the divisor of a frequency that is none
EXPERTS = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w3": "up", "w2": "down"}


def convert(
    directory: Path, file: Path, type: int = F32, vectors: dict[str, torch.Tensor] | None = None, **more: Any
) -> Path:
    """Write the model of a directory as a GGUF file, with more tensors and keys of the metadata, with `__` for dots."""
    config = json.loads((directory / "config.json").read_text())
    metadata = {**metadata_of(config), **vocabulary(directory)}
    metadata |= {key.replace("__", "."): value for key, value in more.items()}
    state = {
        name: tensor for part in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(part).items()
    }
    tensors = {name: stored(values, type) for name, values in tensors_of(config, state).items()}
    tensors |= {name: stored(values) for name, values in (vectors or {}).items()}
    return write(file, metadata, tensors)


def metadata_of(config: dict[str, Any]) -> dict[str, Any]:
    architecture = ARCHITECTURES[config["model_type"]]
    found: dict[str, Any] = {"general.architecture": architecture}
    for field, key in KEYS.items():
        if config.get(field) is not None:
            found[f"{architecture}.{key}"] = config[field]
    rope = config.get("rope_parameters") or {}
    theta = rope.get("full_attention", rope).get("rope_theta", config.get("rope_theta"))
    found[f"{architecture}.rope.freq_base"] = float(theta)
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    found[f"{architecture}.rope.dimension_count"] = int(head_dim * rope.get("partial_rotary_factor", 1.0))
    if config.get("sliding_window") and config["model_type"] in ("gemma2", "gemma3_text", "phi3"):
        found[f"{architecture}.attention.sliding_window"] = config["sliding_window"]
    if architecture in ("gemma3n", "gemma4"):
        found[f"{architecture}.attention.sliding_window"] = config["sliding_window"]
        found[f"{architecture}.attention.sliding_window_pattern"] = [kind == SLIDING for kind in config["layer_types"]]
        found[f"{architecture}.rope.freq_base_swa"] = float(rope[SLIDING]["rope_theta"])
    if architecture == "gemma3n":
        deviations = [
            NormalDist().inv_cdf(share) if share else -math.inf for share in config["activation_sparsity_pattern"]
        ]
        found["gemma3n.activation_sparsity_scale"] = deviations
    return found | (gemma4_metadata(config) if architecture == "gemma4" else {})


def gemma4_metadata(config: dict[str, Any]) -> dict[str, Any]:
    """What Gemma 4 has by layer, or for both types of layers."""
    count, shared = config["num_hidden_layers"], config["num_kv_shared_layers"]
    own = config["per_layer_config"]
    full = next(iter(own.values()))["head_dim"]
    heads = [
        own.get(str(layer), {}).get("num_key_value_heads", config["num_key_value_heads"]) for layer in range(count)
    ]
    found: dict[str, Any] = {
        "attention.key_length": full,
        "attention.value_length": full,
        "attention.key_length_swa": config["head_dim"],
        "attention.value_length_swa": config["head_dim"],
        "attention.head_count_kv": heads,
        "rope.dimension_count": full,
        "rope.dimension_count_swa": config["head_dim"],
    }
    if config["use_double_wide_mlp"]:
        size = config["intermediate_size"]
        found["feed_forward_length"] = [size if layer < count - shared else 2 * size for layer in range(count)]
    return {f"gemma4.{key}": value for key, value in found.items()}


def gemma4_divisors(config: dict[str, Any]) -> torch.Tensor:
    """What the converter writes for pairs of a whole layer's head that are not turned."""
    pairs = next(iter(config["per_layer_config"].values()))["head_dim"] // 2
    turned = int(pairs * config["rope_parameters"]["full_attention"]["partial_rotary_factor"])
    return torch.tensor([1.0] * turned + [UNTURNED] * (pairs - turned))


def vocabulary(directory: Path) -> dict[str, Any]:
    """The metadata of a tokenizer.json of byte-level BPE; none where there is no such file."""
    file = directory / "tokenizer.json"
    if not file.exists():
        return {}
    content = json.loads(file.read_text())
    added = {token["content"]: token for token in content["added_tokens"]}
    tokens = sorted(
        {**content["model"]["vocab"], **{name: t["id"] for name, t in added.items()}}.items(), key=lambda t: t[1]
    )
    kinds = [1 if name not in added else 3 if added[name]["special"] else 4 for name, _ in tokens]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [name for name, _ in tokens],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }


def tensors_of(config: dict[str, Any], state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    experts: dict[str, dict[int, torch.Tensor]] = {}
    gemma = config["model_type"].startswith("gemma")
    for name, values in state.items():
        if config["model_type"] in NORMS_PLUS_ONE and name.endswith("norm.weight"):
            values = values + 1
        if "layers." not in name:
            stem, _, number = name.removesuffix(".weight").rpartition(".")
            if stem in STACKED:
                experts.setdefault(STACKED[stem], {})[int(number)] = values
            else:
                found[TOP[name]] = values
            continue
        _, _, layer, rest = name.split(".", 3)
        if rest in WHOLE_PARTS:
            found[f"blk.{layer}.{WHOLE_PARTS[rest]}"] = values
            continue
        part, kind = rest.rsplit(".", 1)
        if ".experts." in part:
            number, projection = part.split(".experts.")[1].split(".")
            stacked = f"blk.{layer}.ffn_{EXPERTS[projection]}_exps.{kind}"
            experts.setdefault(stacked, {})[int(number)] = values
            continue
        own = {**PARTS, **(GEMMA_PARTS if gemma else {})}[part]
        if ARCHITECTURES[config["model_type"]] == "llama" and own in ("attn_q", "attn_k"):
            values = permuted(values, config["num_attention_heads" if own == "attn_q" else "num_key_value_heads"])
        found[f"blk.{layer}.{own}.{kind}"] = values.squeeze(0) if own == "ffn_gate_inp_shexp" else values
    if config["model_type"] == "gemma4_text":
        found["rope_freqs.weight"] = gemma4_divisors(config)
    stacks = {name: torch.stack([parts[number] for number in sorted(parts)]) for name, parts in experts.items()}
    return found | stacks


def permuted(values: torch.Tensor, heads: int) -> torch.Tensor:
    """The rows of each head with the second half between the first: 0, n/2, 1, n/2 + 1 …"""
    rows = values.shape[0] // heads
    order = [half * rows // 2 + row for row in range(rows // 2) for half in (0, 1)]
    assert math.prod(values.shape) and rows % 2 == 0
    return values.view(heads, rows, *values.shape[1:])[:, order].reshape(values.shape).contiguous()
