"""When a process that is to stand by is started."""

import pytest

from quartet.runtime.launcher import lull
from quartet.runtime.process.vitals import State, Vitals


@pytest.fixture
def active(monkeypatch):
    """What processes have been active for, in seconds, by pid; a test changes it."""
    seconds = {}

    def read(pid):
        return Vitals(State.RUNNABLE, {pid: seconds[pid]}) if pid in seconds else None

    monkeypatch.setattr(lull, "read_vitals", read)
    return seconds


def test_busy_processes_are_waited_for(active):
    wait, pids = lull.Lull(latest=100.0), [1, 2]
    active |= {1: 50.0, 2: 7.0}
    assert not wait.is_here(10.0, pids)  # nothing to compare with
    active |= {1: 50.4, 2: 7.2}
    assert not wait.is_here(11.0, pids)
    active |= {1: 50.5, 2: 7.3}
    assert wait.is_here(12.0, pids)


def test_no_longer_than_the_limit(active):
    wait = lull.Lull(latest=20.0)
    for second in range(10, 20):
        active[1] = float(second)
        assert not wait.is_here(float(second), [1])
    active[1] = 20.0
    assert wait.is_here(20.0, [1])


def test_one_that_has_just_begun_is_not_counted_and_one_that_has_ended_uses_nothing(active):
    wait = lull.Lull(latest=100.0)
    active[1] = 5.0
    assert not wait.is_here(10.0, [1])
    active |= {2: 30.0}
    del active[1]
    assert wait.is_here(11.0, [1, 2])
