"""How large the KV pool is made."""

import logging

import pytest

from quartet.runtime.errors import StartupError
from quartet.runtime.process.memory import GB, Memory
from quartet.scheduler_service.host.pool_size import OTHERS_BYTES, Need, Room, note_size, plan_pool, sized_as_before
from tests.configs import resolved

KIB = 1 << 10
PAGE = 16 * KIB  # bytes, of 16 tokens


def count(
    available_gb: float = 10.0,
    total_gb: float = 16.0,
    most_tokens: int = 10**9,
    bytes_per_token: int = KIB,
    second_set_gb: float = 0.0,
    context_length: int = 2048,
    device: str = "cpu",
    **settings,
) -> int:
    config = resolved(device=device, **settings)
    memory = Memory(int(available_gb * GB), int(total_gb * GB), "a limit")
    need = Need(16, bytes_per_token, most_tokens, context_length)
    return plan_pool(config, need, Room(memory, int(second_set_gb * GB))).page_count


def test_a_cpu_gives_a_quarter_of_what_others_and_an_update_leave():
    left = 10.0 * GB - OTHERS_BYTES - 2.0 * GB
    assert count(10.0, second_set_gb=2.0) * PAGE == pytest.approx(left / 4, rel=1e-3)


def test_a_large_machine_gives_four_gigabytes_unasked():
    assert count(200.0, 256.0) * PAGE == pytest.approx(4 * GB, rel=1e-3)


def test_one_request_of_full_length_fits_even_if_that_takes_more():
    assert count(200.0, 256.0, bytes_per_token=512 * KIB, context_length=32768) * 16 >= 32768


def test_a_long_context_never_takes_more_than_half_of_what_is_left():
    taken = count(2.5, bytes_per_token=512 * KIB, context_length=32768) * 512 * PAGE
    assert taken == pytest.approx((2.5 * GB - OTHERS_BYTES) / 2, rel=1e-2)


def test_an_update_that_has_no_room_leaves_the_pool_its_share_and_is_told(caplog):
    with caplog.at_level(logging.WARNING):
        assert count(2.5, second_set_gb=4.0) == count(2.5)
    assert "A weight update needs 2.00 GB more than there is room for." in caplog.text


def test_a_gpu_gives_most_of_what_is_free():
    assert count(10.0, second_set_gb=2.0, device="cuda") * PAGE == pytest.approx(8.5 * GB, rel=1e-3)


def test_no_more_than_all_requests_can_hold():
    assert count(most_tokens=1000) == 63


def test_the_memory_share_counts_what_is_taken_already():
    assert count(10.0, mem_fraction_static=0.5) * PAGE == pytest.approx(2.0 * GB, rel=1e-3)


def test_an_explicit_size_is_rounded_down_to_whole_pages():
    assert count(max_total_tokens=1000) == 62


@pytest.mark.parametrize("available_gb", [0.2, 1.0, 9.0])
def test_an_explicit_size_that_does_not_fit_is_cut_to_what_others_leave(available_gb, caplog):
    taken = count(available_gb, max_total_tokens=10**9) * PAGE
    assert taken == pytest.approx(max(available_gb * GB - OTHERS_BYTES, available_gb * GB / 2), rel=1e-2)
    assert "may still be used by a limit" in caplog.text


@pytest.mark.parametrize("settings", [{"mem_fraction_static": 0.1}, {"available_gb": 0.00001}])
def test_no_room_for_one_page_is_an_error_that_says_what_limits_it(settings):
    with pytest.raises(StartupError, match=r"may still be used by a limit; .*--mem-fraction-static"):
        count(**settings)


def test_an_encoder_only_counts_its_pages():
    assert count(0.0, bytes_per_token=0, most_tokens=1600) == 100


def test_several_schedulers_on_a_cpu_share_its_memory_and_on_gpus_each_has_its_own():
    assert count(20.0, dp_size=2) == count(10.0)
    assert count(20.0, device="cuda", dp_size=2) == count(20.0, device="cuda")


def test_a_scheduler_that_comes_back_gets_the_pool_of_the_one_before(tmp_path):
    config = resolved(device="cpu", dp_size=2)
    assert sized_as_before(config, str(tmp_path)) == config
    note_size(config, str(tmp_path), 4096)
    again = sized_as_before(config, str(tmp_path))
    assert (again.max_total_tokens, again.dp_size) == (4096, 1)
    alone = resolved(device="cpu")
    note_size(alone, str(tmp_path), 1)
    assert sized_as_before(alone, str(tmp_path)) == alone
