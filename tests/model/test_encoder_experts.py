"""nomic-embed-text-v2-moe: an encoder with experts, compared with its published forward pass in plain torch."""

import random

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from quartet.runtime.errors import StartupError
from quartet.scheduler_service.model.spec import NotNative
from tests.model import nomic_moe
from tests.model.embedders import Embedder, cosine, texts

LEAST_COSINE = 0.99999
LIMITS = {"max_total_tokens": 20000, "max_prefill_tokens": 20000, "chunked_prefill_size": 20000}


def mixed(count: int) -> list[list[int]]:
    chance = random.Random(2)
    return texts(*(chance.randint(1, 60) for _ in range(count)))


def vectors(weights: nomic_moe.Weights, given: list[list[int]]) -> list[torch.Tensor]:
    return [F.normalize(nomic_moe.hidden_states(weights, ids)[0], dim=0) for ids in given]


def test_200_texts_in_one_batch_are_as_the_published_pass_has_them(tmp_path):
    weights, given = nomic_moe.build(tmp_path), mixed(200)
    embedder = Embedder(tmp_path, max_running_requests=256, **LIMITS)
    ours = embedder.embed(given)
    assert len(embedder.steps) == 1
    assert min(map(cosine, ours, vectors(weights, given))) >= LEAST_COSINE
    assert all(torch.allclose(*pair, atol=2e-5) for pair in zip(ours, vectors(weights, given), strict=True))


def test_every_expert_of_that_model_counts(tmp_path):
    weights, given = nomic_moe.build(tmp_path), mixed(60)
    whole = torch.stack(vectors(weights, given))
    for expert in range(nomic_moe.EXPERTS):
        changed = {name: value.clone() for name, value in weights.items()}
        rows = slice(expert * nomic_moe.INNER, (expert + 1) * nomic_moe.INNER)
        changed["encoder.layers.1.mlp.experts.mlp.w2"][rows].zero_()
        difference = (whole - torch.stack(vectors(changed, given))).abs().max()
        assert difference > 1e-3, (expert, difference)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_experts_are_computed_in_other_dtypes_too(dtype, tmp_path):
    weights, given = nomic_moe.build(tmp_path), mixed(8)
    ours = Embedder(tmp_path, dtype=dtype).embed(given)
    assert min(map(cosine, ours, vectors(weights, given))) >= 0.99


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"moe_normalize_expert_weights": True}, "moe_normalize_expert_weights=True"),
        ({"num_shared_experts": 1}, "num_shared_experts=1"),
        ({"expert_choice_router": True}, "expert_choice_router=True"),
        ({"moe_top_k": 9}, "moe_top_k is 9, and there are 8 experts"),
        ({"activation_function": "swiglu"}, "qkv_proj_bias=True"),
        ({"num_experts": 4}, "tensor encoder.layers.1.mlp.router.layer.weight has shape"),
    ],
    ids=str,
)
def test_what_is_not_computed_is_refused_by_name(change, words, tmp_path):
    nomic_moe.build(tmp_path, **change)
    with pytest.raises((StartupError, NotNative), match=words):
        Embedder(tmp_path)


def test_experts_that_do_not_belong_together_are_refused(tmp_path):
    nomic_moe.build(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = "encoder.layers.1.mlp.experts.mlp.w2"
    save_file({**weights, name: weights[name][:-1].clone()}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(StartupError, match="do not belong together"):
        Embedder(tmp_path)
