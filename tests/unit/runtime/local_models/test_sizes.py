"""Sizes and moments in words."""

import pytest

from quartet.runtime.local_models.sizes import ago, in_words, size_of


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1500, "1.5 kB"),
        (999_999, "1.0 MB"),
        (123_456_789, "123 MB"),
        (4_000_000_000, "4.0 GB"),
    ],
)
def test_sizes_have_the_digits_that_count(size, words):
    assert in_words(size) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(5, "just now"), (60, "1 minute ago"), (7200, "2 hours ago"), (86400 * 3, "3 days ago"), (-5, "just now")],
)
def test_moments_are_told_by_how_long_they_are_past(seconds, words):
    assert ago(1e9 - seconds, 1e9) == words


def test_moments_long_past_are_dates():
    assert ago(1e9, 1e9 + 100 * 86400) in ("2001-09-09", "2001-09-08")


def test_links_count_as_what_they_lead_to(tmp_path):
    (tmp_path / "blob").write_bytes(b"x" * 10)
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "link").symlink_to("../blob")
    assert size_of(tmp_path / "snapshot") == 10
