"""Documents that are ranked by a model's answer: the prompts that it gets, and what they may come to."""

from typing import Any

import pytest

from quartet.http_gateway.embedding import fitness
from quartet.http_gateway.generation.intake import Rules
from quartet.runtime.control import Tokenize
from quartet.runtime.errors import Kind, RequestError
from quartet.runtime.messages import Finish, Generate, Logprobs, Message, Reply, Request, pack_ids
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
    assert made.chat.template_kwargs == {"instruct": "find"}


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
