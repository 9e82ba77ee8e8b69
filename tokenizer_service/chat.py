"""Chat templates: a conversation becomes the prompt that the model was trained on, as Hugging Face renders it.

The template is a file of the model (or one named by `--chat-template`), written by people we do not know; it runs in
`tokenizer_service.sandbox` under a budget. What a client sends is data for it and never code.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jinja2
import msgspec
from jinja2 import nodes

from runtime import limits
from runtime.config import ServerConfig
from runtime.errors import RequestError, StartupError
from runtime.messages import Chat
from runtime.model_info import ModelInfo, read_json, tokenizer_dir
from tokenizer_service import call_ids
from tokenizer_service.sandbox import ChatEnvironment

log = logging.getLogger(__name__)

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
PROTECTED = frozenset({"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"})
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
CUT_HERE = "CONTINUE_FINAL_MESSAGE_TAG "  # marks the end of a final message that is to be continued

ContentFormat = Literal["string", "openai"]
Message = dict[str, Any]


class ChatTemplate:
    """The templates of one model, compiled; `render` is a function of the conversation alone."""

    def __init__(
        self,
        sources: Mapping[str, str],
        special_tokens: Mapping[str, str],
        max_chars: int,
        environment: ChatEnvironment | None = None,
    ) -> None:
        """`sources`: template by name, `default` among them. Raises jinja2.TemplateError on a bad one."""
        self._environment = environment or ChatEnvironment()
        self._sources = dict(sources)
        self._compiled = {name: self._environment.from_string(source) for name, source in sources.items()}
        self._special_tokens = dict(special_tokens)
        self._max_chars = max_chars
        self.content_format = content_format(self._environment.parse(self._sources["default"]))

    def render(self, chat: Chat) -> str:
        """The prompt. Raises RequestError (400) with the template engine's message."""
        _check(chat)
        messages = [_message(message, self.content_format) for message in chat.messages]
        name = "tool_use" if chat.tools is not None and "tool_use" in self._compiled else "default"
        if call_ids.insists(self._sources[name]):
            messages = [call_ids.fitted(message) for message in messages]
        final = _mark_final(messages, self._sources[name]) if chat.continue_final_message else None
        variables = {
            **self._special_tokens,
            **chat.template_kwargs,
            "messages": messages,
            "tools": chat.tools,
            "documents": chat.documents,
            "add_generation_prompt": chat.add_generation_prompt,
        }
        self._environment.meter.start(limits.TEMPLATE_CPU_S, self._max_chars)
        try:
            prompt = self._compiled[name].render(variables)
        except Exception as error:  # template code may raise anything; all of it is this request's fault
            raise RequestError(
                f"the chat template failed: {error or type(error).__name__}", field="messages"
            ) from error
        return prompt if final is None else _cut(prompt, final)


def load_template(info: ModelInfo, config: ServerConfig) -> ChatTemplate | None:
    """The served model's template, or None where it has none. Raises StartupError when it cannot be read."""
    directory = tokenizer_dir(config) if config.tokenizer_path else Path(info.path)
    tokenizer_config = read_json(directory / "tokenizer_config.json")
    if config.chat_template is not None:
        sources = {"default": _chosen_source(config.chat_template)}
    else:
        sources = _sources_of(directory) or _sources_in(tokenizer_config)
    if not sources:
        log.info("No chat template found, defaulting to 'string' content format")
        return None
    if "default" not in sources:
        raise StartupError(
            f"{directory} has chat templates named {sorted(sources)} but no default; use --chat-template"
        )
    tokens = special_tokens(read_json(directory / "special_tokens_map.json"), tokenizer_config)
    max_chars = max(limits.TEMPLATE_CHARS_PER_CONTEXT_TOKEN * info.context_length, limits.TEMPLATE_MIN_OUTPUT_CHARS)
    try:
        template = ChatTemplate(sources, tokens, max_chars)
    except (jinja2.TemplateError, RecursionError) as error:
        raise StartupError(f"the chat template of {directory} cannot be compiled: {error}") from error
    origin = "default HuggingFace chat template" if config.chat_template is None else f"template {config.chat_template}"
    log.info("Using %s with detected content format: %s", origin, template.content_format)
    return template


def bundled() -> dict[str, Path]:
    """The templates that `--chat-template` knows by name."""
    return {file.stem: file for file in sorted((Path(__file__).parent / "templates").glob("*.jinja"))}


def _chosen_source(name: str) -> str:
    """The text of `--chat-template`: a file, or the name of a bundled template."""
    path = Path(name) if Path(name).is_file() else bundled().get(name)
    if path is None:
        raise StartupError(f"--chat-template {name!r} is neither a file nor one of: {', '.join(bundled())}")
    return path.read_text(encoding="utf-8")


def _sources_of(directory: Path) -> dict[str, str]:
    """Template files beside the tokenizer."""
    files = {file.stem: file for file in sorted((directory / "additional_chat_templates").glob("*.jinja"))}
    if (directory / "chat_template.jinja").is_file():
        files["default"] = directory / "chat_template.jinja"
    return {name: file.read_text(encoding="utf-8") for name, file in files.items()}


class _Named(msgspec.Struct):
    name: str
    template: str


def _sources_in(tokenizer_config: dict[str, Any]) -> dict[str, str]:
    """Templates inside tokenizer_config.json: one text, or a list of named ones."""
    value = tokenizer_config.get("chat_template")
    if value is None:
        return {}
    try:
        found = msgspec.convert(value, str | list[_Named])
    except msgspec.ValidationError as error:
        raise StartupError(f"chat_template in tokenizer_config.json: {error}") from error
    return {"default": found} if isinstance(found, str) else {named.name: named.template for named in found}


def special_tokens(*sources: Mapping[str, Any]) -> dict[str, str]:
    """The named special tokens as text; a later source wins. A token is a string or {"content": string}."""
    tokens: dict[str, str] = {}
    for source in sources:
        for name in SPECIAL_TOKENS:
            value = source.get(name)
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                tokens[name] = text
    return tokens


def content_format(tree: nodes.Template) -> ContentFormat:
    """`openai` when the template itself walks over a message's content parts, else `string`."""
    names = {"content"}  # as a macro's argument is called
    for assignment in tree.find_all(nodes.Assign):
        if isinstance(assignment.target, nodes.Name) and _is_content(assignment.node, set()):
            names.add(assignment.target.name)
    return "openai" if any(_is_content(loop.iter, names) for loop in tree.find_all(nodes.For)) else "string"


def _is_content(node: nodes.Node | None, names: set[str]) -> bool:
    """Whether an expression is a message's content, seen through filters and names."""
    while isinstance(node, nodes.Filter):
        node = node.node
    match node:
        case nodes.Getattr(attr="content"):
            return True
        case nodes.Getitem(arg=nodes.Const(value="content")):
            return True
        case nodes.Name(name=name):
            return name in names
    return False


def _check(chat: Chat) -> None:
    if not chat.messages:
        raise RequestError("Messages cannot be empty.", field="messages")
    if chat.continue_final_message and chat.add_generation_prompt:
        raise RequestError(
            "continue_final_message and add_generation_prompt exclude each other.", field="continue_final_message"
        )
    if taken := sorted(PROTECTED & chat.template_kwargs.keys()):
        raise RequestError(f"chat_template_kwargs may not set {taken[0]}.", field="chat_template_kwargs")


def _message(message: Message, form: ContentFormat) -> Message:
    """A message as templates expect it: no nulls, content in the template's format, reasoning under its names."""
    plain = {key: value for key, value in message.items() if value is not None}
    if isinstance(content := plain.get("content"), list):
        texts = [_text_of(part) for part in content]
        plain["content"] = " ".join(texts) if form == "string" else [{"type": "text", "text": text} for text in texts]
    if isinstance(plain.get("tool_calls"), list):
        plain["tool_calls"] = [_tool_call(call) for call in plain["tool_calls"]]
    reasoning = next((plain[key] for key in REASONING_FIELDS if key in plain), None)
    return plain if reasoning is None else {"thinking": reasoning, **plain, "reasoning_content": reasoning}


def _tool_call(call: Any) -> Any:
    """The call with its arguments as an object: clients send them as JSON text, templates print them with tojson."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = msgspec.json.decode(function["arguments"] or "{}", type=dict[str, Any] | None) or {}
    except (ValueError, RecursionError):  # not an object: the template shall print what the client sent
        return call
    return {**call, "function": {**function, "arguments": arguments}}


def _text_of(part: Any) -> str:
    if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        raise RequestError(f"content parts of type {kind!r} are not supported: only text is.", field="messages")
    text: str = part["text"]
    return text


def _mark_final(messages: list[Message], source: str) -> str:
    """Put the mark behind the final message's text, in place; return that text."""
    content = messages[-1].get("content")
    if content is None or content == [] or "content" not in source:
        raise RequestError("continue_final_message: the final message has no content to continue.", field="messages")
    if isinstance(content, str):
        messages[-1]["content"] = content + CUT_HERE
        return content
    text: str = content[-1]["text"]
    content[-1] = {"type": "text", "text": text + CUT_HERE}
    return text


def _cut(prompt: str, final: str) -> str:
    """The prompt up to the mark; where the template trimmed the message, so is the prompt."""
    mark = prompt.rfind(CUT_HERE.strip())
    if mark < 0 or final.strip() not in prompt:
        raise RequestError(
            "continue_final_message: the chat template does not render the final message as it is.", field="messages"
        )
    return prompt[:mark] if prompt.startswith(CUT_HERE, mark) else prompt[:mark].rstrip()
