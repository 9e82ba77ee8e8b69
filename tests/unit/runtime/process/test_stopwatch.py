"""The stopwatch of a start."""

import time

from quartet.runtime.process.stopwatch import Stopwatch, age_s

ROUNDING_S = 1e-6  # of a sum


def test_a_process_grows_older_with_the_clock():
    first = age_s()
    assert 0 < first < time.clock_gettime(time.CLOCK_BOOTTIME)
    assert age_s() >= first


def test_phases_follow_one_another_and_add_up_to_the_whole():
    watch = Stopwatch()
    watch.mark("imports")
    watch.skip_wait()
    before = time.process_time()
    watch.mark("weights")
    after = time.process_time()
    assert [name for name, _, _ in watch.phases] == ["imports", "weights"]
    assert all(wall >= 0 and processor >= 0 for _, wall, processor in watch.phases)
    processor_s = sum(processor for _, _, processor in watch.phases)
    assert before - ROUNDING_S <= processor_s <= after + ROUNDING_S
    assert " s of processor time): imports " in watch.story() and ", weights " in watch.story()


def test_waiting_for_work_is_no_part_of_a_start():
    watch = Stopwatch()
    watch.mark("imports")
    watch._wall -= 1000  # as if so long ago
    watch.skip_wait()
    watch.mark("weights")
    assert watch.phases[1][1] < 500
