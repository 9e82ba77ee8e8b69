"""Prepares the texts of requests and encodes them: refuses what cannot be encoded or is sure not to fit."""

import logging
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from quartet.runtime.control import Tokenize
from quartet.runtime.errors import Kind, RequestError, too_long
from quartet.runtime.messages import Generate, Request
from quartet.runtime.sampling import SamplingParams
from quartet.runtime.stop_patterns import check_stops
from quartet.tokenizer_service.jobs import chars_of
from quartet.tokenizer_service.long_texts import cannot_be_tokenized, encode_whole
from quartet.tokenizer_service.prompts import Prompt, Template, prompt_of, rendered

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

log = logging.getLogger(__name__)

VERY_LONG_CHARS = 1 << 20  # above, the longest token of the vocabulary tells what cannot fit
TOO_LONG = "The input (more than {0} tokens) is longer than the model's context length ({0} tokens)."
INTERNAL = "Internal error: the text could not be tokenized ({})."
NO_TOKENIZER = "the tokenizer is not initialized (--skip-tokenizer-init); send input_ids"
NEED_TOKENIZER = ("stop", "stop_regex", "min_new_tokens")  # parameters that mean nothing without one


class TextEncoder:
    """The tokenizer, the chat template and the context length of one model."""

    def __init__(self, tokenizer: "Tokenizer | None", template: Template | None, context_length: int | None) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self.context_length = context_length

    def prepare(self, message: Generate | Tokenize, index: int) -> Prompt | RequestError | None:
        """The text to encode (of a Tokenize: its text `index`), None for a prompt that is not text, or the refusal."""
        try:
            if isinstance(message, Generate):
                self.check_params(message.request.params)
                prompt = prompt_of(message, self._template)
            else:
                prompt = self._text_of(message, index)
            if prompt is not None:
                self._check_text(prompt)
                prompt = self._pre_cut(prompt, message.request) if isinstance(message, Generate) else prompt
        except RequestError as error:
            return error
        except Exception as error:
            log.exception("a prompt could not be prepared")
            return RequestError(INTERNAL.format(type(error).__name__), Kind.INTERNAL)
        return prompt

    def _text_of(self, command: Tokenize, index: int) -> Prompt:
        if index < len(command.texts):
            return Prompt(command.texts[index], command.add_special_tokens)
        assert command.chat is not None
        return rendered(command.chat, self._template)

    def refusal_of(self, message: Generate) -> RequestError | None:
        """Why a request that has no text is refused, if it is."""
        try:
            self.check_params(message.request.params)
        except RequestError as error:
            return error
        return None

    def check_params(self, params: SamplingParams) -> None:
        """Refuse stop conditions that the detokenizer could not carry out."""
        if self._tokenizer is None:
            for field in NEED_TOKENIZER:
                if getattr(params, field):
                    raise RequestError(f"{field} needs a tokenizer (--skip-tokenizer-init is set)", field=field)
        check_stops(params.stop_patterns)

    def _check_text(self, prompt: Prompt) -> None:
        """Refuse what cannot be encoded, and what is sure not to fit the context before time is spent on it."""
        if self._tokenizer is None:
            raise RequestError(NO_TOKENIZER, field="text")
        if prompt.truncated:
            return
        chars = chars_of(prompt)
        if self.context_length is None or chars <= VERY_LONG_CHARS:
            return
        if chars > self.context_length * self._longest_token_chars:
            raise too_long(TOO_LONG.format(self.context_length), "text")

    def _pre_cut(self, prompt: Prompt, request: Request) -> Prompt:
        """The prompt without text that is sure to be cut off, before time is spent on it."""
        if request.truncate is None or isinstance(prompt.text, tuple) or len(prompt.text) <= VERY_LONG_CHARS:
            return prompt
        chars = max(request.truncate * self._longest_token_chars, 1)
        text = prompt.text[:chars] if request.truncate_side == "right" else prompt.text[-chars:]
        return replace(prompt, text=text)

    @cached_property
    def _longest_token_chars(self) -> int:
        assert self._tokenizer is not None
        return max(map(len, self._tokenizer.get_vocab()))

    def encode(self, prompts: list[Prompt]) -> "list[Encoding | RequestError]":
        """An encoding or a refusal for each prompt, in order; prompts under the same rule share a call."""
        found: dict[int, Encoding | RequestError] = {}
        for special in (True, False):
            places = [place for place, prompt in enumerate(prompts) if prompt.special_tokens is special]
            found.update(zip(places, self._encode_texts([prompts[p].text for p in places], special), strict=True))
        return [found[place] for place in range(len(prompts))]

    def _encode_texts(self, texts: list[Any], special: bool) -> "list[Encoding | RequestError]":
        if not texts:
            return []
        assert self._tokenizer is not None, "text without a tokenizer is refused before"
        try:
            return list(encode_whole(self._tokenizer, texts, special))
        except Exception as error:  # tokenizers raises nothing narrower; one bad text must not fail the others
            if len(texts) == 1:
                return [cannot_be_tokenized(error)]
            return [result for text in texts for result in self._encode_texts([text], special)]
