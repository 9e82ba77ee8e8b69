"""What the gateway's process reads from its surroundings."""

import pytest

from quartet.http_gateway.main import health_timeout_s
from quartet.runtime.errors import StartupError


def test_the_health_timeout_is_twenty_seconds_unless_said_otherwise() -> None:
    assert health_timeout_s({}) == 20
    assert health_timeout_s({"SGLANG_HEALTH_CHECK_TIMEOUT": "2.5"}) == 2.5


@pytest.mark.parametrize("value", ["soon", "", "nan", "inf", "-1", "0"])
def test_a_health_timeout_that_is_no_time_is_refused_in_one_line(value: str) -> None:
    with pytest.raises(StartupError, match=f"SGLANG_HEALTH_CHECK_TIMEOUT must be a number of seconds, got '{value}'"):
        health_timeout_s({"SGLANG_HEALTH_CHECK_TIMEOUT": value})
