from math import inf
from pathlib import Path

from runtime.progress import ProgressReader, ProgressWord


def test_nothing_written_is_infinitely_old_and_not_busy(tmp_path: Path) -> None:
    reader = ProgressReader(str(tmp_path))
    assert (reader.age_s(), reader.busy(), reader.beats()) == (inf, False, 0)


def test_a_reader_opened_before_the_writer_sees_its_beats(tmp_path: Path) -> None:
    reader = ProgressReader(str(tmp_path))
    assert reader.age_s() == inf
    word = ProgressWord(str(tmp_path))
    assert reader.age_s() == inf
    word.beat(busy=True)
    assert reader.age_s() < 60
    assert reader.busy()
    word.beat(busy=False)
    assert (reader.busy(), reader.beats()) == (False, 2)


def test_a_restarted_writer_goes_on_counting(tmp_path: Path) -> None:
    ProgressWord(str(tmp_path)).beat(busy=True)
    ProgressWord(str(tmp_path)).beat(busy=True)
    assert ProgressReader(str(tmp_path)).beats() == 2


def test_the_file_is_private(tmp_path: Path) -> None:
    ProgressWord(str(tmp_path))
    assert (tmp_path / "progress").stat().st_mode & 0o777 == 0o600
