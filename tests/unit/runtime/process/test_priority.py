"""Background threads give way to the steps, whatever priority the server was started with."""

import os
import threading

import pytest

from quartet.runtime.process.priority import NICEST, give_way


@pytest.mark.parametrize("behind_it", [0, 4, 19])
def test_a_thread_gets_a_lower_priority_than_it_had_and_never_a_higher_one(behind_it):
    seen = []

    def work() -> None:
        thread = threading.get_native_id()
        began = min(NICEST, os.getpriority(os.PRIO_PROCESS, thread) + behind_it)
        os.setpriority(os.PRIO_PROCESS, thread, began)
        give_way()
        seen.append((began, os.getpriority(os.PRIO_PROCESS, thread)))

    worker = threading.Thread(target=work)
    worker.start()
    worker.join()
    [(began, ended)] = seen
    assert ended > began or ended == NICEST
