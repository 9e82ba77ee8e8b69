"""Small random jina-embeddings-v3 in both of its layouts, and what its tasks give by transformers and peft."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file

from tests.model import embedders

TASKS = ("retrieval.query", "retrieval.passage", "separation", "classification", "text-matching")
INSTRUCTIONS = dict.fromkeys(TASKS, "")
INSTRUCTIONS |= {"retrieval.query": "Represent the query: ", "retrieval.passage": "Represent the document: "}
RANK, ALPHA = 4, 2
SETTINGS = {"lora_adaptations": TASKS, "task_instructions": INSTRUCTIONS, "lora_rank": RANK, "lora_alpha": ALPHA}
MAKERS = {  # of config.json, as published
    "architectures": ["XLMRobertaModel"],
    "model_type": "xlm-roberta",
    "position_embedding_type": "rotary",
    "rotary_emb_base": 20000.0,
    "load_trained_adapters": True,
}
LINEAR = ("mixer.Wqkv", "mixer.out_proj", "mlp.fc1", "mlp.fc2", "pooler.dense")
TABLES = ("word_embeddings", "token_type_embeddings")
TARGETS = ("word_embeddings", "token_type_embeddings", "q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2", "dense")
FAMILY = "JinaEmbeddingsV3"

Tensors = dict[str, torch.Tensor]
Models = dict[str, transformers.PreTrainedModel]  # by task; "": the base


def makers(directory: Path) -> Models:
    """A checkpoint in its makers' layout; transformers' models of its weights, each task's adapter merged."""
    embedders.build(f"{FAMILY}Model", directory)
    file = directory / "model.safetensors"
    base = load_file(file)
    generator = torch.Generator().manual_seed(5)
    found: Tensors = {}
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name, weight in base.items():
        module = name.removesuffix(".weight")
        if not name.endswith(".weight") or not module.endswith((*LINEAR, *TABLES)):
            found[f"roberta.{name}"] = weight
            continue
        (rows, columns), table = weight.shape, module.endswith(TABLES)
        shapes = ((rows, RANK), (RANK, columns)) if table else ((RANK, columns), (rows, RANK))
        a, b = (torch.randn(len(TASKS), *shape, generator=generator) * 0.3 for shape in shapes)
        factors[name] = a, b
        inside = f"roberta.{module}.parametrizations.weight"
        found |= {f"{inside}.original": weight, f"{inside}.0.lora_A": a, f"{inside}.0.lora_B": b}
    models = {"": merged(base, {}, directory)}
    for number, task in enumerate(TASKS):
        ofs = {name: (a @ b if name.endswith(tables()) else b @ a)[number] for name, (a, b) in factors.items()}
        models[task] = merged(base, ofs, directory)
    save_file(found, file, {"format": "pt"})
    embedders.change_config(directory, **MAKERS, **SETTINGS)
    return models


def tables() -> tuple[str, ...]:
    return tuple(f"{table}.weight" for table in TABLES)


def merged(base: Tensors, added: Tensors, directory: Path) -> transformers.PreTrainedModel:
    """transformers' model of weights to which the products of factors were added."""
    whole = {name: weight + added[name] * (ALPHA / RANK) if name in added else weight for name, weight in base.items()}
    save_file(whole, directory / "model.safetensors", {"format": "pt"})
    model = getattr(transformers, f"{FAMILY}Model").from_pretrained(directory, attn_implementation="eager")
    return model.float().eval()


class Folders:
    """The layout of transformers: a folder for each task, which peft has written."""

    def __init__(self, directory: Path, tasks: Sequence[str] = TASKS, **settings: Any) -> None:
        """`settings` of peft's LoraConfig."""
        base = embedders.build(f"{FAMILY}Model", directory)
        given = {"r": RANK, "lora_alpha": ALPHA, "target_modules": list(TARGETS), "init_lora_weights": False}
        config = peft.LoraConfig(**{**given, **settings})
        self.model: Any = None
        torch.manual_seed(3)
        for task in tasks:
            if self.model is None:
                self.model = peft.get_peft_model(base, config, adapter_name=folder(task)).eval()
            else:
                self.model.add_adapter(folder(task), config)
        self.model.save_pretrained(str(directory))
        embedders.change_config(directory, **SETTINGS)

    def hidden_states(self, task: str, ids: Sequence[int]) -> torch.Tensor:
        """The last ones of a text, (tokens, hidden)."""
        if task:
            self.model.set_adapter(folder(task))
            return embedders.hidden_states(self.model, ids)
        with self.model.disable_adapter():
            return embedders.hidden_states(self.model, ids)


def folder(task: str) -> str:
    return task.replace(".", "_").replace("-", "_")


def vector(states: torch.Tensor) -> torch.Tensor:
    """The mean of states (tokens, hidden), of length 1."""
    return F.normalize(states.mean(0), dim=0)


def settings(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return found
