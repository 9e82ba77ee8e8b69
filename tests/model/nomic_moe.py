"""A small random model in the layout of nomic-embed-text-v2-moe, and its forward pass in plain torch.

The pass follows the model's published code: post-norm blocks with biases, exact GELU, halves of each head rotated, and
in every second layer experts, of which the best count by their share of a softmax over all, with one bias behind.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from tests.model import embedders, tiny

HIDDEN, HEADS, INNER, LAYERS, EXPERTS, TOP_K = 64, 4, 96, 4, 8, 2
EPSILON, THETA = 1e-5, 10_000.0
CONFIG: dict[str, Any] = {  # the fields of the published config.json that describe the model
    "architectures": ["NomicBertModel"],
    "model_type": "nomic_bert",
    "activation_function": "gelu",
    "n_embd": HIDDEN,
    "n_head": HEADS,
    "n_inner": INNER,
    "n_layer": LAYERS,
    "n_positions": 200,
    "vocab_size": embedders.VOCAB_SIZE,
    "type_vocab_size": 1,
    "layer_norm_epsilon": EPSILON,
    "rotary_emb_base": THETA,
    "rotary_emb_fraction": 1.0,
    "rotary_emb_interleaved": False,
    "qkv_proj_bias": True,
    "mlp_fc1_bias": True,
    "mlp_fc2_bias": True,
    "prenorm": False,
    "parallel_block": False,
    "causal": False,
    "pad_token_id": 1,
    "num_experts": EXPERTS,
    "moe_top_k": TOP_K,
    "moe_every_n_layers": 2,
    "moe_impl": "megablocks",
    "moe_normalize_expert_weights": False,
    "num_shared_experts": 0,
    "expert_choice_router": False,
}
Weights = dict[str, torch.Tensor]


def build(directory: Path, **changes: Any) -> Weights:
    """Write a model of these settings; returns its weights."""
    generator = torch.Generator().manual_seed(9)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.1

    weights = {
        "embeddings.word_embeddings.weight": random(embedders.VOCAB_SIZE, HIDDEN),
        "embeddings.token_type_embeddings.weight": random(1, HIDDEN),
        "emb_ln.weight": 1 + random(HIDDEN),
        "emb_ln.bias": random(HIDDEN),
    }
    for layer in range(LAYERS):
        at = f"encoder.layers.{layer}."
        for norm in ("norm1", "norm2"):
            weights |= {f"{at}{norm}.weight": 1 + random(HIDDEN), f"{at}{norm}.bias": random(HIDDEN) * 0.1}
        linears = {"attn.Wqkv": (3 * HIDDEN, HIDDEN), "attn.out_proj": (HIDDEN, HIDDEN)}
        if layer % 2 == 0:
            linears |= {"mlp.fc1": (INNER, HIDDEN), "mlp.fc2": (HIDDEN, INNER)}
        else:
            weights |= {f"{at}mlp.router.layer.weight": 3 * random(EXPERTS, HIDDEN)}
            weights |= {f"{at}mlp.experts.mlp.w{n}": random(EXPERTS * INNER, HIDDEN) for n in (1, 2)}
            weights |= {f"{at}mlp.experts.bias": random(HIDDEN)}
        for name, shape in linears.items():
            weights |= {f"{at}{name}.weight": random(*shape), f"{at}{name}.bias": random(shape[0])}
    directory.mkdir(exist_ok=True)
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    tiny.save_tokenizer(directory, embedders.VOCAB_SIZE)
    return weights


@torch.inference_mode()
def hidden_states(weights: Weights, ids: Sequence[int]) -> torch.Tensor:
    """The last hidden states of one text, (tokens, hidden)."""
    x = weights["embeddings.word_embeddings.weight"][list(ids)] + weights["embeddings.token_type_embeddings.weight"][0]
    x = norm(weights, "emb_ln", x)
    for layer in range(LAYERS):
        own = {
            name.removeprefix(at): w for name, w in weights.items() if name.startswith(at := f"encoder.layers.{layer}.")
        }
        x = norm(own, "norm1", x + attention(own, x))
        x = norm(own, "norm2", x + (experts(own, x) if layer % 2 else plain(own, x)))
    return x


def norm(weights: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, (HIDDEN,), weights[f"{name}.weight"], weights[f"{name}.bias"], EPSILON)


def linear(weights: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def attention(weights: Weights, x: torch.Tensor) -> torch.Tensor:
    size = HIDDEN // HEADS
    queries, keys, values = linear(weights, "attn.Wqkv", x).view(len(x), 3, HEADS, size).permute(1, 2, 0, 3)
    scores = rotated(queries) @ rotated(keys).transpose(1, 2) / size**0.5  # (heads, tokens, tokens)
    return linear(weights, "attn.out_proj", (scores.softmax(-1) @ values).transpose(0, 1).reshape(len(x), HIDDEN))


def rotated(x: torch.Tensor) -> torch.Tensor:
    """Heads (heads, tokens, dim), turned by their positions."""
    tokens, size = x.shape[1:]
    angles = torch.outer(torch.arange(tokens).float(), 1.0 / THETA ** (torch.arange(0, size, 2).float() / size))
    cos, sin = (torch.cat((part, part), 1) for part in (angles.cos(), angles.sin()))
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), -1) * sin


def plain(weights: Weights, x: torch.Tensor) -> torch.Tensor:
    return linear(weights, "mlp.fc2", F.gelu(linear(weights, "mlp.fc1", x)))


def experts(weights: Weights, x: torch.Tensor) -> torch.Tensor:
    """Every token through every expert, those that were not chosen with a weight of zero."""
    shares = (x @ weights["mlp.router.layer.weight"].T).softmax(-1)
    best = shares.topk(TOP_K, dim=-1)
    kept = torch.zeros_like(shares).scatter(1, best.indices, best.values)
    up, down = (weights[f"mlp.experts.mlp.w{n}"].view(EXPERTS, INNER, HIDDEN) for n in (1, 2))
    found = [F.gelu(x @ up[expert].T) @ down[expert] * kept[:, expert, None] for expert in range(EXPERTS)]
    return torch.stack(found).sum(0) + weights["mlp.experts.bias"]
