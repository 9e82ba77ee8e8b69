"""Logprobs of the OpenAI endpoints: tokens that share a text or a character, and where each begins."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from quartet.http_gateway.openai.output import Offsets, Scored
from quartet.runtime.control import Detokenize
from quartet.runtime.messages import Finish, Generate, Logprobs, Message, Reply, pack_ids
from tests.unit.http_gateway.harness import Script, asynchronous, floats, served, step
from tests.unit.http_gateway.openai_scripts import says

FACE = "\U0001fae0".encode()  # four bytes
SPELT = {1: b"a ", 2: FACE[:2], 3: FACE[2:], 4: b"<|end|>", 5: b"x", 6: b"x", 7: b""}


def scored(ids: Sequence[int], tops: Sequence[Sequence[int]] = (), unspoken: Sequence[int] = ()) -> Logprobs:
    """Token n has the logprob -n."""
    flat = [id for top in tops for id in top]
    return Logprobs(
        ids=pack_ids(ids),
        values=floats(*(-float(id) for id in ids)),
        texts=[SPELT[id] for id in ids],
        top_ids=pack_ids(flat),
        top_values=floats(*(-float(id) for id in flat)),
        top_texts=[SPELT[id] for id in flat],
        unspoken=list(unspoken),
    )


def answers(text: str, output: Logprobs, prompt: Logprobs | None = None) -> Script:
    """One step with all of it."""

    def script(generate: Generate) -> list[Message]:
        ids = list(range(len(output.values) // 4))
        end = Finish(reason="stop", matched=4)
        return [step(generate.request.rid, ids, text, logprobs=output, input_logprobs=prompt, finish=end)]

    return script


async def completion(script: Script, **body: Any) -> dict[str, Any]:
    async with served(script) as server:
        answer = await server.client.post("/v1/completions", {"prompt": "p", "logprobs": 1, **body})
        found: dict[str, Any] = answer.json()["choices"][0]["logprobs"]
        return found


@asynchronous
async def test_joined_bytes_of_a_chats_logprobs_spell_the_answer() -> None:
    async with served(answers("a \U0001fae0", scored([1, 2, 3, 4], unspoken=[3]))) as server:
        body = {"messages": [{"role": "user", "content": "hi"}], "logprobs": True}
        told = (await server.client.post("/v1/chat/completions", body)).json()["choices"][0]["logprobs"]["content"]
        assert b"".join(bytes(position["bytes"]) for position in told) == b"a " + FACE + b"<|end|>"
        assert [position["token"] for position in told] == ["a ", r"\xf0\x9f", r"\xab\xa0", "<|end|>"]


@asynchronous
async def test_best_tokens_of_one_text_do_not_overwrite_each_other() -> None:
    found = await completion(answers("x", scored([6], [[5, 6, 7]])), logprobs=3)
    assert found["tokens"] == ["x"]
    assert found["top_logprobs"] == [{"token_id:5": -5.0, "x": -6.0, "": -7.0}]


@asynchronous
async def test_parts_of_characters_are_named_by_their_bytes() -> None:
    found = await completion(answers("\U0001fae0", scored([2, 3], [[2, 3], [3, 2]])), logprobs=2)
    first, second = r"bytes:\xf0\x9f", r"bytes:\xab\xa0"
    assert found["tokens"] == [first, second]
    assert found["top_logprobs"] == [{first: -2.0, second: -3.0}, {second: -3.0, first: -2.0}]


@asynchronous
async def test_offsets_say_where_each_token_begins_in_the_text() -> None:
    found = await completion(answers("a \U0001fae0x", scored([1, 2, 3, 5, 4], unspoken=[4])), logprobs=0)
    assert found["text_offset"] == [0, 2, 2, 3, 4]


@asynchronous
async def test_offsets_of_an_echo_begin_with_the_prompt() -> None:
    script = answers("x", scored([5]), scored([4, 1, 1]))  # the tokenizer put a special token before the prompt
    found = await completion(script, prompt="a a ", echo=True, logprobs=0)
    assert found["text_offset"] == [0, 0, 2, 4]


@pytest.mark.parametrize("chunks", [1, 2])
@asynchronous
async def test_offsets_go_on_from_chunk_to_chunk(chunks: int) -> None:
    def script(generate: Generate) -> list[Message]:
        rid, end = generate.request.rid, Finish(reason="length", length=2)
        if chunks == 1:
            return [step(rid, [1, 5], "a x", logprobs=scored([1, 5]), finish=end)]
        return [
            step(rid, [1], "a ", logprobs=scored([1])),
            step(rid, [5], "x", logprobs=scored([5]), finish=end),
        ]

    async with served(script) as server:
        events = (await server.client.post("/v1/completions", {"prompt": "p", "logprobs": 0, "stream": True})).events()
        told = [event["choices"][0]["logprobs"]["text_offset"] for event in events]
        assert [offset for part in told for offset in part] == [0, 2]


def test_the_space_that_a_tokenizer_puts_before_a_text_takes_no_room() -> None:
    offsets = Offsets("hi you")
    told = [offsets.next(Scored((None, 0, token), None, prompt=True)) for token in (b" hi", b" you")]
    assert told == [0, 2]


def test_a_character_that_the_prompt_begins_and_the_output_ends_is_one() -> None:
    offsets = Offsets("a ")
    prompt = [offsets.next(Scored((None, 0, token), None, prompt=True)) for token in (b"a ", FACE[:2])]
    output = [offsets.next(Scored((None, 0, token), None)) for token in (FACE[2:], b"x")]
    assert (prompt, output) == ([0, 2], [2, 3])


@asynchronous
async def test_an_echo_leaves_half_a_character_to_the_output() -> None:
    async with served(says("\U0001fae0")) as server:
        server.ring.answers_commands = False
        call = asyncio.create_task(server.client.post("/v1/completions", {"prompt": [1, 2], "echo": True}))
        [command] = await server.ring.sent_of(Detokenize)
        assert command.open_end
        server.ring.push(Reply(id=command.id, body={"texts": ["a "]}))
        assert (await call).json()["choices"][0]["text"] == "a \U0001fae0"


@asynchronous
async def test_a_token_without_text_is_told_with_an_empty_content() -> None:
    async with served(answers("", scored([4], unspoken=[0]))) as server:
        body = {"messages": [{"role": "user", "content": "hi"}], "logprobs": True, "stream": True}
        chunks = (await server.client.post("/v1/chat/completions", body)).events()
        choices = [choice for chunk in chunks for choice in chunk["choices"]]
        assert [choice["delta"]["content"] for choice in choices if choice["logprobs"]] == [""]
