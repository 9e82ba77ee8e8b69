"""CPU budgets that do not depend on the machine: a slow one must be able to compile what these tests compile."""

import pytest

from quartet.runtime import limits

AMPLE_CPU_S = 20.0


@pytest.fixture
def usual_budget() -> None:
    """For grammars that must run out of it: the budget that servers have."""


@pytest.fixture(autouse=True)
def budget(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough for any grammar on any machine, unless the test has `usual_budget`."""
    if "usual_budget" not in request.fixturenames:
        monkeypatch.setattr(limits, "GRAMMAR_CPU_S", AMPLE_CPU_S)
