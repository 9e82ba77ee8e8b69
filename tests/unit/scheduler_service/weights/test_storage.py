"""Quantized weights: what is chosen, what is served, and what an update makes of them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quartet.kernels.cpu.linear import no_pause
from quartet.kernels.cpu.native import build
from quartet.kernels.cpu.native import library as native
from quartet.kernels.cpu.native.quantized import (
    FINE_ROTATED_INT8,
    INT4,
    INT6,
    LONG_ROWS_INT8,
    ROTATED_INT8,
    QuantizedRows,
    Scheme,
    rounded,
)
from quartet.runtime.control import (
    CheckWeights,
    ReleaseMemory,
    ResumeMemory,
    UpdateWeightsFromDisk,
)
from quartet.runtime.errors import StartupError
from quartet.runtime.model_files import gguf_directory, model_info
from quartet.runtime.sampling import SamplingParams
from quartet.scheduler_service.model.registry import load_model
from quartet.scheduler_service.weights import record
from quartet.scheduler_service.weights.block_numbers import FORMATS
from quartet.scheduler_service.weights.checkpoint import Checkpoint, CheckpointError, Encoding, StoredTensor
from quartet.scheduler_service.weights.formats import checkpoint_of
from quartet.scheduler_service.weights.parameters import Layout, Weights
from quartet.scheduler_service.weights.storage import read_numbers, recorded, schemes_in, schemes_of
from quartet.scheduler_service.weights.tensor_io import open_file
from tests import checkpoints, gguf_files
from tests.configs import resolved
from tests.engine import ALL_LOGPROBS, Engine
from tests.gguf_files import Q8_0
from tests.live import Live
from tests.stepper import tokenized

pytestmark = pytest.mark.skipif(not build.is_possible(), reason="no compiler, or another kind of machine")

CPU = torch.device("cpu")
PROMPT = list(range(10, 31))
A, B = 100, 200  # what the version models answer
QUANTIZED = {"dtype": "bfloat16", "quantization": "int8"}
MIXTURE = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}


def weights_of(directory: Path, **settings):
    config = resolved(model_path=str(directory), dtype="bfloat16", **settings)
    return load_model(config, model_info.load(config), CPU).weights


def test_int8_and_int4_keep_every_product_and_leave_norms_and_biases(tmp_path):
    directory = checkpoints.random_model(tmp_path, 0)
    for choice, scheme, finer in (("int8", LONG_ROWS_INT8, LONG_ROWS_INT8), ("int4", INT4, INT6)):
        weights = weights_of(directory, quantization=choice)
        kept = {slab[0]: scheme for slab, scheme in weights.schemes.items()}
        assert kept == {
            "embed": finer,
            "lm_head": finer,
            "qkv": finer,
            "output": finer,
            "gate_up": scheme,
            "down": scheme,
        }
        assert weights.buffers["qkv"].is_meta and not weights.buffers["norm"].is_meta


def test_int4_has_more_bits_for_attention_and_both_sides():
    layout = Layout()
    for buffer in ("embed", "qkv", "output", "gate_up", "down", "expert_down", "space_in"):
        layout.add(buffer, (0,), [(buffer, 64)], 64)
    schemes = {slab[0]: scheme for slab, scheme in schemes_of("int4", layout, torch.bfloat16, CPU, None).items()}
    assert schemes["embed"] == schemes["qkv"] == schemes["output"] == INT6
    assert {schemes[name] for name in ("gate_up", "down", "expert_down", "space_in")} == {INT4}


def test_int8_rotates_weights_of_feed_forward_blocks_that_have_whole_blocks(tmp_path):
    directory = checkpoints.random_model(tmp_path, 0, hidden_size=128, intermediate_size=384)
    weights, plain = weights_of(directory, quantization="int8"), weights_of(directory)
    kept = {slab[0]: scheme for slab, scheme in weights.schemes.items()}
    kernels = native.library()
    assert kernels is not None
    assert kept["gate_up"] == kept["down"] == (ROTATED_INT8 if kernels.instruction_set == "amx" else FINE_ROTATED_INT8)
    assert {kept[name] for name in ("embed", "lm_head", "qkv", "output")} == {LONG_ROWS_INT8}
    assert schemes_in(recorded(weights.schemes)) == weights.schemes
    for name, place in weights.layout.places.items():
        if place.buffer in ("gate_up", "down", "embed", "lm_head"):
            values = plain.view(name).float()
            assert (weights.view(name).float() - values).norm() < 0.01 * values.norm()


@pytest.mark.parametrize("choice", ["int8", "int4"])
def test_a_loaded_tensor_is_the_stored_one_rounded(tmp_path, choice):
    directory = checkpoints.random_model(tmp_path, 0)
    plain, kept = weights_of(directory), weights_of(directory, quantization=choice)
    for name, place in kept.layout.places.items():
        own = kept.schemes.get((place.buffer, place.index))
        expected = plain.view(name) if own is None else rounded(plain.view(name).contiguous(), own)
        assert torch.equal(kept.view(name), expected), name
    assert kept.nbytes() < 0.7 * plain.nbytes()


@pytest.mark.parametrize("choice", ["int8", "int4"])
@pytest.mark.parametrize("changes", [{}, MIXTURE], ids=["dense", "experts"])
def test_a_deterministic_model_has_the_bits_of_a_plain_one_with_the_rounded_weights(tmp_path, choice, changes):
    directory = checkpoints.random_model(tmp_path / "original", 0, **changes)
    kept = weights_of(directory, quantization=choice)
    values = {name: kept.view(name) for name in kept.names()}
    as_plain = checkpoints.save(checkpoints.write_config(tmp_path / "rounded", **changes), values)
    settings = {"dtype": "bfloat16", "enable_deterministic_inference": True}
    params = SamplingParams(temperature=0.0, max_new_tokens=12, ignore_eos=True)
    engines = Engine(directory, quantization=choice, **settings), Engine(as_plain, **settings)
    (ours,), (theirs,) = (engine.generate([PROMPT], params, logprobs=ALL_LOGPROBS) for engine in engines)
    assert ours.ids == theirs.ids and ours.logprobs == theirs.logprobs


def test_numbers_of_a_gguf_file_stay_as_they_are(tmp_path):
    original = checkpoints.random_model(tmp_path / "original", 0)
    file = gguf_files.convert(original, tmp_path / "model.gguf", Q8_0)
    directory = gguf_directory.described(file, tmp_path, tokenizer=False)
    kept, expanded = weights_of(directory), weights_of(directory, quantization="none")
    assert set(kept.schemes.values()) == {Scheme(8, 32, offsets=False, zero_point=128)}
    assert not expanded.schemes
    for name in kept.names():
        assert torch.equal(kept.view(name), expanded.view(name)), name


def test_int8_keeps_the_numbers_of_a_q8_0_file_where_they_are_not_rotated(tmp_path):
    original = checkpoints.random_model(tmp_path / "original", 0, hidden_size=128, intermediate_size=384)
    file = gguf_files.convert(original, tmp_path / "model.gguf", Q8_0)
    directory = gguf_directory.described(file, tmp_path, tokenizer=False)
    kept, as_stored = weights_of(directory, quantization="int8"), weights_of(directory)
    for name, place in kept.layout.places.items():
        if place.buffer in ("embed", "lm_head", "qkv", "output"):
            assert kept.schemes[place.buffer, place.index] == LONG_ROWS_INT8
            assert torch.equal(kept.view(name), as_stored.view(name)), name


def test_a_slab_whose_tensors_have_several_formats_gets_a_form_for_all():
    layout = Layout()
    layout.add("qkv", (0,), [("q", 16), ("k", 16)], 256)
    tensors = {name: stored(kind) for name, kind in (("q", "Q4_K"), ("k", "Q6_K"))}
    checkpoint = Checkpoint([], tensors, indexed=False)
    schemes = schemes_of("auto", layout, torch.bfloat16, CPU, checkpoint)
    assert schemes == {("qkv", (0,)): Scheme(6, 16, offsets=True)}


@pytest.mark.parametrize(("kind", "scale_bits"), [("Q4_K", 16), ("Q4_0", 16), ("Q8_0", 8), ("Q6_K", 8)])
def test_int4_keeps_the_numbers_of_a_file_that_has_four_bits(kind, scale_bits):
    layout = Layout()
    layout.add("down", (0,), [("d", 16)], 256)
    checkpoint = Checkpoint([], {"d": stored(kind)}, indexed=False)
    schemes = schemes_of("int4", layout, torch.bfloat16, CPU, checkpoint)
    assert schemes == {("down", (0,)): replace(INT4, scale_bits=scale_bits)}


def stored(kind: str) -> StoredTensor:
    """A tensor (16, 256) in that format, without a file."""
    encoding = Encoding(kind, 256, 256, lambda memory: memory, FORMATS[kind][0])
    return StoredTensor(Path("model.gguf"), "F32", (16, 256), 0, 0, encoding=encoding)


@pytest.mark.parametrize("choice", ["int8", "int4"])
def test_what_cannot_be_kept_so_is_refused_at_the_start(tmp_path, choice):
    directory = checkpoints.random_model(tmp_path, 0)
    with pytest.raises(StartupError, match=f"--quantization {choice} needs bfloat16 activations; add --dtype bfloat16"):
        schemes_of(choice, checkpoints.layout_of(directory), torch.float32, CPU, checkpoint_of(directory))


@pytest.mark.parametrize(
    ("changes", "settings", "said"),
    [
        ({}, {"is_embedding": True}, "--quantization int8 is for models that generate"),
        ({"architectures": ["StableLmForCausalLM"], "model_type": "stablelm"}, {}, "needs a native family"),
    ],
)
def test_models_that_it_would_change_nothing_for_are_refused(tmp_path, changes, settings, said):
    directory = checkpoints.random_model(tmp_path, 0)
    checkpoints.write_config(directory, **changes)
    with pytest.raises(StartupError, match=said):
        weights_of(directory, quantization="int8", **settings)


def test_tensors_that_do_not_begin_a_block_of_rows_are_not_kept_so():
    layout = Layout()
    layout.add("qkv", (0,), [("q", 24), ("k", 8)], 32)
    layout.add("down", (0,), [("d", 24)], 32)
    assert set(schemes_of("int8", layout, torch.bfloat16, CPU, None)) == {("down", (0,))}


def test_the_log_names_what_is_not_quantized(tmp_path, caplog):
    caplog.set_level("INFO")
    weights_of(checkpoints.random_model(tmp_path / "even", 0), quantization="int4")
    assert "Not quantized" not in caplog.text
    odd = checkpoints.random_model(tmp_path / "odd", 0, num_key_value_heads=1, head_dim=20)
    assert "qkv" not in {buffer for buffer, _ in weights_of(odd, quantization="int4").schemes}
    assert "Not quantized: qkv." in caplog.text


def test_a_buffer_is_kept_in_one_way():
    layout = Layout()
    layout.add("qkv", (0,), [("q", 16), ("k", 16)], 32)
    layout.add("qkv", (1,), [("q1", 24), ("k1", 8)], 32)
    assert schemes_of("int8", layout, torch.bfloat16, CPU, None) == {}


# updates


@pytest.fixture
def versions(tmp_path: Path) -> tuple[Path, Path]:
    first = checkpoints.version_model(tmp_path / "a", A)
    return first, checkpoints.version_model(tmp_path / "b", B)


def test_an_update_from_disk_swaps_while_requests_run(versions, tmp_path):
    live = Live(versions[0], tmp_path, weight_version="A", **QUANTIZED)
    live.send(tokenized("x", PROMPT, 200, ignore_eos=True))
    live.step(4)
    reply = live.call(UpdateWeightsFromDisk(model_path=str(versions[1]), weight_version="B"))
    live.run()
    assert reply.success, reply.message
    seen = live.by_version("x")
    assert set(seen) == {("A", A), ("B", B)} and seen == sorted(seen)


def test_weights_after_an_update_equal_those_of_a_start(tmp_path):
    first, second = (checkpoints.random_model(tmp_path / str(seed), seed) for seed in (1, 2))
    live, fresh = Live(first, tmp_path, **QUANTIZED), Live(second, tmp_path, **QUANTIZED)
    assert live.call(UpdateWeightsFromDisk(model_path=str(second))).success
    bodies = [server.call(CheckWeights(action="checksum")).body for server in (live, fresh)]
    assert bodies[0] == bodies[1]


@pytest.mark.parametrize(("choice", "bits", "value"), [("int4", 4, 1e6), ("int8", 8, 1e8), ("int4", 4, 1e30)])
def test_values_that_float16_scales_cannot_reach_are_refused_and_the_old_weights_stay(tmp_path, choice, bits, value):
    directory = checkpoints.random_model(tmp_path / "m", 1)
    tensors = checkpoints.random_tensors(directory, 2)
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[name][0, 7] = value
    other = checkpoints.save(checkpoints.write_config(tmp_path / "large"), tensors)
    live = Live(directory, tmp_path, **QUANTIZED | {"quantization": choice})
    before = live.call(CheckWeights(action="checksum")).body
    reply = live.call(UpdateWeightsFromDisk(model_path=str(other)))
    assert f"{name} cannot be kept in {bits} bits: its values are too large" in reply.message
    assert not reply.success
    assert live.call(CheckWeights(action="checksum")).body == before
    with pytest.raises(StartupError, match="its values are too large"):
        weights_of(other, quantization=choice)


def test_a_matrix_that_would_become_zeros_is_refused_and_one_with_some_small_groups_is_not(tmp_path):
    directory = checkpoints.write_config(tmp_path)
    tensors = checkpoints.random_tensors(directory, 1)
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[name][:8] *= 1e-9
    assert weights_of(checkpoints.save(directory, tensors), quantization="int8").view(name)[0].eq(0).all()
    tensors[name][8:] *= 1e-9
    with pytest.raises(StartupError, match=f"{name} cannot be kept in 8 bits: its values are too small"):
        weights_of(checkpoints.save(directory, tensors), quantization="int8")


def test_scales_that_grow_too_large_in_a_joined_form_are_refused(tmp_path):
    stored = numbers_in(tmp_path / "numbers", scale=60000.0)
    layout = Layout()
    layout.add("qkv", (0,), [("q", 16)], 32)
    for scheme, fits in ((Scheme(8, 32, False, 128), True), (Scheme(8, 32, True), False)):
        weights = Weights(layout, torch.bfloat16, CPU, {("qkv", (0,)): scheme})
        with open_file(stored.file) as descriptor:
            if fits:
                read_numbers("q", stored, weights, descriptor, no_pause)
                assert torch.isfinite(weights.view("q")).all()
                continue
            with pytest.raises(CheckpointError, match="tensor q has scales that are too large"):
                read_numbers("q", stored, weights, descriptor, no_pause)


def numbers_in(file: Path, scale: float) -> StoredTensor:
    """A tensor (16, 32) in a file, all of whose blocks have this scale."""
    file.write_bytes(bytes(16 * 34))
    scheme, _ = FORMATS["Q8_0"]

    def numbers(memory: torch.Tensor, columns: int) -> QuantizedRows:
        rows = len(memory) // 34
        return QuantizedRows(scheme, torch.zeros(rows, columns, dtype=torch.uint8), torch.full((rows, 1), scale), None)

    encoding = Encoding("Q8_0", 34, 32, lambda memory: memory, scheme, numbers)
    return StoredTensor(file, "F32", (16, 32), 0, 16 * 34, encoding=encoding)


@pytest.mark.parametrize("kind", FORMATS)
def test_every_form_of_a_file_takes_values_of_an_update(kind):
    scheme, _ = FORMATS[kind]
    values = (torch.randn(16, 64) * 0.02).bfloat16()
    error = (rounded(values, scheme).float() - values.float()).norm() / values.float().norm()
    assert error < {4: 0.16, 5: 0.07, 6: 0.04, 8: 0.01}[scheme.bits]


@pytest.mark.parametrize(
    "settings", [QUANTIZED, QUANTIZED | {"quantization": "int4"}, {"dtype": "bfloat16"}], ids=["int8", "int4", "file"]
)
def test_a_restart_serves_the_same_values_in_the_same_forms(tmp_path, settings):
    original, second = (checkpoints.random_model(tmp_path / str(seed), seed) for seed in (1, 2))
    file = gguf_files.convert(original, tmp_path / "model.gguf", Q8_0)
    live = Live(gguf_directory.described(file, tmp_path, tokenizer=False), tmp_path, **settings)
    assert live.call(UpdateWeightsFromDisk(model_path=str(second))).success
    config = record.restored(resolved(model_path=str(original), **settings), str(tmp_path))
    assert config.model_dir == str(second)
    again = load_model(config, model_info.load(config), CPU).weights
    assert again.schemes == live.updates.live.schemes != {}
    for name in again.names():
        assert torch.equal(again.view(name), live.updates.live.view(name)), name


def test_values_are_lost_and_given_back_with_the_memory(tmp_path):
    directory = checkpoints.random_model(tmp_path / "m", 1)
    live = Live(directory, tmp_path, enable_memory_saver=True, **QUANTIZED)
    before = live.call(CheckWeights(action="checksum")).body
    assert live.call(ReleaseMemory()).success
    assert live.call(ResumeMemory()).success
    assert live.call(UpdateWeightsFromDisk(model_path=str(directory))).success
    assert live.call(CheckWeights(action="checksum")).body == before
