"""The text part of the configs of models that also read images or sound."""

import pytest

from quartet.runtime.model_files import towers

# the text part of a released config.json: what equals the defaults of transformers is not there
RELEASED = {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34}


def test_what_released_configs_leave_to_defaults_is_filled_in():
    config = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": RELEASED}
    text = towers.text_config(config)
    heads = text["num_attention_heads"], text["num_key_value_heads"], text["head_dim"]
    assert heads == (8, 4, 256) and text["vocab_size"] == 262208 and text["model_type"] == "gemma3_text"


def test_what_a_config_says_stands_before_defaults():
    config = {"text_config": {**RELEASED, "num_attention_heads": 16}, "vocab_size": 7, "bos_token_id": 2}
    text = towers.text_config(config)
    assert text["num_attention_heads"] == 16 and text["bos_token_id"] == 2


def test_a_config_of_text_alone_stays_as_it_is():
    config = {"model_type": "llama", "vocab_size": 5}
    assert towers.text_config(config) == config


@pytest.mark.parametrize(
    ("architecture", "model_type", "expected"),
    [
        ("LlamaForCausalLM", "llama", "LlamaForCausalLM"),
        ("Gemma3ForConditionalGeneration", "gemma3_text", "Gemma3ForCausalLM"),
        ("Mistral3ForConditionalGeneration", "ministral3", "Ministral3ForCausalLM"),
        ("Mistral3ForConditionalGeneration", "mistral", "MistralForCausalLM"),
        ("Mistral3ForConditionalGeneration", "other", "Mistral3ForConditionalGeneration"),
    ],
)
def test_the_architecture_of_the_language_model_follows_from_its_type(architecture, model_type, expected):
    assert towers.language_model(architecture, {"model_type": model_type}) == expected
