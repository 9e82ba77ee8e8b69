"""What the soak makes of its samples."""

from deploy.benchmarks.soak import MB, Sample, Soak, report, slope


def soak(growth_mb: float, wrong: int = 0) -> Soak:
    """Samples every 1,000 requests; growth in 100,000 of them. The first, before the warm-up's end, is far off."""
    found = Soak(port=0)
    for number in range(6):
        size = int(50 * MB + growth_mb * MB * number / 100) if number else 10 * MB
        found.samples.append(Sample(60.0 * number, 1000 * number, {"quartet::gateway": size}, {"quartet::gateway": 9}))
    if wrong:
        found.wrong["plain: 500 instead of 200"] = wrong
    return found


def test_a_slope_is_growth_in_so_many_requests() -> None:
    assert slope([(0, 0), (1000, MB), (2000, 2 * MB)]) == 100


def test_growth_before_the_end_of_the_warm_up_counts_for_nothing() -> None:
    assert report(soak(growth_mb=0.5), warmup_s=60)
    assert not report(soak(growth_mb=0.5), warmup_s=0)


def test_growth_beyond_the_aim_is_a_failure() -> None:
    assert not report(soak(growth_mb=1.5), warmup_s=60)


def test_a_wrong_answer_is_a_failure() -> None:
    assert not report(soak(growth_mb=0.5, wrong=1), warmup_s=60)
