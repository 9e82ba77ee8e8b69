"""The files of the demo model agree with each other and with the corpus they were made from."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from deploy.demo_model import vocabulary
from deploy.demo_model.corpus import PROMPT_WEIGHT, SEED, documents, is_held_out, turn
from deploy.demo_model.facts import ALIASES, COUNTRIES
from deploy.demo_model.phrasings import HELD_OUT_COMPLETIONS, HELD_OUT_QUESTIONS
from quartet.runtime.model_files.model_info import DEMO

LARGEST_WEIGHTS_BYTES = 8_000_000
BYTES_PER_NUMBER = {"BF16": 2, "F32": 4}


def read_json(name: str) -> dict[str, Any]:
    content = json.loads((DEMO / name).read_text())
    assert isinstance(content, dict)
    return content


def weights_header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file: name, dtype, shape and place of every tensor."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    assert isinstance(header, dict)
    return header


def texts(seed: int, count: int) -> list[str]:
    return ["".join(span.text for span in document) for document in islice(documents(seed), count)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return vocabulary.load(DEMO)


def test_every_country_has_one_capital_of_its_own():
    assert len(COUNTRIES) == 194
    assert len({country.name for country in COUNTRIES}) == len({country.capital for country in COUNTRIES}) == 194
    assert set(ALIASES) <= {country.name for country in COUNTRIES}


def test_weights_have_the_shapes_that_the_config_says():
    config, header = read_json("config.json"), weights_header(DEMO / "model.safetensors")
    hidden, inner, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    expected = {"model.embed_tokens.weight": [config["vocab_size"], hidden], "model.norm.weight": [hidden]}
    for layer in range(config["num_hidden_layers"]):
        parts = {
            "input_layernorm": [hidden],
            "post_attention_layernorm": [hidden],
            "self_attn.q_norm": [head_dim],
            "self_attn.k_norm": [head_dim],
            "self_attn.q_proj": [queries, hidden],
            "self_attn.k_proj": [keys, hidden],
            "self_attn.v_proj": [keys, hidden],
            "self_attn.o_proj": [hidden, queries],
            "mlp.gate_proj": [inner, hidden],
            "mlp.up_proj": [inner, hidden],
            "mlp.down_proj": [hidden, inner],
        }
        expected |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in parts.items()}
    assert {name: tensor["shape"] for name, tensor in header.items()} == expected
    assert {tensor["dtype"] for tensor in header.values()} == {"BF16"} and config["dtype"] == "float32"


def test_weights_are_complete_and_small():
    path = DEMO / "model.safetensors"
    header = weights_header(path)
    end = max(tensor["data_offsets"][1] for tensor in header.values())
    header_bytes = int.from_bytes(path.read_bytes()[:8], "little")
    assert path.stat().st_size == 8 + header_bytes + end <= LARGEST_WEIGHTS_BYTES


def test_config_files_name_the_same_special_tokens(tokenizer: Tokenizer):
    config, generation, settings = map(read_json, ("config.json", "generation_config.json", "tokenizer_config.json"))
    assert [tokenizer.token_to_id(token) for token in vocabulary.SPECIAL_TOKENS] == [0, 1, 2]
    assert tokenizer.get_vocab_size() == config["vocab_size"]
    assert tokenizer.token_to_id(settings["eos_token"]) == config["eos_token_id"]
    assert tokenizer.token_to_id(settings["pad_token"]) == config["pad_token_id"] == generation["pad_token_id"]
    assert generation["eos_token_id"] == [0, 2]
    assert settings["model_max_length"] == config["max_position_embeddings"]


@given(st.text(max_size=40))
def test_decoding_gives_back_what_was_encoded(text: str):
    tokenizer = vocabulary.load(DEMO)
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_chat_template_writes_what_the_model_was_trained_on():
    template = jinja2.Environment(keep_trailing_newline=False).from_string((DEMO / "chat_template.jinja").read_text())
    messages = [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": "Hi!"}]
    said = turn("system", "Answer briefly.") + turn("user", "Hi!")
    assert template.render(messages=messages, add_generation_prompt=False) == said
    assert template.render(messages=messages, add_generation_prompt=True) == said + "<|im_start|>assistant\n"


def test_same_seed_gives_the_same_corpus():
    assert texts(3, 500) == texts(3, 500)
    assert texts(3, 500) != texts(4, 500)


@pytest.mark.slow
def test_tokenizer_file_is_what_the_corpus_teaches(tokenizer: Tokenizer):
    learned = vocabulary.learn(read_json("config.json")["vocab_size"], SEED)
    assert json.loads(learned.to_str()) == json.loads(tokenizer.to_str())


def test_answers_count_fully_in_the_loss_and_end_with_a_stop_token():
    for document in islice(documents(5), 500):
        assert document[-1].text.endswith("<|endoftext|>")
        assert {span.weight for span in document} <= {0.0, PROMPT_WEIGHT, 0.5, 1.0}


def test_held_out_phrasings_are_nowhere_in_the_corpus():
    corpus = "\n".join(texts(1, 20_000))
    for phrasing in HELD_OUT_QUESTIONS + HELD_OUT_COMPLETIONS:
        opening = phrasing.prompt.partition("{")[0]
        assert opening not in corpus, opening


def test_held_out_sums_are_nowhere_in_the_corpus():
    corpus = "\n".join(texts(1, 20_000))
    held_out = [(a, b) for a in range(100) for b in range(100) if is_held_out(a, b)]
    assert len(held_out) == 1000
    for left, right in held_out:
        assert f" {left} + {right} =" not in corpus and f"\n{left} - {right} =" not in corpus


def test_every_country_is_asked_about_in_chat_form():
    corpus = "\n".join(text for text in texts(1, 40_000) if text.startswith("<|im_start|>"))
    assert [country.name for country in COUNTRIES if f"capital of {country.name}?" not in corpus] == []
