"""Work in a thread of its own, and what becomes of its faults."""

from collections.abc import Callable

import pytest

from runtime.errors import CommandRefused
from scheduler_service.beside import beside


def outcome(work: Callable[[], object]) -> object:
    """What the work returns, once its generator has been advanced to its end."""
    waiting = beside(work)
    while True:
        try:
            next(waiting)
        except StopIteration as end:
            return end.value


def raising(error: Exception) -> Callable[[], object]:
    def work() -> object:
        raise error

    return work


def test_the_result_of_the_work_is_returned() -> None:
    assert outcome(lambda: 3) == 3


def test_a_refusal_stays_what_it_is() -> None:
    with pytest.raises(CommandRefused, match="no such group") as refused:
        outcome(raising(CommandRefused("no such group", 409)))
    assert refused.value.status == 409


@pytest.mark.parametrize("fault", [KeyError("group"), PermissionError(13, "Permission denied"), MemoryError()])
def test_any_other_fault_is_the_commands_own_and_a_500(fault: Exception) -> None:
    with pytest.raises(CommandRefused, match=type(fault).__name__) as refused:
        outcome(raising(fault))
    assert refused.value.status == 500
