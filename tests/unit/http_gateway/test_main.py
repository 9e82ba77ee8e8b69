"""What the gateway's process reads from its surroundings."""

import pytest

from http_gateway.main import health_timeout_s
from runtime.errors import StartupError


def test_the_health_timeout_is_twenty_seconds_unless_said_otherwise() -> None:
    assert health_timeout_s({}) == 20
    assert health_timeout_s({"SGLANG_HEALTH_CHECK_TIMEOUT": "2.5"}) == 2.5


def test_a_health_timeout_that_is_no_number_is_refused_in_one_line() -> None:
    with pytest.raises(StartupError, match="SGLANG_HEALTH_CHECK_TIMEOUT must be a number of seconds, got 'soon'"):
        health_timeout_s({"SGLANG_HEALTH_CHECK_TIMEOUT": "soon"})
