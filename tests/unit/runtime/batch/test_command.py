"""`quartet run-batch`: its arguments, and a batch through a server of OpenAI's API."""

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from quartet.runtime.batch import command


class Echo(BaseHTTPRequestHandler):
    """Answers with what it was sent."""

    key = ""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        right = self.headers.get("authorization", "") == (f"Bearer {self.key}" if self.key else "")
        self.send_response(200 if right else 401)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url(monkeypatch):
    monkeypatch.delenv("QUARTET_API_KEY", raising=False)
    monkeypatch.setattr(Echo, "key", "")
    with ThreadingHTTPServer(("127.0.0.1", 0), Echo) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def source(tmp_path):
    texts = [{"custom_id": f"{i}", "url": "/v1/completions", "body": {"prompt": i}} for i in range(5)]
    (tmp_path / "in").write_text("\n".join(map(json.dumps, texts)))
    return str(tmp_path / "in")


def test_a_file_is_answered_by_a_server_that_runs(url, source, tmp_path, capsys):
    target = tmp_path / "out"
    assert command.main([source, str(target), "--url", url]) == 0
    answers = [json.loads(text) for text in target.read_text().splitlines()]
    assert sorted(answer["response"]["body"]["prompt"] for answer in answers) == [0, 1, 2, 3, 4]
    assert f"5 requests were answered: {target}" in capsys.readouterr().err


def test_a_file_that_is_done_needs_no_server(url, source, tmp_path):
    target = tmp_path / "out"
    assert command.main([source, str(target), "--url", url]) == 0
    before = target.read_bytes()
    assert command.main([source, str(target), "--url", "http://127.0.0.1:1"]) == 0
    assert target.read_bytes() == before


def test_lines_that_are_wrong_are_told_by_the_status(url, source, tmp_path, capsys):
    with open(source, "a") as file:
        file.write("\n{}\n")
    assert command.main([source, str(tmp_path / "out"), "--url", url]) == 1
    assert "5 requests were answered, 1 failed" in capsys.readouterr().err


def test_a_server_that_is_lost_leaves_what_is_done_and_says_how_to_go_on(source, tmp_path, capsys):
    assert command.main([source, str(tmp_path / "out"), "--url", "http://127.0.0.1:1"]) == 1
    assert "the same command goes on where this one ended" in capsys.readouterr().err
    assert (tmp_path / "out").read_bytes() == b""


class Trickle(Echo):
    """Sends byte by byte, without an end."""

    def do_POST(self) -> None:
        self.send_response(200)
        self.end_headers()
        with contextlib.suppress(OSError):
            while True:
                self.wfile.write(b" " * 100)
                time.sleep(0.01)


@pytest.fixture
def trickling():
    with ThreadingHTTPServer(("127.0.0.1", 0), Trickle) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_an_answer_that_trickles_is_given_up_after_the_time_for_a_request(trickling, source, tmp_path, capsys):
    assert command.main([source, str(tmp_path / "out"), "--url", trickling, "--timeout", "0.2"]) == 1
    said = capsys.readouterr().err
    assert "no whole answer from /v1/completions within 0.2 seconds (--timeout); the same command goes on" in said
    assert (tmp_path / "out").read_bytes() == b""


def test_an_answer_without_an_end_is_given_up_by_its_size(trickling, source, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "MAX_BATCH_ANSWER_BYTES", 1000)
    assert command.main([source, str(tmp_path / "out"), "--url", trickling]) == 1
    assert "answers with more than 1000 bytes" in capsys.readouterr().err


def test_a_missing_key_ends_the_run_instead_of_failing_every_line(url, source, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Echo, "key", "secret")
    assert command.main([source, str(tmp_path / "out"), "--url", url]) == 1
    assert "QUARTET_API_KEY" in capsys.readouterr().err
    assert command.main([source, str(tmp_path / "out"), "--url", url, "--api-key", "secret"]) == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["{in}"], "output"),
        (["/nowhere", "{out}"], "/nowhere is no file"),
        (["{in}", "{in}"], "into the file of the requests"),
        (["{in}", "/nowhere/out"], "/nowhere is no directory"),
        (["{in}", "{out}", "demo", "--url", "http://x"], "--url names a server that runs"),
        (["{in}", "{out}", "--concurrency", "0"], "--concurrency must be at least 1"),
        (["{in}", "{out}", "--timeout", "0"], "--timeout must be more than 0"),
        (["{in}", "{out}", "--timeout", "nan"], "--timeout must be more than 0"),
        (["{in}", "{out}", "demo", "--", "--prt", "1"], "unknown flag --prt"),
    ],
)
def test_wrong_arguments_are_one_line_and_nothing_is_written(source, tmp_path, capsys, words, says):
    target = tmp_path / "out"
    given = [word.format(**{"in": source, "out": target}) for word in words]
    assert command.main(given) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1
    assert not target.exists()


@pytest.mark.parametrize("change", [{"custom_id": "other"}, {"body": {"prompt": "else"}}])
def test_results_of_another_batch_are_refused_and_kept(url, source, tmp_path, capsys, change):
    target = tmp_path / "out"
    assert command.main([source, str(target), "--url", url]) == 0
    before = target.read_bytes()
    asked = {"custom_id": "0", "url": "/v1/completions", "body": {"prompt": 0}} | change
    (tmp_path / "others").write_text(json.dumps(asked))
    assert command.main([str(tmp_path / "others"), str(target), "--url", url]) == 2
    assert "has the result of another request" in capsys.readouterr().err
    assert target.read_bytes() == before


@pytest.mark.parametrize(
    ("status", "body", "is_one"),
    [
        (200, b'{"choices": []}', True),
        (404, b'{"error": {"message": "no such model"}}', True),
        (500, b'{"error": {"message": "a bug"}}', True),
        (404, b'{"detail": "Not Found"}', False),
        (200, b"<html>", False),
        (200, b"[]", False),
        (200, b"null", False),
        (500, b'"a bug"', False),
        (502, b"Bad Gateway", False),
    ],
)
def test_what_another_server_says_is_no_result(status, body, is_one):
    assert command.is_answer(status, body) is is_one
