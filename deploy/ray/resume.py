"""Requests that outlive their replica: each goes on in another one, behind the output that its client has.

The tokens are those of an undisturbed run: a draw depends on the seed, the position and the logits, so it is the seed
that is chosen here, and `resume_ids` say where to go on. As after the death of a process inside a ring, near ties may
fall otherwise; with `enable_deterministic_inference` they do not.
"""

import secrets
from collections.abc import AsyncIterator, Callable
from typing import Any

from deploy.ray.replica import LOST, Chunk

MOST_DEATHS = 5  # of replicas, that one request outlives
SEED_BITS = 31

Send = Callable[[dict[str, Any]], AsyncIterator[Chunk]]  # has a replica generate


async def resumed(send: Send, body: dict[str, Any], deaths: tuple[type[Exception], ...]) -> AsyncIterator[Chunk]:
    """The chunks of a request, each with all of its output so far, from as many replicas as it takes.

    `deaths`: what `send` raises when a replica dies. Raises it when too many have died.
    """
    params = {"sampling_seed": secrets.randbits(SEED_BITS), **(body.get("sampling_params") or {})}
    given = list(body.get("resume_ids") or [])
    text, ids = "", list[int]()
    for left in reversed(range(MOST_DEATHS + 1)):
        whole: Chunk = {"text": text, "output_ids": ids}
        try:
            async for chunk in send({**body, "sampling_params": params, "resume_ids": given + ids}):
                if "error" in chunk:
                    if chunk["error"]["code"] == LOST and left:
                        break
                    yield chunk
                    return
                whole = joined(text, ids, chunk)
                yield whole
                if whole["meta_info"]["finish_reason"]:
                    return
        except deaths:
            if not left:
                raise
        text, ids = whole["text"], whole["output_ids"]


def joined(text: str, ids: list[int], chunk: Chunk) -> Chunk:
    """A chunk behind what replicas before have made."""
    if not ids:
        return chunk
    meta = dict(chunk["meta_info"], completion_tokens=len(ids) + chunk["meta_info"]["completion_tokens"])
    return dict(chunk, text=text + chunk.get("text", ""), output_ids=ids + chunk["output_ids"], meta_info=meta)
