"""What a replica does with its ring."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from quartet.runtime.api.engine import Engine
from quartet.runtime.api.transport import EngineError

Chunk = dict[str, Any]
LOST = 0  # code of an error: the ring has ended
BY_NAME = ("text", "sampling_params", "stream")


async def chunks_of(engine: Engine, body: dict[str, Any]) -> AsyncIterator[Chunk]:
    """The chunks of a request for /generate. The last one is {"error"} where it was refused or has failed."""
    fields = {name: value for name, value in body.items() if name not in BY_NAME}
    try:
        text, params = body.get("text"), body.get("sampling_params")
        async for chunk in await engine.async_generate(text, params, stream=True, **fields):
            yield chunk
    except (EngineError, TypeError) as error:  # TypeError: a field that /generate does not have
        status = error.status if isinstance(error, EngineError) else 400
        yield {"error": {"message": str(error), "code": status, "param": getattr(error, "field", None)}}


async def update_weights(engine: Engine, weights: dict[str, Any]) -> None:
    """Serve the weights of a user_config: the parameters of `Engine.update_weights_from_disk`. Empty: as started."""
    if weights:
        await asyncio.to_thread(lambda: engine.update_weights_from_disk(**weights))
