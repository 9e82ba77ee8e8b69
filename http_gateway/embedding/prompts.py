"""Texts that are put before others, by what their vector is for: a query, a document, a text to classify.

A model's files name such prompts (`prompts` in config_sentence_transformers.json) and may say which one is the default.
"""

from quartet.http_gateway.generation.truncation import Truncating
from quartet.runtime.errors import RequestError
from quartet.runtime.model_files.embedding import Embedding
from quartet.runtime.names import Name

UNKNOWN = "prompt_name {!r} is not among this model's prompts: {}."
NO_PROMPTS = "prompt_name is not supported: this model's files name no prompts."
ONE_PROMPT = "prompt and prompt_name cannot be given at the same time."
NOT_BEFORE_IDS = "{} is for texts, and token ids were given."
NOT_POOLED = "{} is not supported: this model's vectors leave the prompt's tokens out."


class Prompted(Truncating, kw_only=True):
    """The fields by which a request chooses, and those that cut a text."""

    prompt_name: Name | None = None
    prompt: Name | None = None


def prefix_of(body: Prompted, embedding: Embedding, *, texts: bool) -> str:
    """What stands before each text. Raises RequestError, naming the field, for a prompt that cannot be used."""
    field = "prompt" if body.prompt is not None else "prompt_name"
    if body.prompt is not None and body.prompt_name is not None:
        raise RequestError(ONE_PROMPT, field="prompt")
    asked = body.prompt or body.prompt_name
    if asked and not texts:
        raise RequestError(NOT_BEFORE_IDS.format(field), field=field)
    name = body.prompt_name or embedding.default_prompt
    if body.prompt_name and body.prompt_name not in embedding.prompts:
        known = ", ".join(sorted(embedding.prompts))
        raise RequestError(UNKNOWN.format(body.prompt_name, known) if known else NO_PROMPTS, field="prompt_name")
    found = body.prompt if body.prompt is not None else embedding.prompts.get(name, "")
    if found and texts and not embedding.prompts_pooled:
        raise RequestError(NOT_POOLED.format(field), field=field)
    return found if texts else ""
