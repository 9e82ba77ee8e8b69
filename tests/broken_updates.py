"""Updates that must fail and leave what serves as it was; `python -m tests.broken_updates` prints them in a table.

Staging touches no disk. What does is the payload of /update_weights_from_tensor, which the gateway puts into a file:
the full disk is tried there.
"""

import asyncio
import base64
import resource
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from safetensors.torch import save

from quartet.http_gateway.admin import payloads
from quartet.runtime.control import UpdateWeightsFromDisk
from quartet.runtime.errors import RequestError
from quartet.runtime.messages import Reply
from quartet.scheduler_service.weights.manifest import manifest_of
from tests import checkpoints
from tests.live import Live

PROMPT = [5, 6, 7, 8, 9, 10, 11]
ITERATOR, UPDATE = "Failed to get weights iterator: ", "Failed to update weights: "
ROLLED_BACK = ".\nRolling back to original weights."
NAME = "model.layers.1.mlp.down_proj.weight"
FILE_LIMIT_BYTES = 4096


@dataclass(frozen=True)
class Case:
    """`attempt` takes the server and a sound new checkpoint, breaks something, and returns the answer."""

    name: str
    attempt: Callable[[Live, Path], Reply]
    begins: str
    contains: str
    status: int = 400


def update(live: Live, directory: Path | str, manifest: dict[str, str] | None = None) -> Reply:
    return live.call(UpdateWeightsFromDisk(model_path=str(directory), weight_version="broken", manifest=manifest))


def with_tensors(change: Callable[[checkpoints.Tensors], None]) -> Callable[[Live, Path], Reply]:
    """The checkpoint saved again with some tensors changed."""

    def attempt(live: Live, directory: Path) -> Reply:
        tensors = checkpoints.random_tensors(directory, 2)
        change(tensors)
        for old in directory.glob("*.safetensors*"):
            old.unlink()
        return update(live, checkpoints.save(directory, tensors, shards=2))

    return attempt


def shard(directory: Path) -> Path:
    return sorted(directory.glob("model-*.safetensors"))[-1]


def missing_shard(live: Live, directory: Path) -> Reply:
    shard(directory).unlink()
    return update(live, directory)


def truncated_file(live: Live, directory: Path) -> Reply:
    with shard(directory).open("r+b") as file:
        file.truncate(shard(directory).stat().st_size - 1000)
    return update(live, directory)


def flipped_bit(live: Live, directory: Path) -> Reply:
    manifest = manifest_of(directory)
    with shard(directory).open("r+b") as file:
        file.seek(-1001, 2)
        byte = file.read(1)[0]
        file.seek(-1001, 2)
        file.write(bytes([byte ^ 1]))
    return update(live, directory, manifest)


def short_manifest(live: Live, directory: Path) -> Reply:
    manifest = manifest_of(directory)
    del manifest[NAME]
    return update(live, directory, manifest)


def rewritten(live: Live, directory: Path) -> Reply:
    """A writer that is still at work."""
    data = shard(directory).read_bytes()
    answered, writing = threading.Event(), threading.Event()

    def write() -> None:
        with shard(directory).open("r+b", buffering=0) as file:
            while not answered.is_set():
                file.seek(0)
                file.write(data)
                writing.set()

    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert writing.wait(10)
        return update(live, directory)
    finally:
        answered.set()
        writer.join()


def full_disk(live: Live, directory: Path) -> Reply:
    """The gateway's answer when its file cannot grow."""
    body = msgspec.json.encode([base64.b64encode(save(checkpoints.random_tensors(directory, 2))).decode()])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_LIMIT_BYTES, hard))
    try:
        with payloads.Upload(str(directory)) as upload:
            asyncio.run(upload.feed(body))
    except RequestError as error:
        return Reply(id="", success=False, message=error.message, status=error.kind.status)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    raise AssertionError("the disk was not full")


def as_int(tensors: checkpoints.Tensors) -> None:
    tensors[NAME] = tensors[NAME].to(torch.int32)


def as_nan(tensors: checkpoints.Tensors) -> None:
    tensors[NAME][3, 4] = float("nan")


def as_infinity(tensors: checkpoints.Tensors) -> None:
    tensors[NAME][0, 0] = float("-inf")


def narrower(tensors: checkpoints.Tensors) -> None:
    tensors[NAME] = tensors[NAME][:, 1:].contiguous()


def renamed(tensors: checkpoints.Tensors) -> None:
    tensors["model.layers.1.mlp.up_down.weight"] = tensors.pop(NAME)


def one_more(tensors: checkpoints.Tensors) -> None:
    tensors["value_head.weight"] = torch.ones(1, 64)


CASES = [
    Case("missing shard", missing_shard, ITERATOR, "No such file or directory"),
    Case("truncated file", truncated_file, ITERATOR, "is truncated"),
    Case("flipped bit, with a manifest", flipped_bit, UPDATE, "the manifest says"),
    Case("manifest without a tensor", short_manifest, UPDATE, "the manifest lacks 1 tensor"),
    Case("wrong shape", with_tensors(narrower), UPDATE, "has shape [64, 95], the model needs [64, 96]"),
    Case("wrong dtype (int32)", with_tensors(as_int), UPDATE, "is I32, which is not supported"),
    Case("wrong name", with_tensors(renamed), UPDATE, f"the checkpoint lacks 1 tensor: {NAME}"),
    Case("extra tensor", with_tensors(one_more), UPDATE, "no use for 1 tensor: value_head.weight"),
    Case("NaN", with_tensors(as_nan), UPDATE, f"tensor {NAME} holds values that are not finite"),
    Case("infinity", with_tensors(as_infinity), UPDATE, f"tensor {NAME} holds values that are not finite"),
    Case("directory missing", lambda live, new: update(live, new / "no"), ITERATOR, "(repository not found)."),
    Case("directory missing, why", lambda live, new: update(live, new / "no"), ITERATOR, "new/no does not exist"),
    Case("hub id unknown", lambda live, new: update(live, "no-one/no-such"), ITERATOR, "(repository not found)."),
    Case("empty directory", lambda live, new: update(live, new.parent), ITERATOR, "no *.safetensors file"),
    Case("file rewritten during reading", rewritten, ITERATOR, "is being written"),
    Case("full disk for a payload", full_disk, "The payload could not be stored: ", "File too large", 500),
]


@dataclass(frozen=True)
class Outcome:
    """What an attempt left behind."""

    reply: Reply
    same_logits: bool
    same_version: bool
    recovered: bool  # the next sound update works


def outcome(case: Case, live: Live, place: Path) -> Outcome:
    """Try a case on a server; a sound update follows it."""
    before, version = live.logits(PROMPT), live.worker.weight_version
    reply = case.attempt(live, checkpoints.random_model(place / "broken" / "new", 2, shards=2))
    same = live.logits(PROMPT) == before
    same_version = live.worker.weight_version == version
    sound = checkpoints.random_model(place / "sound", 3)
    good = live.call(UpdateWeightsFromDisk(model_path=str(sound), weight_version="sound"))
    recovered = good.success and live.logits(PROMPT) != before and live.worker.weight_version == "sound"
    return Outcome(reply, same, same_version, recovered)


def try_one(case: Case, place: Path) -> Outcome:
    live = Live(checkpoints.random_model(place / "first", 1), place)
    return outcome(case, live, place)


def main() -> None:
    print(f"{'update':32} {'status':>6}  {'logits':8} {'version':8} {'next update':12} message")
    for case in CASES:
        with tempfile.TemporaryDirectory() as place:
            found = try_one(case, Path(place))
            message = found.reply.message.replace(place, "").replace("\n", " ")
        words = ("same" if found.same_logits else "CHANGED", "same" if found.same_version else "CHANGED")
        after = "works" if found.recovered else "FAILS"
        print(f"{case.name:32} {found.reply.status:6}  {words[0]:8} {words[1]:8} {after:12} {message}")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
