"""The command around a run: in which order servers are measured, what is written, what is refused beforehand."""

import json

import httpx
import pytest

from quartet.runtime.bench import main as bench
from quartet.runtime.bench.records import Record, Run
from quartet.runtime.bench.statistics import summarize
from quartet.runtime.client.connection import ClientError

URLS = ("http://a", "http://b")
DONE = Record(0.0, 0.5, 1.0, 1.0, [0.5], 10, 0, 2)


@pytest.fixture
def runs(monkeypatch):
    """What is executed, in order; every run has one request that went well, until a test says otherwise."""
    executed: list[tuple[str, int]] = []

    def execute(target, options, seed) -> Run:
        executed.append((target.url, seed))
        return Run(target.url, [DONE], interrupted=len(executed) == execute.interrupted)

    execute.interrupted = 0
    monkeypatch.setattr(bench, "find", lambda url, options: bench.Target(url, "m", 1000))
    monkeypatch.setattr(bench, "execute", execute)
    return execute, executed


def test_two_servers_are_measured_in_turn_with_the_same_prompts_and_none_twice(runs, capsys):
    _, executed = runs
    assert bench.main(["--compare", *URLS, "--seed", "5"]) == 0
    later = 5 + bench.RUN_SEED
    assert executed == [("http://a", 5), ("http://b", 5), ("http://b", later), ("http://a", later)]
    assert "second / first" in capsys.readouterr().out


def test_an_interrupted_comparison_shows_what_was_measured(runs, capsys):
    execute, executed = runs
    execute.interrupted = 2
    assert bench.main(["--compare", *URLS]) == bench.INTERRUPTED
    assert len(executed) == 2
    assert "completed" in capsys.readouterr().out


def test_the_result_as_json_goes_to_stdout_and_the_table_to_stderr(runs, capsys):
    assert bench.main(["--json", "-", "--api-key", "s3cr3t"]) == 0
    shown = capsys.readouterr()
    result = json.loads(shown.out)
    assert result["summary"]["completion_tokens"] == 2
    assert result["runs"][0]["records"][0]["first_at"] == 0.5
    assert "requests/s" in shown.err
    assert "s3cr3t" not in shown.out + shown.err


def test_a_picture_of_a_server_beside_itself_has_two_lines(runs, tmp_path):
    assert bench.main(["--compare", "http://a", "http://a", "--plot", str(tmp_path / "x.png")]) == 0
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_in_which_all_failed_is_a_failure():
    assert bench.status_of(summarize([[Record(0.0, error="HTTP 503: full")]], {})) == 1
    assert bench.status_of(summarize([[DONE]], {})) == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--json", "/no/such/directory/x.json"], "no directory for --json"), (["--rate", "x"], "--rate")],
)
def test_what_cannot_be_done_is_said_before_anything_is_measured(runs, capsys, words, said):
    _, executed = runs
    assert bench.main(words) == 2
    assert said in capsys.readouterr().err
    assert executed == []


def server(monkeypatch, info: httpx.Response) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        models = httpx.Response(200, json={"data": [{"id": "m"}]})
        return models if request.url.path == "/v1/models" else info

    client = httpx.Client(transport=httpx.MockTransport(answer), base_url="http://a")
    monkeypatch.setattr(bench, "connect", lambda *_: client)


@pytest.mark.parametrize(
    ("info", "vocabulary"),
    [
        (httpx.Response(200, json={"vocab_size": 512}), 512),
        (httpx.Response(404, json={}), 10_000),
        (httpx.Response(200, text="<html>"), 10_000),
    ],
)
def test_ids_are_of_the_servers_vocabulary_where_it_tells(monkeypatch, info, vocabulary):
    server(monkeypatch, info)
    assert bench.find("a:1", bench.parse([])) == bench.Target("http://a:1", "m", vocabulary)


def test_a_model_that_the_server_lacks_is_refused(monkeypatch):
    server(monkeypatch, httpx.Response(404))
    with pytest.raises(ClientError, match="no model other; it has m"):
        bench.find("a:1", bench.parse(["--model", "other"]))
