"""Tool calls as the models write them: one function for each way, by the names of `--tool-call-parser`.

Each follows what the models' chat templates print, or what their documentation shows where a template prints none.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

Calls = list[tuple[str, dict[str, Any]]]


def as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def objects(calls: Calls, arguments: str = "arguments") -> list[str]:
    return [as_json({"name": name, arguments: keys}) for name, keys in calls]


def hermes(calls: Calls) -> str:
    return "\n".join(f"<tool_call>\n{body}\n</tool_call>" for body in objects(calls))


def llama3(calls: Calls) -> str:
    return "<|python_tag|>" + "; ".join(objects(calls, "parameters"))


def mistral(calls: Calls) -> str:
    """Since version 11 of their tokenizer; before, a list: see `mistral_list`."""
    return "".join(f"[TOOL_CALLS]{name}[ARGS]{as_json(keys)}" for name, keys in calls)


def mistral_with_ids(calls: Calls) -> str:
    """Version 11 alone."""
    return "".join(
        f"[TOOL_CALLS]{name}[CALL_ID]{number:09}[ARGS]{as_json(keys)}" for number, (name, keys) in enumerate(calls)
    )


def mistral_list(calls: Calls) -> str:
    return f"[TOOL_CALLS] [{', '.join(objects(calls))}]"


def granite(calls: Calls) -> str:
    return f"<|tool_call|>[{', '.join(objects(calls))}]"


def phi4_mini(calls: Calls) -> str:
    return f"<|tool_call|>[{', '.join(objects(calls))}]<|/tool_call|>"


def phi4_mini_functools(calls: Calls) -> str:
    return f"functools[{', '.join(objects(calls))}]"


def generic(calls: Calls) -> str:
    return f"```json\n[{', '.join(objects(calls))}]\n```"


def required(calls: Calls) -> str:
    return f"[{','.join(objects(calls, 'parameters'))}]"


def deepseek_v3(calls: Calls) -> str:
    bodies = (
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{as_json(keys)}\n```<｜tool▁call▁end｜>"
        for name, keys in calls
    )
    return f"<｜tool▁calls▁begin｜>{chr(10).join(bodies)}<｜tool▁calls▁end｜>"


def deepseek_v31(calls: Calls) -> str:
    bodies = (f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{as_json(keys)}<｜tool▁call▁end｜>" for name, keys in calls)
    return f"<｜tool▁calls▁begin｜>{''.join(bodies)}<｜tool▁calls▁end｜>"


def deepseek_v32_parameter(key: str, value: Any) -> str:
    is_text = as_json(isinstance(value, str))
    return f'<｜DSML｜parameter name="{key}" string="{is_text}">{shown(value)}</｜DSML｜parameter>\n'


def deepseek_v32(calls: Calls) -> str:
    bodies = (
        f'<｜DSML｜invoke name="{name}">\n'
        + "".join(deepseek_v32_parameter(key, value) for key, value in keys.items())
        + "</｜DSML｜invoke>\n"
        for name, keys in calls
    )
    return f"<｜DSML｜function_calls>\n{''.join(bodies)}</｜DSML｜function_calls>"


def kimi_k2(calls: Calls) -> str:
    bodies = (
        f"<|tool_call_begin|>functions.{name}:{index}<|tool_call_argument_begin|>{as_json(keys)}<|tool_call_end|>"
        for index, (name, keys) in enumerate(calls)
    )
    return f"<|tool_calls_section_begin|>{''.join(bodies)}<|tool_calls_section_end|>"


def harmony(calls: Calls) -> str:
    """What the model writes behind `<|start|>assistant`; at the length's end a message has no tag."""
    return "<|start|>assistant".join(
        f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{as_json(keys)}<|call|>"
        for name, keys in calls
    )


def harmony_template(calls: Calls) -> str:
    """The other order, of the chat template."""
    return "<|start|>assistant".join(
        f" to=functions.{name}<|channel|>commentary json<|message|>{as_json(keys)}<|call|>" for name, keys in calls
    )


def python(calls: Calls) -> list[str]:
    return [f"{name}({', '.join(f'{key}={value!r}' for key, value in keys.items())})" for name, keys in calls]


def pythonic(calls: Calls) -> str:
    return f"[{', '.join(python(calls))}]"


def llama4(calls: Calls) -> str:
    return f"<|python_start|>{pythonic(calls)}<|python_end|>"


def olmo3(calls: Calls) -> str:
    return f"<function_calls>\n{chr(10).join(python(calls))}\n</function_calls>"


def olmo3_json(calls: Calls) -> str:
    """As in the data that it was trained on: values are JSON in ASCII."""
    lines = (
        f"{name}({', '.join(f'{key}={json.dumps(value)}' for key, value in keys.items())})" for name, keys in calls
    )
    return f"<function_calls>{chr(10).join(lines)}</function_calls>"


def gemma3(calls: Calls) -> str:
    return f"```tool_code\n{chr(10).join(python(calls))}\n```"


def gemma3_printed(calls: Calls) -> str:
    return f"```tool_code\n{chr(10).join(f'print({call})' for call in python(calls))}\n```"


def shown(value: Any) -> str:
    """A value between tags: text without quotes, else JSON."""
    return value if isinstance(value, str) else as_json(value)


def qwen3_coder(calls: Calls) -> str:
    return "\n".join(f"<tool_call>\n{body}\n</tool_call>" for body in qwen3_coder_functions(calls))


def qwen3_coder_bare(calls: Calls) -> str:
    """As the model writes at times: without the tag before."""
    return "\n".join(f"{body}\n</tool_call>" for body in qwen3_coder_functions(calls))


def qwen3_coder_functions(calls: Calls) -> list[str]:
    return [
        f"<function={name}>\n"
        + "".join(f"<parameter={key}>\n{shown(value)}\n</parameter>\n" for key, value in keys.items())
        + "</function>"
        for name, keys in calls
    ]


def glm45(calls: Calls) -> str:
    return "\n".join(
        f"<tool_call>{name}\n"
        + "".join(f"<arg_key>{key}</arg_key>\n<arg_value>{shown(value)}</arg_value>\n" for key, value in keys.items())
        + "</tool_call>"
        for name, keys in calls
    )


def glm47(calls: Calls) -> str:
    return glm45(calls).replace("\n<arg_", "<arg_").replace("</arg_value>\n", "</arg_value>")


def minimax_m2(calls: Calls) -> str:
    bodies = (
        f'<invoke name="{name}">\n'
        + "".join(f'<parameter name="{key}">{shown(value)}</parameter>\n' for key, value in keys.items())
        + "</invoke>\n"
        for name, keys in calls
    )
    return f"<minimax:tool_call>\n{''.join(bodies)}</minimax:tool_call>"


WAYS: Mapping[str, tuple[Callable[[Calls], str], ...]] = {
    "deepseekv3": (deepseek_v3,),
    "deepseekv31": (deepseek_v31,),
    "deepseekv32": (deepseek_v32,),
    "gemma3": (gemma3, gemma3_printed, pythonic),
    "glm": (glm45, glm47),
    "glm45": (glm45, glm47),
    "glm47": (glm45, glm47),
    "gpt-oss": (harmony, harmony_template),
    "granite": (granite,),
    "granite4": (hermes,),
    "hermes": (hermes,),
    "json": (generic, required),
    "kimi_k2": (kimi_k2,),
    "llama3": (llama3,),
    "minimax-m2": (minimax_m2,),
    "mistral": (mistral, mistral_list),
    "mistral_v11": (mistral_with_ids, mistral, mistral_list),
    "mistral_v13": (mistral, mistral_list),
    "olmo3": (olmo3, olmo3_json),
    "phi4_mini_json": (phi4_mini, phi4_mini_functools),
    "pythonic": (pythonic, llama4),
    "qwen": (hermes,),
    "qwen25": (hermes,),
    "qwen3_coder": (qwen3_coder, qwen3_coder_bare),
    "required": (required,),
    "smollm3": (hermes,),
}
AT_THE_BEGINNING = (pythonic, llama4, required)  # ways that are calls only where the answer begins
