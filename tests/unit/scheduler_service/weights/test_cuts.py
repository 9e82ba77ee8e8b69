"""A rank's part of matrices that lie in one tensor with others is read by itself, or refused by name."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quartet.scheduler_service.weights import load
from quartet.scheduler_service.weights.checkpoint import Checkpoint, CheckpointError
from quartet.scheduler_service.weights.cuts import Cut, own_parts
from quartet.scheduler_service.weights.formats import checkpoint_of
from quartet.scheduler_service.weights.parameters import Layout, Weights
from quartet.scheduler_service.weights.tensor_io import open_file, read_chunks

SIZE, HIDDEN = 8, 12
INSIDE = "model.layers.0.experts"


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


def test_matrices_whose_columns_come_first_are_refused(tmp_path: Path) -> None:
    gate_up, down = torch.randn(3, HIDDEN, 2 * SIZE), torch.randn(3, SIZE, HIDDEN)
    checkpoint = checkpoint_of(stacked(tmp_path, gate_up, down))
    with pytest.raises(CheckpointError, match="all experts of a layer in one tensor, columns first"):
        own_parts(checkpoint, cuts(0))
