"""Encoders beside BERT and RoBERTa: layouts of their checkpoints, how they count distances, what is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from quartet.runtime.errors import StartupError
from quartet.scheduler_service.model.spec import NotNative
from tests.model import embedders
from tests.model.embedders import NEWER, Embedder, cosine, hidden_states, scores, texts

LEAST_COSINE = 0.99999
MOST_ERROR = 1e-4  # of a score
LONG = (190, 5, 133, 5, 64)


def assert_agrees(directory: Path, peer: Any, *lengths: int) -> None:
    given = texts(*lengths)
    for ids, ours in zip(given, Embedder(directory).embed(given), strict=True):
        theirs = F.normalize(hidden_states(peer, ids)[0], dim=0)
        assert cosine(ours, theirs) >= LEAST_COSINE and torch.allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize("family", ["Gte", "JinaEmbeddingsV3", "NomicBert"])
def test_checkpoints_are_read_under_either_names(family, tmp_path):
    """save_pretrained writes the makers' names, which the other tests read; these are transformers' own."""
    for place, architecture in (("plain", "Model"), ("scored", "ForSequenceClassification")):
        peer = embedders.build(f"{family}{architecture}", tmp_path / place, num_labels=2)
        theirs = set(load_file(tmp_path / place / "model.safetensors"))
        peer.save_pretrained(tmp_path / place, save_original_format=False)
        assert not set(load_file(tmp_path / place / "model.safetensors")) >= theirs
        if place == "plain":
            assert_agrees(tmp_path / place, peer, 9, 30)
            continue
        given = texts(9, 30)
        for ids, ours in zip(given, Embedder(tmp_path / place).embed(given), strict=True):
            assert (ours - scores(peer, ids)).abs().max() <= MOST_ERROR


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"position_buckets": -1},
        {"pos_att_type": "c2p"},
        {"pos_att_type": ["p2c"], "norm_rel_ebd": "none"},
        {"pos_att_type": None, "position_biased_input": True, "type_vocab_size": 2},
        {"max_relative_positions": 100, "position_buckets": 8},
    ],
    ids=str,
)
def test_deberta_counts_distances_as_its_config_says(settings, tmp_path):
    peer = embedders.build("DebertaV2Model", tmp_path, **settings)
    assert_agrees(tmp_path, peer, *LONG)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_relative_positions": 24},
        {"pos_att_type": "p2c|c2p", "position_biased_input": True, "type_vocab_size": 2},
    ],
    ids=str,
)
def test_the_first_deberta_counts_distances_as_its_config_says(settings, tmp_path):
    peer = embedders.build("DebertaModel", tmp_path, **settings)
    assert_agrees(tmp_path, peer, *LONG)


def test_mpnet_counts_far_distances_by_their_logarithm(tmp_path):
    peer = embedders.build("MPNetModel", tmp_path)
    assert_agrees(tmp_path, peer, *LONG)


def test_many_texts_of_one_length_are_attended_in_parts(tmp_path, monkeypatch):
    """Scores with something added take memory by text: four heads of 20 * 20, of two texts at once."""
    monkeypatch.setattr("quartet.scheduler_service.model.encoder_attention.MOST_SCORES", 4 * 20 * 20 * 2)
    peer = embedders.build("DebertaV2Model", tmp_path)
    assert_agrees(tmp_path, peer, *(20,) * 5, 7, 90)


@pytest.mark.parametrize("pooling", ["bos", "mean", "late"])
def test_a_eurobert_classifier_pools_as_its_config_says(pooling, tmp_path):
    peer = embedders.build("EuroBertForSequenceClassification", tmp_path, num_labels=3, classifier_pooling=pooling)
    given = texts(5, 40, 17)
    for ids, ours in zip(given, Embedder(tmp_path).embed(given), strict=True):
        assert (ours - scores(peer, ids)).abs().max() <= MOST_ERROR


def test_nomics_own_config_is_read(tmp_path):
    peer = embedders.build("NomicBertModel", tmp_path)
    own = {
        "n_embd": 64,
        "n_head": 4,
        "n_inner": 96,
        "n_layer": 3,
        "n_positions": 200,
        "layer_norm_epsilon": 1e-12,
        "activation_function": "swiglu",
        "rotary_emb_base": 1000,
        "rotary_emb_fraction": 1.0,
        "mlp_fc1_bias": False,
        "model_type": "nomic_bert",
        "architectures": ["NomicBertModel"],
        "vocab_size": embedders.VOCAB_SIZE,
        "type_vocab_size": 2,
    }
    (tmp_path / "config.json").write_text(json.dumps(own))
    assert_agrees(tmp_path, peer, 9, 30)


@pytest.mark.parametrize(
    ("family", "change", "words"),
    [
        ("NomicBert", {"num_experts": 8, "moe_every_n_layers": 2}, "moe_every_n_layers=2"),
        ("DebertaV2", {"conv_kernel_size": 3}, "conv_kernel_size=3"),
        ("DebertaV2", {"share_att_key": False}, "share_att_key=False"),
        ("Deberta", {"talking_head": True}, "talking_head=True"),
        ("Deberta", {"pos_att_type": "c2p"}, "pos_att_type="),
        ("MPNet", {"relative_attention_num_buckets": 16}, "relative_attention_num_buckets=16"),
        ("Electra", {"embedding_size": 32}, "embedding_size=32"),
    ],
)
def test_what_a_family_does_not_compute_is_refused_by_name(family, change, words, tmp_path):
    embedders.build(f"{family}Model", tmp_path)
    embedders.change_config(tmp_path, **change)
    with pytest.raises((StartupError, NotNative), match=words):
        Embedder(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", NEWER)
def test_200_texts_in_one_batch_are_as_sentence_transformers_has_them(family, tmp_path):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Normalize, Pooling, Transformer

    embedders.build(f"{family}Model", tmp_path / "model")
    body = Transformer(str(tmp_path / "model"))
    peer = SentenceTransformer(modules=[body, Pooling(64, pooling_mode="mean"), Normalize()], device="cpu")
    peer.save(str(tmp_path / "saved"))
    sentences = [f"text {i} " + "and so on " * (i * 7 % 19) for i in range(200)]
    limits = {"max_total_tokens": 20000, "max_prefill_tokens": 20000, "chunked_prefill_size": 20000}
    embedder = Embedder(tmp_path / "saved", max_running_requests=256, **limits)
    ours = embedder.embed([peer.tokenizer(text)["input_ids"] for text in sentences])
    assert len(embedder.steps) == 1
    theirs = torch.from_numpy(peer.encode(sentences))
    assert min(map(cosine, ours, theirs)) >= LEAST_COSINE
