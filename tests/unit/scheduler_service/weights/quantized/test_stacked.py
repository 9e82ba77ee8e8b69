"""Tensors that hold all experts of a layer become one each, whichever way their matrices lie."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quartet.scheduler_service.weights import load
from quartet.scheduler_service.weights.checkpoint import CheckpointError
from quartet.scheduler_service.weights.formats import checkpoint_of
from quartet.scheduler_service.weights.parameters import Layout, Weights

EXPERTS, SIZE, HIDDEN = 3, 8, 12
BLOCK = "model.layers.0.mlp"


def served(directory: Path, gate_up: torch.Tensor, down: torch.Tensor, names: tuple[str, str]) -> Weights:
    """The weights of one layer's experts, read from a checkpoint that has them under these names."""
    (directory / "config.json").write_text("{}")
    pairs = zip(names, (gate_up, down), strict=True)
    save_file({f"{BLOCK}.{name}": tensor.contiguous() for name, tensor in pairs}, directory / "model.safetensors")
    layout = Layout()
    for expert in range(EXPERTS):
        inside = f"{BLOCK}.experts.{expert}"
        both = [(f"{inside}.{name}_proj.weight", SIZE) for name in ("gate", "up")]
        layout.add("expert_gate_up", (0, expert), both, HIDDEN)
        layout.add("expert_down", (0, expert), [(f"{inside}.down_proj.weight", HIDDEN)], SIZE)
    weights = Weights(layout, torch.float32, torch.device("cpu"))
    checkpoint = checkpoint_of(directory)
    load.check_tensors(checkpoint, weights)
    load.read_weights(checkpoint, weights, checkpoint.files)
    return weights


@pytest.mark.parametrize("columns_first", [False, True])
@pytest.mark.parametrize(
    "names", [("experts.gate_up_proj", "experts.down_proj"), ("input_linear.weight", "output_linear.weight")]
)
def test_each_expert_gets_its_matrices(columns_first: bool, names: tuple[str, str], tmp_path: Path) -> None:
    gate_up, down = torch.randn(EXPERTS, 2 * SIZE, HIDDEN), torch.randn(EXPERTS, HIDDEN, SIZE)
    stored = (gate_up.mT, down.mT) if columns_first else (gate_up, down)
    weights = served(tmp_path, *stored, names)
    for expert in range(EXPERTS):
        assert torch.equal(weights.slab("expert_gate_up", 0, expert), gate_up[expert])
        assert torch.equal(weights.slab("expert_down", 0, expert), down[expert])


def test_matrices_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    gate_up, down = torch.randn(EXPERTS, 2 * SIZE, HIDDEN), torch.randn(EXPERTS, HIDDEN, SIZE + 1)
    with pytest.raises(CheckpointError, match="which do not belong together"):
        served(tmp_path, gate_up, down, ("experts.gate_up_proj", "experts.down_proj"))
