"""Embedders whose texts stand behind an instruction: from text to vector as sentence-transformers does it."""

import json

import pytest
import torch

from tests.model import embedders
from tests.model.embedders import Served, cosine, wrap_texts

LEAST_COSINE = 0.99999
INSTRUCTION = "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:"
ARCTIC_M_V2 = {  # as its config.json has them, in the words of its makers' own code
    "architectures": ["GteModel"],
    "model_type": "gte",
    "rope_theta": 160000,
    "rope_scaling": None,
    "layer_norm_type": "layer_norm",
    "position_embedding_type": "rope",
    "pack_qkv": True,
    "type_vocab_size": 1,
    "logn_attention_scale": False,
    "unpad_inputs": False,
    "hidden_act": "gelu",
    "matryoshka_dimensions": [32],
}
MODELS = {  # family, pooling and prompts as released
    "Qwen3-Embedding": ("Qwen3", "lasttoken", {"query": INSTRUCTION, "document": ""}),
    "arctic-embed-m": ("Bert", "cls", {"query": "Represent this sentence for searching relevant passages: "}),
    "arctic-embed-l-v2.0": ("XLMRoberta", "cls", {"query": "query: "}),
    "arctic-embed-m-v2.0": ("Gte", "cls", {"query": "query: ", "document": ""}),
}
TEXTS = [
    "where is Paris?",
    "x",
    "the quick brown fox jumps over the lazy dog, and the capital of France is Paris",
    "1 2",
]


@pytest.mark.parametrize("model", MODELS)
def test_a_text_behind_its_instruction_has_the_vector_of_sentence_transformers(model, tmp_path):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Normalize, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    family, pooling, prompts = MODELS[model]
    embedders.build(f"{family}Model", tmp_path / "model", vocab_size=embedders.VOCAB_SIZE + 8, pad_token_id=2)
    wrap_texts(tmp_path / "model")
    modules = [Transformer(str(tmp_path / "model")), Pooling(64, pooling_mode=pooling), Normalize()]
    peer = SentenceTransformer(modules=modules, device="cpu", prompts=prompts)
    peer.save(str(tmp_path / "saved"))
    if family == "Gte":
        file = tmp_path / "saved" / "config.json"
        given = {name: value for name, value in json.loads(file.read_text()).items() if name != "rope_parameters"}
        file.write_text(json.dumps({**given, **ARCTIC_M_V2}))
    served = Served(tmp_path / "saved")
    for name in (None, *prompts):
        ours = [torch.tensor(embedders.floats(update.vector)) for update in served.ask(TEXTS, name)]
        theirs = peer.encode(TEXTS, prompt=prompts[name] if name else "", convert_to_tensor=True)
        assert min(map(cosine, ours, theirs)) >= LEAST_COSINE
