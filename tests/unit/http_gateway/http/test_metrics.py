"""Metrics that do not come from requests."""

from functools import partial
from pathlib import Path

from quartet.http_gateway.http.metrics import Metrics
from quartet.runtime.messages import ROLES
from quartet.runtime.sockets import newest_epoch, point_stable_path
from tests.unit.http_gateway.harness import asynchronous


@asynchronous
async def test_restarts_are_those_that_the_launcher_announces_so_that_a_new_gateway_counts_on(tmp_path: Path) -> None:
    for role, epoch in zip(ROLES, (2, 0, 11, 1), strict=True):
        point_stable_path(str(tmp_path), role, epoch)
    for _ in ("a gateway", "the one after it"):
        text = (await Metrics("m", partial(newest_epoch, str(tmp_path))).text({})).decode()
        assert [line for line in text.splitlines() if line.startswith("quartet:restarts")] == [
            'quartet:restarts_total{role="gateway"} 2.0',
            'quartet:restarts_total{role="tokenizer"} 0.0',
            'quartet:restarts_total{role="scheduler"} 11.0',
            'quartet:restarts_total{role="detokenizer"} 1.0',
        ]
