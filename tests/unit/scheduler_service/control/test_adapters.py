"""Adapters that are loaded and replaced while requests run."""

from pathlib import Path

from quartet.runtime.adapters import LoadAdapter
from tests import checkpoints
from tests.adapters import write_adapter
from tests.live import Live
from tests.stepper import tokenized


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
    for _ in range(10_000):  # it is read once no request uses the other one
        live.step()
        if len(live.output("y")) == 2:
            break
    assert len(live.output("x")) == 40 and len(live.output("y")) == 2
