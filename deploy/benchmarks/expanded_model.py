"""A model in bfloat16 whose weights are those of a GGUF file, to quantize again.

    python -m deploy.benchmarks.expanded_model FILE.gguf OUT [--reorder]

Where only a quantized file of a real model is at hand, its own blocks hold its weights exactly: a comparison of ways to
quantize favours the one that the file has. With --reorder, OUT computes the same function with other weights. The
channels of the residual stream and of each feed-forward block stand in another, random order, and values are rotated,
which the weight of attention's output undoes. Then nearly no group of 32 neighbours comes from one block. Models in the
manner of Llama and Qwen2 only: root-mean-square norms before each part, gated feed-forward blocks.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from deploy.benchmarks import fidelity

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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--reorder", action="store_true")
    given = parser.parse_args()
    model = fidelity.expanded(given.file)
    tokenizer = AutoTokenizer.from_pretrained(given.file.parent, gguf_file=given.file.name)
    if given.reorder:
        ids = tokenizer(TEXT, return_tensors="pt").input_ids
        with torch.inference_mode():
            before = model(ids).logits
            reorder(model)
            difference = (model(ids).logits - before).abs().max().item()
        print(f"largest difference of logits in float32: {difference:.1e}")
        if difference > MOST_DIFFERENCE:
            raise SystemExit("the reordered model computes something else: its layers are not of the known kind")
    model.config.__dict__.pop("quantization_config", None)
    model.hf_quantizer, model.is_quantized = None, False
    model.bfloat16().save_pretrained(given.out)
    tokenizer.save_pretrained(given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
