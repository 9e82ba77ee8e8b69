"""/v1/chat/completions from the client's side, on a ring that answers in process."""

import json
import re
from typing import Any

import msgspec
import pytest

from quartet.http_gateway.parsers.call_formats import FORMATS
from quartet.runtime.errors import too_long
from quartet.runtime.messages import Finish, Generate, Message, Place, Text, Thought, unpack_ids
from quartet.runtime.sampling import GRAMMARS
from tests.unit.http_gateway.harness import Served, asynchronous, ends, served, step
from tests.unit.http_gateway.openai_scripts import says

PATH = "/v1/chat/completions"
USER = {"role": "user", "content": "hi"}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
OTHER = {"type": "function", "function": {"name": "other"}}
CALL = ("<tool", '_call>{"name": "weather", "arguments"', ': {"city": "U', 'lm"}}</tool_call>')


async def ask(server: Served, **body: Any) -> dict[str, Any]:
    answer = await server.client.post(PATH, {"messages": [USER], **body})
    assert answer.status == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def chunks_of(server: Served, **body: Any) -> list[dict[str, Any]]:
    return (await server.client.post(PATH, {"messages": [USER], "stream": True, **body})).events()


def generate_of(server: Served) -> Generate:
    generate = server.ring.sent[-1]
    assert isinstance(generate, Generate)
    return generate


def joined(chunks: list[dict[str, Any]], key: str) -> str:
    return "".join(choice["delta"][key] or "" for chunk in chunks for choice in chunk["choices"])


@asynchronous
async def test_the_whole_answer() -> None:
    async with served(says("Par", "is.")) as server:
        body = await ask(server, model="any", rid="r")
        assert isinstance(body.pop("created"), int)
        assert body == {
            "id": "r",
            "object": "chat.completion",
            "model": "any",
            "choices": [
                {
                    "index": 0,
                    "message": {
                        "role": "assistant",
                        "content": "Paris.",
                        "reasoning_content": None,
                        "tool_calls": None,
                    },
                    "logprobs": None,
                    "finish_reason": "stop",
                    "matched_stop": 2,
                }
            ],
            "usage": {
                "prompt_tokens": 3,
                "total_tokens": 5,
                "completion_tokens": 2,
                "prompt_tokens_details": None,
                "reasoning_tokens": 0,
            },
            "metadata": {"weight_version": "v1"},
        }


@asynchronous
async def test_the_order_of_a_stream() -> None:
    async with served() as server:
        body = {"messages": [USER], "rid": "r", "stream": True, "stream_options": {"include_usage": True}}
        call = server.client.start("POST", PATH, body)
        await server.ring.sent_of(Generate)
        server.ring.push(step("r", [1], "Par", prompt_tokens=3))
        await call.chunk()
        server.ring.push(step("r", [2], "is.", finish=Finish(reason="stop", matched=2)))
        chunks = (await call.answer()).events()
        nothing = {"role": None, "content": None, "reasoning_content": None, "tool_calls": None}
        choices = [chunk["choices"][0] for chunk in chunks[:-1]]
        assert [choice["delta"] for choice in choices] == [
            nothing | {"role": "assistant", "content": ""},
            nothing | {"content": "Par"},
            nothing | {"content": "is."},
            nothing,
        ]
        assert [choice["finish_reason"] for choice in choices] == [None, None, None, "stop"]
        assert choices[-1]["matched_stop"] == 2
        assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 2
        assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
        assert {chunk["id"] for chunk in chunks} == {"r"}


@asynchronous
async def test_every_choice_of_a_stream_is_opened_and_ended() -> None:
    async with served(says("a", "b")) as server:
        chunks = await chunks_of(server, n=3)
        for index in range(3):
            own = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
            assert own[0]["delta"]["role"] == "assistant"
            assert "".join(choice["delta"]["content"] or "" for choice in own) == "ab"
            assert [choice["finish_reason"] for choice in own if choice["finish_reason"]] == ["stop"]


@asynchronous
async def test_the_operator_s_interval_thins_a_stream_out() -> None:
    async with served(stream_interval=3) as server:
        call = server.client.start("POST", PATH, {"messages": [USER], "rid": "r", "stream": True})
        await server.ring.sent_of(Generate)
        for i in range(6):
            server.ring.push(step("r", [i], str(i), prompt_tokens=3))
        server.ring.push(step("r", [6], "6", finish=Finish(reason="length", length=7)))
        chunks = (await call.answer()).events()
        assert joined(chunks, "content") == "0123456"
        assert len(chunks) <= 5


# the conversation


@asynchronous
async def test_the_conversation_is_rendered_by_the_tokenizer() -> None:
    async with served(says("x")) as server:
        messages = [
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "hi"}]},
            {"role": "assistant", "content": None, "tool_calls": []},
        ]
        await ask(
            server,
            messages=messages,
            tools=[WEATHER],
            documents=[{"text": "d"}],
            reasoning_effort="low",
            chat_template_kwargs={"a": 1},
        )
        chat = generate_of(server).chat
        assert chat is not None and chat.messages == [{"role": "system", "content": "be brief"}, *messages[1:]]
        assert chat.tools == [WEATHER] and chat.documents == [{"text": "d"}]
        assert chat.template_kwargs == {"reasoning_effort": "low", "a": 1}
        assert chat.add_generation_prompt and not chat.continue_final_message


@asynchronous
async def test_no_effort_switches_the_thought_off() -> None:
    async with served(says("x")) as server:
        await ask(server, reasoning_effort="none")
        chat = generate_of(server).chat
        assert chat is not None and chat.template_kwargs == {"enable_thinking": False, "thinking": False}


@asynchronous
async def test_a_final_message_is_continued_without_a_new_turn() -> None:
    async with served(says("x")) as server:
        await ask(server, messages=[USER, {"role": "assistant", "content": "Par"}], continue_final_message=True)
        chat = generate_of(server).chat
        assert chat is not None and chat.continue_final_message and not chat.add_generation_prompt


@asynchronous
async def test_ids_that_the_client_has_rendered_are_taken_as_they_are() -> None:
    async with served(says("x")) as server:
        await ask(server, messages=[], input_ids=[4, 5])
        assert generate_of(server).chat is None
        assert unpack_ids(generate_of(server).input_ids).tolist() == [4, 5]


# logprobs


@asynchronous
async def test_logprobs_with_the_best_tokens_beside_each() -> None:
    async with served(says("a")) as server:
        body = await ask(server, logprobs=True, top_logprobs=2)
        [position] = body["choices"][0]["logprobs"]["content"]
        own = {"token": "t10", "bytes": [116, 49, 48], "logprob": -0.5}
        assert position == own | {"top_logprobs": [own, {"token": "t11", "bytes": [116, 49, 49], "logprob": -0.5}]}


@asynchronous
async def test_a_stream_tells_each_logprob_once() -> None:
    async with served(says("a", "", "b")) as server:
        chunks = await chunks_of(server, logprobs=True)
        told = [c["logprobs"]["content"] for chunk in chunks for c in chunk["choices"] if c["logprobs"]]
        assert [position["token"] for part in told for position in part] == ["t10", "t11", "t12"]


# tools


@asynchronous
async def test_tool_calls_are_found_where_there_is_a_parser() -> None:
    async with served(says("Well. ", *CALL), tool_call_parser="hermes") as server:
        [choice] = (await ask(server, tools=[WEATHER]))["choices"]
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["content"] == "Well."
        [call] = choice["message"]["tool_calls"]
        assert call["id"].startswith("call_") and len(call["id"]) == 29
        assert (call["index"], call["type"], call["function"]["name"]) == (0, "function", "weather")
        assert json.loads(call["function"]["arguments"]) == {"city": "Ulm"}
        assert not generate_of(server).request.params.skip_special_tokens


@asynchronous
async def test_content_is_null_where_there_are_calls_only() -> None:
    async with served(says(*CALL), tool_call_parser="hermes") as server:
        assert (await ask(server, tools=[WEATHER]))["choices"][0]["message"]["content"] is None


@asynchronous
async def test_a_streamed_call_is_announced_and_then_grows() -> None:
    async with served(says(*CALL), tool_call_parser="hermes") as server:
        chunks = await chunks_of(server, tools=[WEATHER])
        pieces = [call for c in chunks for choice in c["choices"] for call in choice["delta"]["tool_calls"] or ()]
        first, *later = pieces
        assert first["function"] == {"name": "weather", "arguments": ""} and first["id"]
        assert all(
            piece.keys() == {"index", "function"} and piece["function"].keys() == {"arguments"} for piece in later
        )
        assert json.loads("".join(piece["function"]["arguments"] for piece in pieces)) == {"city": "Ulm"}
        assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
        assert joined(chunks, "content") == ""


UNTAGGED = ['```json\n{"name": "weather", ', '"arguments": {"city"', ': "Ulm"}}\n```']
ASKED = {"role": "user", "content": "hi"}
RESULT = {"role": "tool", "tool_call_id": "c", "content": "rain"}


@asynchronous
async def test_a_call_without_its_tags_is_found_where_it_is_the_whole_answer() -> None:
    async with served(says(*UNTAGGED), tool_call_parser="hermes") as server:
        [choice] = (await ask(server, tools=[WEATHER]))["choices"]
        [call] = choice["message"]["tool_calls"]
        assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", None)
        assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == ("weather", {"city": "Ulm"})
        chunks = await chunks_of(server, tools=[WEATHER])
        assert joined(chunks, "content") == "" and chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize(
    "body",
    [
        {"tools": [WEATHER], "messages": [ASKED, {"role": "assistant", "content": "", "tool_calls": []}, RESULT]},
        {"tools": [WEATHER], "response_format": {"type": "json_object"}},
        {"tools": [WEATHER], "tool_choice": "none"},
        {},
    ],
    ids=["behind a result", "constrained", "not to be called", "no tools"],
)
@asynchronous
async def test_json_is_no_call_where_it_may_be_the_answer(body: dict[str, Any]) -> None:
    async with served(says(*UNTAGGED), tool_call_parser="hermes") as server:
        [choice] = (await ask(server, **body))["choices"]
        assert choice["message"]["content"] == "".join(UNTAGGED) and choice["finish_reason"] == "stop"


@asynchronous
async def test_without_a_parser_a_call_stays_text() -> None:
    async with served(says(*CALL)) as server:
        [choice] = (await ask(server, tools=[WEATHER]))["choices"]
        assert choice["message"]["content"] == "".join(CALL) and choice["finish_reason"] == "stop"


@asynchronous
async def test_tools_that_may_not_be_called_are_not_told_of() -> None:
    async with served(says(*CALL), tool_call_parser="hermes") as server:
        [choice] = (await ask(server, tools=[WEATHER], tool_choice="none"))["choices"]
        chat = generate_of(server).chat
        assert chat is not None and chat.tools is None
        assert choice["message"]["content"] == "".join(CALL)


@pytest.mark.parametrize(
    ("choice", "names"),
    [("required", ["weather", "other"]), ({"type": "function", "function": {"name": "other"}}, ["other"])],
)
@asynchronous
async def test_demanded_calls_are_constrained_and_read_without_a_parser(choice: Any, names: list[str]) -> None:
    async with served(says('[{"name": "other", ', '"parameters": {"a": 1}}]')) as server:
        [told] = (await ask(server, tools=[WEATHER, OTHER], tool_choice=choice))["choices"]
        schema = json.loads(generate_of(server).request.params.json_schema or "")
        assert [call["properties"]["name"]["const"] for call in schema["items"]["anyOf"]] == names
        [call] = told["message"]["tool_calls"]
        assert call["function"]["name"] == "other" and json.loads(call["function"]["arguments"]) == {"a": 1}
        assert told["finish_reason"] == "tool_calls" and told["message"]["content"] is None


def allowed(mode: str, *names: str) -> dict[str, Any]:
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


@asynchronous
async def test_allowed_tools_are_all_that_the_model_sees_and_may_call() -> None:
    async with served(says('[{"name": "other", ', '"parameters": {"a": 1}}]')) as server:
        await ask(server, tools=[WEATHER, OTHER], tool_choice=allowed("auto", "other"))
        chat = generate_of(server).chat
        assert chat is not None and [tool["function"]["name"] for tool in chat.tools or ()] == ["other"]
        assert generate_of(server).request.params.grammar is None
        server.ring.sent.clear()
        await ask(server, tools=[WEATHER, OTHER], tool_choice=allowed("required", "other", "weather", "other"))
        schema = json.loads(generate_of(server).request.params.json_schema or "")
        names = [call["properties"]["name"]["const"] for call in schema["items"]["anyOf"]]
        assert names == ["other", "weather"]
        server.ring.sent.clear()
        named = {"type": "function", "function": {"name": "weather"}}
        await ask(server, tools=[WEATHER, OTHER], tool_choice={**allowed("auto", "other"), **named})
        schema = json.loads(generate_of(server).request.params.json_schema or "")
        assert [call["properties"]["name"]["const"] for call in schema["items"]["anyOf"]] == ["weather"]


@pytest.mark.parametrize("kind", ["json_schema", "json_object"])
@asynchronous
async def test_a_demanded_call_has_the_form_of_its_arguments_not_of_a_message(kind: str) -> None:
    """Agents that are to answer in a form send it with every turn, those that must call a tool included."""
    form = {"type": kind, "json_schema": {"name": "answer", "schema": {"type": "object"}}}
    for choice in ("required", {"type": "function", "function": {"name": "other"}}, allowed("required", "other")):
        async with served(says('[{"name": "other", ', '"parameters": {"a": 1}}]')) as server:
            asked = {"tools": [WEATHER, OTHER], "response_format": form}
            [told] = (await ask(server, **asked, tool_choice=choice))["choices"]
            assert told["message"]["tool_calls"][0]["function"]["name"] == "other"
            assert "parameters" in (generate_of(server).request.params.json_schema or "")
            server.ring.sent.clear()
            await ask(server, **asked, tool_choice="auto")
            assert json.loads(generate_of(server).request.params.json_schema or "") == {"type": "object"}


@asynchronous
async def test_calls_one_at_a_time() -> None:
    async with served(says("[]")) as server:
        await ask(server, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False)
        assert json.loads(generate_of(server).request.params.json_schema or "")["maxItems"] == 1


@asynchronous
async def test_a_call_that_was_cut_off_says_so() -> None:
    cut = says('[{"name": "weather", "parameters": {"ci', finish=Finish(reason="length", length=1))
    async with served(cut) as server:
        [choice] = (await ask(server, tools=[WEATHER], tool_choice="required"))["choices"]
        assert choice["finish_reason"] == "length" and not choice["message"]["content"]


@asynchronous
async def test_a_call_that_a_stop_string_breaks_off_is_no_finished_call() -> None:
    text = '<tool_call>\n{"name": "weather", "arguments": {"city": "U'
    cut = says(text, finish=Finish(reason="stop", length=1, matched="lm"))
    async with served(cut, tool_call_parser="hermes") as server:
        asked = {"tools": [WEATHER], "tool_choice": "required", "stop": ["lm"]}
        [choice] = (await ask(server, **asked))["choices"]
        assert (choice["finish_reason"], choice["matched_stop"]) == ("stop", "lm")
        assert (await chunks_of(server, **asked))[-1]["choices"][0]["finish_reason"] == "stop"


@asynchronous
async def test_calls_behind_the_one_that_is_allowed_are_dropped() -> None:
    async with served(says(*CALL, "\n", *CALL, " so"), tool_call_parser="hermes") as server:
        for streamed in (False, True):
            if streamed:
                chunks = await chunks_of(server, tools=[WEATHER], parallel_tool_calls=False)
                deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
                pieces = [call for delta in deltas for call in delta["tool_calls"] or ()]
            else:
                answer = await ask(server, tools=[WEATHER], parallel_tool_calls=False)
                pieces = answer["choices"][0]["message"]["tool_calls"]
            assert {piece["index"] for piece in pieces} == {0}
            assert json.loads("".join(piece["function"]["arguments"] for piece in pieces)) == {"city": "Ulm"}


@asynchronous
async def test_ids_of_calls_fit_the_templates_of_the_server_s_family() -> None:
    for choice in ("auto", "required"):
        async with served(
            says('[TOOL_CALLS] [{"name": "weather", "arguments": {}}]'), tool_call_parser="mistral"
        ) as server:
            [call] = (await ask(server, tools=[WEATHER], tool_choice=choice))["choices"][0]["message"]["tool_calls"]
            assert re.fullmatch("[a-zA-Z0-9]{9}", call["id"])


DEMANDED = {
    "hermes": '<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"}}\n</tool_call>',
    "qwen3_coder": ("<tool_call>\n<function=weather>\n<parameter=city>\nUlm\n</parameter>\n</function>\n</tool_call>"),
    "llama3": '{"name": "weather", "parameters": {"city": "Ulm"}}',
    "pythonic": '[weather(city="Ulm")]',
    "mistral_v11": '[TOOL_CALLS]weather[CALL_ID]abc123XYZ[ARGS]{"city": "Ulm"}',
    "gpt-oss": '<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city": "Ulm"}',
}


@pytest.mark.parametrize("family", DEMANDED)
@asynchronous
async def test_demanded_calls_are_written_and_read_in_the_model_s_own_format(family: str) -> None:
    async with served(says(*DEMANDED[family]), tool_call_parser=family) as server:
        asked = {"tools": [WEATHER, OTHER], "tool_choice": "required", "skip_special_tokens": True}
        [told] = (await ask(server, **asked))["choices"]
        [call] = told["message"]["tool_calls"]
        assert told["finish_reason"] == "tool_calls" and told["message"]["content"] is None
        assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == ("weather", {"city": "Ulm"})
        params = generate_of(server).request.params
        assert [kind for kind in GRAMMARS if getattr(params, kind)] == ["call_grammar"]
        assert not params.skip_special_tokens  # the marks of calls must be read
        pieces = [
            delta for chunk in await chunks_of(server, **asked) for c in chunk["choices"] if (delta := c["delta"])
        ]
        streamed = [piece["function"]["arguments"] for delta in pieces for piece in delta["tool_calls"] or ()]
        assert json.loads("".join(streamed)) == {"city": "Ulm"}


@pytest.mark.parametrize("more", [{"parallel_tool_calls": False}, {"tool_choice": {"function": {"name": "weather"}}}])
@asynchronous
async def test_one_call_may_be_demanded_in_the_model_s_own_format(more: dict[str, Any]) -> None:
    async with served(says(DEMANDED["hermes"]), tool_call_parser="hermes") as server:
        await ask(server, **{"tools": [WEATHER, OTHER], "tool_choice": "required", **more})
        assert json.loads(generate_of(server).request.params.call_grammar or "")["single"] is True


STRICT = {"type": "function", "function": {**WEATHER["function"], "strict": True}}


@pytest.mark.parametrize("family", ["hermes", "llama3", "mistral"])
@asynchronous
async def test_calls_of_strict_tools_are_constrained_once_the_model_begins_one(family: str) -> None:
    async with served(says("x"), tool_call_parser=family) as server:
        await ask(server, tools=[STRICT, OTHER])
        asked = json.loads(generate_of(server).request.params.call_grammar or "")
        strict, free = asked["calls"]
        assert strict["parameters"]["properties"] == {"city": {"type": "string"}} and '"weather"' in strict["begin"]
        assert free["parameters"] == {"type": "object", "additionalProperties": True} and '"other"' in free["begin"]
        assert asked["trigger"] == FORMATS[family].opening


@pytest.mark.parametrize("more", [{"tools": [WEATHER]}, {"regex": "x"}, {"response_format": {"type": "json_object"}}])
@asynchronous
async def test_calls_are_not_constrained_without_strict_tools_nor_under_the_client_s_own_grammar(
    more: dict[str, Any],
) -> None:
    async with served(says("x"), tool_call_parser="hermes") as server:
        await ask(server, **{"tools": [STRICT], **more})
        assert generate_of(server).request.params.call_grammar is None


# reasoning


@asynchronous
async def test_the_thought_is_told_apart() -> None:
    async with served(says("<think>", "Well", " then.</think>", "\n\nParis."), reasoning_parser="qwen3") as server:
        body = await ask(server)
        message = body["choices"][0]["message"]
        assert (message["reasoning_content"], message["content"]) == ("Well then.", "Paris.")
        assert 2 <= body["usage"]["reasoning_tokens"] < 4
        assert body["usage"]["completion_tokens_details"] == {"reasoning_tokens": body["usage"]["reasoning_tokens"]}
        chunks = await chunks_of(server)
        assert joined(chunks, "reasoning_content") == "Well then." and joined(chunks, "content") == "Paris."


@asynchronous
async def test_a_thought_may_come_in_one_piece() -> None:
    async with served(says("<think>a", "b", "c</think>", "d"), reasoning_parser="qwen3") as server:
        chunks = await chunks_of(server, stream_reasoning=False)
        thoughts = [c["delta"]["reasoning_content"] for chunk in chunks for c in chunk["choices"]]
        assert [thought for thought in thoughts if thought] == ["abc"]


@pytest.mark.parametrize("more", [{"separate_reasoning": False}, {"chat_template_kwargs": {"enable_thinking": False}}])
@asynchronous
async def test_a_thought_stays_in_the_text_where_it_is_wanted_there(more: dict[str, Any]) -> None:
    async with served(says("<think>a</think>b"), reasoning_parser="qwen3") as server:
        message = (await ask(server, **more))["choices"][0]["message"]
        assert message["content"] == "<think>a</think>b" and message["reasoning_content"] is None


@pytest.mark.parametrize("more", [{"response_format": {"type": "json_object"}}, {"json_schema": "{}"}])
@asynchronous
async def test_a_schema_constrains_what_stands_behind_the_thought(more: dict[str, Any]) -> None:
    async with served(says("plan</think>\n", '{"a": 1}'), reasoning_parser="deepseek-r1") as server:
        message = (await ask(server, **more))["choices"][0]["message"]
        assert (message["reasoning_content"], message["content"]) == ("plan", '{"a": 1}')
        assert generate_of(server).request.thought == Thought(opening="<think>", closing="</think>", place="inside")


@pytest.mark.parametrize(
    "more",
    [
        {"thinking_budget": 9},
        {"max_thinking_tokens": 9},
        {"thinking_budget": 9, "max_thinking_tokens": 9},
        {"chat_template_kwargs": {"thinking_budget": 9}},
        {"chat_template_kwargs": {"max_thinking_tokens": 9}},
        {"thinking_budget": 9, "chat_template_kwargs": {"thinking_budget": 7}},
    ],
)
@asynchronous
async def test_a_thought_has_a_budget_under_every_name_for_it(more: dict[str, Any]) -> None:
    async with served(says("plan</think>yes"), reasoning_parser="deepseek-r1") as server:
        await ask(server, **more)
        sent = generate_of(server)
        assert sent.request.params.thinking_budget == 9 and sent.request.thought is not None
        assert sent.chat is not None and "thinking_budget" in sent.chat.template_kwargs


@asynchronous
async def test_a_template_s_own_word_for_no_limit_limits_nothing() -> None:
    async with served(says("plan</think>yes"), reasoning_parser="deepseek-r1") as server:
        await ask(server, chat_template_kwargs={"thinking_budget": -1})
        sent = generate_of(server)
        assert sent.request.params.thinking_budget is None
        assert sent.chat is not None and sent.chat.template_kwargs == {"thinking_budget": -1}


@pytest.mark.parametrize(
    ("more", "parser", "field"),
    [
        ({"thinking_budget": 9}, "none", "thinking_budget"),
        ({"thinking_budget": -1}, "qwen3", "thinking_budget"),
        ({"thinking_budget": 1 << 40}, "qwen3", "thinking_budget"),
        ({"thinking_budget": 9, "max_thinking_tokens": 8}, "qwen3", "max_thinking_tokens"),
        ({"chat_template_kwargs": {"thinking_budget": "much"}}, "qwen3", "chat_template_kwargs"),
        ({"chat_template_kwargs": {"thinking_budget": True}}, "qwen3", "chat_template_kwargs"),
        ({"chat_template_kwargs": {"thinking_budget": -2}}, "qwen3", "chat_template_kwargs"),
        ({"chat_template_kwargs": {"thinking_budget": 2, "max_thinking_tokens": 3}}, "qwen3", "chat_template_kwargs"),
    ],
)
@asynchronous
async def test_a_budget_that_cannot_be_kept_is_a_400_that_names_it(
    more: dict[str, Any], parser: str, field: str
) -> None:
    async with served(says("a"), reasoning_parser=parser) as server:
        answer = await server.client.post(PATH, {"messages": [USER], **more})
        assert (answer.status, answer.json()["param"]) == (400, field)


@asynchronous
async def test_thinking_is_switched_at_the_top_level_too() -> None:
    async with served(says("yes"), reasoning_parser="qwen3") as server:
        await ask(server, enable_thinking=False, thinking_budget=3)
        sent = generate_of(server)
        assert sent.chat is not None and sent.chat.template_kwargs["enable_thinking"] is False
        assert sent.request.thought is None


@pytest.mark.parametrize("more", [{"reasoning_effort": "none"}, {"chat_template_kwargs": {"thinking": False}}])
@asynchronous
async def test_a_thought_that_is_switched_off_is_not_waited_for(more: dict[str, Any]) -> None:
    async with served(says('{"a": 1}'), reasoning_parser="deepseek-r1") as server:
        message = (await ask(server, response_format={"type": "json_object"}, **more))["choices"][0]["message"]
        assert (message["reasoning_content"], message["content"]) == (None, '{"a": 1}')
        assert generate_of(server).request.thought is None


@pytest.mark.parametrize(
    ("grammar", "text", "thought", "content"),
    [
        ({"regex": "yes|no"}, "yes", None, "yes"),
        ({"ebnf": 'root ::= "yes"'}, "yes", None, "yes"),
        ({"response_format": {"type": "regex", "pattern": "yes"}}, "yes", None, "yes"),
        ({"regex": r".*<\/think>.*"}, "so</think>yes", "so", "yes"),
    ],
)
@asynchronous
async def test_a_regex_constrains_the_whole_output_and_spells_a_thought_or_has_none(
    grammar: dict[str, Any], text: str, thought: str | None, content: str
) -> None:
    async with served(says(text), reasoning_parser="deepseek-r1") as server:
        message = (await ask(server, **grammar))["choices"][0]["message"]
        assert (message["reasoning_content"], message["content"]) == (thought, content)


@pytest.mark.parametrize("place", ["before", "inside", "past"])
@asynchronous
async def test_the_end_of_the_prompt_says_where_the_output_begins(place: Place) -> None:
    def script(generate: Generate) -> list[Message]:
        first, *later = says("plan", "</think>", " yes")(generate)
        assert isinstance(first, Text)
        return [msgspec.structs.replace(first, place=place), *later]

    async with served(script, reasoning_parser="qwen3") as server:
        message = (await ask(server))["choices"][0]["message"]
        expected = ("plan", "yes") if place == "inside" else (None, "plan</think> yes")
        assert (message["reasoning_content"], message["content"]) == expected


@asynchronous
async def test_a_call_in_a_thought_that_was_not_closed_is_a_call_where_the_family_forgets_the_tag() -> None:
    output = says("<think>I call ", "it. ", *CALL)
    async with served(output, reasoning_parser="qwen3", tool_call_parser="qwen") as server:
        message = (await ask(server, tools=[WEATHER]))["choices"][0]["message"]
        assert message["reasoning_content"] == "I call it." and message["content"] is None
        assert message["tool_calls"][0]["function"]["name"] == "weather"


@asynchronous
async def test_a_call_in_a_thought_that_was_not_closed_is_else_a_part_of_the_thought() -> None:
    output = says("<think>I call ", "it. ", *CALL)
    async with served(output, reasoning_parser="deepseek-v3", tool_call_parser="qwen") as server:
        choice = (await ask(server, tools=[WEATHER]))["choices"][0]
        message = choice["message"]
        assert message["reasoning_content"] == "I call it. " + "".join(CALL) and message["content"] is None
        assert message["tool_calls"] is None and choice["finish_reason"] == "stop"


@asynchronous
@pytest.mark.parametrize("asked", [{}, {"reasoning_effort": "none"}, {"separate_reasoning": False}])
async def test_channels_become_thought_answer_and_calls(asked: dict[str, Any]) -> None:
    thought, answer = "<|channel|>analysis<|message|>Which?<|end|>", "<|channel|>commentary<|message|>I look.<|end|>"
    call = ' to=functions.weather<|channel|>commentary json<|message|>{"city": "Ulm"}'
    script = says("<|start|>assistant".join([thought, answer, call]))
    async with served(script, reasoning_parser="gpt-oss", tool_call_parser="gpt-oss") as server:
        message = (await ask(server, tools=[WEATHER], **asked))["choices"][0]["message"]
        expected = (None, "Which?I look.") if "separate_reasoning" in asked else ("Which?", "I look.")
        assert (message["reasoning_content"], message["content"]) == expected
        assert generate_of(server).request.params.skip_special_tokens is False
        assert message["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"city": "Ulm"}'}


@asynchronous
async def test_channels_are_read_without_tools_too() -> None:
    pieces = ("<|channel|>analysis<|message|>Which?<|end|><|start|>assistant", "<|channel|>final<|message|>So.")
    async with served(says(*pieces), reasoning_parser="gpt-oss", tool_call_parser="gpt-oss") as server:
        chunks = await chunks_of(server)
        assert (joined(chunks, "reasoning_content"), joined(chunks, "content")) == ("Which?", "So.")
        assert generate_of(server).request.params.skip_special_tokens is False


@asynchronous
async def test_a_thought_may_talk_of_tags_of_calls() -> None:
    text = '<think>A <tool_call> would be {...}, or <tool_call>{"</think>Hello.'
    async with served(says(text), reasoning_parser="qwen3", tool_call_parser="qwen") as server:
        message = (await ask(server, tools=[WEATHER]))["choices"][0]["message"]
        thought = 'A <tool_call> would be {...}, or <tool_call>{"'
        assert (message["reasoning_content"], message["content"]) == (thought, "Hello.")


@asynchronous
async def test_an_answer_cut_inside_the_thought_has_no_content() -> None:
    cut = says("<think>a", " b", finish=Finish(reason="length", length=2))
    async with served(cut, reasoning_parser="qwen3") as server:
        message = (await ask(server))["choices"][0]["message"]
        assert (message["reasoning_content"], message["content"]) == ("a b", None)


@asynchronous
async def test_thought_and_calls_together() -> None:
    pieces = ("<think>which?</think>", *CALL)
    async with served(says(*pieces), reasoning_parser="qwen3", tool_call_parser="qwen") as server:
        message = (await ask(server, tools=[WEATHER]))["choices"][0]["message"]
        assert message["reasoning_content"] == "which?" and message["content"] is None
        assert message["tool_calls"][0]["function"]["name"] == "weather"


# refusals


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"messages": []}, "Messages cannot be empty."),
        ({"tool_choice": "required"}, "Tools cannot be empty if tool choice is set to required."),
        ({"tools": [WEATHER], "tool_choice": {"function": {"name": "x"}}}, "Tool 'x' not found in tools list."),
        ({"tools": [WEATHER], "tool_choice": {"type": "function"}}, "function is required"),
        ({"tools": [WEATHER], "tool_choice": {"type": "allowed_tools"}}, "allowed_tools is required"),
        ({"tools": [WEATHER], "tool_choice": allowed("auto")}, "allowed_tools must name functions"),
        ({"tools": [WEATHER], "tool_choice": allowed("auto", "x")}, "Tool 'x' not found in tools list."),
        ({"tools": [WEATHER, WEATHER]}, "tools: 2 tools have the name 'weather'."),
        ({"tools": [WEATHER, WEATHER], "tool_choice": "none"}, "tools: 2 tools have the name 'weather'."),
        ({"max_completion_tokens": 513}, "max_completion_tokens is too large: 513.This model supports at most 512"),
        ({"response_format": {"type": "json_schema"}}, "schema_ is required for json_schema response format request."),
        ({"messages": [{"role": "judge", "content": "x"}]}, "role must be one of"),
        ({"messages": [{"role": "user", "content": 3}]}, "content must be a string"),
        ({"top_logprobs": 2}, "top_logprobs needs logprobs"),
        ({"session_params": {"id": "x"}}, "session_params is not supported"),
        ({"tools": [WEATHER], "tool_choice": "required", "regex": "a"}, "one thing only"),
    ],
)
@asynchronous
async def test_refusals(body: dict[str, Any], message: str) -> None:
    async with served(says("x")) as server:
        answer = await server.client.post(PATH, {"messages": [USER], **body})
        assert answer.status == 400 and message in answer.json()["message"], answer.text
        assert answer.json()["error"]["message"] == answer.json()["message"]


@pytest.mark.parametrize("stream", [False, True])
@asynchronous
async def test_a_conversation_that_exceeds_the_context_is_told_by_its_code(stream: bool) -> None:
    finish = Finish.failed(
        too_long("The input (9 tokens) is longer than the model's context length (8 tokens).", "text")
    )
    async with served(ends(finish)) as server:
        answer = await server.client.post(PATH, {"messages": [USER], "stream": stream})
        assert (answer.status, answer.json()["code"]) == (400, 400)
        assert answer.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize("effort", ["none", "minimal", "low", "medium", "high", "xhigh", "max"])
@asynchronous
async def test_every_reasoning_effort_of_the_api_is_taken(effort: str) -> None:
    async with served(says("ok")) as server:
        await ask(server, reasoning_effort=effort)
        sent = generate_of(server).chat
        assert sent is not None
        told = sent.template_kwargs.get("reasoning_effort")
        assert told == (None if effort == "none" else effort)
