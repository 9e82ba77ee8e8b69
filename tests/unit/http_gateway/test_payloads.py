"""Large payloads of control requests, as files."""

from pathlib import Path

import msgspec

from http_gateway import payloads


def test_payloads_live_as_long_as_their_request(tmp_path: Path) -> None:
    with payloads.files(str(tmp_path), 1) as [file]:
        payloads.store([msgspec.Raw(b'"aGVsbG8="')], [file])
        assert file.read_bytes() == b"hello"
    assert list(tmp_path.iterdir()) == []


def test_what_a_dead_gateway_has_left_is_swept_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / f"{payloads.PREFIX}12").touch()
    (tmp_path / "weights.json").touch()
    payloads.sweep(str(tmp_path))
    assert [file.name for file in tmp_path.iterdir()] == ["weights.json"]
