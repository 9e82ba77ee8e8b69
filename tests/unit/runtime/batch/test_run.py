"""Running a batch: every line is answered once, however often it is interrupted."""

import asyncio
import io
import json
import random

import pytest

from quartet.runtime.batch import lines, run
from quartet.runtime.batch.results import Results
from quartet.runtime.batch.run import run_batch

COUNT = 40


def batch(count: int = COUNT) -> io.BytesIO:
    texts = [{"custom_id": f"{i}", "url": "/v1/completions", "body": {"prompt": i}} for i in range(count)]
    return io.BytesIO("\n".join(map(json.dumps, [*texts, texts[0], {"custom_id": "bad"}])).encode())


def names(path) -> list[str]:
    return sorted(json.loads(text)["custom_id"] for text in path.read_text().splitlines())


EXPECTED = sorted([*map(str, range(COUNT)), "0", "bad"])


async def echo(method: str, url: str, body: bytes) -> tuple[int, bytes]:
    await asyncio.sleep(0)
    return 200, body


def test_each_line_is_answered_once_and_so_many_at_once(tmp_path):
    running = most = 0
    full = asyncio.Event()

    async def execute(method: str, url: str, body: bytes) -> tuple[int, bytes]:
        nonlocal running, most
        running += 1
        most = max(most, running)
        if running == 8:
            full.set()
        await full.wait()
        await asyncio.sleep(0)
        running -= 1
        return 200, body

    results = Results(tmp_path / "out")
    asyncio.run(run_batch(lines.read(batch()), results, execute, 8))
    assert names(tmp_path / "out") == EXPECTED
    assert (results.succeeded, results.failed) == (COUNT, 2)
    assert most == 8


def test_runs_that_share_places_have_no_more_lines_in_memory_than_places(tmp_path):
    most, read, kept = 3, 0, 0

    def counted():
        nonlocal read
        for line in lines.read(batch()):
            read += 1
            assert read - kept <= most
            yield line

    class Counting(Results):
        def add(self, entry):
            nonlocal kept
            super().add(entry)
            kept += 1

    async def both() -> None:
        places = asyncio.Semaphore(most)
        files = [Counting(tmp_path / name) for name in ("first", "second")]
        await asyncio.gather(*(run_batch(counted(), results, echo, COUNT, places=places) for results in files))

    asyncio.run(both())
    assert names(tmp_path / "first") == names(tmp_path / "second") == EXPECTED


@pytest.mark.parametrize("seed", range(5))
def test_a_run_that_dies_again_and_again_loses_and_doubles_nothing(tmp_path, seed):
    chance = random.Random(seed)

    async def dies(method: str, url: str, body: bytes) -> tuple[int, bytes]:
        await asyncio.sleep(0)
        if chance.random() < 0.15:
            raise ConnectionError("it died")
        return 200, body

    for _ in range(200):
        results = Results(tmp_path / "out")
        try:
            asyncio.run(run_batch(lines.read(batch()), results, dies, 4))
            break
        except ConnectionError:
            pass
        finally:
            results.close()
            torn = (tmp_path / "out").read_bytes()
            if not torn.endswith(b"\n") or chance.random() < 0.5:
                (tmp_path / "out").write_bytes(torn + b'{"id": "batch_req_half')
    Results(tmp_path / "out").close()
    assert names(tmp_path / "out") == EXPECTED


def test_an_overloaded_server_is_asked_again(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "FIRST_PAUSE_S", 0.0)
    answers = iter([(503, b"{}"), (429, b"{}")])

    async def execute(method: str, url: str, body: bytes) -> tuple[int, bytes]:
        return next(answers, (200, body))

    results = Results(tmp_path / "out")
    asyncio.run(run_batch(lines.read(batch()), results, execute, 1))
    assert results.succeeded == COUNT


def test_what_the_server_refuses_is_an_answer_too(tmp_path):
    async def refuse(method: str, url: str, body: bytes) -> tuple[int, bytes]:
        return 400, b'{"error": {"message": "no"}}'

    results = Results(tmp_path / "out")
    asyncio.run(run_batch(lines.read(batch(1)), results, refuse, 4))
    first = json.loads((tmp_path / "out").read_text().splitlines()[0])
    assert first["response"]["status_code"] == 400
    assert first["response"]["body"] == {"error": {"message": "no"}}
    assert results.succeeded == 0


def test_a_cancelled_run_can_go_on(tmp_path):
    async def interrupted(results: Results) -> None:
        task = asyncio.create_task(run_batch(lines.read(batch()), results, echo, 3))
        while results.count < 10:
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])

    results = Results(tmp_path / "out")
    asyncio.run(interrupted(results))
    results.close()
    results = Results(tmp_path / "out")
    assert 10 <= results.count < COUNT
    asyncio.run(run_batch(lines.read(batch()), results, echo, 3))
    assert names(tmp_path / "out") == EXPECTED
