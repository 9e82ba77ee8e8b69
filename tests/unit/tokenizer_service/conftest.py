"""How much a step of the encoder does in these tests does not depend on the machine's speed."""

import pytest

from quartet.tokenizer_service.encode import Encoder


@pytest.fixture(autouse=True)
def unlimited_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """No step of an encoder ends by the time that it has taken, unless the test gives it a clock."""
    made = Encoder.__init__

    def with_stopped_clock(self: Encoder, *args: object, **kwargs: object) -> None:
        made(self, *args, **({"clock": lambda: 0.0} | kwargs))  # type: ignore[arg-type]

    monkeypatch.setattr(Encoder, "__init__", with_stopped_clock)
