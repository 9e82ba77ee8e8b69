"""The run directory: private, locked while its launcher lives, gone afterwards."""

import os
import stat

import pytest

from quartet.runtime.errors import StartupError
from quartet.runtime.launcher import run_dir


def test_the_directory_is_private_and_gone_afterwards(tmp_path):
    with run_dir.private(tmp_path) as (directory, _):
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        (directory / "scheduler.0").touch()
    assert list(tmp_path.iterdir()) == []


def test_the_lifeline_is_open_exactly_as_long_as_the_directory(tmp_path):
    with run_dir.private(tmp_path) as (_, lifeline):
        copy = os.dup(lifeline)
        os.set_blocking(copy, False)
        with pytest.raises(BlockingIOError):
            os.read(copy, 1)
    assert os.read(copy, 1) == b""
    os.close(copy)


def test_two_boots_have_directories_of_their_own(tmp_path):
    with run_dir.private(tmp_path) as (first, _), run_dir.private(tmp_path) as (second, _):
        assert first != second
        assert first.exists()


def test_the_directory_goes_when_the_body_fails(tmp_path):
    with pytest.raises(ZeroDivisionError), run_dir.private(tmp_path):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_link_named_like_a_run_directory_is_not_followed(tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").touch()
    (precious / "lock").touch()
    (tmp_path / "quartet-0123abcd").symlink_to(precious)
    run_dir.sweep(tmp_path)
    assert (precious / "file").exists()


@pytest.mark.parametrize(("name", "has_lock"), [("quartet-models", True), ("quartet-0123abcd", False)])
def test_a_directory_that_no_launcher_has_made_is_left_alone(tmp_path, name, has_lock):
    other = tmp_path / name
    other.mkdir()
    if has_lock:
        (other / "lock").touch()
    run_dir.sweep(tmp_path)
    assert other.exists()
    assert (other / "lock").exists() == has_lock


def test_a_parent_that_cannot_be_written_is_refused_with_the_remedy(tmp_path):
    with pytest.raises(StartupError, match="set XDG_RUNTIME_DIR"), run_dir.private(tmp_path / "missing"):
        pass


def test_xdg_runtime_dir_is_used_where_it_exists(tmp_path):
    assert run_dir.base({"XDG_RUNTIME_DIR": str(tmp_path)}) == tmp_path
    assert str(run_dir.base({"XDG_RUNTIME_DIR": str(tmp_path / "missing")})) == "/tmp"
    assert str(run_dir.base({})) == "/tmp"


@pytest.mark.parametrize(
    "failing", ["quartet.runtime.launcher.run_dir.take_lock", "quartet.runtime.launcher.run_dir.hire_janitor"]
)
def test_a_directory_that_cannot_be_made_whole_leaves_nothing_behind(tmp_path, monkeypatch, failing):
    def refuse(*_):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(failing, refuse)
    with pytest.raises((OSError, StartupError), match="Too many open files"), run_dir.private(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []
