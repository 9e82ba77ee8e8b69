"""What a config.json says about tasks with adapters."""

import json

import pytest

from quartet.runtime.model_files import servable
from quartet.runtime.model_files.embedding import embedding
from quartet.runtime.model_files.task_adapters import WEIGHTS, architecture_of, tasks_of

FAMILY = "JinaEmbeddingsV3Model"
MAKERS = {"model_type": "xlm-roberta", "position_embedding_type": "rotary", "lora_adaptations": ["a.b", "c-d"]}
FOLDERS = {"model_type": "jina_embeddings_v3", "lora_adaptations": ["a.b", "c-d"]}


@pytest.mark.parametrize(
    ("architecture", "config", "expected"),
    [
        ("XLMRobertaLoRA", {}, FAMILY),
        ("XLMRobertaModel", {"position_embedding_type": "rotary"}, FAMILY),
        ("XLMRobertaForSequenceClassification", MAKERS, "JinaEmbeddingsV3ForSequenceClassification"),
        ("XLMRobertaModel", {"position_embedding_type": "absolute"}, "XLMRobertaModel"),
        ("XLMRobertaModel", {}, "XLMRobertaModel"),
        ("BertModel", {"position_embedding_type": "rotary"}, "BertModel"),
    ],
)
def test_the_makers_code_goes_under_the_name_of_another_architecture(architecture, config, expected):
    assert architecture_of(architecture, config) == expected


@pytest.mark.parametrize("architecture", ["XLMRobertaLoRA", "XLMRobertaModel"])
def test_a_model_of_the_makers_is_not_refused_for_its_code(architecture):
    config = {**MAKERS, "architectures": [architecture], "auto_map": {"AutoModel": "x--modeling_lora.XLMRobertaLoRA"}}
    assert servable.refusal(config, {"llama": "LlamaForCausalLM"}) == ""


def test_the_makers_layout_has_all_tasks_in_the_checkpoint(tmp_path):
    assert tasks_of(tmp_path, FAMILY, MAKERS) == {"a.b": "", "c-d": ""}
    assert tasks_of(tmp_path, FAMILY, {**MAKERS, "load_trained_adapters": False}) == {}
    assert tasks_of(tmp_path, "BertModel", MAKERS) == {}


def test_the_other_layout_has_the_tasks_whose_folders_are_there(tmp_path):
    assert tasks_of(tmp_path, FAMILY, FOLDERS) == {}
    (tmp_path / "c_d").mkdir()
    (tmp_path / "c_d" / WEIGHTS).touch()
    assert tasks_of(tmp_path, FAMILY, FOLDERS) == {"c-d": "c_d"}


def test_a_model_with_tasks_pools_all_states_and_has_their_prompts(tmp_path):
    config = {**MAKERS, "task_instructions": {"a.b": "find: ", "c-d": ""}, "default_task": "c-d"}
    found = embedding(tmp_path, FAMILY, config)
    assert (found.pooling, found.prompts, found.default_task) == (("mean",), config["task_instructions"], "c-d")
    assert embedding(tmp_path, FAMILY, {}).pooling == ("cls",)


def test_the_makers_modules_are_followed_without_their_code(tmp_path):
    modules = [
        {"idx": 0, "name": "transformer", "path": "", "type": "custom_st.Transformer", "kwargs": ["task"]},
        {"idx": 1, "name": "pooler", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "name": "normalizer", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
    ]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling/config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    prompts = {"prompts": {"a.b": "find: "}, "default_prompt_name": None}
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    found = embedding(tmp_path, FAMILY, MAKERS)
    assert (found.pooling, found.normalize, found.prompts) == (("mean",), True, {"a.b": "find: "})
