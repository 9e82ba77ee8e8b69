"""The three health answers, and the one that really generates.

/livez             the event loop turns
/readyz            the server takes requests: it has warmed up, does not drain, is not paused, and no process is missing
/health            and the scheduler moves, by the age of its progress word: no probe, no waiting
/health_generate   and one token comes back
"""

import time

from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from http_gateway import errors
from http_gateway.auth import Access
from http_gateway.endpoint import Endpoint
from http_gateway.gateway import Gateway, Phase
from runtime.sockets import is_open

RING = ("tokenizer", "scheduler", "detokenizer")


def not_ready(gateway: Gateway) -> str:
    """Why the server takes no requests; empty when it does."""
    return "" if gateway.phase is Phase.UP else gateway.phase.value


def resting(gateway: Gateway) -> str:
    """Why requests wait though the server is well; empty when they do not."""
    if gateway.paused:
        return "generation is paused"
    return "memory is released" if gateway.asleep else ""


def stuck(gateway: Gateway) -> str:
    """Why the scheduler counts as dead; empty when it moves, or has nothing to do."""
    limit_s = gateway.health_timeout_s
    age_s = gateway.progress.age_s()
    oldest = gateway.ring.oldest_sent_at
    waited_s = 0.0 if oldest is None else time.monotonic() - oldest
    if age_s > limit_s and (gateway.progress.busy() or waited_s > limit_s):
        return f"the scheduler has not moved for {age_s:.0f} s"
    return ""


def verdict(reason: str) -> Response:
    if reason:
        return errors.json_response({"status": "unhealthy", "reason": reason}, 503, {"Retry-After": "1"})
    return Response(status_code=200)


async def live(gateway: Gateway, http: HTTPRequest) -> Response:
    return Response(status_code=200)


def missing(gateway: Gateway) -> str:
    """Which process is being started again, so that requests wait for it; empty when none is."""
    absent = [role for role in RING if gateway.run_dir and not is_open(gateway.run_dir, role)]
    return f"the {absent[0]} is being started again" if absent else ""


async def ready(gateway: Gateway, http: HTTPRequest) -> Response:
    return verdict(not_ready(gateway) or resting(gateway) or missing(gateway))


async def health(gateway: Gateway, http: HTTPRequest) -> Response:
    return verdict(not_ready(gateway) or stuck(gateway))


async def health_generate(gateway: Gateway, http: HTTPRequest) -> Response:
    """While nothing is generated on purpose, the scheduler's heartbeat is the sign of life."""
    if resting(gateway):
        return verdict(not_ready(gateway) or stuck(gateway))
    return verdict(not_ready(gateway) or await gateway.sign_of_life.missing())


ENDPOINTS = [
    Endpoint("/", live, ("GET", "HEAD")),
    Endpoint("/ping", live, access=Access.PUBLIC),
    Endpoint("/livez", live, access=Access.PUBLIC),
    Endpoint("/readyz", ready, access=Access.PUBLIC),
    Endpoint("/ready", ready, access=Access.PUBLIC),
    Endpoint("/health", health, access=Access.PUBLIC),
    Endpoint("/health_generate", health_generate, access=Access.PUBLIC),
]
