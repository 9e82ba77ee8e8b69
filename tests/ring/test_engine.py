"""The Python API on a whole engine: one for all tests, which are its users."""

import asyncio
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import psutil
import pytest

from quartet import Engine, EngineError, StartupError
from tests.servers import ROOT

GREEDY = {"temperature": 0, "max_new_tokens": 8}
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module", autouse=True)
def run_base():
    """Logs of engines that fail are kept; here with all else."""
    directory = Path(tempfile.mkdtemp(prefix="q", dir="/tmp"))  # short: socket paths are limited
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(directory))
        yield directory
    shutil.rmtree(directory, ignore_errors=True)  # the engine that was killed removes its own files meanwhile


@pytest.fixture(scope="module")
def engine(run_base):
    flags = {"enable_memory_saver": True, "enable_weights_cpu_backup": True, "disable_standby": True}
    with Engine("demo", dtype="float32", **flags) as started:
        yield started


def test_it_listens_on_no_port_and_on_a_socket_of_its_user_alone(engine):
    processes = [psutil.Process(engine.pid), *psutil.Process(engine.pid).children(recursive=True)]
    listening = [one for process in processes for one in process.net_connections("inet") if one.status == "LISTEN"]
    assert listening == []
    socket = engine.log_path.parent / "socket"
    assert (socket.stat().st_mode & 0o777, socket.parent.stat().st_mode & 0o777) == (0o600, 0o700)


def test_a_prompt_gives_one_answer_and_a_list_one_for_each(engine):
    alone = engine.generate("The capital of France is", GREEDY)
    together = engine.generate(["The capital of France is", "The capital of Italy is"], [GREEDY, {"max_new_tokens": 1}])
    assert alone["text"] == together[0]["text"] == " Paris."
    assert together[1]["meta_info"]["completion_tokens"] == 1
    assert engine.generate(input_ids=[10, 11], sampling_params=GREEDY)["meta_info"]["prompt_tokens"] == 2


def test_a_stream_grows_to_the_whole_answer(engine):
    texts = [part["text"] for part in engine.generate("The capital of France is", GREEDY, stream=True)]
    assert texts[-1] == " Paris."
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))


def test_a_conversation_and_several_are_answered_like_the_openai_api_does(engine):
    alone = engine.chat(QUESTION, temperature=0, max_tokens=16)["choices"][0]["message"]["content"]
    together = engine.chat([QUESTION, QUESTION], temperature=0, max_tokens=16)
    chunks = engine.chat(QUESTION, temperature=0, max_tokens=16, stream=True)
    streamed = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    assert "Paris" in alone
    assert [answer["choices"][0]["message"]["content"] for answer in together] == [alone] * 2
    assert streamed == alone


def test_labels_are_scored(engine):
    scores = engine.score("The capital of France is", [" Paris", " Rome"], [10, 11, 12], apply_softmax=True)
    assert [sum(labels) for labels in scores] == [pytest.approx(1.0)] * 2


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda engine: engine.generate("x", {"max_new_tokens": -5}), "max_new_tokens"),
        (lambda engine: engine.generate("x", {"max_new_tokens": "many"}), "max_new_tokens"),
        (lambda engine: next(engine.generate("x", {"top_k": -7}, stream=True)), "top_k"),
        (lambda engine: engine.chat([]), "messages"),
        (lambda engine: engine.chat([QUESTION, QUESTION], max_tokens=10**7), "max_tokens"),
        (lambda engine: engine.score("a", ["b"], [10**8]), "label_token_ids"),
        (lambda engine: asyncio.run(engine.async_generate("x", {"min_p": 2})), "min_p"),
    ],
)
def test_what_the_server_refuses_is_an_exception_that_names_the_field(engine, call, field):
    with pytest.raises(EngineError, match=rf"(?i){field}") as error:
        call(engine)
    assert (error.value.status, error.value.field) == (400, field)


def test_what_the_model_cannot_do_is_an_exception(engine):
    for call in (lambda: engine.embed("x"), lambda: engine.rerank("x", ["y"])):
        with pytest.raises(EngineError, match="embedding model"):
            call()


def test_many_coroutines_share_an_engine(engine):
    async def ask() -> list[str]:
        answers = await asyncio.gather(*(engine.async_generate(f"{i} and", GREEDY) for i in range(50)))
        stream = await engine.async_generate("0 and", GREEDY, stream=True)
        parts = [part["text"] async for part in stream]
        chat = await engine.async_chat(QUESTION, temperature=0, max_tokens=16)
        return [answers[0]["text"], parts[-1], chat["choices"][0]["message"]["content"], str(len(answers))]

    first, streamed, chat, count = asyncio.run(ask())
    assert (first, count) == (streamed, "50")
    assert "Paris" in chat


def load(engine: Engine) -> int:
    return engine.get_server_info()["internal_states"][0]["load"]


def wait_for_load(engine: Engine, wanted: int) -> None:
    for _ in range(200):
        if load(engine) == wanted:
            return
        threading.Event().wait(0.05)
    raise AssertionError(f"{load(engine)} requests, not {wanted}")


@pytest.mark.parametrize("stream", [False, True])
def test_cancelling_a_task_ends_its_request(engine, stream):
    """Generation is paused meanwhile, so that no request ends by itself."""

    async def begin_and_cancel() -> None:
        async def use() -> None:
            answer = await engine.async_generate("x", {"max_new_tokens": 500, "ignore_eos": True}, stream=stream)
            if stream:
                [_ async for _ in answer]

        task = asyncio.create_task(use())
        await asyncio.to_thread(wait_for_load, engine, 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    engine.pause_generation("in_place")
    try:
        asyncio.run(begin_and_cancel())
        wait_for_load(engine, 0)
    finally:
        engine.continue_generation()


def test_a_stream_that_is_left_ends_its_request(engine):
    for _ in engine.generate("x", {"max_new_tokens": 1500, "ignore_eos": True}, stream=True):
        break
    wait_for_load(engine, 0)


def test_commands_of_the_server_are_methods(engine):
    assert engine.flush_cache(timeout_s=30).startswith("Cache flushed")
    engine.release_memory_occupation(["kv_cache"])
    engine.resume_memory_occupation(["kv_cache"])
    path = engine.get_model_info()["model_path"]
    with pytest.raises(EngineError, match="/nonexistent"):
        engine.update_weights_from_disk("/nonexistent")
    assert engine.update_weights_from_disk(path, weight_version="next")["success"]
    assert engine.get_model_info()["weight_version"] == "next"
    assert engine.generate("The capital of France is", GREEDY)["text"] == " Paris."


def test_a_wrong_model_is_one_exception_with_the_reason():
    with pytest.raises(StartupError, match=r"^--model-path /nonexistent does not exist"):
        Engine("/nonexistent")


def test_flags_of_ports_and_keys_have_no_meaning():
    with pytest.raises(TypeError, match="listens on no port, so api_key has no meaning"):
        Engine("demo", api_key="x")


ENDS = """
import os, signal
from quartet import Engine
engine = Engine("demo", is_embedding=True, dtype="float32")
vectors = engine.embed(["a", "b"])
print(engine.pid, len(vectors), vectors[0] == engine.encode("a")["embedding"], flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_an_engine_of_embeddings_ends_with_its_program_even_when_that_is_killed(run_base):
    before = set(run_base.glob("quartet-????????"))
    found = subprocess.run([sys.executable, "-c", ENDS], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == -signal.SIGKILL, found.stderr
    pid, count, same = found.stdout.split()
    assert (count, same) == ("2", "True")
    for _ in range(200):
        if not psutil.pid_exists(int(pid)) and set(run_base.glob("quartet-????????")) == before:
            break
        threading.Event().wait(0.05)
    assert not psutil.pid_exists(int(pid))
    assert set(run_base.glob("quartet-????????")) == before, "sockets are left"


def test_an_engine_that_was_killed_says_so(engine):
    """The last test: it ends the engine that the others share."""
    os.kill(engine.pid, signal.SIGKILL)
    with pytest.raises(EngineError, match="ended with status -9"):
        engine.generate("x")
    assert not engine.alive
