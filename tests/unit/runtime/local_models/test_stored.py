"""The cache's list, and what is removed from it."""

import io
import os

import pytest

from quartet.runtime.local_models import stored

COMMITS = ("a" * 40, "b" * 40)
DAY_S = 86400


def keep(cache, name: str, size: int, *, days: float, kind: str = "models", commits=COMMITS[:1]):
    """A repository of the cache as the hub's library lays it out; last used so many days ago."""
    folder = cache / f"{kind}--{name.replace('/', '--')}"
    (folder / "blobs").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commits[0])
    for commit in commits:
        blob = folder / "blobs" / commit
        blob.write_bytes(b"x" * size)
        moment = blob.stat().st_mtime - days * DAY_S
        os.utime(blob, (moment, moment))
        (folder / "snapshots" / commit).mkdir(parents=True)
        (folder / "snapshots" / commit / "model.safetensors").symlink_to(f"../../blobs/{commit}")
    return folder


@pytest.fixture
def cache(tmp_path):
    keep(tmp_path, "owner/large", 3_000_000, days=3, commits=COMMITS)
    keep(tmp_path, "owner/small", 1500, days=0)
    keep(tmp_path, "owner/texts", 900, days=1, kind="datasets")
    return tmp_path


def run(cache, capsys, *words: str) -> tuple[int, str, str]:
    status = stored.main([*words, "--download-dir", str(cache)])
    shown = capsys.readouterr()
    return status, shown.out, shown.err


def test_models_are_listed_with_sizes_the_last_used_first(cache, capsys):
    status, out, _ = run(cache, capsys)
    assert status == 0
    assert out.splitlines() == [
        "model          size  last used",
        "owner/small  1.5 kB  just now",
        "owner/large  6.0 MB  3 days ago",
        f"2 models, 6.0 MB in {cache}",
    ]


def test_an_empty_cache_says_how_to_fill_it(tmp_path, capsys):
    status, out, _ = run(tmp_path / "none", capsys)
    assert (status, "quartet pull" in out) == (0, True)


def test_a_model_is_removed_whole_and_nothing_else(cache, capsys):
    status, out, _ = run(cache, capsys, "rm", "owner/large", "--yes")
    assert (status, out) == (0, "removed owner/large: 6.0 MB freed\n")
    assert sorted(folder.name for folder in cache.iterdir()) == ["datasets--owner--texts", "models--owner--small"]


def test_a_download_that_was_broken_off_is_removed_too(cache, capsys):
    folder = keep(cache, "owner/broken", 10, days=0)
    for file in (folder / "snapshots").rglob("*"):
        if file.is_symlink():
            file.unlink()
    (folder / "snapshots" / COMMITS[0]).rmdir()
    (folder / "refs" / "main").unlink()
    assert run(cache, capsys, "rm", "owner/broken", "--yes")[0] == 0
    assert not folder.exists()


@pytest.mark.parametrize(("answer", "status"), [("y\n", 0), ("\n", 1), ("n\n", 1), ("", 1)])
def test_a_person_is_asked_first(cache, capsys, monkeypatch, answer, status):
    terminal = io.StringIO(answer)
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr("sys.stdin", terminal)
    found, out, _ = run(cache, capsys, "rm", "owner/small")
    assert (found, "Remove owner/small (1.5 kB)? [y/N]" in out) == (status, True)
    assert (cache / "models--owner--small").exists() is bool(status)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["rm", "owner/small"], "--yes"),
        (["rm"], "say which model"),
        (["rm", "owner/smal", "--yes"], "did you mean owner/small?"),
        (["rm", "owner/small", "nobody/x", "--yes"], "no model nobody/x"),
        (["rm", "owner/texts", "--yes"], "no model owner/texts"),
        (["list", "owner/small"], "quartet models rm"),
        (["delete"], "delete"),
    ],
)
def test_what_makes_no_sense_is_refused_and_removes_nothing(cache, capsys, monkeypatch, words, said):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    status, _, err = run(cache, capsys, *words)
    assert (status, said in err) == (2, True)
    assert len(list(cache.iterdir())) == 3
