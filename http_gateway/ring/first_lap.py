"""The first message that goes all the way round the ring."""

import logging
from collections.abc import Awaitable, Callable

from quartet.runtime.errors import RequestError

log = logging.getLogger(__name__)

LAP_TIMEOUT_S = 5.0


async def wait_until_connected(probe: Callable[[float], Awaitable[object]]) -> None:
    """Return once a probe has gone all the way round: every hop is there and connected to the next."""
    while True:
        try:
            await probe(LAP_TIMEOUT_S)
            return
        except (RequestError, TimeoutError) as error:
            log.info("The ring is not complete yet: %s", error or "no answer in time")
