"""Extra fields of a choice of the OpenAI endpoints, where a request asks for them.

Ids of the prompt's and the output's tokens, the hidden state behind the last one, and the native `meta_info`.
"""

from array import array
from typing import Any

from quartet.http_gateway.openai.types import GenerationBody
from quartet.http_gateway.routes.gateway import Gateway
from quartet.runtime.messages import Request, Text, unpack_ids

DISTRIBUTIONS = ("return_entropy", "return_sampling_mask")  # which are reported in meta_info


def wants_meta_info(body: GenerationBody) -> bool:
    return bool(body.return_meta_info) or any(getattr(body, name) for name in DISTRIBUTIONS)


class Extras:
    """Those of one choice."""

    def __init__(self, gateway: Gateway, body: GenerationBody, request: Request, received_at: float) -> None:
        self._output = gateway.output(request, received_at) if wants_meta_info(body) else None
        self._wants_ids = bool(body.return_token_ids)
        self._ids: list[int] = []  # not sent yet
        self._prompt_ids: list[int] = []
        self._hidden: list[float] = []

    def take(self, text: Text) -> None:
        """Add one step of the request."""
        tokens = text.tokens
        if self._output is not None:
            self._output.add(text)
        if self._wants_ids:
            self._ids += unpack_ids(tokens.ids)
        if tokens.prompt_ids:
            self._prompt_ids = unpack_ids(tokens.prompt_ids).tolist()
        if tokens.hidden_states:
            self._hidden = array("f", tokens.hidden_states)[-tokens.hidden_size :].tolist()

    def take_new(self) -> dict[str, Any]:
        """The ids that are new since the last time, by the names of an answer's fields."""
        fields: dict[str, Any] = {"token_ids": self._ids} if self._ids else {}
        if self._prompt_ids:
            fields["prompt_token_ids"] = self._prompt_ids
        self._ids, self._prompt_ids = [], []
        return fields

    def end(self) -> dict[str, Any]:
        """The fields that are known at the end only."""
        fields: dict[str, Any] = {} if self._output is None else {"meta_info": self._output.meta_info()}
        return fields | ({"hidden_states": self._hidden} if self._hidden else {})
