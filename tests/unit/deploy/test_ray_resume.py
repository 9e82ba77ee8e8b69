"""Requests that outlive their replica, without Ray: replicas are functions here."""

from collections.abc import AsyncIterator
from typing import Any

import pytest

from deploy.ray.replica import LOST
from deploy.ray.resume import MOST_DEATHS, resumed
from tests.unit.http_gateway.harness import asynchronous

OUTPUT = [(5, "a"), (6, "b"), (7, "c"), (8, "d")]


class Died(Exception):
    pass


class Replicas:
    """Each serves so many tokens of a request and then dies; the last one serves the rest."""

    def __init__(self, *lives: int) -> None:
        self.lives = list(lives)
        self.asked: list[dict[str, Any]] = []

    async def __call__(self, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        self.asked.append(body)
        life = self.lives.pop(0) if self.lives else len(OUTPUT)
        made = OUTPUT[len(body["resume_ids"]) :]
        for count in range(1, len(made) + 1):
            if count > life:
                raise Died
            ids, text = [id for id, _ in made[:count]], "".join(part for _, part in made[:count])
            meta = {"completion_tokens": count, "finish_reason": {"type": "stop"} if count == len(made) else None}
            yield {"text": text, "output_ids": ids, "meta_info": meta}


async def chunks_of(replicas: Any, body: dict[str, Any]) -> list[dict[str, Any]]:
    return [chunk async for chunk in resumed(replicas, body, (Died,))]


@asynchronous
async def test_a_request_goes_on_behind_what_its_client_has_with_the_same_seed() -> None:
    replicas = Replicas(1, 2)
    chunks = await chunks_of(replicas, {"text": "x"})
    assert [chunk["output_ids"] for chunk in chunks] == [[5], [5, 6], [5, 6, 7], [5, 6, 7, 8]]
    assert [chunk["text"] for chunk in chunks] == ["a", "ab", "abc", "abcd"]
    assert [chunk["meta_info"]["completion_tokens"] for chunk in chunks] == [1, 2, 3, 4]
    assert [body["resume_ids"] for body in replicas.asked] == [[], [5], [5, 6, 7]]
    assert len({body["sampling_params"]["sampling_seed"] for body in replicas.asked}) == 1


@asynchronous
async def test_a_death_behind_the_last_chunk_costs_nothing() -> None:
    replicas = Replicas(4)
    assert len(await chunks_of(replicas, {"text": "x"})) == 4
    assert len(replicas.asked) == 1


@asynchronous
async def test_a_request_outlives_so_many_replicas_and_no_more() -> None:
    assert (await chunks_of(Replicas(*[0] * MOST_DEATHS), {}))[-1]["output_ids"] == [5, 6, 7, 8]
    with pytest.raises(Died):
        await chunks_of(Replicas(*[0] * (MOST_DEATHS + 1)), {})


@asynchronous
async def test_a_refusal_is_passed_on_and_a_ring_that_has_ended_is_a_death() -> None:
    codes = [LOST, 400]

    async def refuse(body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        yield {"error": {"message": "no", "code": codes.pop(0)}}

    assert await chunks_of(refuse, {}) == [{"error": {"message": "no", "code": 400}}]
