"""Chat templates: a conversation becomes the prompt that the model was trained on, as Hugging Face renders it.

The template is a file of the model (or one named by `--chat-template`), written by people we do not know; it runs in
`quartet.tokenizer_service.sandbox` under a budget. What a client sends is data for it and never code.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jinja2
import msgspec
from jinja2 import nodes

from quartet.runtime import limits
from quartet.runtime.config import ServerConfig
from quartet.runtime.errors import RequestError, StartupError, too_long
from quartet.runtime.messages import Chat
from quartet.runtime.model_files.chat_templates import template_dir, template_sources
from quartet.runtime.model_files.model_info import ModelInfo, read_json
from quartet.tokenizer_service import call_ids, turns
from quartet.tokenizer_service.sandbox import ChatEnvironment, ConversationRefused, TextTooLong

log = logging.getLogger(__name__)

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
PROTECTED = frozenset({"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"})
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
TOO_LONG = "{}: longer than the model's context length ({} tokens)."
CUT_HERE = "CONTINUE_FINAL_MESSAGE_TAG "  # marks the end of a final message that is to be continued

NO_ARGUMENTS = ("", "null")  # as some clients echo a call that had none

ContentFormat = Literal["string", "openai"]
Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Habits:
    """How a template reads an assistant's turn that calls tools."""

    null_content: bool = False  # it knows such a turn by its content being none
    text_arguments: bool = False  # it joins the arguments to strings, rather than print an object as JSON


class ChatTemplate:
    """The templates of one model, compiled; `render` is a function of the conversation alone."""

    def __init__(
        self,
        sources: Mapping[str, str],
        special_tokens: Mapping[str, str],
        context_length: int,
        environment: ChatEnvironment | None = None,
    ) -> None:
        """`sources`: template by name, `default` among them. Raises jinja2.TemplateError on a bad one."""
        self._environment = environment or ChatEnvironment()
        self._sources = dict(sources)
        self._compiled = {name: self._environment.from_string(source) for name, source in sources.items()}
        self._special_tokens = dict(special_tokens)
        self._context_length = context_length
        self.content_format = content_format(self._environment.parse(self._sources["default"]))
        self._habits = {name: habits(self._environment.parse(source)) for name, source in sources.items()}

    def render(self, chat: Chat) -> str:
        """The prompt. Raises RequestError (400) with the template engine's message."""
        _check(chat)
        self._check_count(chat)
        name = "tool_use" if chat.tools is not None and "tool_use" in self._compiled else "default"
        messages = [_message(message, self.content_format, self._habits[name]) for message in chat.messages]
        messages = call_ids.fit(messages, self._sources[name])
        final = _mark_final(messages, self._sources[name]) if chat.continue_final_message else None
        variables = {
            **self._special_tokens,
            "xml_tools": chat.tools,  # as SmolLM3's template calls them
            **chat.template_kwargs,
            "messages": messages,
            "tools": chat.tools,
            "documents": chat.documents,
            "add_generation_prompt": chat.add_generation_prompt,
        }
        max_chars = limits.TEMPLATE_CHARS_PER_CONTEXT_TOKEN * self._context_length
        self._environment.meter.start(limits.template_cpu_s(len(messages)), max_chars)
        try:
            prompt = self._prompt(name, variables, chat.as_it_is)
        except TextTooLong as error:
            raise too_long(TOO_LONG.format(error, self._context_length), "messages") from error
        except Exception as error:  # template code may raise anything; all of it is this request's fault
            raise RequestError(
                f"the chat template failed: {error or type(error).__name__}", field="messages"
            ) from error
        return prompt if final is None else _cut(prompt, final)

    def _prompt(self, name: str, variables: Mapping[str, Any], as_it_is: bool) -> str:
        """The prompt; in turns, where the template refuses the conversation as it stands. Both have one budget."""
        template = self._compiled[name]
        try:
            return template.render(variables)
        except ConversationRefused:
            messages = turns.in_turns(variables["messages"])
            if as_it_is or messages == variables["messages"]:
                raise
            return template.render({**variables, "messages": messages})

    def _check_count(self, chat: Chat) -> None:
        """Refuse more messages than the context has tokens, before time is spent on them."""
        if len(chat.messages) > self._context_length:
            made = f"the conversation has {len(chat.messages)} messages"
            raise too_long(TOO_LONG.format(made, self._context_length), "messages")


def load_template(info: ModelInfo, config: ServerConfig) -> ChatTemplate | None:
    """The served model's template, or None where it has none. Raises StartupError when it cannot be read."""
    directory = template_dir(info, config)
    sources = template_sources(directory, config.chat_template)
    if not sources:
        log.info("No chat template found, defaulting to 'string' content format")
        return None
    if "default" not in sources:
        raise StartupError(
            f"{directory} has chat templates named {sorted(sources)} but no default; use --chat-template"
        )
    tokens = special_tokens(
        read_json(directory / "special_tokens_map.json"), read_json(directory / "tokenizer_config.json")
    )
    try:
        template = ChatTemplate(sources, tokens, info.context_length)
    except (jinja2.TemplateError, RecursionError) as error:
        raise StartupError(f"the chat template of {directory} cannot be compiled: {error}") from error
    origin = "default HuggingFace chat template" if config.chat_template is None else f"template {config.chat_template}"
    log.info("Using %s with detected content format: %s", origin, template.content_format)
    return template


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
    return _is_field(node, "content") or (isinstance(node, nodes.Name) and node.name in names)


def _is_field(node: nodes.Node | None, field: str) -> bool:
    """Whether an expression is `x.field` or `x["field"]`."""
    match node:
        case nodes.Getattr(attr=name) | nodes.Getitem(arg=nodes.Const(value=name)):
            return name == field
    return False


def habits(tree: nodes.Template) -> Habits:
    """What a template's own code says of its habits."""
    tests = list(tree.find_all(nodes.Test))
    used: list[nodes.Node | None] = [test.node for test in tests]
    used += [filtered.node for filtered in tree.find_all(nodes.Filter)]
    used += [item.node for item in tree.find_all(nodes.Getitem)]
    used += [attribute.node for attribute in tree.find_all(nodes.Getattr)]
    as_object = any(_is_field(node, "arguments") for node in used)
    return Habits(
        null_content=any(test.name == "none" and _is_field(test.node, "content") for test in tests),
        text_arguments=not as_object and any(_is_field(part, "arguments") for part in _joined(tree)),
    )


def _joined(tree: nodes.Template) -> Iterator[nodes.Node]:
    """The operands of `+` and `~`."""
    for node in tree.find_all((nodes.Add, nodes.Concat, nodes.List)):  # the sandbox makes a list of what `~` joins
        yield from node.iter_child_nodes()


def _check(chat: Chat) -> None:
    if not chat.messages:
        raise RequestError("Messages cannot be empty.", field="messages")
    if chat.continue_final_message and chat.add_generation_prompt:
        raise RequestError(
            "continue_final_message and add_generation_prompt exclude each other.", field="continue_final_message"
        )
    if taken := sorted(PROTECTED & chat.template_kwargs.keys()):
        raise RequestError(f"chat_template_kwargs may not set {taken[0]}.", field="chat_template_kwargs")


def _message(message: Message, form: ContentFormat, habits: Habits) -> Message:
    """A message as templates expect it: no nulls, content in the template's format, reasoning under its names.

    No content is an empty one: most templates add it to a string.
    """
    whole = message if message.get("content") is not None else {**message, "content": ""}
    plain = {key: value for key, value in whole.items() if value is not None}
    if isinstance(content := plain.get("content"), list):
        texts = [_text_of(part) for part in content]
        plain["content"] = " ".join(texts) if form == "string" else [{"type": "text", "text": text} for text in texts]
    if isinstance(plain.get("tool_calls"), list):
        plain["tool_calls"] = [_tool_call(call, habits.text_arguments) for call in plain["tool_calls"]]
        if habits.null_content and plain["tool_calls"] and not plain["content"]:
            plain["content"] = None
    reasoning = next((plain[key] for key in REASONING_FIELDS if key in plain), None)
    return plain if reasoning is None else {"thinking": reasoning, **plain, "reasoning_content": reasoning}


def _tool_call(call: Any, text_arguments: bool) -> Any:
    """The call with its arguments as an object: clients send them as JSON text, templates print them with tojson."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    arguments: Any = "{}" if function["arguments"].strip() in NO_ARGUMENTS else function["arguments"]
    if not text_arguments:
        try:
            arguments = msgspec.json.decode(arguments, type=dict[str, Any])
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
