"""Models with a vector for each token, or weights of words, give what sentence-transformers gives."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quartet.runtime.errors import StartupError
from tests.model import embedders
from tests.model.embedders import Embedder, Served, cosine, floats, hidden_states, texts, wrap_texts

LEAST_COSINE = 0.99999
TEXTS = ["what is a panda?", "a, b!", "hello world", "the quick brown fox jumps over the lazy dog, " * 4, "x"]
SPARSE = {"Bert": "max", "DistilBert": "sum", "MPNet": "sum", "ModernBert": "max", "Roberta": "max"}


def assert_same(ours: Sequence[torch.Tensor], theirs: Sequence[Any]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        other = torch.as_tensor(other)
        assert mine.shape == other.shape
        assert all(cosine(a, b) >= LEAST_COSINE for a, b in zip(mine, other, strict=True))
        assert torch.allclose(mine, other, atol=2e-5)


@pytest.fixture(params=[None, {"strategy": "fixed", "length": 16}, {"strategy": "min", "length": 12, "attend": True}])
def many_vectors(request, tmp_path):
    """A small model of sentence-transformers with a vector for each token, and where it was saved."""
    from sentence_transformers import MultiVectorEncoder
    from sentence_transformers.base.modules import Dense, Normalize, Transformer
    from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask

    embedders.build("BertModel", tmp_path / "model", vocab_size=embedders.VOCAB_SIZE + 8)
    wrap_texts(tmp_path / "model")
    tokens = {"module_input_name": "token_embeddings"}
    modules = [
        Transformer(str(tmp_path / "model"), query_expansion=request.param),
        Dense(64, 48, bias=False, activation_function=torch.nn.Identity(), **tokens),
        MultiVectorMask(skiplist_words=["!", ",", "?", "not a token"]),
        Normalize(**tokens),
    ]
    prompts = {"query": "ask: ", "document": "text: "}
    peer = MultiVectorEncoder(modules=modules, prompts=prompts, device="cpu")
    peer.save(str(tmp_path / "saved"))
    return peer, tmp_path / "saved"


def test_a_model_of_many_vectors_treats_queries_and_documents_each_in_their_way(many_vectors):
    peer, directory = many_vectors
    served = Served(directory)
    queries = TEXTS[:3] + TEXTS[4:]
    assert_same(served.vectors(TEXTS, "document"), peer.encode_document(TEXTS))
    assert_same(served.vectors(queries, "query"), peer.encode_query(queries))
    assert_same(served.vectors(TEXTS), peer.encode(TEXTS))


def stanford(directory: Path, **metadata: Any) -> None:
    """A checkpoint as Stanford's ColBERT writes it: BERT with one more matrix, and marks among the vocabulary."""
    embedders.build("BertModel", directory, vocab_size=embedders.VOCAB_SIZE + 8)
    wrap_texts(directory)
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    for place, word in enumerate(("[unused0]", "[unused1]")):  # in the vocabulary, but no tokens of their own
        tokenizer["model"]["vocab"][word] = embedders.VOCAB_SIZE + 4 + place
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    tensors = load_file(directory / "model.safetensors")
    tensors = {f"bert.{name}": tensor for name, tensor in tensors.items()}
    save_file({**tensors, "linear.weight": torch.randn(24, 64)}, directory / "model.safetensors", {"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "architectures": ["HF_ColBERT"]}))
    settings = {"dim": 24, "query_token_id": "[unused0]", "doc_token_id": "[unused1]", "query_maxlen": 16, **metadata}
    (directory / "artifact.metadata").write_text(json.dumps(settings))


@pytest.mark.parametrize("metadata", [{}, {"attend_to_mask_tokens": True, "mask_punctuation": False}])
def test_stanfords_colbert_marks_its_texts_with_tokens(metadata, tmp_path):
    from sentence_transformers import MultiVectorEncoder

    stanford(tmp_path, **metadata)
    peer = MultiVectorEncoder(str(tmp_path), device="cpu")
    served = Served(tmp_path)
    assert_same(served.vectors(TEXTS, "document"), peer.encode_document(TEXTS))
    assert_same(served.vectors(TEXTS[:3], "query"), peer.encode_query(TEXTS[:3]))


def test_a_model_of_pylate_is_read_with_what_its_files_leave_out(tmp_path):
    """No mask, no normalisation among its modules, and punctuation that is left out unsaid."""
    from sentence_transformers import MultiVectorEncoder

    embedders.build("ModernBertModel", tmp_path, vocab_size=embedders.VOCAB_SIZE + 8)
    wrap_texts(tmp_path, known=["[Q] ", "[D] "])
    (tmp_path / "1_Dense").mkdir()
    dense = {"in_features": 64, "out_features": 32, "bias": False}
    dense["activation_function"] = "torch.nn.modules.linear.Identity"
    (tmp_path / "1_Dense" / "config.json").write_text(json.dumps(dense))
    save_file({"linear.weight": torch.randn(32, 64)}, tmp_path / "1_Dense" / "model.safetensors")
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Dense", "type": "pylate.models.Dense.Dense"},
    ]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    settings = {"model_type": "ColBERT", "query_prefix": "[Q] ", "document_prefix": "[D] ", "query_length": 16}
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps({**settings, "prompts": {}}))
    peer = MultiVectorEncoder(str(tmp_path), device="cpu")
    served = Served(tmp_path)
    assert_same(served.vectors(TEXTS, "document"), peer.encode_document(TEXTS))
    assert_same(served.vectors(TEXTS[:3], "query"), peer.encode_query(TEXTS[:3]))


@pytest.mark.parametrize(("family", "pooling"), SPARSE.items())
def test_a_sparse_model_gives_its_weights_of_words(family, pooling, tmp_path, monkeypatch):
    from sentence_transformers import SparseEncoder
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sparse_encoder.modules import SpladePooling

    monkeypatch.setattr("quartet.scheduler_service.execution.pooling.TOKENS_AT_ONCE", 7)
    embedders.build(f"{family}ForMaskedLM", tmp_path / "model")
    body = Transformer(str(tmp_path / "model"), transformer_task="fill-mask")
    activation = "relu" if pooling == "max" else "log1p_relu"
    peer = SparseEncoder(modules=[body, SpladePooling(pooling, activation)], device="cpu")
    peer.save(str(tmp_path / "saved"))
    theirs = peer.encode(TEXTS, convert_to_sparse_tensor=False)
    for update, expected in zip(Served(tmp_path / "saved").ask(TEXTS), theirs, strict=True):
        ours = torch.zeros(embedders.VOCAB_SIZE)
        ids = torch.frombuffer(bytearray(update.vector_ids), dtype=torch.int32).long()
        ours[ids] = torch.tensor(floats(update.vector))
        assert cosine(ours, expected) >= LEAST_COSINE and torch.allclose(ours, expected, atol=2e-5)
        assert ids.tolist() == sorted(set(ids.tolist())) and len(ids) == int((expected != 0).sum())


@pytest.mark.parametrize(("family", "served"), [("Bert", True), ("Qwen3", False)])
def test_any_model_that_reads_whole_texts_gives_its_last_hidden_states(family, served, tmp_path):
    peer = embedders.build(f"{family}Model", tmp_path)
    embedder = Embedder(tmp_path)
    given = texts(9, 30)
    rids = [embedder.add(ids, vectors="tokens") for ids in given]
    embedder.run()
    for rid, ids in zip(rids, given, strict=True):
        update = embedder.updates[rid]
        if not served:
            assert update.finish.status == 400 and "in pieces" in update.finish.message
            continue
        assert torch.allclose(torch.tensor(floats(update.vector)).view(-1, 64), hidden_states(peer, ids), atol=2e-5)


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("artifact.metadata", {"dim": 0}, "dim is 0"),
        ("artifact.metadata", {"query_maxlen": 1 << 20}, "1048576 tokens; served are"),
        ("artifact.metadata", {"query_maxlen": "x"}, "how queries are filled up"),
        ("tokenizer_config.json", {}, "no token to fill queries up with"),
    ],
)
def test_settings_of_a_colbert_that_cannot_be_are_refused(file, content, words, tmp_path):
    stanford(tmp_path)
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(StartupError, match=words):
        Served(tmp_path)


def test_a_colbert_on_another_model_than_bert_is_refused_by_name(tmp_path):
    stanford(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "xlm-roberta"}))
    with pytest.raises(StartupError, match="model_type='xlm-roberta' is not supported"):
        Served(tmp_path)


def test_the_norms_of_an_old_checkpoint_are_read_in_its_head_too(tmp_path):
    embedders.build("BertForMaskedLM", tmp_path)
    (tmp_path / "1_Splade").mkdir()
    (tmp_path / "1_Splade" / "config.json").write_text("{}")
    kinds = {"": "MLMTransformer", "1_Splade": "SpladePooling"}
    (tmp_path / "modules.json").write_text(json.dumps([{"type": t, "path": path} for path, t in kinds.items()]))
    [new] = Served(tmp_path).ask(TEXTS[:1])
    tensors = load_file(tmp_path / "model.safetensors")
    ends = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    for name in list(tensors):
        if end := next((end for end in ends if name.endswith(end)), None):
            tensors[name.removesuffix(end) + ends[end]] = tensors.pop(name)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    [old] = Served(tmp_path).ask(TEXTS[:1])
    assert (old.vector, old.vector_ids) == (new.vector, new.vector_ids) and new.vector


def test_sparse_models_need_a_head_of_words(tmp_path):
    from sentence_transformers import SparseEncoder
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sparse_encoder.modules import SpladePooling

    embedders.build("ElectraForMaskedLM", tmp_path / "model")
    body = Transformer(str(tmp_path / "model"), transformer_task="fill-mask")
    SparseEncoder(modules=[body, SpladePooling()], device="cpu").save(str(tmp_path / "saved"))
    with pytest.raises(Exception, match="sparse embedder of the family Electra"):
        Embedder(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    (tmp_path / "saved" / "config.json").write_text(json.dumps({**config, "architectures": ["ElectraModel"]}))
    with pytest.raises(StartupError, match="which a ElectraModel has no head for"):
        Embedder(tmp_path / "saved")
    shutil.rmtree(tmp_path / "saved")
