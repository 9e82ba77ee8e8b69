"""How families of models write tool calls: one declaration each. `output_reader` reads them all."""

import secrets
import string
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from quartet.http_gateway.parsers.channels import HARMONY, Channels
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
    """How the model itself writes calls, for the grammars that constrain them."""

    begin: str  # before the name
    middle: str  # between the name and the arguments
    end: str
    before: str = ""  # the first call
    separator: str = ""  # of two calls
    after: str = ""  # the last call
    quoted: bool = True  # the name is a JSON string
    mark: str = ""  # behind the name, before the number or the id of the call
    marked: Literal["", "number", "id"] = ""
    behind_thought: str = ""  # what the model writes between a thought and calls
    alone: bool = False  # a call ends the output


@dataclass(frozen=True)
class Head:
    """What stands around a call whose arguments alone are JSON."""

    begin: str  # before the name
    name_end: str  # between the name and the arguments
    end: str  # behind the arguments
    optional: str = ""  # the end of `begin`, where models leave it out at times


@dataclass(frozen=True)
class CallFormat:
    """What leads to a call, what a call looks like, what may follow it."""

    body: Literal["json", "python", "tags"] = "json"
    tags: Tags | None = None  # of a call whose body is tags
    head: Head | None = None
    channels: Channels | None = None  # a call is a message to its function
    opening: str = ""  # the tag before calls, anywhere in the output
    other_openings: tuple[str, ...] = ()  # what models write in its place
    closing: str = ""  # the tag behind them
    bare: tuple[str, ...] = ()  # what leads to calls at the beginning of the answer alone
    brackets: str = "{"  # one of them follows a bare beginning
    separators: str = ""  # of two calls; between others there are blanks at most
    named: bool = False  # the tag may also be followed by name{arguments}
    lines: bool = False  # calls in Python need no list around them
    wrapper: str = ""  # a function that such a call may be handed to
    shared_opening: bool = False  # the tag also leads to what is no call
    alone: bool = False  # there is nothing but calls: the beginning of one is never content
    untagged: bool = False  # small models leave the tags out
    frame: Frame | None = None
    new_id: Callable[[], str] = call_id

    @property
    def openings(self) -> tuple[str, ...]:
        return (self.opening, *self.other_openings) if self.opening else ()

    def begins_tag(self, text: str) -> bool:
        """Whether a text is the beginning of a tag around calls, and no more than that."""
        inner = (self.tags.name_begin, self.tags.end) if self.tags else ()
        framed = (self.head.begin, self.head.end) if self.head else ()
        tags = (*self.openings, self.closing, *inner, *framed)
        return bool(text) and any(tag.startswith(text) and tag != text for tag in tags)


HERMES = CallFormat(
    opening="<tool_call>",
    closing="</tool_call>",
    separators=",",
    untagged=True,
    frame=Frame('<tool_call>\n{"name": ', ', "arguments": ', "}\n</tool_call>", separator="\n"),
)
DEEPSEEK_V3 = CallFormat(
    opening="<｜tool▁calls▁begin｜>",
    closing="<｜tool▁calls▁end｜>",
    head=Head("<｜tool▁call▁begin｜>function<｜tool▁sep｜>", "\n```json\n", "```<｜tool▁call▁end｜>"),
    frame=Frame(
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
        "\n```json\n",
        "\n```<｜tool▁call▁end｜>",
        before="<｜tool▁calls▁begin｜>",
        separator="\n",
        after="<｜tool▁calls▁end｜>",
        quoted=False,
    ),
)
DEEPSEEK_V31 = CallFormat(
    opening="<｜tool▁calls▁begin｜>",
    closing="<｜tool▁calls▁end｜>",
    head=Head("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"),
    frame=Frame(
        "<｜tool▁call▁begin｜>",
        "<｜tool▁sep｜>",
        "<｜tool▁call▁end｜>",
        before="<｜tool▁calls▁begin｜>",
        after="<｜tool▁calls▁end｜>",
        quoted=False,
    ),
)
DEEPSEEK_V32 = CallFormat(
    body="tags",
    opening="<｜DSML｜function_calls>",
    closing="</｜DSML｜function_calls>",
    tags=Tags(
        '<｜DSML｜invoke name="',
        '">',
        '<｜DSML｜parameter name="',
        '"',
        'string="false">',
        "</｜DSML｜parameter>",
        "</｜DSML｜invoke>",
        text_begin='string="true">',
    ),
    frame=Frame(
        '<｜DSML｜invoke name="',
        '">\n',
        "</｜DSML｜invoke>",
        before="<｜DSML｜function_calls>\n",
        separator="\n",
        after="\n</｜DSML｜function_calls>",
        quoted=False,
    ),
)
KIMI_K2 = CallFormat(
    opening="<|tool_calls_section_begin|>",
    closing="<|tool_calls_section_end|>",
    head=Head("<|tool_call_begin|>functions.", "<|tool_call_argument_begin|>", "<|tool_call_end|>", "functions."),
    frame=Frame(
        "<|tool_call_begin|>functions.",
        "<|tool_call_argument_begin|>",
        "<|tool_call_end|>",
        before="<|tool_calls_section_begin|>",
        after="<|tool_calls_section_end|>",
        quoted=False,
        mark=":",
        marked="number",
    ),
)
LIST_FRAME = Frame('{"name": ', ', "arguments": ', "}", before="<|tool_call|>[", separator=", ", after="]")
GRANITE = CallFormat(
    opening="<|tool_call|>",
    other_openings=("<tool_call>", "<function_call>"),  # of versions 3.1 and 20b-functioncalling
    closing="</tool_call>",
    separators=",",
    frame=LIST_FRAME,
)
PHI4_MINI = CallFormat(
    opening="<|tool_call|>",
    other_openings=("functools",),
    closing="<|/tool_call|>",
    separators=",",
    frame=replace(LIST_FRAME, after="]<|/tool_call|>"),
)
OLMO3 = CallFormat(
    body="python",
    opening="<function_calls>",
    closing="</function_calls>",
    separators=",",
    lines=True,
    frame=Frame("", "(", ")", before="<function_calls>", separator="\n", after="</function_calls>", quoted=False),
)
GEMMA3 = CallFormat(
    body="python",
    opening="```tool_code",
    closing="```",
    bare=("",),
    brackets="[",
    separators=",",
    lines=True,
    wrapper="print",
    frame=Frame("", "(", ")", before="```tool_code\n", separator="\n", after="\n```", quoted=False),
)
GLM45 = CallFormat(
    body="tags",
    opening="<tool_call>",
    closing="</tool_call>",
    tags=Tags("", "", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", ""),
    frame=Frame("<tool_call>", "\n", "</tool_call>", separator="\n", quoted=False),
)
MINIMAX_M2 = CallFormat(
    body="tags",
    opening="<minimax:tool_call>",
    closing="</minimax:tool_call>",
    tags=Tags('<invoke name="', '">', '<parameter name="', '">', "", "</parameter>", "</invoke>"),
    frame=Frame(
        '<invoke name="',
        '">\n',
        "</invoke>",
        before="<minimax:tool_call>\n",
        separator="\n",
        after="\n</minimax:tool_call>",
        quoted=False,
    ),
)
QWEN3_CODER = CallFormat(
    body="tags",
    opening="<tool_call>",
    other_openings=("<function=",),
    closing="</tool_call>",
    tags=Tags("<function=", ">", "<parameter=", ">", "", "</parameter>", "</function>", own_lines=True),
    frame=Frame("<tool_call>\n<function=", ">\n", "</function>\n</tool_call>", separator="\n", quoted=False),
)
MISTRAL = CallFormat(
    opening="[TOOL_CALLS]",
    separators=",",
    named=True,
    frame=Frame('{"name": ', ', "arguments": ', "}", before="[TOOL_CALLS] [", separator=", ", after="]"),
    new_id=short_call_id,
)
FORMATS = {
    "hermes": HERMES,
    "llama3": CallFormat(
        opening="<|python_tag|>",
        bare=("",),
        separators=";,",
        frame=Frame('{"name": ', ', "parameters": ', "}", separator="; "),
    ),
    "mistral": MISTRAL,
    "pythonic": CallFormat(
        body="python",
        closing="<|python_end|>",
        bare=("<|python_start|>", ""),
        brackets="[",
        separators=",",
        frame=Frame("", "(", ")", before="[", separator=", ", after="]", quoted=False),
    ),
    "qwen": HERMES,
    "qwen25": HERMES,
    "qwen3_coder": QWEN3_CODER,
    "deepseekv3": DEEPSEEK_V3,
    "deepseekv31": DEEPSEEK_V31,
    "deepseekv32": DEEPSEEK_V32,
    "gemma3": GEMMA3,
    "glm": GLM45,
    "glm45": GLM45,
    "glm47": GLM45,
    "gpt-oss": CallFormat(
        channels=HARMONY,
        frame=Frame(
            "<|channel|>commentary to=functions.",
            " <|constrain|>json<|message|>",
            "",
            quoted=False,
            behind_thought="<|start|>assistant",
            alone=True,
        ),
    ),
    "granite": GRANITE,
    "granite4": HERMES,
    "json": CallFormat(
        opening="```json",
        closing="```",
        bare=("",),
        brackets="{[",
        separators=",;",
        shared_opening=True,
        frame=Frame('{"name": ', ', "arguments": ', "}", separator="\n"),
    ),
    "kimi_k2": KIMI_K2,
    "minimax-m2": MINIMAX_M2,
    "mistral_v11": replace(
        MISTRAL, frame=Frame("[TOOL_CALLS]", "[ARGS]", "", quoted=False, mark="[CALL_ID]", marked="id")
    ),
    "mistral_v13": replace(MISTRAL, frame=Frame("[TOOL_CALLS]", "[ARGS]", "", quoted=False)),
    "olmo3": OLMO3,
    "phi4_mini_json": PHI4_MINI,
    "smollm3": HERMES,
}
CLUES = {  # what a chat template that describes tools holds → the format; the first one that is found decides
    r"<\|channel\|>": "gpt-oss",
    r"<minimax:tool_call>": "minimax-m2",
    r"｜DSML｜": "deepseekv32",
    r"<arg_key>": "glm45",
    r"<\|tool_calls_section_begin\|>": "kimi_k2",
    r"<｜tool▁sep｜>(?=[\s\S]{0,200}```json)": "deepseekv3",
    r"<｜tool▁sep｜>": "deepseekv31",
    r"<function=": "qwen3_coder",
    r"<function_calls>": "olmo3",
    r"<\|/tool(_call)?\|>|functools\[": "phi4_mini_json",
    r"<\|tool_call\|>|<function_call>": "granite",
    r"\[CALL_ID\]": "mistral_v11",
    r"\[ARGS\]": "mistral_v13",
    r"\[TOOL_CALLS\]": "mistral",
    r"<\|python_start\|>|\[func_name1\(": "pythonic",
    r"```tool_code": "gemma3",
    r"<tool_call>": "hermes",
    r"<\|python_tag\|>|dictionary of argument name and its value": "llama3",
    r'"(arguments|parameters)\\?": ?[<{]': "json",
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
REQUIRED = CallFormat(bare=("",), brackets="[", separators=",", alone=True)  # what `calls_schema` asks for
