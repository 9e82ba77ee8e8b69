"""How families of models write tool calls: one declaration each. `output_reader` reads them all."""

import secrets
import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from quartet.http_gateway.parsers.tagged_calls import Tags

ID_CHARS = string.ascii_letters + string.digits


def call_id() -> str:
    """A fresh id of a call, as clients of OpenAI's API know it."""
    return f"call_{secrets.token_hex(12)}"


def short_call_id() -> str:
    """A fresh id of nine letters and digits: Mistral's templates refuse any other."""
    return "".join(secrets.choice(ID_CHARS) for _ in range(9))


@dataclass(frozen=True)
class Frame:
    """How one call stands in the text, for grammars that constrain its arguments."""

    begin: str  # before the name
    middle: str  # between the name and the arguments
    end: str


@dataclass(frozen=True)
class Head:
    """What stands around a call whose arguments alone are JSON."""

    begin: str  # before the name
    name_end: str  # between the name and the arguments
    end: str  # behind the arguments


@dataclass(frozen=True)
class CallFormat:
    """What leads to a call, what a call looks like, what may follow it."""

    body: Literal["json", "python", "tags"] = "json"
    tags: Tags | None = None  # of a call whose body is tags
    head: Head | None = None
    opening: str = ""  # the tag before calls, anywhere in the output
    closing: str = ""  # the tag behind them
    bare: tuple[str, ...] = ()  # what leads to calls at the beginning of the answer alone
    bracket: str = "{"  # what follows a bare beginning
    separators: str = ""  # of two calls; between others there are blanks at most
    named: bool = False  # the tag may also be followed by name{arguments}
    alone: bool = False  # there is nothing but calls: the beginning of one is never content
    frame: Frame | None = None
    new_id: Callable[[], str] = call_id


HERMES = CallFormat(
    opening="<tool_call>",
    closing="</tool_call>",
    separators=",",
    frame=Frame('<tool_call>\n{"name": ', ', "arguments": ', "}\n</tool_call>"),
)
DEEPSEEK_V3 = CallFormat(
    opening="<｜tool▁calls▁begin｜>",
    closing="<｜tool▁calls▁end｜>",
    head=Head("<｜tool▁call▁begin｜>function<｜tool▁sep｜>", "\n```json\n", "```<｜tool▁call▁end｜>"),
)
DEEPSEEK_V31 = CallFormat(
    opening="<｜tool▁calls▁begin｜>",
    closing="<｜tool▁calls▁end｜>",
    head=Head("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"),
)
KIMI_K2 = CallFormat(
    opening="<|tool_calls_section_begin|>",
    closing="<|tool_calls_section_end|>",
    head=Head("<|tool_call_begin|>functions.", "<|tool_call_argument_begin|>", "<|tool_call_end|>"),
)
GRANITE_FRAME = Frame('<|tool_call|>[{"name": ', ', "arguments": ', "}]")
GLM45 = CallFormat(
    body="tags",
    opening="<tool_call>",
    closing="</tool_call>",
    tags=Tags("", "", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", ""),
)
MINIMAX_M2 = CallFormat(
    body="tags",
    opening="<minimax:tool_call>",
    closing="</minimax:tool_call>",
    tags=Tags('<invoke name="', '">', '<parameter name="', '">', "", "</parameter>", "</invoke>"),
)
QWEN3_CODER = CallFormat(
    body="tags",
    opening="<tool_call>",
    closing="</tool_call>",
    tags=Tags("<function=", ">", "<parameter=", ">", "", "</parameter>", "</function>", own_lines=True),
)
FORMATS = {
    "hermes": HERMES,
    "llama3": CallFormat(
        opening="<|python_tag|>",
        bare=("",),
        separators=";,",
        frame=Frame('<|python_tag|>{"name": ', ', "parameters": ', "}"),
    ),
    "mistral": CallFormat(
        opening="[TOOL_CALLS]",
        separators=",",
        named=True,
        frame=Frame('[TOOL_CALLS] [{"name": ', ', "arguments": ', "}]"),
        new_id=short_call_id,
    ),
    "pythonic": CallFormat(
        body="python", closing="<|python_end|>", bare=("<|python_start|>", ""), bracket="[", separators=","
    ),
    "qwen": HERMES,
    "qwen25": HERMES,
    "qwen3_coder": QWEN3_CODER,
    "deepseekv3": DEEPSEEK_V3,
    "deepseekv31": DEEPSEEK_V31,
    "glm45": GLM45,
    "granite": CallFormat(opening="<|tool_call|>", separators=",", frame=GRANITE_FRAME),
    "kimi_k2": KIMI_K2,
    "minimax-m2": MINIMAX_M2,
}
CLUES = {  # what a chat template that describes tools holds → the format; the first one that is found decides
    r"<minimax:tool_call>": "minimax-m2",
    r"<arg_key>": "glm45",
    r"<\|tool_calls_section_begin\|>": "kimi_k2",
    r"<｜tool▁sep｜>(?=[\s\S]{0,200}```json)": "deepseekv3",
    r"<｜tool▁sep｜>": "deepseekv31",
    r"<function=": "qwen3_coder",
    r"<\|tool_call\|>": "granite",
    r"\[TOOL_CALLS\]": "mistral",
    r"<\|python_start\|>|\[func_name1\(": "pythonic",
    r"<tool_call>": "hermes",
    r"<\|python_tag\|>|dictionary of argument name and its value": "llama3",
}
MODEL_TYPES = {  # of models whose template describes tools but shows no call
    "llama": "llama3",
    "llama4_text": "pythonic",
    "mistral": "mistral",
    "mixtral": "mistral",
    "qwen2": "hermes",
    "qwen2_moe": "hermes",
    "qwen3": "hermes",
    "qwen3_moe": "hermes",
}
REQUIRED = CallFormat(bare=("",), bracket="[", separators=",", alone=True)  # what `calls_schema` asks for
