"""Weights that change while requests run, on a real tiny model between fake sockets."""

import json
import logging
import os
import shutil
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import save, save_file

from quartet.runtime.control import (
    BeginWeightUpdate,
    CheckWeights,
    EndWeightUpdate,
    FlushCache,
    GetWeightsByName,
    UpdateWeightsFromDisk,
    UpdateWeightsFromTensor,
    UpdateWeightVersion,
)
from quartet.runtime.errors import StartupError
from quartet.runtime.model_files import model_info
from quartet.runtime.process.memory import Memory
from quartet.scheduler_service.host import memory as host_memory
from quartet.scheduler_service.main import model_facts
from quartet.scheduler_service.weights import record, staging
from quartet.scheduler_service.weights.checkpoint import Checkpoint, CheckpointError
from quartet.scheduler_service.weights.manifest import manifest_of
from tests import checkpoints
from tests.broken_updates import CASES, ROLLED_BACK, UPDATE, Case, outcome
from tests.configs import resolved
from tests.live import Live
from tests.stepper import tokenized

PROMPT = list(range(10, 31))
A, B = 100, 200  # what the version models answer


@pytest.fixture
def versions(tmp_path: Path) -> tuple[Path, Path]:
    first = checkpoints.version_model(tmp_path / "a", A)
    return first, checkpoints.version_model(tmp_path / "b", B)


@pytest.fixture
def live(versions: tuple[Path, Path], tmp_path: Path) -> Live:
    return Live(versions[0], tmp_path, weight_version="A")


def to_b(versions: tuple[Path, Path], **fields: object) -> UpdateWeightsFromDisk:
    return UpdateWeightsFromDisk(model_path=str(versions[1]), weight_version="B", **fields)  # type: ignore[arg-type]


def running(live: Live, *rids: str, tokens: int = 300) -> None:
    """Requests that are in the middle of their answers."""
    for rid in rids:
        live.send(tokenized(rid, PROMPT, tokens, ignore_eos=True))
    live.step(4)


def runs(live: Live, rid: str) -> list[tuple[str, int]]:
    """(version, token) of an answer, equal neighbours once."""
    seen = live.by_version(rid)
    return [pair for i, pair in enumerate(seen) if i == 0 or seen[i - 1] != pair]


# from disk


@pytest.mark.parametrize("depth", [0, 1])
def test_running_requests_go_on_over_a_swap_and_every_token_tells_its_version(
    versions: tuple[Path, Path], tmp_path: Path, depth: int
) -> None:
    live = Live(versions[0], tmp_path, depth=depth, weight_version="A")
    running(live, "x", "y")
    reply = live.call(to_b(versions))
    live.run()
    assert (reply.success, reply.message) == (True, "Succeeded to update model weights. Weight version updated to B.")
    assert reply.body == {
        "weight_version": "B",
        "paused": False,
        "asleep": False,
        "lacks": [],
        "num_paused_requests": 0,
        "model_path": str(versions[1]),
    }
    for rid in ("x", "y"):
        assert runs(live, rid) == [("A", A), ("B", B)]
        assert len(live.output(rid)) == 300
        assert live.tokens(rid)[-1].retractions == 0


def test_decoding_goes_on_while_an_update_is_staged(live: Live, versions: tuple[Path, Path]) -> None:
    running(live, "x")
    id = live.begin(to_b(versions))
    before = len(live.output("x"))
    live.wait(id)
    assert len(live.output("x")) > before


def test_the_log_says_what_the_contract_says(
    live: Live, versions: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        live.call(to_b(versions))
    lines = [line.split(". avail")[0] for line in caplog.messages]
    assert lines == [
        "Start update_weights. Load format=auto",
        "Update engine weights online from disk begin",
        "Using model weights format ['*.safetensors']",
        f"No model.safetensors.index.json found in {versions[1]}.",
        "Update weights end.",
        "Cache flushed successfully!",
    ]


def test_a_wrong_path_is_answered_in_the_words_that_clients_compare(
    live: Live, caplog: pytest.LogCaptureFixture
) -> None:
    wrong = "qwen/qwen2.5-0.5b-instruct-wrong"
    with caplog.at_level(logging.INFO):
        reply = live.call(UpdateWeightsFromDisk(model_path=wrong))
    message = f"Failed to get weights iterator: {wrong} (repository not found)."
    assert (reply.success, reply.status, reply.message) == (False, 400, message)
    assert caplog.messages[2] == message


@pytest.mark.parametrize("path", ["a" * 5000, "/proc/1/root/weights", "\0", ""])
def test_a_path_that_cannot_be_looked_at_is_a_400(live: Live, path: str) -> None:
    reply = live.call(UpdateWeightsFromDisk(model_path=path))
    assert not reply.success and reply.status == 400
    assert reply.message.startswith("Failed to get weights iterator: ")


@pytest.mark.parametrize(
    ("name", "files", "missing"),
    [
        ("gone", None, "does not exist; it takes a directory"),
        ("gone.gguf", None, "there is no such file"),
        ("bare", {}, "no *.safetensors file in"),
        ("torn", {"model.safetensors.index.json": '{"weight_map": {"a": "1.safetensors"}}'}, "torn/1.safetensors"),
    ],
)
def test_the_directory_and_what_is_missing_in_it_are_named(
    live: Live, tmp_path: Path, name: str, files: dict[str, str] | None, missing: str
) -> None:
    directory = tmp_path / name
    if files is not None:
        shutil.copytree(live.updates.committed.model_dir or live.updates.committed.model_path, directory)
        for weights in directory.glob("*.safetensors"):
            weights.unlink()
        for file, text in files.items():
            (directory / file).write_text(text)
    reply = live.call(UpdateWeightsFromDisk(model_path=str(directory)))
    assert reply.message.startswith("Failed to get weights iterator: ") and reply.status == 400
    assert str(directory) in reply.message and missing in reply.message


def test_an_unknown_load_format_has_no_loader(live: Live, versions: tuple[Path, Path]) -> None:
    reply = live.call(to_b(versions, load_format="pt"))
    assert reply.status == 400
    assert reply.message.startswith("Failed to get model loader: load format pt is unknown")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_broken_update_changes_nothing_and_the_next_one_works(case: Case, tmp_path: Path) -> None:
    live = Live(checkpoints.random_model(tmp_path / "first", 1), tmp_path)
    running(live, "x", tokens=150)
    found = outcome(case, live, tmp_path)
    assert found.reply.status == case.status and not found.reply.success
    assert found.reply.message.startswith(case.begins) and case.contains in found.reply.message
    assert found.reply.message.endswith(ROLLED_BACK if case.begins == UPDATE else ".")
    assert found.same_logits and found.same_version and found.recovered
    live.run()
    assert len(live.output("x")) == 150


def test_a_file_that_changes_after_its_header_was_read_is_refused(live: Live, versions: tuple[Path, Path]) -> None:
    before = staging.stable_identities(versions[1])
    checkpoint = Checkpoint.open(versions[1])
    file = versions[1] / "model.safetensors"
    file.write_bytes(file.read_bytes())
    with pytest.raises(CheckpointError, match="was changed while it was read"):
        staging.stage_checkpoint(checkpoint, before, live.updates.second, None)


def test_a_checkpoint_in_another_float_format_is_converted(live: Live, tmp_path: Path) -> None:
    directory = checkpoints.write_config(tmp_path / "half")
    tensors = {name: t.bfloat16() for name, t in checkpoints.version_tensors(directory, 7).items()}
    checkpoints.save(directory, tensors, shards=3)
    digests = manifest_of(directory)
    assert live.call(UpdateWeightsFromDisk(model_path=str(directory), manifest=digests)).success
    running(live, "x", tokens=1)
    live.run()
    assert live.output("x") == [7]


def test_a_version_that_is_not_served_is_a_conflict(live: Live, versions: tuple[Path, Path]) -> None:
    reply = live.call(to_b(versions, expected_version="Z"))
    assert (reply.status, reply.message) == (409, "Weight version Z was expected, A is served.")
    assert live.call(to_b(versions, expected_version="A")).success


def test_updates_that_come_together_are_carried_out_in_order(live: Live, versions: tuple[Path, Path]) -> None:
    ids = [live.begin(to_b(versions, expected_version=v)) for v in ("A", "A", "B")]
    assert [live.wait(id).status for id in ids] == [200, 409, 200]


def test_abort_all_ends_requests_with_what_they_have(live: Live, versions: tuple[Path, Path]) -> None:
    running(live, "x", "y")
    live.call(to_b(versions, abort_all_requests=True))
    assert [live.finish(rid).reason for rid in ("x", "y")] == ["abort", "abort"]  # type: ignore[union-attr]
    assert set(live.output("x")) == {A}


def test_a_failed_update_aborts_nothing(live: Live) -> None:
    running(live, "x")
    live.call(UpdateWeightsFromDisk(model_path="/no/where", abort_all_requests=True))
    assert live.finish("x") is None


def test_retract_computes_running_requests_anew_on_the_new_weights(live: Live, versions: tuple[Path, Path]) -> None:
    running(live, "x")
    reply = live.call(to_b(versions, retract=True))
    live.run()
    assert reply.body is not None and reply.body["num_paused_requests"] == 1
    assert runs(live, "x") == [("A", A), ("B", B)]
    assert len(live.output("x")) == 300
    assert live.tokens("x")[-1].retractions == 1


def test_keep_pause_leaves_the_server_paused_until_it_continues(live: Live, versions: tuple[Path, Path]) -> None:
    live.call(to_b(versions, keep_pause=True))
    assert live.planner.paused


def test_a_cache_that_is_not_flushed_is_never_matched_again(live: Live, versions: tuple[Path, Path]) -> None:
    running(live, "x", tokens=2)
    live.run()
    cached = live.planner.pool.tree.cached
    live.call(to_b(versions, flush_cache=False))
    assert live.planner.pool.tree.cached == cached > 0
    running(live, "y", tokens=2)
    live.run()
    assert live.tokens("y")[-1].cached_tokens == 0
    live.call(to_b(versions))
    assert live.planner.pool.tree.cached == 0


def test_no_stale_prefix_is_used_after_an_update(tmp_path: Path) -> None:
    """1,000 prompts that are all cached under the old weights, then on the new ones, against a fresh server."""
    first, second = (checkpoints.random_model(tmp_path / name, seed) for seed, name in enumerate("ab"))
    live, fresh = Live(first, tmp_path), Live(second, tmp_path)
    prompts = {f"p{i}": [2 + i % 7, 3 + i % 5, *range(10, 20), 20 + i % 250, 30 + i // 250] for i in range(1000)}
    for server, round in ((live, "old"), (live, "warm"), (fresh, "new")):
        server.send(*(tokenized(f"{round}/{rid}", prompt, 1) for rid, prompt in prompts.items()))
        server.run()
    assert all(live.tokens(f"warm/{rid}")[-1].cached_tokens for rid in prompts)
    assert live.call(UpdateWeightsFromDisk(model_path=str(second))).success
    live.send(*(tokenized(f"new/{rid}", prompt, 1) for rid, prompt in prompts.items()))
    live.run()
    answers = [live.output(f"new/{rid}") for rid in prompts]
    assert answers == [fresh.output(f"new/{rid}") for rid in prompts]
    assert answers != [live.output(f"old/{rid}") for rid in prompts]


def test_a_request_retracted_before_a_swap_resumes_on_new_keys_and_values(tmp_path: Path) -> None:
    first, second = (checkpoints.random_model(tmp_path / name, seed) for seed, name in enumerate("ab"))
    live, fresh = Live(first, tmp_path), Live(second, tmp_path)
    running(live, "x", tokens=200)
    live.call(UpdateWeightsFromDisk(model_path=str(second), weight_version="B", retract=True))
    live.run()
    swapped = [version for version, _ in live.by_version("x")].index("B")
    fresh.send(tokenized("x", PROMPT, 200, ignore_eos=True, resume=live.output("x")[:swapped]))
    fresh.run()
    assert live.output("x")[swapped:] == fresh.output("x")


def test_what_was_committed_last_is_recorded_for_a_restart(
    live: Live, versions: tuple[Path, Path], tmp_path: Path
) -> None:
    assert record.read_record(str(tmp_path)) is None
    live.call(to_b(versions))
    live.call(UpdateWeightsFromDisk(model_path="/no/where", weight_version="C"))
    config = record.restored(resolved(model_path=str(versions[0])), str(tmp_path))
    assert (config.model_dir, config.weight_version) == (str(versions[1]), "B")
    again = Live(Path(config.model_dir), tmp_path, weight_version=config.weight_version)
    assert again.logits(PROMPT) == live.logits(PROMPT)


def test_a_restart_keeps_the_label_that_was_given_last(live: Live, versions: tuple[Path, Path], tmp_path: Path) -> None:
    live.call(to_b(versions))
    live.call(UpdateWeightVersion(new_version="B2"))
    restored = record.restored(resolved(model_path=str(versions[0])), str(tmp_path))
    assert (restored.model_dir, restored.weight_version) == (str(versions[1]), "B2")


def test_after_a_restart_lost_tensors_do_not_leave_their_label_behind(
    live: Live, versions: tuple[Path, Path], tmp_path: Path
) -> None:
    live.call(to_b(versions))
    assert live.call(from_tensor(payload(tmp_path, head(A)), weight_version="C")).success
    live.call(UpdateWeightVersion(new_version="D"))
    restored = record.restored(resolved(model_path=str(versions[0])), str(tmp_path))
    assert (restored.model_dir, restored.weight_version) == (str(versions[1]), "B")


def test_a_directory_rewritten_since_its_update_is_served_under_another_version_after_a_restart(
    live: Live, versions: tuple[Path, Path], tmp_path: Path
) -> None:
    live.call(to_b(versions))
    os.utime(versions[1] / "model.safetensors", ns=(1, 1))
    restored = record.restored(resolved(model_path=str(versions[0])), str(tmp_path))
    assert (restored.model_dir, restored.weight_version) == (str(versions[1]), "B-rewritten")


def test_a_rewritten_directory_is_noticed_behind_a_restart_and_a_new_label_too(
    versions: tuple[Path, Path], tmp_path: Path
) -> None:
    again = Live(versions[0], tmp_path, model_dir=str(versions[0]), weight_version="A")  # nothing was updated since
    assert again.call(UpdateWeightVersion(new_version="A2")).success
    os.utime(versions[0] / "model.safetensors", ns=(1, 1))
    restored = record.restored(resolved(model_path=str(versions[0])), str(tmp_path))
    assert restored.weight_version == "A2-rewritten"


def test_a_checkpoint_that_is_gone_is_named_and_nothing_else_is_served_in_its_place(
    live: Live, versions: tuple[Path, Path], tmp_path: Path
) -> None:
    live.call(to_b(versions))
    shutil.rmtree(versions[1])
    with pytest.raises(StartupError, match=f"version B.* no longer in {versions[1]}"):
        record.restored(resolved(model_path=str(versions[0])), str(tmp_path))


def test_a_directory_of_nothing_but_weights_can_be_served_after_a_restart(
    live: Live, versions: tuple[Path, Path], tmp_path: Path
) -> None:
    for file in versions[1].iterdir():
        if file.suffix != ".safetensors":
            file.unlink()
    assert live.call(to_b(versions)).success
    started = resolved(model_path=str(versions[0]))
    facts = model_facts(started, record.restored(started, str(tmp_path)))
    assert facts.path == str(versions[1])
    assert msgspec.structs.replace(facts, path=str(versions[0])) == model_info.load(started)


def test_a_label_changes_without_touching_the_cache(live: Live) -> None:
    running(live, "x")
    live.send(UpdateWeightVersion(id="r", new_version="A2", abort_all_requests=False))
    live.run()
    assert runs(live, "x") == [("A", A), ("A2", A)]
    reply = live.call(UpdateWeightVersion(new_version="A3"))
    assert reply.body == {"new_version": "A3", "weight_version": "A3", "num_aborted_requests": 0}


def test_a_label_changes_first_and_then_requests_end_if_asked(live: Live) -> None:
    running(live, "x", "y")
    reply = live.call(UpdateWeightVersion(new_version="A2"))
    assert reply.body is not None and reply.body["num_aborted_requests"] == 2
    assert live.tokens("x")[-1].weight_version == "A2" and live.finish("x").reason == "abort"  # type: ignore[union-attr]


# tensor by tensor


def payload(tmp_path: Path, tensors: checkpoints.Tensors) -> list[str]:
    save_file(tensors, tmp_path / "payload")
    return [str(tmp_path / "payload")]


def head(token: int) -> checkpoints.Tensors:
    values = torch.zeros(checkpoints.VOCAB_SIZE, 64)
    values[token] = 1.0
    return {"lm_head.weight": values}


def from_tensor(files: list[str], **fields: object) -> UpdateWeightsFromTensor:
    return UpdateWeightsFromTensor(payload_files=files, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("load_format", [None, "direct"])
def test_a_tensor_over_the_wire_is_served_at_once(live: Live, tmp_path: Path, load_format: str | None) -> None:
    running(live, "x")
    reply = live.call(from_tensor(payload(tmp_path, head(B)), load_format=load_format, weight_version="B"))
    live.run()
    assert (reply.success, reply.message) == (True, "Success Weight version updated to B.")
    assert runs(live, "x") == [("A", A), ("B", B)]


def test_a_part_of_a_fused_matrix_leaves_the_rest_as_it_was(tmp_path: Path) -> None:
    live = Live(checkpoints.random_model(tmp_path / "a", 1), tmp_path)
    name = "model.layers.0.self_attn.k_proj.weight"
    changed = torch.randn(live.updates.live.names()[name][0])
    for _ in range(2):  # the second time the spare buffers hold older values
        before = {n: live.updates.live.checksum(n) for n in live.updates.live.names()}
        changed = changed + 1
        live.call(from_tensor(payload(tmp_path, {name: changed})))
        after = {n: live.updates.live.checksum(n) for n in live.updates.live.names()}
        assert {n for n in before if before[n] != after[n]} == {name}
        assert torch.equal(live.updates.live.view(name), changed)


def test_a_flattened_bucket_is_taken_apart(live: Live, tmp_path: Path) -> None:
    norm = torch.full((64,), 2.0, dtype=torch.bfloat16)
    parts = {"model.norm.weight": norm, **head(B)}
    flat = torch.cat([tensor.flatten().view(torch.uint8) for tensor in parts.values()])
    metadata, end = [], 0
    for name, tensor in parts.items():
        start, end = end, end + tensor.nbytes
        shape, dtype = list(tensor.shape), str(tensor.dtype)
        entry = {"name": name, "shape": shape, "dtype": dtype, "start_idx": start, "end_idx": end, "numel": end - start}
        metadata.append(entry)
    file = tmp_path / "bucket"
    file.write_bytes(save({"flattened_tensor": flat}, {"metadata": json.dumps(metadata)}))
    assert live.call(from_tensor([str(file)], load_format="flattened_bucket")).success
    assert torch.equal(live.updates.live.view("model.norm.weight"), norm.float())
    assert live.call(GetWeightsByName(name="lm_head.weight", truncate_size=B + 1)).body["rows"][B][0] == 1.0  # type: ignore[index]


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"no.such": torch.ones(2)}, "the model has no tensor no.such"),
        ({"model.norm.weight": torch.ones(63)}, "has shape [63], the model needs [64]"),
        ({"model.norm.weight": torch.full((64,), float("nan"))}, "holds values that are not finite"),
        ({"model.norm.weight": torch.ones(64, dtype=torch.int64)}, "is I64, which is not supported"),
    ],
)
def test_a_bad_tensor_changes_nothing_though_others_came_before_it(
    live: Live, tmp_path: Path, tensors: checkpoints.Tensors, reason: str
) -> None:
    before = live.logits(PROMPT)
    reply = live.call(from_tensor(payload(tmp_path, {**head(B), **tensors}), weight_version="B"))
    assert reply.status == 400 and reason in reply.message
    assert live.logits(PROMPT) == before and live.worker.weight_version == "A"
    assert live.call(from_tensor(payload(tmp_path, head(B)))).success
    assert live.logits(PROMPT) != before


@pytest.mark.parametrize("metadata", [b"[]", b"{}", b"null", b'{"metadata": 1}', b'{"metadata": "[1]"}'])
def test_a_bucket_without_its_list_of_tensors_is_refused(live: Live, tmp_path: Path, metadata: bytes) -> None:
    header = b'{"__metadata__": %s, "flat": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}' % metadata
    (tmp_path / "bucket").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    reply = live.call(from_tensor([str(tmp_path / "bucket")], load_format="flattened_bucket"))
    assert reply.status == 400 and "metadata" in reply.message


@pytest.mark.parametrize("begin", [b"\x80\x04\x95\x10\x00\x00\x00\x00", b"PK\x03\x04"])
def test_a_pickle_is_refused_with_what_to_send_instead(live: Live, tmp_path: Path, begin: bytes) -> None:
    (tmp_path / "pickle").write_bytes(begin + bytes(100))
    reply = live.call(from_tensor([str(tmp_path / "pickle")]))
    assert reply.status == 400 and "send base64 of safetensors bytes" in reply.message


def test_there_is_one_payload_for_each_rank(live: Live) -> None:
    assert "one entry for each of 1 ranks, got 0" in live.call(from_tensor([])).message


# sessions


def test_what_a_session_collects_is_served_at_its_end_and_not_before(live: Live, tmp_path: Path) -> None:
    before = live.logits(PROMPT)
    assert live.call(BeginWeightUpdate()).success
    assert live.call(from_tensor(payload(tmp_path, head(B)), weight_version="B")).success
    assert live.call(from_tensor(payload(tmp_path, {"model.norm.weight": torch.full((64,), 3.0)}))).success
    assert live.logits(PROMPT) == before and live.worker.weight_version == "A"
    assert live.call(EndWeightUpdate()).success
    assert live.logits(PROMPT) != before and live.worker.weight_version == "B"
    assert live.updates.live.view("model.norm.weight").eq(3.0).all()


def test_a_session_with_a_bad_bucket_changes_nothing(live: Live, tmp_path: Path) -> None:
    before = live.logits(PROMPT)
    live.call(BeginWeightUpdate())
    live.call(from_tensor(payload(tmp_path, head(B))))
    live.call(from_tensor(payload(tmp_path, {"no.such": torch.ones(2)})))
    reply = live.call(EndWeightUpdate())
    assert (reply.success, live.logits(PROMPT)) == (False, before)
    assert live.call(BeginWeightUpdate()).success


def test_an_error_that_nobody_expects_breaks_the_session_too(
    live: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = live.logits(PROMPT)
    live.call(BeginWeightUpdate())
    live.call(from_tensor(payload(tmp_path, head(B))))

    def fail(*of: object) -> None:
        raise TypeError("not a size")

    with monkeypatch.context() as patch:
        patch.setattr(staging, "stage_tensor", fail)
        assert live.call(from_tensor(payload(tmp_path, head(A)))).status == 500
    reply = live.call(EndWeightUpdate())
    assert not reply.success and reply.message.endswith("Internal error: TypeError")
    assert live.logits(PROMPT) == before


def test_sessions_are_opened_and_closed_in_pairs(live: Live, versions: tuple[Path, Path]) -> None:
    assert not live.call(EndWeightUpdate()).success
    assert live.call(BeginWeightUpdate()).success
    assert not live.call(BeginWeightUpdate()).success
    assert not live.call(to_b(versions)).success
    assert live.call(EndWeightUpdate()).success


# looking at weights


def test_digests_are_equal_where_weights_are_and_equal_to_the_trainers(
    versions: tuple[Path, Path], tmp_path: Path
) -> None:
    ours, theirs = Live(versions[0], tmp_path), Live(versions[1], tmp_path)
    bodies = [server.call(CheckWeights(action="checksum")).body for server in (ours, theirs)]
    assert bodies[0]["per_engine_checksum"] != bodies[1]["per_engine_checksum"]  # type: ignore[index]
    assert bodies[0]["ranks"][0]["checksums"] == manifest_of(versions[0])  # type: ignore[index]
    ours.call(to_b(versions))
    assert ours.call(CheckWeights(action="checksum")).body == bodies[1]


def test_snapshot_reset_and_compare_find_an_update_that_leaves_something_out(
    live: Live, versions: tuple[Path, Path]
) -> None:
    assert live.call(CheckWeights(action="compare")).status == 400
    assert live.call(CheckWeights(action="snapshot")).success
    assert live.call(CheckWeights(action="compare")).success
    skipped = ["model.norm.weight"]
    assert live.call(CheckWeights(action="reset_tensors", skip_tensor_list=skipped)).success
    assert "The weights differ from the snapshot" in live.call(CheckWeights(action="compare")).message
    assert live.updates.live.view("model.norm.weight").eq(1.0).all()
    live.call(UpdateWeightsFromDisk(model_path=str(versions[0])))
    assert live.call(CheckWeights(action="compare")).success


def test_the_first_rows_of_a_tensor_can_be_read(live: Live) -> None:
    rows = live.call(GetWeightsByName(name="lm_head.weight", truncate_size=2)).body
    assert rows == {"rows": [[0.0] * 64] * 2}
    assert live.call(GetWeightsByName(name="no.such")).message == "Get parameter by name failed"


def test_a_flush_of_a_busy_server_still_waits(live: Live) -> None:
    running(live, "x", tokens=100)
    assert not live.call(FlushCache()).success


def test_memory_that_is_short_for_packing_is_a_refusal_in_the_contracts_words(
    live: Live, versions: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise MemoryError("no room")

    before = live.logits(PROMPT)
    monkeypatch.setattr(host_memory, "warm", full)
    reply = live.call(to_b(versions))
    assert (reply.success, reply.status) == (False, 400)
    assert reply.message == "Failed to update weights: no room.\nRolling back to original weights."
    assert live.logits(PROMPT) == before and live.worker.weight_version == "A"


def test_an_update_whose_second_set_has_no_room_is_refused_before_the_kernel_ends_the_process(
    live: Live, versions: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = live.logits(PROMPT)
    with monkeypatch.context() as others:
        others.setattr("quartet.runtime.process.memory.look", lambda: Memory(1 << 10, 1 << 30, "a limit"))
        reply = live.call(to_b(versions))
    assert (reply.success, reply.status) == (False, 400)
    assert "no room for a second set of weights: " in reply.message and "used by a limit." in reply.message
    assert live.logits(PROMPT) == before
    assert live.call(to_b(versions)).success
