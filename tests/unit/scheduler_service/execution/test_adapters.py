"""Which adapters are known and in memory, against a model of what should happen; and a restart."""

import random
from pathlib import Path

import pytest
from safetensors.torch import save_file

from quartet.runtime.errors import CommandRefused, StartupError
from quartet.scheduler_service.execution.adapters import CpuAdapters, adapter_store
from tests.adapters import write_adapter
from tests.checkpoints import random_tensors, write_config
from tests.engine import Engine

NAMES = ["a", "b", "c", "d", "e", "f"]
MOST = 3


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    base = write_config(tmp_path / "base", num_hidden_layers=1)
    save_file(random_tensors(base, 0), base / "model.safetensors")
    for name in NAMES:
        write_adapter(base, tmp_path / name, rank=2, seed=ord(name))
    return Engine(base, enable_lora=True, max_loaded_loras=MOST, max_loras_per_batch=MOST)


def store_of(engine: Engine, run_dir: Path) -> CpuAdapters:
    return adapter_store(engine.worker.model, "Llama", engine.config, str(run_dir), CpuAdapters)


def test_random_loads_unloads_and_requests_do_what_a_model_of_them_says(engine: Engine, tmp_path: Path) -> None:
    store, dice = store_of(engine, tmp_path), random.Random(0)
    known: dict[str, str] = {}  # name → version
    recent: list[str] = []  # in memory, least recently used first
    used: set[str] = set()
    versions: set[str] = set()

    def victims(name: str) -> list[str]:
        return [] if name in recent or len(recent) < MOST else [other for other in recent if other not in used][:1]

    def fits(name: str) -> bool:
        return name in recent or len(recent) < MOST or bool(victims(name))

    def touch(name: str) -> None:
        gone = {*victims(name), name}
        recent[:] = [*(other for other in recent if other not in gone), name]

    for _ in range(1000):
        name = dice.choice(NAMES)
        used = set(dice.sample(NAMES, dice.randint(0, 3)))
        match dice.choice(["load", "unload", "request", "request"]):
            case "load":
                if name not in store.loaded and not fits(name):
                    with pytest.raises(CommandRefused):
                        store.make_room(used)
                    continue
                if name not in store.loaded:
                    store.make_room(used)
                directory = tmp_path / name
                store.install(name, name, str(directory), store.read(directory), pinned=False)
                touch(name)
                known[name] = store.version_of[name]
                assert known[name] not in versions, "a version is given once"
                versions.add(known[name])
            case "unload" if name in known:
                store.forget(name)
                del known[name]
                recent[:] = [other for other in recent if other != name]
            case "request":
                assert store.is_served(name) == (name in known)
                if name in known and fits(name):
                    if not store.use(name):
                        assert store.has_room() or store.evict_unused(used)
                        store.bring_back(store.known[name], store.read_known(store.known[name]))
                    touch(name)
                elif name in known:
                    assert not (store.use(name) or store.has_room() or store.evict_unused(used))
        assert list(store.loaded) == recent
        assert store.version_of == known == {each["name"]: each["version"] for each in store.state()}


def test_a_restarted_scheduler_has_the_adapters_it_had_and_a_changed_file_another_version(
    engine: Engine, tmp_path: Path
) -> None:
    store = store_of(engine, tmp_path)
    for name in ("a", "b"):
        store.install(name, name, str(tmp_path / name), store.read(tmp_path / name), pinned=name == "a")
    (tmp_path / "b" / "adapter_model.safetensors").touch()
    again = store_of(engine, tmp_path)
    assert again.version_of["a"] == store.version_of["a"] and again.version_of["b"] not in store.version_of.values()
    assert [(each["name"], each["pinned"]) for each in again.state()] == [("a", True), ("b", False)]


def test_an_adapter_whose_files_are_gone_is_still_known_after_a_restart(engine: Engine, tmp_path: Path) -> None:
    store = store_of(engine, tmp_path)
    for name in ("a", "b"):
        store.install(name, name, str(tmp_path / name), store.read(tmp_path / name), pinned=False)
    (tmp_path / "b" / "adapter_model.safetensors").unlink()
    again = store_of(engine, tmp_path)
    assert [(each["name"], each["loaded"]) for each in again.state()] == [("a", True), ("b", False)]
    assert again.version_of == store.version_of
    with pytest.raises(StartupError):
        again.read_known(again.known["b"])
