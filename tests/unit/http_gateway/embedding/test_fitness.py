"""Documents that are ranked by a model's answer: the prompts that it gets, and what they may come to."""

import dataclasses
from typing import Any

import pytest

from quartet.http_gateway.embedding import fitness
from quartet.http_gateway.generation.intake import Rules
from quartet.runtime.control import Tokenize
from quartet.runtime.errors import Kind, RequestError
from quartet.runtime.messages import Finish, Generate, Logprobs, Message, Reply, Request, pack_ids, unpack_ids
from quartet.runtime.model_files.reranker import AnswerRanking
from quartet.runtime.sampling import SamplingParams
from tests.unit.http_gateway.harness import asynchronous, floats, served, step

RULES = Rules(vocab_size=100, hidden_size=2, most_bytes=1 << 20)


class Counted(str):
    """Fails where it is put into another text."""

    def __format__(self, spec: str) -> str:
        raise AssertionError("a prompt was made")


def by_length(generate: Generate) -> list[Message]:
    """Yes is as likely as the length of the prompt says."""
    sure = min(0.99, len(generate.text or "") / 1000)
    made = Logprobs(ids=pack_ids([7]), values=floats(-0.5), asked_values=floats(sure, 0.0))
    finish = Finish(reason="length", length=1)
    return [step(generate.request.rid, [7], "yes", prompt_tokens=9, logprobs=made, finish=finish)]


def test_prompts_that_are_too_large_together_are_refused_before_one_is_made() -> None:
    body = fitness.Ranking(query=Counted("q" * 5000))
    with pytest.raises(RequestError, match="300 requests of this call take") as refusal:
        fitness.check_prompts(body, ["d"] * 300, RULES)
    assert refusal.value.kind is Kind.TOO_LARGE
    fitness.check_prompts(body, ["d"] * 100, RULES)


def test_a_template_of_its_own_gets_query_document_and_instruction() -> None:
    body = fitness.Ranking(query="q", instruct="find")
    request = Request(rid="", params=SamplingParams())
    made = fitness.question(request, body, "d", own_template=True)
    assert made.chat is not None and [message["content"] for message in made.chat.messages] == ["q", "d"]
    assert made.chat.template_kwargs == {"instruct": "find"} and made.chat.as_it_is


@asynchronous
async def test_the_tokens_of_the_answers_are_asked_for_once() -> None:
    async with served(by_length) as server:
        server.gateway.answer_ranking = AnswerRanking(own_template=False)
        answers_commands = server.ring._answer

        def answer(command: Any) -> None:
            if isinstance(command, Tokenize):
                server.ring.push(Reply(id=command.id, body={"tokens": [pack_ids([7]), pack_ids([8])]}))
            else:
                answers_commands(command)

        server.ring._answer = answer  # type: ignore[method-assign]
        body = {"query": "q", "documents": ["short", "a longer document"]}
        for _ in range(2):
            ranked = (await server.client.post("/v1/rerank", body)).json()
            assert [entry["index"] for entry in ranked] == [1, 0]
        assert len([sent for sent in server.ring.sent if isinstance(sent, Tokenize)]) == 1
        prompts = [sent for sent in server.ring.sent if isinstance(sent, Generate)]
        assert all(prompt.request.logprobs.token_ids == [7, 8] for prompt in prompts if prompt.request.logprobs)


def by_last_but_one(generate: Generate) -> list[Message]:
    """The logit of the answer is the number of tokens."""
    count = float(len(generate.input_ids) // 4)
    made = Logprobs(ids=pack_ids([7]), values=floats(-0.5), asked_values=floats(count - 20))
    finish = Finish(reason="length", length=1)
    return [step(generate.request.rid, [7], "x", prompt_tokens=9, logprobs=made, finish=finish)]


@asynchronous
async def test_a_reranker_of_bge_is_scored_by_the_logit_of_yes_behind_its_question(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fitness, "BGE_PROMPT", "fits?")
    async with served(by_last_but_one) as server:
        server.gateway.answer_ranking = AnswerRanking(by_logit=True)
        answers_commands = server.ring._answer

        def answer(command: Any) -> None:
            if isinstance(command, Tokenize):
                ids = [[5] if text == "Yes" else [ord(letter) for letter in text] for text in command.texts]
                begun = [[1, *one] if command.add_special_tokens else one for one in ids]
                server.ring.push(Reply(id=command.id, body={"tokens": list(map(pack_ids, begun))}))
            else:
                answers_commands(command)

        server.ring._answer = answer  # type: ignore[method-assign]
        body = {"query": "q", "documents": ["short", "a longer document"], "model": "any"}
        ranked = (await server.client.post("/v1/rerank", body)).json()
        assert [(entry["index"], entry["score"]) for entry in ranked] == [(1, 12.0), (0, 0.0)]
        prompts = [sent for sent in server.ring.sent if isinstance(sent, Generate)]
        assert [bytes(unpack_ids(sent.input_ids).tolist()) for sent in prompts] == [
            b"\x01A: q\nB: short\nfits?",
            b"\x01A: q\nB: a longer document\nfits?",
        ]
        options = prompts[0].request.logprobs
        assert options is not None and options.raw and options.token_ids == [5]
        cut = {"query": "q", "texts": body["documents"], "truncate": True, "raw_scores": True, "instruct": "so?"}
        server.gateway.rules = dataclasses.replace(server.gateway.rules, longest_prompt=20)
        scores = {entry["index"]: entry["score"] for entry in (await server.client.post("/rerank", cut)).json()}
        assert scores == {0: -2.0, 1: -1.0}
        shares = (await server.client.post("/rerank", {"query": "q", "documents": ["short"]})).json()["results"]
        assert shares[0]["relevance_score"] == 0.5
