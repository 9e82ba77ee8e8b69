"""Large payloads of control requests, as files."""

import asyncio
import base64
import json
import random
from pathlib import Path
from typing import Any

import msgspec
import pytest

from quartet.http_gateway.admin import payloads
from quartet.http_gateway.admin.payloads import LONG_STRING_BYTES, Upload
from quartet.runtime.errors import RequestError

DATA = random.Random(3).randbytes(3 * LONG_STRING_BYTES)
TEXT = base64.b64encode(DATA).decode()


def feed_body(upload: Upload, body: bytes, size: int = 1 << 16) -> dict[str, Any]:
    """The skeleton of a body that arrives in parts of this size."""

    async def feed() -> None:
        for start in range(0, len(body), size):
            await upload.feed(body[start : start + size])

    asyncio.run(feed())
    skeleton: dict[str, Any] = json.loads(upload.skeleton)
    return skeleton


@pytest.mark.parametrize("size", [997, 1 << 16, 1 << 22])
@pytest.mark.parametrize("escape", [None, "\\/", "\\u002f", "\\u002F"])
def test_a_long_string_is_decoded_into_a_file_however_the_body_is_split(
    tmp_path: Path, size: int, escape: str | None
) -> None:
    body = json.dumps({"weight_version": 'a "b" \\', "entries": [TEXT, "short"], "n": 1})
    body = body if escape is None else body.replace("/", escape)
    with Upload(str(tmp_path)) as upload:
        skeleton = feed_body(upload, body.encode(), size)
        long, short = skeleton.pop("entries")
        assert skeleton == {"weight_version": 'a "b" \\', "n": 1}
        assert upload.file_of(json.dumps(long).encode()).read_bytes() == DATA
        assert short == "short"
        assert len(upload.skeleton) < 200
    assert list(tmp_path.iterdir()) == []


def test_more_payloads_than_ranks_are_refused_before_they_are_stored(tmp_path: Path) -> None:
    with Upload(str(tmp_path)) as upload, pytest.raises(RequestError, match="one entry for each of 1 ranks, got more"):
        feed_body(upload, json.dumps({"entries": [TEXT, TEXT]}).encode())
    assert list(tmp_path.iterdir()) == []


def test_two_ranks_may_be_sent_the_same_short_string(tmp_path: Path) -> None:
    with Upload(str(tmp_path), ranks=2) as upload:
        files = upload.files_of([msgspec.Raw(b'"aGVsbG8="')] * 2)
        assert [Path(file).read_bytes() for file in files] == [b"hello"] * 2


def test_a_short_string_is_written_when_its_file_is_requested(tmp_path: Path) -> None:
    with Upload(str(tmp_path)) as upload:
        assert upload.file_of(b'"aGVsbG8="').read_bytes() == b"hello"
        upload.check_placeholders(1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["*" * 100_000, "A" * 100_001, "A" * 90_000 + "\\n" + "A" * 9_998, '\\"' * 90_000])
def test_invalid_base64_is_refused(tmp_path: Path, text: str) -> None:
    with Upload(str(tmp_path)) as upload, pytest.raises(RequestError, match="not valid base64"):
        feed_body(upload, f'{{"entries": ["{text}"]}}'.encode())
    assert list(tmp_path.iterdir()) == []


def test_a_long_string_outside_of_the_entries_is_refused(tmp_path: Path) -> None:
    with Upload(str(tmp_path)) as upload:
        feed_body(upload, json.dumps({"weight_version": TEXT}).encode())
        with pytest.raises(RequestError, match="may be longer"):
            upload.check_placeholders(0)


def test_only_the_payload_files_of_a_dead_gateway_are_removed(tmp_path: Path) -> None:
    (tmp_path / f"{payloads.PREFIX}12").touch()
    (tmp_path / "weights.json").touch()
    payloads.remove_leftovers(str(tmp_path))
    assert [file.name for file in tmp_path.iterdir()] == ["weights.json"]
