"""Texts that are put before others, by what their vector is for: a query, a document, a text to classify.

A model's files name such prompts (`prompts` in config_sentence_transformers.json) and may say which one is the default.
Some models have an adapter for each task besides: `task` chooses it, and the prompt of the same name.
"""

from typing import Any

from quartet.http_gateway.generation.truncation import Truncating
from quartet.runtime.errors import RequestError
from quartet.runtime.messages import Request
from quartet.runtime.model_files.embedding import Embedding
from quartet.runtime.names import Name
from quartet.runtime.shorten import short

UNKNOWN = "prompt_name {!r} is not among this model's prompts: {}."
NO_PROMPTS = "prompt_name is not supported: this model's files name no prompts."
ONE_PROMPT = "prompt and prompt_name cannot be given at the same time."
NOT_BEFORE_IDS = "{} is for texts, and token ids were given."
NOT_POOLED = "{} is not supported: this model's vectors leave the prompt's tokens out."
NO_TASKS = "task is not supported: the adapters of this model's tasks are not in its directory."
UNKNOWN_TASK = "task must be one of this model's, got {}; they are {}."


class Prompted(Truncating, kw_only=True):
    """The fields by which a request chooses, and those that cut a text."""

    prompt_name: Name | None = None
    prompt: Name | None = None
    task: Any = None  # of models with an adapter for each task; others never heard of it


def task_of(body: Prompted, embedding: Embedding) -> str:
    """The task whose adapter a request wants; "": the base. Raises RequestError, naming the field."""
    if body.task is None or not embedding.task_adapters:
        return embedding.default_task
    if not embedding.tasks:
        raise RequestError(NO_TASKS, field="task")
    if isinstance(body.task, str) and body.task in embedding.tasks:
        return body.task
    given = repr(short(body.task)) if isinstance(body.task, str) else f"a value of the type {type(body.task).__name__}"
    raise RequestError(UNKNOWN_TASK.format(given, ", ".join(embedding.tasks)), field="task")


def prefix_of(body: Prompted, embedding: Embedding, *, texts: bool) -> str:
    """What stands before each text. Raises RequestError, naming the field, for a prompt that cannot be used."""
    field = "prompt" if body.prompt is not None else "prompt_name"
    if body.prompt is not None and body.prompt_name is not None:
        raise RequestError(ONE_PROMPT, field="prompt")
    asked = body.prompt or body.prompt_name
    if asked and not texts:
        raise RequestError(NOT_BEFORE_IDS.format(field), field=field)
    name = body.prompt_name or task_of(body, embedding) or embedding.default_prompt
    if body.prompt_name and body.prompt_name not in embedding.prompts:
        known = ", ".join(sorted(embedding.prompts))
        raise RequestError(UNKNOWN.format(body.prompt_name, known) if known else NO_PROMPTS, field="prompt_name")
    found = body.prompt if body.prompt is not None else embedding.prompts.get(name, "")
    if found and texts and not embedding.prompts_pooled:
        raise RequestError(NOT_POOLED.format(field), field=field)
    return found if texts else ""


def choose_vectors(request: Request, body: Prompted, embedding: Embedding) -> None:
    """Have a model with tasks compute a text for one, and one of many vectors treat it as what its prompt makes it."""
    request.task_adapter = task_of(body, embedding)
    many = embedding.multi_vector
    name = body.prompt_name or embedding.default_prompt
    if many is None or name not in ("query", "document"):
        return
    request.vectors = "query" if name == "query" else "document"
    if name == "query" and many.expansion is not None:
        request.fill_to = many.expansion.length
        if many.expansion.strategy == "fixed":
            request.truncate = min(request.truncate or request.fill_to, request.fill_to)
