"""Weights that another process broadcasts over Gloo while requests run."""

import contextlib
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from quartet.runtime.adapters import LoadAdapterFromDistributed
from quartet.runtime.control import DestroyWeightsUpdateGroup, InitWeightsUpdateGroup, UpdateWeightsFromDistributed
from quartet.scheduler_service.weights import distributed
from tests import checkpoints
from tests.adapters import BASE_TOKEN, FIRST_TOKEN, telling_base, telling_settings, telling_tensors
from tests.live import Live
from tests.stepper import tokenized

PROMPT = list(range(10, 31))
A, B = 100, 200
PATIENCE_S = 60.0
GROUP = "weight_update_group"
NAMES = ["lm_head.weight", "model.norm.weight"]


class Trainer:
    """The other process."""

    def __init__(self, process: "subprocess.Popen[str]", port: int) -> None:
        self.process = process
        self.port = port

    def go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def read_line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def trainer(file: Path, *options: str, world_size: int = 2) -> Iterator[Trainer]:
    port = free_port()
    command = [sys.executable, "-m", "tests.trainer", str(port), str(world_size), GROUP, str(file), *options]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield Trainer(process, port)
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def live(tmp_path: Path) -> Live:
    return Live(checkpoints.version_model(tmp_path / "a", A), tmp_path, weight_version="A")


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    tensors = checkpoints.version_tensors(tmp_path / "a", B)
    save_file({name: tensors[name] for name in NAMES}, tmp_path / "sent")
    return tmp_path / "sent"


def joining(port: int | str, **fields: object) -> InitWeightsUpdateGroup:
    return InitWeightsUpdateGroup(
        master_address="127.0.0.1",
        master_port=port,
        rank_offset=1,
        world_size=2,
        backend="gloo",
        **fields,  # type: ignore[arg-type]
    )


def broadcast(**fields: object) -> UpdateWeightsFromDistributed:
    shapes = [[checkpoints.VOCAB_SIZE, 64], [64]]
    return UpdateWeightsFromDistributed(
        **{"names": NAMES, "dtypes": ["torch.float32", "float32"], "shapes": shapes, **fields}  # type: ignore[arg-type]
    )


@pytest.mark.slow
@pytest.mark.parametrize("flat", [False, True])
def test_a_trainer_broadcasts_while_requests_run(live: Live, weights: Path, flat: bool) -> None:
    live.send(tokenized("x", PROMPT, 400, ignore_eos=True))
    with trainer(weights, *(["flat"] if flat else [])) as other:
        joined = live.call(joining(str(other.port)))  # a string, as some trainers send it
        assert (joined.success, joined.message) == (True, "Succeeded to initialize custom process group.")
        assert other.read_line() == "joined"
        live.send(tokenized("y", PROMPT, 400, ignore_eos=True))
        live.step(3)
        id = live.begin(broadcast(weight_version="B", load_format="flattened_bucket" if flat else None))
        made = len(live.output("y"))
        live.step(5)
        assert live.reply(id) is None and len(live.output("y")) == made + 5  # it waits, the loop does not
        other.go()
        reply = live.wait(id)
        assert other.read_line() == "sent"
        assert reply.message == "Succeeded to update parameter online. Weight version updated to B."
        live.run()
        assert set(live.by_version("y")) == {("A", A), ("B", B)}
        assert len(live.output("x")) == len(live.output("y")) == 400
        left = live.call(DestroyWeightsUpdateGroup())
        assert (left.success, left.message) == (True, "Succeeded to destroy custom process group.")


@pytest.mark.slow
def test_a_trainer_that_dies_changes_nothing(live: Live, weights: Path) -> None:
    before = live.logits(PROMPT)
    with trainer(weights) as other:
        assert live.call(joining(other.port)).success
        assert other.read_line() == "joined"
        id = live.begin(broadcast(weight_version="B"))
        live.step(2)
        other.process.kill()
        reply = live.wait(id)
    assert reply.status == 400 and reply.message.startswith("Failed to update parameter online: ")
    assert reply.message.endswith("Nothing was changed.")
    assert live.logits(PROMPT) == before and live.worker.weight_version == "A"
    assert live.call(DestroyWeightsUpdateGroup()).success


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"rank_offset": 2}, "rank 2 of 2"),
        ({"master_port": "http"}, "master_port http is no port"),
        ({"backend": "nccl"}, "needs a GPU"),
        ({"backend": "ucc"}, 'backend "ucc" is not supported; choose one of gloo, nccl'),
        ({"backend": "cpu:gloo,cuda:x"}, "is not supported"),
        ({"backend": ""}, "is not supported"),
        ({"world_size": 1 << 40}, f"rank 1 of {1 << 40}"),
        ({"master_address": ""}, 'master_address "" is no host'),
        ({"master_address": "host?rank=5"}, "is no host"),
    ],
)
def test_a_group_that_cannot_be_is_refused_at_once(live: Live, fields: dict[str, object], reason: str) -> None:
    command = joining(free_port())
    for name, value in fields.items():
        setattr(command, name, value)
    reply = live.call(command)
    assert reply.status == 400 and reply.message.startswith("Failed to initialize custom process group: ")
    assert reason in reply.message


@pytest.mark.slow
def test_a_second_call_for_a_group_that_waits_for_its_trainer_is_refused(live: Live, weights: Path) -> None:
    with trainer(weights) as other:
        first = live.begin(joining(other.port))
        again = live.call(joining(other.port))
        assert not again.success and "is being joined already" in again.message
        assert live.wait(first).success and other.read_line() == "joined"
        assert "exists already" in live.call(joining(other.port)).message
        id = live.begin(broadcast(weight_version="B"))
        other.go()
        assert live.wait(id).success and other.read_line() == "sent"
    assert live.call(DestroyWeightsUpdateGroup()).success


def test_a_group_is_destroyed_once_and_not_joined_meanwhile(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    leaves, go_on = threading.Event(), threading.Event()
    left: list[Any] = []

    def leave(group: Any) -> None:
        leaves.set()
        assert go_on.wait(PATIENCE_S)
        left.append(group)

    monkeypatch.setattr(distributed, "leave", leave)
    group: Any = object()
    live.updates.groups[GROUP] = group
    first = live.begin(DestroyWeightsUpdateGroup())
    live.step()
    assert leaves.wait(PATIENCE_S)
    again = live.call(DestroyWeightsUpdateGroup())
    assert (again.status, again.message) == (400, f"The group {GROUP} is being destroyed already.")
    joined = live.call(joining(free_port()))
    assert joined.status == 400 and joined.message.endswith(f"the group {GROUP} is being destroyed.")
    go_on.set()
    assert live.wait(first).success and left == [group]
    assert live.call(DestroyWeightsUpdateGroup()).message == "The group to be destroyed does not exist."


def test_groups_that_do_not_exist_are_named(live: Live) -> None:
    assert live.call(DestroyWeightsUpdateGroup()).message == "The group to be destroyed does not exist."
    assert "there is no group weight_update_group" in live.call(broadcast()).message


def adapter(number: int, **fields: Any) -> LoadAdapterFromDistributed:
    """What miles sends when it broadcasts a telling adapter."""
    tensors = sorted(telling_tensors(number).items())
    return LoadAdapterFromDistributed(
        **{
            "lora_name": "miles_lora",
            "config_dict": telling_settings(),
            "names": [name for name, _ in tensors],
            "dtypes": [str(tensor.dtype) for _, tensor in tensors],
            "shapes": [list(tensor.shape) for _, tensor in tensors],
            "group_name": GROUP,
            **fields,
        }
    )


@pytest.mark.slow
def test_a_trainer_broadcasts_an_adapter_while_requests_run(tmp_path: Path) -> None:
    live = Live(telling_base(tmp_path / "base"), tmp_path, enable_lora=True)
    assert live.adapters is not None
    save_file(telling_tensors(3), tmp_path / "sent")
    assert "there is no group" in live.call(adapter(3)).message
    with trainer(tmp_path / "sent") as other:
        assert live.call(joining(other.port)).success
        assert other.read_line() == "joined"
        for wrong, reason in (
            ({"names": ["x"] * 6}, "not a factor"),
            ({"shapes": [[1, 1]] * 6}, "does not fit the model"),
            ({"dtypes": ["float32"]}, "differ in length"),
            ({"added_tokens_config": {"a": 1}}, "added_tokens_config"),
        ):
            refused = live.call(adapter(3, **wrong))
            assert not refused.success and reason in refused.message
        live.send(tokenized("base", PROMPT, 40, ignore_eos=True, temperature=0.0))
        live.step(3)
        id = live.begin(adapter(3, upsert=True))
        live.step(5)
        assert live.reply(id) is None and len(live.output("base")) >= 5  # it waits, the loop does not
        other.go()
        reply = live.wait(id)
        assert reply.success and reply.body["loaded_adapters"] == {"miles_lora": "__distributed__"}, reply.message
        message = tokenized("x", PROMPT, 3, ignore_eos=True)
        message.request.adapter = "miles_lora"
        live.send(message)
        live.run()
        assert live.output("x") == [FIRST_TOKEN + 3] * 3 and set(live.output("base")) == {BASE_TOKEN}
        restarted = Live(tmp_path / "base", tmp_path, enable_lora=True)
        assert restarted.adapters is not None and [*restarted.adapters.loaded] == ["miles_lora"]
