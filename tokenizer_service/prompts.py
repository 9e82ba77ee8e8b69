"""Finds the text that a request wants encoded, and how."""

from dataclasses import dataclass, replace
from typing import Protocol

from quartet.runtime.errors import RequestError
from quartet.runtime.messages import Chat, Generate
from quartet.tokenizer_service.pairs import joined

NO_TEMPLATE = (
    "this model has no chat template, so it was not made for conversations: give it one (quartet serve MODEL "
    "--chat-template FILE, or quartet chat MODEL -- --chat-template FILE), or send text to /generate or /v1/completions"
)


class Template(Protocol):
    """The model's chat template."""

    def render(self, chat: Chat) -> str: ...


@dataclass(frozen=True, slots=True)
class Prompt:
    """Text to encode. A rendered chat has its special tokens in it already."""

    text: str | tuple[str, str]
    special_tokens: bool = True
    truncated: bool = False  # it may be longer than the context, for it will be cut


def prompt_of(message: Generate, template: Template | None) -> Prompt | None:
    """The text of a request, or None where it came as ids or vectors. Raises RequestError (400)."""
    truncated = message.request.truncate is not None
    if message.chat is not None:
        return replace(rendered(message.chat, template), truncated=truncated)
    if message.text is not None:
        return Prompt(joined(message.text, message.text_pair), truncated=truncated)
    return None


def rendered(chat: Chat, template: Template | None) -> Prompt:
    """A conversation in the model's own form. Raises RequestError (400)."""
    if template is None:
        raise RequestError(NO_TEMPLATE, field="messages")
    return Prompt(template.render(chat), special_tokens=False)
