"""What a chat request asks for: the conversation to render, the grammar of its tool choice, the parsers of its turn."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any, Literal

import msgspec

from quartet.http_gateway.generation.intake import NO_BUDGET
from quartet.http_gateway.native.generate_body import TWO_BUDGETS, pack_prompt_ids, placeholder_request
from quartet.http_gateway.openai.chat_turn import Turn
from quartet.http_gateway.openai.params import budget_of, params_of
from quartet.http_gateway.openai.response_format import VLLM_FIELDS
from quartet.http_gateway.openai.types import ChatBody, NamedTool
from quartet.http_gateway.parsers import reasoning, tool_calls
from quartet.http_gateway.parsers.call_formats import REQUIRED, CallFormat, call_id
from quartet.http_gateway.parsers.output_reader import OutputReader
from quartet.http_gateway.parsers.tool_events import Tool
from quartet.http_gateway.parsers.untagged_calls import UntaggedCalls
from quartet.http_gateway.routes.gateway import Gateway
from quartet.runtime.errors import RequestError
from quartet.runtime.messages import Chat, Generate, LogprobOptions, Thought
from quartet.runtime.sampling import GRAMMARS, SamplingParams
from quartet.runtime.shorten import short

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
NO_MESSAGES = "Messages cannot be empty."
NO_TOOLS = "Tools cannot be empty if tool choice is set to required."
NO_TEMPLATES = "chat_template is not supported: conversations are rendered by the server's own (--chat-template)."
NO_SUCH_TOOL = "Tool '{}' not found in tools list."
BUDGETS = ("thinking_budget", "max_thinking_tokens")
NO_LIMIT = -1  # of a budget
TOO_LARGE = "{} is too large: {}.This model supports at most {} completion tokens."


@dataclass(frozen=True)
class Choosing:
    """What `tools` and `tool_choice` come to."""

    tools: Sequence[Tool] = ()  # those the template describes
    grammar: tuple[str, str] | None = None  # of the calls that are demanded, or of those that must be strict
    format: CallFormat | None = None  # how the calls are written
    untagged: bool = False  # they may come without their tags
    demanded: bool = False  # calls are the whole output: the format of a message means nothing


def choosing(body: ChatBody, tool_call_parser: str | None) -> Choosing:
    """Raises RequestError for a choice that cannot be made."""
    tools, choice = offered(body)
    if choice is None:
        choice = "auto" if tools else "none"
    if choice == "none":
        return Choosing()
    own = tool_calls.format_of(tool_call_parser) if tool_call_parser else None
    if choice == "auto":
        if own is None or not tools:
            return Choosing(tools)
        if constrained(body):
            return Choosing(tools, None, own)
        untagged = own.untagged and not answers_tool(body.messages)
        return Choosing(tools, tool_calls.strict_calls(own, tools), own, untagged)
    name = choice.function.name if isinstance(choice, NamedTool) and choice.function else None
    if name is None and not tools:
        raise RequestError(NO_TOOLS, field="tools")
    if name is not None and name not in tool_calls.names_of(tools):
        raise RequestError(NO_SUCH_TOOL.format(short(name)), field="tool_choice")
    parallel = body.parallel_tool_calls is not False
    if own is not None and (grammar := tool_calls.demanded_calls(own, tools, name, parallel)) is not None:
        return Choosing(tools, grammar, replace(own, alone=True), demanded=True)
    schema = tool_calls.calls_schema(tools, name, parallel)
    form = replace(REQUIRED, new_id=own.new_id) if own else REQUIRED
    return Choosing(tools, ("json_schema", schema), form, demanded=True)


def offered(body: ChatBody) -> tuple[Sequence[Tool], Literal["none", "auto", "required"] | NamedTool | None]:
    """The tools that the model may call, and the choice among them. Raises RequestError."""
    tools, choice = body.tools or [], body.tool_choice
    check_tool_names(tools)
    if not isinstance(choice, NamedTool):
        return tools, choice
    if getattr(choice, choice.type) is None:
        raise RequestError(
            f"tool_choice: {choice.type} is required where type is {choice.type!r}.", field="tool_choice"
        )
    if choice.type == "function" or choice.allowed_tools is None:
        return tools, choice
    by_name = {tool.function.name: tool for tool in tools}
    names = dict.fromkeys(allowed.function.name for allowed in choice.allowed_tools.tools)
    if not names:
        raise RequestError("tool_choice: allowed_tools must name functions.", field="tool_choice")
    if missing := next((name for name in names if name not in by_name), None):
        raise RequestError(NO_SUCH_TOOL.format(short(missing)), field="tool_choice")
    return [by_name[name] for name in names], choice.allowed_tools.mode


def check_tool_names(tools: Sequence[Tool]) -> None:
    """Raise RequestError where two tools have one name: nobody could tell whose arguments a call has."""
    name, count = max(Counter(tool_calls.names_of(tools)).items(), key=itemgetter(1), default=("", 0))
    if count > 1:
        raise RequestError(f"tools: {count} tools have the name {short(name)!r}.", field="tools")


def answers_tool(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the model is to answer a tool's result, which small models repeat in the form of a call."""
    return bool(messages) and messages[-1].get("role") in ("tool", "function")


def constrained(body: ChatBody) -> bool:
    """Whether the client says itself what the output must look like."""
    has_format = body.response_format is not None and body.response_format.type != "text"
    return has_format or any(getattr(body, name, None) is not None for name in (*GRAMMARS, *VLLM_FIELDS))


def chat_params(gateway: Gateway, body: ChatBody, choice: Choosing) -> SamplingParams:
    """The sampling parameters. Without a limit, the turn may fill the context."""
    limit = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    most = gateway.facts.context_length
    if limit is not None and limit > most:
        name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        raise RequestError(TOO_LARGE.format(name, limit, most), field=name)
    fallback: dict[str, Any] = {"max_new_tokens": None}
    if (choice.format is not None and not choice.format.alone) or marks_are_tokens(gateway.config.reasoning_parser):
        fallback["skip_special_tokens"] = False  # some models write calls and thoughts between special tokens
    fixed: dict[str, int | None] = {} if limit is None else {"max_new_tokens": limit}
    if choice.format is not None and choice.format.alone and choice.format.frame is not None:
        fixed["skip_special_tokens"] = False  # whatever the client says: its calls must be read
    if (budget := thinking_budget(body)) is not None:
        fixed["thinking_budget"] = budget
    if choice.demanded:
        body = msgspec.structs.replace(body, response_format=None)
    return params_of(gateway, body, fixed, fallback, choice.grammar)


def thinking_budget(body: ChatBody) -> int | None:
    """The most tokens of a thought: of the body, else of the template's variables. Raises RequestError."""
    in_template = template_budget(body.chat_template_kwargs or {})
    own = budget_of(body)
    return in_template if own is None else own


def template_budget(variables: Mapping[str, Any]) -> int | None:
    """The same of the template's variables; templates that know such a variable write -1 for no limit."""
    given = {name: value for name in BUDGETS if (value := variables.get(name)) is not None}
    for name, value in given.items():
        if type(value) is not int or value < NO_LIMIT:
            raise RequestError(
                f"{name} must be an integer, and -1 (no limit) or more, got {short(str(value))}.",
                field="chat_template_kwargs",
            )
    if len(set(given.values())) > 1:
        raise RequestError(TWO_BUDGETS, field="chat_template_kwargs")
    found: int | None = next(iter(given.values()), None)
    return None if found == NO_LIMIT else found


def marks_are_tokens(family: str | None) -> bool:
    """Whether thoughts stand between tokens that are no text."""
    marks = reasoning.family(family).marks if family else None
    return marks is not None and (marks.anywhere or marks.channels is not None)


def logprob_options(body: ChatBody) -> LogprobOptions | None:
    if not body.logprobs:
        if body.top_logprobs:
            raise RequestError("top_logprobs needs logprobs to be true.", field="top_logprobs")
        return None
    return LogprobOptions(top=body.top_logprobs or 0, text=True)


def prompt_of(body: ChatBody, choice: Choosing, vocab_size: int) -> Generate:
    """The conversation, to be rendered by the tokenizer; or the ids that the client has rendered itself."""
    if body.chat_template is not None or "chat_template" in (body.chat_template_kwargs or {}):
        raise RequestError(NO_TEMPLATES, field="chat_template")
    if body.input_ids is not None:
        return Generate(request=placeholder_request(), input_ids=pack_prompt_ids(body.input_ids, vocab_size))
    if not body.messages:
        raise RequestError(NO_MESSAGES, field="messages")
    continues = bool(body.continue_final_message)
    chat = Chat(
        messages=[checked(message) for message in body.messages],
        tools=[tool.plain() for tool in choice.tools] or None,
        documents=body.documents,
        add_generation_prompt=not continues if body.add_generation_prompt is None else body.add_generation_prompt,
        continue_final_message=continues,
        template_kwargs=template_variables(body),
    )
    return Generate(request=placeholder_request(), chat=chat)


def checked(message: dict[str, Any]) -> dict[str, Any]:
    """The message under a role that templates know: they were written before `developer` took over from `system`."""
    role = message.get("role")
    if role not in ROLES:
        raise RequestError(f"A message's role must be one of {', '.join(ROLES)}, got {role!r}.", field="messages")
    content = message.get("content")
    if not isinstance(content, str | list | None) or (content is None and role == "user"):
        raise RequestError("A message's content must be a string or a list of parts.", field="messages")
    return {**message, "role": "system"} if role == "developer" else message


def template_variables(body: ChatBody) -> dict[str, Any]:
    """The template's variables: what the body says of thinking, under the names that templates use."""
    variables: dict[str, Any] = {}
    thinks = False if body.reasoning_effort == "none" else None
    if body.reasoning_effort is not None and thinks is None:
        variables["reasoning_effort"] = body.reasoning_effort
    if body.enable_thinking is not None:
        thinks = body.enable_thinking
    if thinks is not None:
        variables |= {"enable_thinking": thinks, "thinking": thinks}
    if (budget := thinking_budget(body)) is not None:
        variables["thinking_budget"] = budget
    return variables | (body.chat_template_kwargs or {})


def make_turn(body: ChatBody, choice: Choosing, family: str | None, thought: Thought | None) -> Turn:
    """The reader of one choice's output. `family`: how the model thinks; `thought`: as in the request."""
    calls = choice.format
    separate = body.separate_reasoning is not False
    marks = reasoning.family(family).marks if family and thought else None
    if marks and not marks.channels and not separate and not (calls and calls.alone):
        thought = marks = None  # it is to stay in the content, tags and all
    if marks is None and calls is None:
        return Turn()
    known, schemas = tool_calls.names_of(choice.tools), tool_calls.schemas_of(choice.tools)
    return Turn(
        OutputReader(marks, thought.place if thought else "before", calls, known, schemas),
        untagged=UntaggedCalls(known, schemas) if choice.untagged else None,
        stream_reasoning=body.stream_reasoning is not False,
        separate_reasoning=separate,
        most_calls=1 if body.parallel_tool_calls is False else None,
        new_id=calls.new_id if calls else call_id,
    )


def thought_of(body: ChatBody, family: str | None, params: SamplingParams) -> Thought | None:
    """What the output may begin with, on a server that knows how its model thinks. Raises RequestError where it does
    not and the thought has a budget.

    A regex or an EBNF constrains the whole output. There is a thought in it only where it spells one of the tags.
    """
    variables = template_variables(body)
    if family is None and params.thinking_budget is not None:
        raise RequestError(NO_BUDGET, field="thinking_budget")
    if family is None:
        return None
    found = reasoning.family(family)
    marks = found.marks
    if variables.get("enable_thinking", variables.get("thinking")) is False and not marks.channels:
        return None
    if params.grammar is not None and params.grammar[0] in ("regex", "ebnf"):
        plain = params.grammar[1].replace("\\", "")
        if marks.opening not in plain and marks.closing not in plain:
            return None
    return Thought(opening=marks.opening, closing=marks.closing, place=found.place)
