"""The formats that `auto` chooses, and that a template without tools or tags chooses none."""

from pathlib import Path

import pytest

from quartet.http_gateway.parsers.call_formats import CLUES, FORMATS, MODEL_TYPES
from quartet.http_gateway.parsers.detection import detect, detect_calls, detect_thoughts
from quartet.http_gateway.parsers.reasoning import CLUES as THOUGHT_CLUES
from quartet.http_gateway.parsers.reasoning import FAMILIES
from quartet.runtime.model_files.chat_templates import bundled
from quartet.runtime.model_files.model_info import ModelInfo
from tests.configs import resolved

LOOP = "{% for m in messages %}{{ m.content }}{% endfor %}"
TEMPLATES = {  # what the models' own templates hold, shortened
    "hermes": '{% if tools %}<tool_call>\\n{"name": <name>, "arguments": <args>}\\n</tool_call>{% endif %}',
    "qwen3_coder": "{% if tools %}<tool_call>\n<function=example>\n<parameter=a>\n</function>\n</tool_call>{% endif %}",
    "glm45": "{% if tools %}<tool_call>{function-name}\n<arg_key>{arg-key-1}</arg_key>{% endif %}",
    "minimax-m2": "{% if tools %}{% set toolcall_begin_token = '<minimax:tool_call>' %}{% endif %}",
    "granite": "{%- if tools %}write '<|tool_call|>' followed by a JSON list of tools used.{% endif %}",
    "kimi_k2": "{%- if tools -%}<|tool_calls_section_begin|>{%- endif -%}",
    "deepseekv3": "{% for tool in message['tool_calls']%}{{ '<｜tool▁sep｜>' + tool.name + '\\n```json' }}{% endfor %}",
    "deepseekv31": "{%- for tool in message['tool_calls']%}{{ '<｜tool▁sep｜>' + tool['arguments'] }}{% endfor %}",
    "llama3": "{% if tools %}Write {name: ..., parameters: dictionary of argument name and its value}.{% endif %}",
    "mistral": "{%- if tools is not none %}{{ '[AVAILABLE_TOOLS]' }}{{ '[TOOL_CALLS] [' }}{%- endif %}",
    "pythonic": "{%- if tools %}Put it in the format of [func_name1(params_name1=params_value1, ...)]{% endif %}",
}

EXCERPTS = Path(__file__).parent / "chat_templates"  # the decisive lines of real templates
FORMATS_OF = {  # what they choose: calls, thoughts
    "DeepSeek-R1": ("deepseekv3", "qwen3"),
    "DeepSeek-V3.1": ("deepseekv31", "qwen3"),
    "DeepSeek-V3.2": ("deepseekv32", "qwen3"),
    "GLM-4.6": ("glm45", "qwen3"),
    "Gemma-3-of-vLLM": ("pythonic", None),
    "Gemma-3-with-JSON": ("json", None),
    "Gemma-3-with-code-blocks": ("gemma3", None),
    "Granite-3.1": ("granite", "granite"),
    "Granite-4.0": ("hermes", None),
    "Kimi-K2-Thinking": ("kimi_k2", "qwen3"),
    "Llama-3.1": ("llama3", None),
    "Llama-4-of-vLLM": ("pythonic", None),
    "Magistral-Small-2509": ("mistral_v13", "mistral"),
    "MiniMax-M2": ("minimax-m2", "qwen3"),
    "Mistral-Small-3.1-2503": ("mistral_v11", None),
    "Mistral-7B-Instruct-v0.3": ("mistral", None),
    "OLMo-3.1-Instruct": ("olmo3", None),
    "OLMo-3-of-vLLM": ("olmo3", None),
    "Phi-4-mini-instruct": ("phi4_mini_json", None),
    "Phi-4-mini-of-llama.cpp": ("phi4_mini_json", None),
    "Phi-4-mini-of-vLLM": ("phi4_mini_json", None),
    "Qwen3": ("hermes", "qwen3"),
    "Qwen3-Coder": ("qwen3_coder", None),
    "SmolLM3": ("hermes", "qwen3"),
    "gpt-oss-20b": ("gpt-oss", "gpt-oss"),
}


def model(model_type: str = "") -> ModelInfo:
    return ModelInfo(
        path="x", architecture="", model_type=model_type, vocab_size=1, hidden_size=1, context_length=1, eos_ids=[],
        config={},
    )  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_template_tells_how_calls_are_written(name):
    choice = detect_calls({"default": TEMPLATES[name] + LOOP}, "")
    assert choice.name == name and "the chat template has" in choice.reason


@pytest.mark.parametrize("file", sorted(EXCERPTS.iterdir()), ids=lambda file: file.stem)
def test_real_templates_choose_the_formats_of_their_models(file):
    templates = {"default": file.read_text()}
    assert (detect_calls(templates, "").name, detect_thoughts(templates).name) == FORMATS_OF[file.stem]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_without_tools_gives_no_parser_whatever_it_holds(name):
    source = TEMPLATES[name].replace("if tools", "if system").replace("tool_calls'", "content'")
    assert detect_calls({"default": source}, "qwen2").name is None
    assert detect_calls({}, "qwen2").name is None


def test_the_template_for_tools_comes_before_the_default_one():
    assert detect_calls({"default": LOOP, "tool_use": TEMPLATES["mistral"]}, "").name == "mistral"


def test_the_model_type_decides_where_the_template_shows_no_call():
    source = "{{ tools | tojson }}" + LOOP
    assert detect_calls({"default": source}, "qwen3") == ("hermes", "model type qwen3")
    assert detect_calls({"default": source}, "strange").name is None


def test_thoughts_are_found_by_their_tags():
    assert detect_thoughts({"default": "{{ content.split('</think>')[-1] }}"}).name == "qwen3"
    assert detect_thoughts({"default": "{{ '◁think▷' }}"}).name == "kimi"
    assert detect_thoughts({"default": LOOP}).name is None
    assert detect_thoughts({}).name is None


def test_every_choice_of_ours_exists_and_no_thought_begins_unseen():
    assert {*CLUES.values(), *MODEL_TYPES.values()} <= FORMATS.keys()
    assert all(FAMILIES[name].place == "before" for name in THOUGHT_CLUES.values())


def test_the_manual_names_every_format():
    manual = (Path(__file__).parents[4] / "docs/formats.md").read_text()
    assert [name for name in (*FORMATS, *FAMILIES) if f"`{name}`" not in manual] == []


def test_bundled_templates_are_recognised():
    found = {name: detect_calls({"default": file.read_text()}, "").name for name, file in bundled().items()}
    assert (found["chatml"], found["gemma"], found["mistral"], found["qwen3"]) == (None, None, "mistral", "hermes")


@pytest.mark.parametrize(("value", "calls"), [("none", None), (None, None), ("llama3", "llama3"), ("auto", "hermes")])
def test_the_flag_wins_over_the_template(value, calls):
    config = resolved(tool_call_parser=value, reasoning_parser="none")
    formats = detect(config, model(), {"default": TEMPLATES["hermes"] + "<think>"})
    served = formats.applied(config)
    assert (served.tool_call_parser, served.reasoning_parser) == (calls, None)
    assert str(formats).startswith(f"Tool call parser: {calls or 'none'} (")
    assert str(formats).endswith("reasoning parser: none (by --reasoning-parser)")
