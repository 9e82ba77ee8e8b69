"""A model in bfloat16 whose weights are those of a GGUF file, to quantize again.

    python -m deploy.benchmarks.expanded_model FILE.gguf OUT [--reorder] [--width 1024]

Where only a quantized file of a real model is at hand, its own blocks hold its weights exactly: a comparison of ways to
quantize favours the one that the file has. With --reorder, OUT computes the same function with other weights. The
channels of the residual stream and of each feed-forward block stand in another, random order, and values are rotated,
which the weight of attention's output undoes. Then nearly no group of 32 neighbours comes from one block.

With --width, channels of zeros behind the model's own make it wider, and heads of zeros as many as that takes. The
function stays the same. K-quants have blocks of 256 numbers: llama.cpp stores rows of another length in more bits.

Models in the manner of Llama and Qwen2 only: root-mean-square norms before each part, gated feed-forward blocks.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoTokenizer

from deploy.benchmarks import fidelity

KNOWN = ("llama", "mistral", "qwen2")  # model types
MAGIC = b"GGUF"
SEED = 7
MOST_DIFFERENCE = 1e-3  # of logits in float32
TEXT = "def fibonacci(n):\n    if n < 2:\n        return n\n"


def reorder(model: Any) -> None:
    """Other weights for the same function, in place."""
    config, random = model.config, torch.Generator().manual_seed(SEED)
    hidden = torch.randperm(config.hidden_size, generator=random)
    inner, embedding = model.model, model.get_input_embeddings().weight
    embedding.data = embedding.data[:, hidden].clone()
    if model.lm_head.weight is not embedding:
        take_columns(model.lm_head, hidden)
    inner.norm.weight.data = inner.norm.weight.data[hidden]
    for layer in inner.layers:
        attention, block = layer.self_attn, layer.mlp
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.data = norm.weight.data[hidden]
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj, block.gate_proj, block.up_proj):
            take_columns(linear, hidden)
        for linear in (attention.o_proj, block.down_proj):
            take_rows(linear, hidden)
        channels = torch.randperm(config.intermediate_size, generator=random)
        take_rows(block.gate_proj, channels)
        take_rows(block.up_proj, channels)
        take_columns(block.down_proj, channels)
        rotate_values(attention, config, random)


def take_rows(linear: torch.nn.Linear, order: torch.Tensor) -> None:
    linear.weight.data = linear.weight.data[order].clone()
    if linear.bias is not None:
        linear.bias.data = linear.bias.data[order].clone()


def take_columns(linear: torch.nn.Linear, order: torch.Tensor) -> None:
    linear.weight.data = linear.weight.data[:, order].clone()


def rotate_values(attention: Any, config: Any, random: torch.Generator) -> None:
    """Values of each head times a random orthonormal matrix, and the output's weight times its inverse."""
    size, kv_heads = attention.head_dim, config.num_key_value_heads
    sharing = config.num_attention_heads // kv_heads
    values, output = attention.v_proj, attention.o_proj
    for head in range(kv_heads):
        rotation = torch.linalg.qr(torch.randn(size, size, generator=random, dtype=torch.float64))[0].float()
        own = slice(head * size, (head + 1) * size)
        values.weight.data[own] = rotation @ values.weight.data[own]
        if values.bias is not None:
            values.bias.data[own] = rotation @ values.bias.data[own]
        for query_head in range(head * sharing, (head + 1) * sharing):
            read = slice(query_head * size, (query_head + 1) * size)
            output.weight.data[:, read] = output.weight.data[:, read] @ rotation.T


def widen(model: Any, width: int) -> None:
    """Channels of zeros up to `width`, and heads of zeros behind those of each key and value head, in place."""
    config = model.config
    had, size = config.hidden_size, model.model.layers[0].self_attn.head_dim
    groups = config.num_key_value_heads
    if config.num_attention_heads * size != had:
        raise SystemExit(f"--width wants heads that are together as wide as the model, {had}")
    if width < had or width % (size * groups):
        raise SystemExit(f"--width {width} is not a multiple of {size * groups} from {had} on")
    more = (width - had) // groups  # rows of queries behind each key and value head's
    embedding, head = model.get_input_embeddings(), model.lm_head
    for matrix in (embedding,) if head.weight is embedding.weight else (embedding, head):
        add_columns(matrix, width - had)
    norms = [model.model.norm]
    for layer in model.model.layers:
        attention, block = layer.self_attn, layer.mlp
        norms += [layer.input_layernorm, layer.post_attention_layernorm]
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj, block.gate_proj, block.up_proj):
            add_columns(linear, width - had)
        for linear in (attention.o_proj, block.down_proj):
            add_rows(linear, width - had)
        add_rows(attention.q_proj, more, groups)
        add_columns(attention.o_proj, more, groups)
        attention.num_key_value_groups = width // size // groups
    for norm in norms:  # the mean of squares is over `width` now
        norm.weight.data = F.pad(norm.weight.data * (had / width) ** 0.5, (0, width - had))
        norm.variance_epsilon *= had / width
    config.rms_norm_eps *= had / width
    config.head_dim, config.hidden_size, config.num_attention_heads = size, width, width // size


def add_columns(linear: Any, count: int, groups: int = 1) -> None:
    """Columns of zeros behind each of `groups` parts."""
    linear.weight.data = F.pad(linear.weight.data.unflatten(1, (groups, -1)), (0, count)).flatten(1)


def add_rows(linear: torch.nn.Linear, count: int, groups: int = 1) -> None:
    """Rows of zeros behind each of `groups` parts."""
    linear.weight.data = F.pad(linear.weight.data.unflatten(0, (groups, -1)), (0, 0, 0, count)).flatten(0, 1)
    if linear.bias is not None:
        linear.bias.data = F.pad(linear.bias.data.unflatten(0, (groups, -1)), (0, count)).flatten()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--reorder", action="store_true")
    parser.add_argument("--width", type=int)
    given = parser.parse_args()
    if not given.file.is_file():
        raise SystemExit(f"{given.file} is not a file")
    with given.file.open("rb") as opened:
        if opened.read(len(MAGIC)) != MAGIC:
            raise SystemExit(f"{given.file} is not a GGUF file")
    model = fidelity.expanded(given.file)
    if model.config.model_type not in KNOWN:
        raise SystemExit(f"{given.file} has a model of type {model.config.model_type}, not one of {', '.join(KNOWN)}")
    tokenizer = AutoTokenizer.from_pretrained(given.file.parent, gguf_file=given.file.name)
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    with torch.inference_mode():
        before = model(ids).logits
        if given.reorder:
            reorder(model)
        if given.width is not None:
            widen(model, given.width)
        difference = (model(ids).logits - before).abs().max().item()
    print(f"largest difference of logits in float32: {difference:.1e}")
    if difference > MOST_DIFFERENCE:
        raise SystemExit("the model computes something else: its layers are not of the known kind")
    model.config.__dict__.pop("quantization_config", None)
    model.hf_quantizer, model.is_quantized = None, False
    model.bfloat16().save_pretrained(given.out)
    tokenizer.save_pretrained(given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
