"""/v1/batches and /v1/files on a gateway whose ring answers in process."""

import asyncio
import gzip
import json
import shutil
import threading
from typing import Any

import pytest
from starlette.datastructures import UploadFile

from quartet.http_gateway.batches import runner
from quartet.http_gateway.batches.batch import OVER
from quartet.http_gateway.batches.runner import BatchRunner
from quartet.http_gateway.routes import file_store
from quartet.runtime.control import Abort
from quartet.runtime.errors import Kind, RequestError
from quartet.runtime.messages import Generate
from tests.unit.http_gateway.harness import Served, asynchronous, served, words

CHAT = "/v1/chat/completions"
KEY = {"authorization": "Bearer secret"}


def lines(count: int, **body: Any) -> bytes:
    message = {"messages": [{"role": "user", "content": "hi"}], **body}
    texts = [{"custom_id": f"r{i}", "method": "POST", "url": CHAT, "body": message} for i in range(count)]
    return b"\n".join(json.dumps(text).encode() for text in texts)


def form(content: bytes, purpose: str = "batch", name: str = "in.jsonl", **more: str) -> dict[str, Any]:
    """Options of a call that uploads a file."""
    fields = "".join(
        f'--x\r\nContent-Disposition: form-data; name="{key}"\r\n\r\n{value}\r\n'
        for key, value in {"purpose": purpose, **more}.items()
    )
    head = f'--x\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n\r\n'
    body = fields.encode() + head.encode() + content + b"\r\n--x--\r\n"
    return {"body": body, "headers": {"content-type": "multipart/form-data; boundary=x"}}


def in_charset(charset: str, options: dict[str, Any]) -> dict[str, Any]:
    return options | {"headers": {"content-type": f"multipart/form-data; boundary=x; charset={charset}"}}


def runner_of(server: Served) -> BatchRunner:
    return server.gateway.at_drain[0].__self__


async def upload(server: Served, content: bytes) -> str:
    answer = await server.client.post("/v1/files", **form(content))
    assert answer.status == 200, answer.text
    return answer.json()["id"]


async def begin(server: Served, content: bytes, window: str = "24h") -> str:
    body = {"input_file_id": await upload(server, content), "endpoint": CHAT, "completion_window": window}
    answer = await server.client.post("/v1/batches", body)
    assert answer.status == 200, answer.text
    return answer.json()["id"]


async def get(server: Served, batch_id: str) -> dict[str, Any]:
    return (await server.client.get(f"/v1/batches/{batch_id}")).json()


async def ended(server: Served, batch_id: str) -> dict[str, Any]:
    while True:
        batch = await get(server, batch_id)
        if batch["status"] in OVER:
            return batch
        await asyncio.sleep(0.01)


async def content(server: Served, file_id: str) -> list[Any]:
    answer = await server.client.get(f"/v1/files/{file_id}/content")
    return [json.loads(line) for line in answer.body.splitlines()]


@asynchronous
async def test_a_file_is_kept_listed_read_and_deleted():
    async with served() as server:
        file_id = await upload(server, b"some bytes")
        described = (await server.client.get(f"/v1/files/{file_id}")).json()
        assert (described["bytes"], described["filename"], described["purpose"]) == (10, "in.jsonl", "batch")
        assert [file["id"] for file in (await server.client.get("/v1/files")).json()["data"]] == [file_id]
        assert (await server.client.get(f"/v1/files/{file_id}/content")).body == b"some bytes"
        assert (await server.client.call("DELETE", f"/v1/files/{file_id}")).json()["deleted"]
        gone = await server.client.get(f"/v1/files/{file_id}/content")
        assert (gone.status, gone.json()["message"]) == (404, f"No such File object: {file_id}")


@asynchronous
async def test_a_file_whose_content_has_gone_is_a_404_in_the_shape_of_the_api():
    async with served() as server:
        file_id = await upload(server, b"some bytes")
        server.gateway.files.path_of(file_id).unlink()
        gone = await server.client.get(f"/v1/files/{file_id}/content")
        assert (gone.status, gone.json()["message"]) == (404, f"No such File object: {file_id}")
        assert gone.json()["error"]["type"] == "NotFoundError"


@asynchronous
async def test_a_file_that_is_deleted_before_it_is_sent_is_sent_whole():
    async with served() as server:
        text = b"x" * 300_000
        file_id = await upload(server, text)
        store = server.gateway.files
        content = store.content

        def then_delete(file_id: str) -> Any:
            file = content(file_id)
            assert store.delete(file_id)
            return file

        store.content = then_delete
        answer = await server.client.get(f"/v1/files/{file_id}/content")
        assert (answer.status, answer.body == text, store.room()) == (200, True, store.most_bytes)


@asynchronous
async def test_of_two_calls_that_delete_a_file_one_finds_it():
    async with served() as server:
        file_id = await upload(server, b"x")
        calls = [server.client.start("DELETE", f"/v1/files/{file_id}") for _ in range(2)]
        assert sorted([(await call.answer()).status for call in calls]) == [200, 404]


@asynchronous
async def test_files_are_listed_page_by_page():
    async with served() as server:
        first, second, third = [await upload(server, b"x") for _ in range(3)]
        newest = (await server.client.get("/v1/files?limit=2")).json()
        assert ([file["id"] for file in newest["data"]], newest["has_more"]) == ([third, second], True)
        rest = (await server.client.get(f"/v1/files?limit=2&after={second}")).json()
        assert ([file["id"] for file in rest["data"]], rest["has_more"]) == ([first], False)
        assert (await server.client.get("/v1/files?purpose=batch_output")).json()["data"] == []


@pytest.mark.parametrize(
    ("options", "field"),
    [
        (form(b"x", purpose="fine-tune"), "purpose"),
        ({"body": {"file": "x"}}, "file"),
        ({"body": b"--x\r\n", "headers": {"content-type": "multipart/form-data; boundary=x"}}, "file"),
        ({"body": b"", "headers": {"content-type": "multipart/form-data"}}, "file"),
        ({"body": b"not a form", "headers": {"content-type": "multipart/form-data; boundary=x"}}, "file"),
        (form(b"x", **{"expires_after[seconds]": "3600"}), "expires_after[anchor]"),
        (form(b"x", **{"expires_after[anchor]": "created_at"}), "expires_after[seconds]"),
        (
            form(b"x", **{"expires_after[anchor]": "created_at", "expires_after[seconds]": "60"}),
            "expires_after[seconds]",
        ),
        (
            form(b"x", **{"expires_after[anchor]": "created_at", "expires_after[seconds]": "-1"}),
            "expires_after[seconds]",
        ),
        (form(b"x", colour="red"), "colour"),
        (in_charset("unicode_escape", form(b"x", name="\\ud800")), "file"),
        (in_charset("undefined", form(b"x")), "file"),
    ],
)
@asynchronous
async def test_uploads_that_are_wrong_name_the_field(options, field):
    async with served() as server:
        answer = await server.client.post("/v1/files", **options)
        assert (answer.status, answer.json()["param"]) == (400, field)
        assert not list(server.gateway.files.path_of("file-x").parent.glob("file-*"))


@asynchronous
async def test_a_file_says_when_it_goes_and_is_gone_then():
    async with served(files_store_age=86400) as server:
        now = 1000.0
        server.gateway.files._now = lambda: now
        wanted = {"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}
        short = (await server.client.post("/v1/files", **form(b"x", **wanted))).json()
        usual = (await server.client.post("/v1/files", **form(b"x"))).json()
        assert (short["expires_at"], usual["expires_at"]) == (1000 + 3600, 1000 + 86400)
        now += 3600
        assert (await server.client.get(f"/v1/files/{short['id']}")).status == 404
        assert [file["id"] for file in (await server.client.get("/v1/files")).json()["data"]] == [usual["id"]]


@asynchronous
async def test_the_results_of_a_batch_are_kept_as_long_as_was_asked_and_its_record_as_long_as_files_are():
    async with served(words("Hello"), files_store_age=86400) as server:
        body = {"input_file_id": await upload(server, lines(2)), "endpoint": CHAT, "completion_window": "24h"}
        body |= {"output_expires_after": {"anchor": "created_at", "seconds": 7200}}
        batch_id = (await server.client.post("/v1/batches", body)).json()["id"]
        batch = await ended(server, batch_id)
        made = (await server.client.get(f"/v1/files/{batch['output_file_id']}")).json()
        assert made["expires_at"] - made["created_at"] == 7200
        server.gateway.files._now = lambda: made["created_at"] + 7200.0
        assert (await server.client.get(f"/v1/files/{batch['output_file_id']}/content")).status == 404
        assert (await get(server, batch_id))["status"] == "completed"
        server.gateway.files._now = lambda: made["created_at"] + 86402.0
        assert (await server.client.get(f"/v1/batches/{batch_id}")).status == 404


@asynchronous
async def test_a_compressed_upload_is_refused_rather_than_kept_as_it_is():
    async with served() as server:
        options = form(gzip.compress(b"x"))
        options["headers"]["content-encoding"] = "gzip"
        answer = await server.client.post("/v1/files", **options)
        assert (answer.status, "Content-Encoding: 'gzip'" in answer.text) == (400, True)
        options["headers"]["content-encoding"] = "identity"
        assert (await server.client.post("/v1/files", **options)).status == 200


@asynchronous
async def test_an_upload_beyond_the_store_is_refused_with_the_flag():
    async with served(files_store_size=1000) as server:
        for size in (1001, 500_000):
            answer = await server.client.post("/v1/files", **form(b"x" * size))
            assert answer.status == 413
            assert "--files-store-size" in answer.text
        assert (await server.client.get("/v1/files")).json()["data"] == []


@asynchronous
async def test_a_key_is_needed_as_for_the_other_routes():
    async with served(words("ok"), api_key="secret") as server:
        for path in ("/v1/files", "/v1/files/x", "/v1/files/x/content", "/v1/batches", "/v1/batches/x"):
            assert (await server.client.get(path)).status == 401
        options = form(lines(2))
        options["headers"] |= KEY
        file_id = (await server.client.post("/v1/files", **options)).json()["id"]
        body = {"input_file_id": file_id, "endpoint": CHAT, "completion_window": "24h"}
        batch_id = (await server.client.post("/v1/batches", body, headers=KEY)).json()["id"]
        while (batch := (await server.client.get(f"/v1/batches/{batch_id}", headers=KEY)).json())[
            "status"
        ] != "completed":
            await asyncio.sleep(0.01)
        assert batch["request_counts"] == {"total": 2, "completed": 2, "failed": 0}


@asynchronous
async def test_a_batch_is_answered_and_its_results_are_a_file():
    async with served(words("Hello")) as server:
        batch = await ended(server, await begin(server, lines(5)))
        assert batch["status"] == "completed"
        assert batch["request_counts"] == {"total": 5, "completed": 5, "failed": 0}
        assert batch["error_file_id"] is None
        results = await content(server, batch["output_file_id"])
        assert sorted(result["custom_id"] for result in results) == ["r0", "r1", "r2", "r3", "r4"]
        assert {result["response"]["body"]["choices"][0]["message"]["content"] for result in results} == {"Hello"}
        times = [batch[f"{name}_at"] for name in ("created", "in_progress", "finalizing", "completed")]
        assert times == sorted(times)


@asynchronous
async def test_requests_that_are_refused_are_in_the_file_of_errors():
    async with served(words("Hello")) as server:
        wrong = lines(1, max_tokens=-1).replace(b"r0", b"wrong")
        batch = await ended(server, await begin(server, lines(2) + b"\n" + wrong))
        assert batch["request_counts"] == {"total": 3, "completed": 2, "failed": 1}
        [error] = await content(server, batch["error_file_id"])
        assert (error["custom_id"], error["response"]["status_code"]) == ("wrong", 400)


@pytest.mark.parametrize(
    ("text", "code", "line"),
    [
        (b"{", "invalid_json_line", 1),
        (lines(1) + b"\n" + lines(1), "duplicate_custom_id", 2),
        (lines(1).replace(b"chat/", b""), "invalid_url", 1),
        (lines(1, stream=True), "invalid_request", 1),
        (lines(1, background=True), "invalid_request", 1),
        (b"\n\n", "empty_file", None),
    ],
)
@asynchronous
async def test_a_file_that_is_wrong_fails_before_anything_is_sent(text, code, line):
    async with served(words("Hello")) as server:
        batch = await ended(server, await begin(server, text))
        assert batch["status"] == "failed"
        assert (batch["errors"]["data"][0]["code"], batch["errors"]["data"][0]["line"]) == (code, line)
        assert server.ring.sent == []


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"input_file_id": "file-x"}, "input_file_id"),
        ({"endpoint": "/generate"}, "endpoint"),
        ({"completion_window": "soon"}, "completion_window"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 60}}, "output_expires_after.seconds"),
        ({"output_expires_after": {"anchor": "never", "seconds": 7200}}, "output_expires_after.anchor"),
        ({"metadata": {"k": "v" * 513}}, "metadata"),
    ],
)
@asynchronous
async def test_a_batch_that_cannot_begin_names_the_field(change, field):
    async with served() as server:
        body = {"input_file_id": await upload(server, b"x"), "endpoint": CHAT, "completion_window": "24h"}
        answer = await server.client.post("/v1/batches", body | change)
        assert (answer.status, answer.json()["param"]) == (400, field)
        assert (await server.client.get("/v1/batches")).json()["data"] == []


@asynchronous
async def test_a_cancelled_batch_keeps_what_was_answered_and_aborts_what_runs():
    """The first two requests are answered, the others never."""

    async with served() as server:
        answers = 0

        def script(generate: Any) -> list[Any]:
            nonlocal answers
            answers += 1
            return words("Hello")(generate) if answers <= 2 else []

        server.ring.script = script
        batch_id = await begin(server, lines(6))
        file_id = (await get(server, batch_id))["input_file_id"]
        while (await get(server, batch_id))["request_counts"]["completed"] < 2:
            await asyncio.sleep(0.01)
        await server.ring.sent_of(Generate, 6)
        assert (await server.client.call("DELETE", f"/v1/files/{file_id}")).status == 409
        answer = await server.client.post(f"/v1/batches/{batch_id}/cancel")
        assert answer.json()["status"] == "cancelling"
        batch = await ended(server, batch_id)
        assert (batch["status"], batch["request_counts"]["completed"]) == ("cancelled", 2)
        assert len(await content(server, batch["output_file_id"])) == 2
        assert len(await server.ring.sent_of(Abort)) == 4
        assert (await server.client.post(f"/v1/batches/{batch_id}/cancel")).status == 409


@asynchronous
async def test_a_batch_that_is_cancelled_while_its_end_is_being_kept_has_that_end():
    async with served() as server:
        store, keeps_end, go_on = server.gateway.files, threading.Event(), threading.Event()
        put = store.put_batch

        def put_slowly(batch_id: str, data: bytes, over: bool, *made: Any) -> None:
            if over:
                keeps_end.set()
                go_on.wait()
            put(batch_id, data, over, *made)

        store.put_batch, store.reserve = put_slowly, lambda batch_id, size: False
        batch_id = await begin(server, lines(1))
        await asyncio.to_thread(keeps_end.wait)
        cancelled = server.client.start("POST", f"/v1/batches/{batch_id}/cancel")
        while store._thread._work_queue.empty():  # what the cancellation keeps waits behind the end
            await asyncio.sleep(0.01)
        go_on.set()
        assert (await cancelled.answer()).status == 200
        assert (await get(server, batch_id))["status"] == "failed"
        assert store.batches(unfinished=True) == []


@asynchronous
async def test_what_is_not_answered_within_the_window_is_told_in_the_file_of_errors():
    async with served() as server:
        server.ring.script = lambda generate: []
        batch_id = await begin(server, lines(3))
        runner = runner_of(server)
        await server.ring.sent_of(object, 3)
        runner._now = lambda: 1e12
        for task in runner._tasks.values():
            task.cancel()
        await asyncio.wait(runner._tasks.values())
        await runner.resume()
        batch = await ended(server, batch_id)
        assert batch["status"] == "expired"
        assert {line["error"]["code"] for line in await content(server, batch["error_file_id"])} == {"batch_expired"}


@asynchronous
async def test_a_batch_whose_file_has_gone_fails_and_keeps_what_was_answered():
    async with served() as server:
        answers = 0

        def script(generate: Any) -> list[Any]:
            nonlocal answers
            answers += 1
            return words("Hello")(generate) if answers <= 2 else []

        server.ring.script = script
        batch_id = await begin(server, lines(3))
        while (await get(server, batch_id))["request_counts"]["completed"] < 2:
            await asyncio.sleep(0.01)
        batches, input_file = runner_of(server), (await get(server, batch_id))["input_file_id"]
        tasks = list(batches._tasks.values())
        batches.stop()
        await asyncio.wait(tasks)
        server.gateway.files.path_of(input_file).unlink()
        await batches.resume()
        batch = await ended(server, batch_id)
        assert (batch["status"], batch["errors"]["data"][0]["code"]) == ("failed", "file_deleted")
        results = await content(server, batch["output_file_id"])
        assert len(results) == 2 == batch["request_counts"]["completed"]


@pytest.mark.parametrize("is_moved", [False, True])
@pytest.mark.parametrize("answered", [0, 2, 3])
@asynchronous
async def test_a_batch_whose_store_has_gone_fails_and_the_store_is_made_anew(tmp_path, answered, is_moved):
    """Somebody deletes the directory, or moves it away, before the batch, amid it, or before its last request ends."""
    answers, held = 0, list[Any]()

    def script(generate: Any) -> list[Any]:
        nonlocal answers
        answers += 1
        if answers > answered:
            held.append(generate)
        return words("Hello")(generate) if answers <= answered else []

    directory = tmp_path / "store"
    async with served(script, files_store=str(directory)) as server:
        batch_id = await begin(server, lines(4))
        while (await get(server, batch_id))["request_counts"]["completed"] < answered or len(held) < 4 - answered:
            await asyncio.sleep(0.01)
        if is_moved:
            directory.rename(tmp_path / "elsewhere")
        else:
            shutil.rmtree(directory)
        for generate in held:
            server.ring.push(*words("Hello")(generate))
        batch = await ended(server, batch_id)
        assert (batch["status"], batch["output_file_id"]) == ("failed", None)
        assert batch["errors"]["data"][0]["code"] in ("results_deleted", "file_deleted")
        assert not runner_of(server)._live
        server.ring.script = words("Hello")
        batch = await ended(server, await begin(server, lines(2)))
        assert (batch["status"], len(await content(server, batch["output_file_id"]))) == ("completed", 2)
        listed = (await server.client.get("/v1/batches")).json()["data"]
        assert [entry["status"] for entry in listed] == ["completed", "failed"]


@asynchronous
async def test_a_batch_that_waits_when_its_store_goes_fails(tmp_path):
    directory = tmp_path / "store"
    async with served(words("Hello"), files_store=str(directory)) as server:
        batch_id, batches = await begin(server, lines(1)), runner_of(server)
        record = batches._live[batch_id]
        tasks = list(batches._tasks.values())
        batches.stop()
        await asyncio.wait(tasks)
        shutil.rmtree(directory)
        batches._start(record)
        batch = await ended(server, batch_id)
        assert (batch["status"], batch["errors"]["data"][0]["code"]) == ("failed", "results_deleted")
        assert "--files-store" in batch["errors"]["data"][0]["message"]


@asynchronous
async def test_a_store_that_cannot_be_made_anew_is_a_503_until_it_can(tmp_path):
    directory = tmp_path / "store"
    async with served(words("Hello"), files_store=str(directory)) as server:
        await upload(server, lines(1))
        shutil.rmtree(directory)
        directory.write_text("in the way")
        for _ in range(2):
            answer = await server.client.get("/v1/files")
            assert (answer.status, "--files-store" in answer.text) == (503, True)
        directory.unlink()
        assert (await server.client.get("/v1/files")).json()["data"] == []
        await upload(server, lines(1))


@asynchronous
async def test_the_next_server_goes_on_with_a_batch_and_answers_each_request_once(tmp_path):
    answered: list[str] = []

    async with served(files_store=str(tmp_path)) as server:
        count = 0

        def script(generate: Any) -> list[Any]:
            nonlocal count
            count += 1
            return words("first")(generate) if count <= 3 else []

        server.ring.script = script
        batch_id = await begin(server, lines(10))
        while (await get(server, batch_id))["request_counts"]["completed"] < 3:
            await asyncio.sleep(0.01)
        await server.ring.sent_of(Generate, 10)
        tasks = list(runner_of(server)._tasks.values())
        for stop in server.gateway.at_drain:
            stop()
        await asyncio.wait(tasks)
        assert len(await server.ring.sent_of(Abort)) == 7
        server.gateway.files.close()

    async with served(words("second"), files_store=str(tmp_path)) as server:
        await runner_of(server).resume()
        batch = await ended(server, batch_id)
        for line in await content(server, batch["output_file_id"]):
            answered.append(line["response"]["body"]["choices"][0]["message"]["content"])
    assert batch["request_counts"] == {"total": 10, "completed": 10, "failed": 0}
    assert sorted(answered) == ["first"] * 3 + ["second"] * 7


@pytest.mark.parametrize(("low_first", "priority"), [(False, -100), (True, 100)])
@asynchronous
async def test_requests_of_a_batch_give_way_where_there_are_priorities(low_first, priority):
    settings = {"schedule_policy": "priority", "schedule_low_priority_values_first": low_first}
    async with served(words("ok"), **settings) as server:
        await ended(server, await begin(server, lines(1) + b"\n" + lines(1, priority=7).replace(b"r0", b"own")))
        assert {sent.request.priority for sent in server.ring.sent} == {priority, 7}


@asynchronous
async def test_a_batch_whose_results_find_no_room_fails_and_says_so():
    async with served(words("Hello"), files_store_size=1500) as server:
        batch = await ended(server, await begin(server, lines(4)))
        assert (batch["status"], batch["errors"]["data"][0]["code"]) == ("failed", "store_full")
        answered = await content(server, batch["output_file_id"])
        assert 0 < len(answered) == batch["request_counts"]["completed"]


@asynchronous
async def test_a_batch_that_takes_all_room_fails_and_the_one_beside_it_goes_on():
    answer = words("Hello " * 100)
    small: list[Any] = []

    async with served(files_store_size=200_000) as server:

        def script(generate: Any) -> list[Any]:
            if len(server.ring.sent) > 2:
                return answer(generate)
            small.append(generate)
            return []  # the small batch waits

        server.ring.script = script
        first = await begin(server, lines(2, user="small"))
        await server.ring.sent_of(Generate, 2)
        batch = await ended(server, await begin(server, lines(400)))
        assert (batch["status"], batch["errors"]["data"][0]["code"]) == ("failed", "store_full")
        assert "--files-store-size" in batch["errors"]["data"][0]["message"]
        kept = sum(file.bytes for file in server.gateway.files.files(None))
        assert 150_000 < kept <= 200_000
        for generate in small:
            server.ring.push(*answer(generate))
        batch = await ended(server, first)
        assert (batch["status"], batch["request_counts"]["completed"]) == ("completed", 2)
        assert sum(file.bytes for file in server.gateway.files.files(None)) <= 200_000


@pytest.mark.parametrize("place", ["results", "files", "store"])
@asynchronous
async def test_a_batch_waits_while_the_disk_is_full_and_loses_no_answer(monkeypatch, place):
    """The disk is full for a while at the second result, at the files of the results, or at the end of the batch."""
    monkeypatch.setattr(runner, "AGAIN_AFTER_S", 0.0)
    left = 2

    def full_at_first(call: Any, error: Exception, skip: int = 0) -> Any:
        calls = 0

        def wrapped(*given: Any) -> Any:
            nonlocal left, calls
            calls += 1
            if left and calls > skip:
                left -= 1
                raise error
            return call(*given)

        return wrapped

    full = OSError(28, "No space left on device")
    async with served(words("Hello")) as server:
        store = server.gateway.files
        if place == "results":
            monkeypatch.setattr(runner.Results, "add", full_at_first(runner.Results.add, full, skip=1))
        elif place == "files":
            monkeypatch.setattr(runner, "synchronize", full_at_first(runner.synchronize, full))
        else:
            refused = RequestError("The store of files has failed", Kind.UNAVAILABLE)
            monkeypatch.setattr(store, "put_batch", full_at_first(store.put_batch, refused, skip=3))
        batch = await ended(server, await begin(server, lines(4)))
        assert (left, batch["status"], batch["request_counts"]["completed"]) == (0, "completed", 4)
        results = await content(server, batch["output_file_id"])
        assert sorted(result["custom_id"] for result in results) == ["r0", "r1", "r2", "r3"]
        known = {file.id for file in store.files(None)}
        assert {path.name for path in store.directory.glob("file-*")} == known


@asynchronous
async def test_an_upload_onto_a_full_disk_is_told_and_leaves_nothing(monkeypatch):
    def full(*given: Any) -> None:
        raise OSError(28, "No space left on device")

    async with served() as server:
        monkeypatch.setattr(file_store.shutil, "copyfileobj", full)
        answer = await server.client.post("/v1/files", **form(b"x"))
        assert (answer.status, answer.json()["param"], "No space left" in answer.text) == (503, "file", True)
        monkeypatch.undo()
        monkeypatch.setattr(UploadFile, "write", full)
        assert (await server.client.post("/v1/files", **form(b"x"))).status == 503
        assert not list(server.gateway.files.directory.glob("file-*"))


@asynchronous
async def test_batches_are_listed_page_by_page():
    async with served(words("ok")) as server:
        first, second, third = [await begin(server, lines(1)) for _ in range(3)]
        newest = (await server.client.get("/v1/batches?limit=2")).json()
        assert ([batch["id"] for batch in newest["data"]], newest["has_more"]) == ([third, second], True)
        assert (newest["first_id"], newest["last_id"]) == (third, second)
        rest = (await server.client.get(f"/v1/batches?limit=2&after={second}")).json()
        assert ([batch["id"] for batch in rest["data"]], rest["has_more"]) == ([first], False)
        assert (await server.client.get(f"/v1/batches?after={first}")).json()["data"] == []
        refused = await server.client.get("/v1/batches?after=batch_x")
        assert (refused.status, refused.json()["param"]) == (400, "after")
