"""A rank's part of tensors is read by itself, of quantized ones and of those that lie in one with others too."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from quartet.kernels.cpu.linear import no_pause
from quartet.kernels.cpu.native import build
from quartet.kernels.cpu.native.library import BLOCK_COLUMNS
from quartet.kernels.cpu.native.quantized import QuantizedRows, Scheme
from quartet.runtime.config import ServerConfig
from quartet.runtime.model_files import model_info
from quartet.scheduler_service.host.parallel import Parallel
from quartet.scheduler_service.model.registry import decoder_spec
from quartet.scheduler_service.model.shards import shard_layout
from quartet.scheduler_service.model.spec import DecoderSpec
from quartet.scheduler_service.weights import load
from quartet.scheduler_service.weights.checkpoint import Checkpoint, CheckpointError
from quartet.scheduler_service.weights.cuts import Cut
from quartet.scheduler_service.weights.formats import checkpoint_of
from quartet.scheduler_service.weights.own_parts import own_parts
from quartet.scheduler_service.weights.parameters import Layout, Weights
from quartet.scheduler_service.weights.quantized import reading
from quartet.scheduler_service.weights.tensor_io import open_file, read_chunks, read_exactly
from tests import checkpoints
from tests.quantized_models import KINDS

SIZE, HIDDEN = 8, 12
INSIDE = "model.layers.0.experts"
CPU = torch.device("cpu")


def stacked(directory: Path, gate_up: torch.Tensor, down: torch.Tensor) -> Path:
    """A checkpoint with all experts of a layer in two tensors."""
    (directory / "config.json").write_text("{}")
    tensors = {f"{INSIDE}.gate_up_proj": gate_up.contiguous(), f"{INSIDE}.down_proj": down.contiguous()}
    save_file(tensors, directory / "model.safetensors")
    return directory


def cuts(rank: int) -> dict[str, Cut]:
    """Of expert 1: half of the rows of its gate, half of the columns of its down projection."""
    half = SIZE // 2
    return {
        f"{INSIDE}.1.gate_proj.weight": Cut((SIZE, HIDDEN), 0, ((rank * half, half),)),
        f"{INSIDE}.1.down_proj.weight": Cut((HIDDEN, SIZE), 1, ((rank * half, half),)),
    }


def test_a_rank_reads_its_part_of_an_expert(tmp_path: Path) -> None:
    gate_up, down = torch.randn(3, 2 * SIZE, HIDDEN), torch.randn(3, HIDDEN, SIZE)
    checkpoint, half = checkpoint_of(stacked(tmp_path, gate_up, down)), SIZE // 2
    for rank in range(2):
        layout = Layout()
        layout.add("gate", (), [(f"{INSIDE}.1.gate_proj.weight", half)], HIDDEN)
        layout.add("down", (), [(f"{INSIDE}.1.down_proj.weight", HIDDEN)], half)
        weights = Weights(layout, torch.float32, torch.device("cpu"))
        own = own_parts(checkpoint, cuts(rank))
        load.check_tensors(own, weights)
        load.read_weights(own, weights, own.files)
        part = slice(rank * half, rank * half + half)
        assert torch.equal(weights.slab("gate"), gate_up[1, :SIZE][part])
        assert torch.equal(weights.slab("down"), down[1][:, part])


def test_a_part_of_several_ranges_is_read_piece_by_piece_and_nothing_else(tmp_path: Path) -> None:
    whole = torch.randn(12, 5)
    save_file({"w": whole}, tmp_path / "model.safetensors")
    cut = Cut((12, 5), 0, ((1, 2), (5, 3), (10, 1)))
    stored = own_parts(Checkpoint.open(tmp_path), {"w": cut}).tensors["w"]
    rows = [1, 2, 5, 6, 7, 10]
    assert stored.nbytes == len(rows) * 20 == sum(size for _, size in stored.pieces)
    for chunk_bytes in (4, 28, 1 << 20):
        part = torch.empty(stored.shape)
        with open_file(stored.file) as descriptor:
            for _ in read_chunks(stored, part, descriptor, chunk_bytes):
                pass
        assert torch.equal(part, whole[rows])
    assembled = torch.zeros_like(whole)
    cut.put(cut.of(whole), assembled)
    assert torch.equal(assembled[rows], whole[rows]) and not assembled[[0, 3, 4, 8, 9, 11]].any()


@pytest.mark.parametrize("rank", range(2))
def test_a_rank_reads_its_part_of_an_expert_whose_columns_come_first(rank: int, tmp_path: Path) -> None:
    gate_up, down = torch.randn(3, HIDDEN, 2 * SIZE), torch.randn(3, SIZE, HIDDEN)
    own, half = own_parts(checkpoint_of(stacked(tmp_path, gate_up, down)), cuts(rank)), SIZE // 2
    part = slice(rank * half, rank * half + half)
    assert torch.equal(read(own, f"{INSIDE}.1.gate_proj.weight"), gate_up[1, :, :SIZE].T[part])
    assert torch.equal(read(own, f"{INSIDE}.1.down_proj.weight"), down[1].T[:, part])


def read(checkpoint: Checkpoint, name: str, dtype: torch.dtype = torch.float32, **schemes: Scheme) -> torch.Tensor:
    """A matrix of a checkpoint, by way of a weight in a scheme if there is one."""
    layout, made = Layout(), checkpoint.quantized[name]
    layout.add("own", (), [(name, made.shape[0])], made.shape[1])
    weights = Weights(layout, dtype, CPU, {(buffer, ()): scheme for buffer, scheme in schemes.items()})
    reading.read_quantized(name, made, weights)
    return weights.view(name)


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: write(tmp_path_factory.mktemp("model"), 0) for kind, write in KINDS.items()}


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_quantized_weights_have_the_values_of_the_whole(
    kind: str, ranks: int, directories: dict[str, Path]
) -> None:
    whole, spec = checkpoints.loaded(directories[kind]), spec_of(directories[kind])
    for rank in range(ranks):
        weights = Weights(shard_layout(spec, Parallel(rank, ranks)), torch.float32, CPU)
        own = own_parts(checkpoint_of(directories[kind]), weights.layout.cuts)
        load.check_tensors(own, weights)
        load.read_weights(own, weights, own.files)
        for name in weights.names():
            assert torch.equal(weights.view(name), weights.layout.own_part(name, whole.view(name))), (rank, name)


def spec_of(directory: Path) -> DecoderSpec:
    return decoder_spec(model_info.load(ServerConfig(model_path=str(directory))))


READ_WHOLE = {"gptq by activation", "bitsandbytes plain", "bitsandbytes nested", "Int4TilePackedTo4dTensor"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_reads_only_units_around_its_columns(
    kind: str, directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, sizes = "model.layers.0.self_attn.o_proj.weight", []

    def counted(descriptor: int, target: memoryview, offset: int, file: Path) -> None:
        sizes.append(len(target))
        read_exactly(descriptor, target, offset, file)

    whole, layout = checkpoint_of(directories[kind]), shard_layout(spec_of(directories[kind]), Parallel(1, 2))
    own = own_parts(whole, layout.cuts)
    monkeypatch.setattr(reading, "read_exactly", counted)
    read(own, name)
    stored = whole.quantized.get(name) or whole.tensors[name]
    share = 1.0 if kind in READ_WHOLE or kind in ("Q4_K", "Q6_K") else 0.7  # a block of 256 for 128 columns; scales
    assert 0 < sum(sizes) <= share * stored.nbytes


@pytest.mark.skipif(not build.is_possible(), reason="no compiler, or another kind of machine")
@pytest.mark.parametrize(("kind", "columns"), [("packed", (16, 48)), ("packed", (32, 32)), ("Q4_K", (144, 96))])
def test_numbers_of_some_columns_stay_as_they_are_stored(
    kind: str, columns: tuple[int, int], directories: dict[str, Path]
) -> None:
    name = "model.layers.0.self_attn.o_proj.weight"
    whole = checkpoint_of(directories[kind])
    shape = (whole.quantized.get(name) or whole.tensors[name]).shape
    own = own_parts(whole, {name: Cut(shape, 1, (columns,))})
    scheme = own.quantized[name].scheme
    assert scheme is not None and scheme.group_size == (32 if columns[0] % 32 == columns[1] % 32 == 0 else 16)
    kept = read(own, name, torch.bfloat16, own=scheme)
    values = checkpoints.loaded(directories[kind]).view(name).narrow(1, *columns)
    torch.testing.assert_close(kept.float(), values, rtol=1 / 128, atol=2e-3)


@pytest.mark.skipif(not build.is_possible(), reason="no compiler, or another kind of machine")
def test_numbers_of_ranges_that_end_within_a_block_of_rows_are_written_together(directories: dict[str, Path]) -> None:
    name = "model.layers.0.mlp.gate_proj.weight"
    whole = checkpoint_of(directories["packed"])
    cut = Cut((96, 64), 0, ((8, 24), (40, 32), (88, 8)))
    own = own_parts(whole, {name: cut})
    scheme = own.quantized[name].scheme
    assert scheme is not None
    kept = read(own, name, torch.bfloat16, own=scheme)
    values = cut.of(checkpoints.loaded(directories["packed"]).view(name))
    torch.testing.assert_close(kept.float(), values, rtol=1 / 128, atol=2e-3)


@pytest.mark.skipif(not build.is_possible(), reason="no compiler, or another kind of machine")
def test_behind_a_range_that_ended_within_a_block_rows_are_written_as_they_come(
    directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, written = "model.layers.0.mlp.gate_proj.weight", list[int]()
    write = Weights.write

    def counted(weights: Weights, name: str, part: QuantizedRows, *place: Any) -> None:
        written.append(len(part.numbers))
        write(weights, name, part, *place)

    monkeypatch.setattr(Weights, "write", counted)
    monkeypatch.setattr(reading.read_quantized, "__defaults__", (BLOCK_COLUMNS * 64, no_pause))  # a block at once
    cut = Cut((96, 64), 0, ((8, 24), (32, 64)))
    own = own_parts(checkpoint_of(directories["packed"]), {name: cut})
    scheme = own.quantized[name].scheme
    assert scheme is not None
    kept = read(own, name, torch.bfloat16, own=scheme)
    assert written == [*[BLOCK_COLUMNS] * 4, BLOCK_COLUMNS + 8]
    values = cut.of(checkpoints.loaded(directories["packed"]).view(name))
    torch.testing.assert_close(kept.float(), values, rtol=1 / 128, atol=2e-3)


def test_rows_that_are_stored_together_are_not_cut(directories: dict[str, Path]) -> None:
    name = "model.layers.0.mlp.gate_proj.weight"
    with pytest.raises(
        CheckpointError, match=r"4 rows of tensor .*gate_proj.weight from row 4 on, .* stored 8 at a time"
    ):
        own_parts(checkpoint_of(directories["awq"]), {name: Cut((96, 64), 0, ((4, 4),))})
    query = "model.layers.0.self_attn.q_proj.weight"  # its rows are permuted within each head
    with pytest.raises(
        CheckpointError, match=r"8 rows of tensor .*q_proj.weight from row 8 on, .* stored 16 at a time"
    ):
        own_parts(checkpoint_of(directories["Q8_0"]), {query: Cut((64, 64), 0, ((8, 8),))})
