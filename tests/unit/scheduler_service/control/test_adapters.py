"""Adapters that are loaded and replaced while requests run."""

import time
from pathlib import Path

import pytest

from quartet.runtime.adapters import ForgetAdapter, LoadAdapter, UnloadAdapter
from quartet.scheduler_service.control import adapters
from tests import checkpoints
from tests.adapters import write_adapter
from tests.live import DEADLINE_S, Live
from tests.stepper import tokenized

LOOKS = 6000


def test_an_evicted_adapter_is_replaced_though_all_memory_is_in_use(tmp_path: Path) -> None:
    base = checkpoints.random_model(tmp_path / "base", 0)
    paths = {name: str(write_adapter(base, tmp_path / name, seed=ord(name))) for name in ("a", "b", "c")}
    live = Live(base, tmp_path, enable_lora=True, max_loaded_loras=1, max_loras_per_batch=1)
    assert live.adapters is not None
    assert live.call(LoadAdapter(lora_name="b", lora_path=paths["b"])).success
    assert live.call(LoadAdapter(lora_name="a", lora_path=paths["a"])).success
    running = tokenized("x", range(5), 40)
    running.request.adapter = "a"
    live.send(running)
    live.step(3)
    assert [*live.adapters.loaded] == ["a"]
    before = live.adapters.version_of["b"]
    assert live.call(LoadAdapter(lora_name="b", lora_path=paths["c"], load_inplace=True)).success
    assert [*live.adapters.loaded] == ["a"] and live.adapters.version_of["b"] != before
    refused = live.call(LoadAdapter(lora_name="c", lora_path=paths["c"]))
    assert not refused.success and "--max-loaded-loras" in refused.message
    pinned = live.call(LoadAdapter(lora_name="b", lora_path=paths["b"], load_inplace=True, pinned=True))
    assert not pinned.success and "--max-loaded-loras" in pinned.message
    late = tokenized("y", range(5), 2)
    late.request.adapter = "b"
    live.send(late)
    live.step_until(lambda: len(live.output("y")) == 2, "b is read, once no request uses a")
    assert len(live.output("x")) == 40 and len(live.output("y")) == 2


@pytest.fixture
def live(tmp_path: Path) -> Live:
    """A scheduler with the adapter a, under its first version."""
    live = Live(checkpoints.random_model(tmp_path / "base", 0), tmp_path, enable_lora=True)
    assert live.call(load(live, tmp_path, "a")).success
    return live


def load(live: Live, tmp_path: Path, name: str, **fields: bool) -> LoadAdapter:
    path = write_adapter(tmp_path / "base", tmp_path / name, seed=ord(name))
    return LoadAdapter(lora_name=name, lora_path=str(path), **fields)


def start(live: Live, rid: str, tokens: int = 6) -> None:
    """A request for the adapter a, which runs."""
    message = tokenized(rid, range(5), tokens)
    message.request.adapter = "a"
    live.send(message)
    live.step(2)


def versions(live: Live, rid: str) -> set[str]:
    return {message.adapter_version for message in live.tokens(rid) if message.ids}


def test_unloading_waits_for_requests_that_run(live: Live) -> None:
    start(live, "x")
    unloading = live.begin(UnloadAdapter(lora_name="a"))
    live.step(2)
    assert live.reply(unloading) is None
    assert live.wait(unloading).body == {"loaded_adapters": {}, "adapters": []}
    assert len(live.output("x")) == 6


def test_unloading_while_no_step_runs_is_answered_at_once_and_done_with_the_last_request(live: Live) -> None:
    start(live, "x")
    live.planner.paused = True
    assert live.call(UnloadAdapter(lora_name="a")).success
    assert live.adapters is not None and not live.adapters.is_served("a") and "a" in live.adapters.known
    assert not live.call(UnloadAdapter(lora_name="a")).success
    live.planner.paused = False
    live.run()
    live.step()
    assert len(live.output("x")) == 6 and versions(live, "x") == {"1"}
    assert "is not loaded" in live.call(UnloadAdapter(lora_name="a")).message
    let_go(live)
    assert not (live.adapters.known or live.adapters.loaded or live.adapters.ending or live.adapters.leaving)


def let_go(live: Live) -> None:
    """The gateway has no unfinished request that names the adapter a."""
    live.send(ForgetAdapter(lora_name="a", version="1"))
    live.step()


def test_a_request_whose_end_was_lost_goes_on_with_an_adapter_that_was_unloaded_meanwhile(live: Live) -> None:
    start(live, "x")
    live.run()
    assert live.call(UnloadAdapter(lora_name="a")).body == {"loaded_adapters": {}, "adapters": []}
    made = live.output("x")
    live.step()
    live.planner.deadlines.advance(live.scheduler.now + 3600, paused=False)  # the gateway holds it back for long
    live.step()
    message = tokenized("x", range(5), 6)
    message.request.adapter, message.request.again, message.request.attempt = "a", True, 1
    live.send(message)
    for _ in range(LOOKS):
        live.run()
        if len(live.output("x")) > len(made):  # the adapter is read again, in the background
            break
        time.sleep(0.01)
    assert live.output("x") == made * 2
    let_go(live)
    assert live.adapters is not None and not live.adapters.known
    late = tokenized("y", range(5), 6)
    late.request.adapter = "a"
    live.send(late)
    live.run()
    finish = live.finish("y")
    assert finish is not None and "never been loaded" in finish.message


def test_an_adapter_that_was_unloaded_takes_nobodys_place(tmp_path: Path) -> None:
    live = Live(
        checkpoints.random_model(tmp_path / "base", 0),
        tmp_path,
        enable_lora=True,
        max_loaded_loras=2,
        max_loras_per_batch=1,
    )
    assert live.adapters is not None
    assert live.call(load(live, tmp_path, "a")).success
    assert live.call(load(live, tmp_path, "b", pinned=True)).success
    assert live.call(UnloadAdapter(lora_name="b")).success
    assert live.call(load(live, tmp_path, "c")).success
    assert [*live.adapters.loaded] == ["a", "c"] and live.adapters.ending == {"b"}
    assert live.call(load(live, tmp_path, "b")).success
    assert [*live.adapters.loaded] == ["c", "b"] and not live.adapters.ending


def test_of_adapters_that_end_one_is_in_memory_and_those_that_requests_use(live: Live, tmp_path: Path) -> None:
    assert live.adapters is not None
    start(live, "x")
    live.planner.paused = True
    assert live.call(UnloadAdapter(lora_name="a")).success
    for name in ("b", "c"):
        assert live.call(load(live, tmp_path, name)).success
        assert live.call(UnloadAdapter(lora_name=name)).success
    assert live.adapters.ending == {"a", "b", "c"} and [*live.adapters.loaded] == ["a", "c"]
    again = tokenized("y", range(5), 2)
    again.request.adapter, again.request.again = "b", True
    live.send(again)
    live.planner.paused = False
    deadline = time.monotonic() + DEADLINE_S
    while not (live.finish("x") and live.finish("y")):  # which waits until it was read again
        assert time.monotonic() < deadline
        live.step()
    assert (len(live.output("x")), len(live.output("y"))) == (6, 2) and versions(live, "y") == {"2"}


def test_a_restarted_scheduler_keeps_no_place_for_a_pinned_adapter_that_was_unloaded(tmp_path: Path) -> None:
    settings = {"enable_lora": True, "max_loaded_loras": 1, "max_loras_per_batch": 1}
    live = Live(checkpoints.random_model(tmp_path / "base", 0), tmp_path, **settings)
    assert live.call(load(live, tmp_path, "b", pinned=True)).success
    assert live.call(UnloadAdapter(lora_name="b")).success
    assert live.call(load(live, tmp_path, "a", pinned=True)).success
    again = Live(tmp_path / "base", tmp_path, **settings)
    assert again.adapters is not None and [*again.adapters.known] == ["b", "a"] and again.adapters.ending == {"b"}
    assert [*again.adapters.loaded] == ["a"]


def test_adapters_that_end_do_not_count_and_those_that_come_back_do(
    live: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapters, "MAX_ADAPTERS", 1)
    assert live.call(UnloadAdapter(lora_name="a")).success
    assert live.call(load(live, tmp_path, "b")).success
    assert "no more are taken" in live.call(load(live, tmp_path, "a")).message
    assert live.adapters is not None and live.adapters.ending == {"a"}


def test_what_is_loaded_under_the_name_of_an_adapter_that_ends_goes_on_with_its_requests(
    live: Live, tmp_path: Path
) -> None:
    start(live, "x")
    live.planner.paused = True
    assert live.call(UnloadAdapter(lora_name="a")).success
    again = load(live, tmp_path, "b")
    again.lora_name = "a"
    assert live.call(again).success
    live.planner.paused = False
    live.run()
    live.step()
    assert len(live.output("x")) == 6 and versions(live, "x") == {"1", "2"}
    assert live.adapters is not None and live.adapters.version_of == {"a": "2"} and not live.adapters.ending


def test_beside_other_schedulers_a_restarted_one_has_what_was_being_unloaded_for_its_requests(tmp_path: Path) -> None:
    settings = {"enable_lora": True, "dp_size": 2}
    live = Live(checkpoints.random_model(tmp_path / "base", 0), tmp_path, **settings)
    assert live.call(load(live, tmp_path, "a")).success
    start(live, "x")
    live.begin(UnloadAdapter(lora_name="a"))
    live.step()
    again = Live(tmp_path / "base", tmp_path, **settings)
    assert again.adapters is not None and again.adapters.state() == []
    message = tokenized("x", range(5), 6)
    message.request.adapter, message.request.again = "a", True
    again.send(message)
    again.run()
    assert len(again.output("x")) == 6 and versions(again, "x") == {"1"}


def test_after_a_restart_an_adapter_that_ends_serves_its_requests_alone(live: Live, tmp_path: Path) -> None:
    start(live, "x")
    live.planner.paused = True
    assert live.call(UnloadAdapter(lora_name="a")).success
    again = Live(tmp_path / "base", tmp_path, enable_lora=True)
    assert again.adapters is not None and again.adapters.state() == [] and again.adapters.ending == {"a"}
    message = tokenized("x", range(5), 6)
    message.request.adapter, message.request.again = "a", True
    again.send(message)
    again.run()
    assert again.output("x") and versions(again, "x") == {"1"}
