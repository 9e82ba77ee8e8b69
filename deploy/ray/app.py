"""Quartet on Ray Serve, a ring in each replica: `serve run deploy.ray.app:app`, then POST to it (docs/fleets.md)."""

from collections.abc import AsyncIterator

from ray import serve

from deploy.ray.front import Front
from deploy.ray.replica import chunks_of, update_weights
from quartet import Engine

SCALING = {"min_replicas": 2, "max_replicas": 8, "target_ongoing_requests": 64}


@serve.deployment(autoscaling_config=SCALING, max_ongoing_requests=256, graceful_shutdown_timeout_s=60, user_config={})
class Ring:
    def __init__(self, model: str = "demo", **flags: object) -> None:
        self.engine = Engine(model, **flags)  # serves when this returns; ends with the replica, however that ends

    async def reconfigure(self, weights: dict) -> None:  # a new user_config reaches every replica, later ones too
        await update_weights(self.engine, weights)

    def check_health(self) -> None:
        assert self.engine.alive, "the ring has ended"

    async def generate(self, body: dict) -> AsyncIterator[dict]:
        async for chunk in chunks_of(self.engine, body):
            yield chunk


app = Front.bind(Ring.bind())
