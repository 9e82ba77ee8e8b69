"""What a model directory says about embedding."""

import json
from pathlib import Path
from typing import Any

import pytest

from quartet.runtime.config import ServerConfig
from quartet.runtime.errors import StartupError
from quartet.runtime.model_files import model_info
from quartet.runtime.model_files.embedding import Embedding, embedding, is_embedder, usable_positions


def write_modules(path: Path, *names: str, pooling: Any = None) -> None:
    entries = [
        {"idx": i, "name": str(i), "path": f"{i}_{name}" if i else "", "type": f"sentence_transformers.models.{name}"}
        for i, name in enumerate(names)
    ]
    (path / "modules.json").write_text(json.dumps(entries))
    if pooling is not None:
        (path / "1_Pooling").mkdir(exist_ok=True)
        (path / "1_Pooling/config.json").write_text(json.dumps(pooling))


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("BertModel", True),
        ("Qwen2Model", True),
        ("LlamaForSequenceClassification", True),
        ("Qwen2ForRewardModel", True),
        ("RobertaForMaskedLM", True),
        ("LlamaForCausalLM", False),
        ("GPT2LMHeadModel", False),
        ("", False),
    ],
)
def test_some_architectures_are_for_embedding_alone(architecture, expected):
    assert is_embedder(architecture) is expected


def test_without_settings_an_encoder_takes_its_first_state_and_a_decoder_its_last(tmp_path):
    encoder, decoder = (embedding(tmp_path, name, {}) for name in ("XLMRobertaModel", "Qwen3ForCausalLM"))
    assert encoder == Embedding(pooling=("cls",), normalize=True, encoder=True, causal=False)
    assert decoder == Embedding(pooling=("lasttoken",), normalize=True)
    assert encoder.whole_prompts and not decoder.whole_prompts


@pytest.mark.parametrize("change", [{"matryoshka_dimensions": [4, 16]}, {"truncate_dim": 16}], ids=str)
def test_vectors_cannot_be_cut_to_more_than_they_have(change, tmp_path):
    config = {"architectures": ["BertModel"], "vocab_size": 8, "hidden_size": 8, **change}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(StartupError, match=f"{next(iter(change))} is 16, more than the 8 numbers of a vector"):
        model_info.load(ServerConfig(model_path=str(tmp_path)))


@pytest.mark.parametrize(
    ("config", "pooling"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, ("mean",)),
        ({"pooling_mode_cls_token": True, "pooling_mode_max_tokens": True}, ("cls", "max")),
        ({"pooling_mode": "lasttoken"}, ("lasttoken",)),
        ({"pooling_mode": ["mean", "weightedmean"]}, ("mean", "weightedmean")),
    ],
)
def test_pooling_is_read_in_the_old_form_and_in_the_new(tmp_path, config, pooling):
    write_modules(tmp_path, "Transformer", "Pooling", pooling=config)
    found = embedding(tmp_path, "BertModel", {})
    assert (found.pooling, found.normalize) == (pooling, False)


def test_normalisation_is_a_module_of_its_own(tmp_path):
    write_modules(tmp_path, "Transformer", "Pooling", "Normalize", pooling={"pooling_mode": "mean"})
    assert embedding(tmp_path, "Qwen2Model", {}).normalize
    assert embedding(tmp_path, "Qwen2Model", {}).whole_prompts  # a mean needs every position


@pytest.mark.parametrize(
    ("names", "pooling", "words"),
    [
        (("Transformer", "LSTM"), None, "has a LSTM module"),
        (("Transformer", "Pooling"), None, "No such file"),
        (("Transformer", "Pooling"), {"pooling_mode": "median"}, "does not name a pooling that is served"),
        (("Transformer", "Pooling"), {}, "names no pooling"),
        (("Transformer", "Pooling"), {"pooling_mode": ["mean", "cls", "mean"]}, "names a pooling twice"),
    ],
)
def test_modules_that_cannot_be_followed_stop_the_start(tmp_path, names, pooling, words):
    write_modules(tmp_path, *names, pooling=pooling)
    with pytest.raises(StartupError, match=words):
        embedding(tmp_path, "BertModel", {})


@pytest.mark.parametrize(
    ("architecture", "config", "labels", "cross_encoder"),
    [
        ("LlamaForSequenceClassification", {"id2label": {"0": "LABEL_0"}}, 1, False),
        ("Qwen2ForRewardModel", {}, 1, False),
        ("BertForSequenceClassification", {}, 2, True),
        ("BertForSequenceClassification", {"id2label": {"0": "a", "1": "b", "2": "c"}}, 3, True),
    ],
)
def test_scores_have_a_label_each_and_are_never_normalised(tmp_path, architecture, config, labels, cross_encoder):
    found = embedding(tmp_path, architecture, config)
    assert (found.labels, found.cross_encoder, found.normalize) == (labels, cross_encoder, False)


@pytest.mark.parametrize(
    "config", [{"sbert_ce_default_activation_function": "a.B"}, {"sentence_transformers": {"activation_fn": "a.B"}}]
)
def test_the_activation_of_scores_has_two_names(tmp_path, config):
    assert embedding(tmp_path, "BertForSequenceClassification", config).activation == "a.B"


def test_matryoshka_is_a_switch_or_a_list(tmp_path):
    assert embedding(tmp_path, "Qwen3Model", {"is_matryoshka": True}).matryoshka
    listed = embedding(tmp_path, "Qwen3Model", {"matryoshka_dimensions": [64, 128]})
    assert (listed.matryoshka, listed.dimensions) == (True, (64, 128))


def test_positions_of_roberta_begin_behind_its_padding():
    assert usable_positions({"model_type": "xlm-roberta", "pad_token_id": 1}, 514) == 512
    assert usable_positions({"model_type": "bert", "pad_token_id": 0}, 512) == 512


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        ({"in_features": 8, "out_features": 0}, "in_features and out_features must be"),
        ({"in_features": 8}, "does not describe a layer"),
        ({"in_features": 8, "out_features": 4, "activation_function": "os.system"}, "names the activation os.system"),
    ],
)
def test_a_dense_layer_that_cannot_be_stops_the_start(tmp_path, layer, words):
    write_modules(tmp_path, "Transformer", "Dense")
    modules = json.loads((tmp_path / "modules.json").read_text())
    folder = tmp_path / modules[1]["path"]
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(layer))
    with pytest.raises(StartupError, match=words):
        embedding(tmp_path, "BertModel", {})


@pytest.mark.parametrize("kind", ["Dense", "Pooling"])
@pytest.mark.parametrize("folder", ["../elsewhere", "..", ".", "/etc", "a\0b"])
def test_a_folder_of_another_directory_stops_the_start(kind, folder, tmp_path):
    modules = [{"type": "a.Transformer", "path": ""}, {"type": f"a.{kind}", "path": folder}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(StartupError, match="not one beside it"):
        embedding(tmp_path, "BertModel", {})


def test_a_default_prompt_that_has_no_text_stops_the_start(tmp_path):
    settings = {"prompts": {"query": "q: "}, "default_prompt_name": "document"}
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(settings))
    with pytest.raises(StartupError, match="default_prompt_name is 'document'"):
        embedding(tmp_path, "BertModel", {})


def test_a_prompt_that_would_be_put_before_a_thousand_texts_is_bounded(tmp_path):
    settings = {"prompts": {"query": "q" * 4097}}
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(settings))
    with pytest.raises(StartupError, match="'query' has more than 4096"):
        embedding(tmp_path, "BertModel", {})
