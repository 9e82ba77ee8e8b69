"""Tiny checkpoints without transformers: random ones, and "version models", whose every token says which weights ran.

A version model answers any prompt with one token only: attention and MLP give nothing, the embeddings are all ones,
and one row of the head is larger than the others. Keys and values of other weights cannot change that.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from quartet.runtime.config import ServerConfig
from quartet.runtime.model_files import model_info
from quartet.scheduler_service.model.layout import decoder_layout
from quartet.scheduler_service.model.registry import decoder_spec
from quartet.scheduler_service.weights import load
from quartet.scheduler_service.weights.checkpoint import INDEX_NAME
from quartet.scheduler_service.weights.formats import checkpoint_of
from quartet.scheduler_service.weights.parameters import Layout, Weights

VOCAB_SIZE = 320
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "eos_token_id": 1,
}

Tensors = dict[str, torch.Tensor]


def write_config(directory: Path, **changes: Any) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(CONFIG | changes))
    return directory


def layout_of(directory: Path) -> Layout:
    return decoder_layout(decoder_spec(model_info.load(ServerConfig(model_path=str(directory)))))


def shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Tensor → shape, of the model that the directory's config describes."""
    return {name: place.shape for name, place in layout_of(directory).places.items()}


def random_tensors(directory: Path, seed: int) -> Tensors:
    """Weights whose logits differ by whole units, so that greedy tokens do not hang on rounding."""
    generator = torch.Generator().manual_seed(seed)
    return {name: random_tensor(shape, generator) for name, shape in shapes(directory).items()}


def random_tensor(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    values = torch.randn(shape, generator=generator)
    return 1 + 0.2 * values if len(shape) == 1 else values * shape[-1] ** -0.5


def version_tensors(directory: Path, token: int) -> Tensors:
    """Weights that answer `token`, always."""
    tensors = {name: torch.zeros(shape) for name, shape in shapes(directory).items()}
    for name, values in tensors.items():
        if values.dim() == 1 or "embed" in name:
            values.fill_(1.0)
    tensors["lm_head.weight"][token] = 1.0
    return tensors


def save(directory: Path, tensors: Tensors, shards: int = 1) -> Path:
    """Write tensors as safetensors; over several shards with an index."""
    directory.mkdir(parents=True, exist_ok=True)
    if shards == 1:
        save_file(tensors, directory / "model.safetensors")
        return directory
    names = sorted(tensors)
    weight_map = {
        name: f"model-{i * shards // len(names) + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(names)
    }
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == file}, directory / file)
    (directory / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def random_model(directory: Path, seed: int, shards: int = 1, **changes: Any) -> Path:
    write_config(directory, **changes)
    return save(directory, random_tensors(directory, seed), shards)


def version_model(directory: Path, token: int, **changes: Any) -> Path:
    write_config(directory, **changes)
    return save(directory, version_tensors(directory, token))


def loaded(directory: Path) -> Weights:
    """The weights of a checkpoint in float32, on the CPU. Raises CheckpointError."""
    weights = Weights(layout_of(directory), torch.float32, torch.device("cpu"))
    checkpoint = checkpoint_of(directory)
    load.check_tensors(checkpoint, weights)
    load.read_weights(checkpoint, weights, checkpoint.files)
    return weights
