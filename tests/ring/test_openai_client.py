"""The `openai` package, unchanged, against real servers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
import requests
from pydantic import BaseModel

from tests.model import tiny
from tests.servers import Server

WAIT_S = 60
QUESTION: Any = [{"role": "user", "content": "What is the capital of France?"}]
STORY: Any = [{"role": "user", "content": "Tell me a story."}]
ANSWER = "The capital of France is Paris."
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "maxLength": 12}, "days": {"type": "integer", "maximum": 9}},
                "required": ["city", "days"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "stop", "parameters": {"type": "object", "additionalProperties": False}}},
]


def client_of(server: Server, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="k", max_retries=0, timeout=WAIT_S, **options)


@pytest.fixture(scope="module")
def server(launch_for_module: Callable[..., Server]) -> Server:
    return launch_for_module("--tool-call-parser", "hermes", "--reasoning-parser", "qwen3", "--enable-cache-report")


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return client_of(server)


# chat


def test_a_question_is_answered(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="demo", messages=QUESTION, temperature=0)
    [choice] = answer.choices
    assert (choice.message.content, choice.finish_reason) == (ANSWER, "stop")
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.object == "chat.completion" and answer.model == "demo"


def test_a_stream_says_the_same(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="demo", messages=QUESTION, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = stream
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ANSWER
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["stop"]
    assert last.choices == [] and last.usage is not None and last.usage.completion_tokens == 9


def test_copies_and_their_seed(client: openai.OpenAI) -> None:
    def ask() -> list[str | None]:
        answer = client.chat.completions.create(
            model="demo", messages=STORY, temperature=1.5, seed=1, n=3, max_completion_tokens=12
        )
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        return [choice.message.content for choice in answer.choices]

    first = ask()
    assert first == ask() and len(set(first)) > 1


def test_stop_bias_and_limits(client: openai.OpenAI) -> None:
    def ask(**more: Any) -> Any:
        return client.chat.completions.create(model="demo", messages=QUESTION, temperature=0, **more).choices[0]

    stopped = ask(stop=" is", extra_body={"no_stop_trim": False})
    assert (stopped.message.content, stopped.finish_reason) == ("The capital of France", "stop")
    assert stopped.matched_stop == " is"
    assert ask(max_tokens=2).finish_reason == "length"
    [first] = requests.post(f"{client.base_url}tokenize", json={"prompt": "The"}, timeout=WAIT_S).json()["tokens"]
    assert not ask(logit_bias={str(first): -100}).message.content.startswith("The")
    assert len(ask(extra_body={"min_tokens": 15}).message.content) > len(ANSWER)


def test_logprobs_of_a_turn(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="demo", messages=QUESTION, temperature=0, logprobs=True, top_logprobs=3
    )
    scored = answer.choices[0].logprobs
    assert scored is not None and scored.content is not None and answer.usage is not None
    assert len(scored.content) == answer.usage.completion_tokens
    assert "".join(position.token for position in scored.content).startswith(ANSWER)
    for position in scored.content:
        assert position.top_logprobs[0].token == position.token and len(position.top_logprobs) == 3
        assert bytes(position.bytes or []).decode() == position.token


def test_a_turn_is_continued(client: openai.OpenAI) -> None:
    begun = [*QUESTION, {"role": "assistant", "content": "The capital of"}]
    answer = client.chat.completions.create(
        model="demo", messages=begun, temperature=0, extra_body={"continue_final_message": True}
    )
    assert answer.choices[0].message.content == ANSWER.removeprefix("The capital of")


def test_cached_tokens_are_reported(client: openai.OpenAI) -> None:
    long: Any = [{"role": "user", "content": "once upon a time " * 30}]
    for _ in range(2):
        answer = client.chat.completions.create(model="demo", messages=long, max_tokens=1)
    assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
    assert (answer.usage.prompt_tokens_details.cached_tokens or 0) > 30


# completions


def test_completions_of_every_kind_of_prompt(client: openai.OpenAI) -> None:
    ids = requests.post(f"{client.base_url}tokenize", json={"prompt": "The capital"}, timeout=WAIT_S).json()["tokens"]
    prompts: list[Any] = ["The capital", ["The capital"], ids, [ids]]
    texts = [
        client.completions.create(model="demo", prompt=prompt, temperature=0, max_tokens=6).choices[0].text
        for prompt in prompts
    ]
    assert len(set(texts)) == 1 and texts[0]


def test_completions_stream_deltas(client: openai.OpenAI) -> None:
    asked: Any = {"model": "demo", "prompt": ["The capital of France", "Once"], "temperature": 0, "max_tokens": 6}
    whole = client.completions.create(**asked)
    texts = ["", ""]
    for chunk in client.completions.create(**asked, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in whole.choices]


def test_an_echo_scores_its_prompt(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="demo", prompt="The capital of France is", echo=True, logprobs=1, max_tokens=1, temperature=0
    )
    scored = answer.choices[0].logprobs
    assert scored is not None and scored.token_logprobs is not None and scored.tokens is not None
    assert answer.usage is not None and len(scored.token_logprobs) == answer.usage.total_tokens
    assert scored.token_logprobs[0] is None
    assert "".join(scored.tokens) == answer.choices[0].text


def test_a_suffix_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="suffix is not supported"):
        client.completions.create(model="demo", prompt="a", suffix="b")


# tools and structure


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_demanded_tools_are_called_validly(client: openai.OpenAI, choice: Any) -> None:
    answer = client.chat.completions.create(
        model="demo", messages=QUESTION, tools=TOOLS, tool_choice=choice, temperature=0, parallel_tool_calls=False
    )
    [told] = answer.choices
    assert told.finish_reason == "tool_calls" and told.message.tool_calls and told.message.content is None
    call: Any = told.message.tool_calls[0]
    arguments = json.loads(call.function.arguments)
    assert call.function.name in ("weather", "stop")
    if call.function.name == "weather":
        assert arguments.keys() == {"city", "days"} and arguments["days"] <= 9


def test_streamed_calls_join_to_the_whole_ones(client: openai.OpenAI) -> None:
    asked: Any = {"model": "demo", "messages": QUESTION, "tools": TOOLS, "temperature": 0}
    asked["tool_choice"] = {"type": "function", "function": {"name": "weather"}}
    whole: Any = client.chat.completions.create(**asked).choices[0].message.tool_calls
    with client.chat.completions.stream(**asked) as stream:
        joined: Any = stream.get_final_completion().choices[0].message.tool_calls
    assert [call.function.arguments for call in joined] == [call.function.arguments for call in whole]
    assert [call.function.name for call in joined] == ["weather"]


def test_tools_that_are_only_offered(client: openai.OpenAI) -> None:
    for choice in ("auto", "none"):
        answer = client.chat.completions.create(
            model="demo", messages=QUESTION, tools=TOOLS, tool_choice=choice, temperature=0
        )
        assert answer.choices[0].message.content


class Capital(BaseModel):
    country: str
    capital: str
    certain: bool


def test_output_by_a_schema_is_parsed_by_the_client(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model="demo", messages=QUESTION, response_format=Capital, temperature=0, max_completion_tokens=400
    )
    assert isinstance(answer.choices[0].message.parsed, Capital)


def test_output_by_the_native_grammars(client: openai.OpenAI) -> None:
    for grammar in ({"regex": "(yes|no){3}"}, {"ebnf": 'root ::= ("yes" | "no") ("yes" | "no") ("yes" | "no")'}):
        answer = client.chat.completions.create(model="demo", messages=QUESTION, extra_body=grammar, n=2)
        for choice in answer.choices:
            text = (choice.message.content or "").replace("yes", "x").replace("no", "x")
            assert text == "xxx"


def test_a_bad_schema_is_the_client_s_fault(client: openai.OpenAI) -> None:
    bad: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}
    with pytest.raises(openai.BadRequestError, match="Failed to compile response_format grammar"):
        client.chat.completions.create(model="demo", messages=QUESTION, response_format=bad)


# other endpoints


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").id == "demo"
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("other/model")
    assert error.value.code == "model_not_found"


def test_responses(client: openai.OpenAI) -> None:
    assert client.responses.create(model="demo", input="What is the capital of France?", temperature=0).output_text == (
        ANSWER
    )
    with client.responses.stream(model="demo", input=QUESTION, temperature=0) as stream:
        assert stream.get_final_response().output_text == ANSWER


def test_tokens_there_and_back(server: Server) -> None:
    ids = requests.post(f"{server.url}/tokenize", json={"prompt": "Grüße, 世界"}, timeout=WAIT_S).json()
    assert ids["count"] == len(ids["tokens"])
    text = requests.post(f"{server.url}/detokenize", json={"tokens": ids["tokens"]}, timeout=WAIT_S).json()["text"]
    assert text == "Grüße, 世界"
    chat = requests.post(f"{server.url}/v1/tokenize", json={"messages": QUESTION}, timeout=WAIT_S).json()
    assert chat["count"] > 5


# errors


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"messages": []}, "Messages cannot be empty"),
        ({"temperature": -1}, "temperature must be"),
        ({"max_completion_tokens": 100_000}, "max_completion_tokens is too large"),
        ({"messages": [{"role": "user", "content": "word " * 3000}]}, "longer than the model's context length"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "only text is"),
        ({"tools": [], "tool_choice": "required"}, "Tools cannot be empty"),
        ({"stop": ["x"] * 33}, "stop takes at most"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_requests(client: openai.OpenAI, body: dict[str, Any], words: str, stream: bool) -> None:
    asked: Any = {"model": "demo", "messages": QUESTION, "stream": stream, **body}
    with pytest.raises(openai.BadRequestError, match=words) as error:
        client.chat.completions.create(**asked)
    assert error.value.type in ("BadRequestError", "Bad Request")


def test_a_client_that_gives_up_frees_its_place(server: Server, client: openai.OpenAI) -> None:
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.3).chat.completions.create(
            model="demo", messages=QUESTION, extra_body={"ignore_eos": True}, max_tokens=1900
        )
    assert requests.get(f"{server.url}/flush_cache?timeout=30", timeout=WAIT_S).status_code == 200


def test_keys_and_overload(launch: Callable[..., Server], tmp_path: Path) -> None:
    tiny.build("llama", tmp_path)
    server = launch("--model-path", str(tmp_path), "--api-key", "k", "--max-inflight-requests", "2")
    with pytest.raises(openai.AuthenticationError):
        client_of(server).with_options(api_key="wrong").models.list()
    client = client_of(server)
    assert client.completions.create(model="m", prompt="hello", max_tokens=3).usage
    long: Any = {"max_tokens": 500, "n": 2, "extra_body": {"ignore_eos": True}}
    with client.completions.create(model="m", prompt="a", stream=True, **long) as stream:
        next(iter(stream))
        with pytest.raises(openai.InternalServerError) as error:
            client.completions.create(model="m", prompt="b")
    assert error.value.status_code == 503 and error.value.response.headers["retry-after"]
