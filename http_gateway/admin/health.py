"""The three health answers, and the one that really generates.

/livez             the event loop turns
/readyz            the server takes requests: it has warmed up, does not drain, is not paused, and no process is missing
/health, /healthz  and every process runs and the scheduler moves, by their progress words: no probe, no waiting
/health_generate   and one token comes back
"""

import time
from math import inf

from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from quartet.http_gateway.http import errors
from quartet.http_gateway.http.auth import Access
from quartet.http_gateway.routes.endpoint import Endpoint
from quartet.http_gateway.routes.gateway import Gateway, Phase
from quartet.runtime.messages import GATEWAY, SCHEDULER, processes
from quartet.runtime.sockets import is_open

FROZEN_S = 5.0  # without a pulse, which comes once a second


def not_ready(gateway: Gateway) -> str:
    """Why the server takes no requests; empty when it does."""
    return "" if gateway.phase is Phase.UP else gateway.phase.value


def resting(gateway: Gateway) -> str:
    """Why requests wait though the server is well; empty when they do not."""
    if gateway.paused:
        return "generation is paused"
    if gateway.lacks:
        return f"memory is released: {', '.join(gateway.lacks)}"
    return "the weights were released, and no update has written all of them since" if gateway.asleep else ""


def stuck(gateway: Gateway) -> str:
    """Why a process counts as dead; empty when all run, and the scheduler moves or has nothing to do."""
    if reason := frozen(gateway):
        return reason
    limit_s = gateway.health_timeout_s
    age_s = gateway.progress.age_s()
    oldest = gateway.ring.oldest_sent_at
    waited_s = 0.0 if oldest is None else time.monotonic() - oldest
    if age_s > limit_s and (gateway.progress.busy() or waited_s > limit_s):
        return f"the scheduler has not moved for {age_s:.0f} s"
    return ""


def frozen(gateway: Gateway) -> str:
    """Which process is there and does not run; empty when none is. One that is being started again is not there."""
    keys = processes(gateway.rules.schedulers)
    for title, pulse in gateway.hops.items():
        age_s = pulse.pulse_age_s()
        if FROZEN_S < age_s < inf and (not gateway.run_dir or is_open(gateway.run_dir, keys[title])):
            return f"the {title} has not run for {age_s:.0f} s"
    return ""


def verdict(reason: str, resting: str = "") -> Response:
    """503 with a reason, or 200. A server that is well and rests on purpose says why nothing is generated."""
    if reason:
        return errors.json_response({"status": "unhealthy", "reason": reason}, 503, {"Retry-After": "1"})
    if resting:
        return errors.json_response({"status": "resting", "reason": resting})
    return Response(status_code=200)


def sleeping() -> Response:
    """The answer of a server that has given its memory back until somebody asks; asking for its health does not."""
    return errors.json_response(
        {"status": "sleeping", "reason": "nothing was asked; the next request wakes the server"}
    )


async def live(gateway: Gateway, http: HTTPRequest) -> Response:
    return Response(status_code=200)


def missing(gateway: Gateway) -> str:
    """Which process is being started again, so that requests wait for it; empty when none is.

    While one of several schedulers lives, they do not wait.
    """
    if not gateway.run_dir:
        return ""
    keys = processes(gateway.rules.schedulers)
    absent = [title for title, key in keys.items() if title != GATEWAY and not is_open(gateway.run_dir, key)]
    schedulers = [title for title in absent if title.startswith(SCHEDULER)]
    if len(schedulers) < gateway.rules.schedulers:
        absent = [title for title in absent if title not in schedulers]
    return f"the {absent[0]} is being started again" if absent else ""


async def ready(gateway: Gateway, http: HTTPRequest) -> Response:
    return verdict(not_ready(gateway) or resting(gateway) or missing(gateway) or frozen(gateway))


async def health(gateway: Gateway, http: HTTPRequest) -> Response:
    why = not_ready(gateway) or stuck(gateway)
    return sleeping() if gateway.sleeping and not why else verdict(why, resting(gateway))


async def health_generate(gateway: Gateway, http: HTTPRequest) -> Response:
    """While nothing is generated on purpose, the scheduler's heartbeat is the sign of life: trainers' watchdogs end
    servers that say 503 while their memory is lent. Once it is all back, nothing but weights is waited for, and
    whoever wants to generate has to hear that.
    """
    if gateway.sleeping:
        why = not_ready(gateway) or stuck(gateway)
        return verdict(why) if why else sleeping()
    if why := resting(gateway):
        unwritten = gateway.asleep and not (gateway.lacks or gateway.paused)
        return verdict(not_ready(gateway) or stuck(gateway) or (why if unwritten else ""), why)
    return verdict(not_ready(gateway) or frozen(gateway) or await gateway.health_probe.failure())


PROBES = {"/ping": live, "/livez": live, "/readyz": ready, "/ready": ready, "/health": health, "/healthz": health}
ENDPOINTS = [
    *(Endpoint(path, handler, ("GET", "HEAD"), access=Access.PUBLIC) for path, handler in PROBES.items()),
    Endpoint("/health_generate", health_generate, access=Access.PUBLIC, changes_state=True),  # it has a token computed
]
