"""A feed-forward block whose second product reads the first one's result in tiles."""

import ctypes

import pytest
import torch

from quartet.kernels.cpu.native.library import OUTPUTS, ROWS_OF_TILES, Library, library, padded
from quartet.kernels.cpu.native.structures import Product

HIDDEN, INNER = 96, 1504  # the second is longer than one piece of k

pytestmark = pytest.mark.skipif(
    getattr(library(), "instruction_set", "") != "amx", reason="products take tiles with AMX only"
)


def run(
    kernels: Library, x: torch.Tensor, rows: int, weight: torch.Tensor, output: str, out: torch.Tensor, **tiles: int
):
    n, k = weight.shape
    packed = kernels.pack(weight, lambda: None)
    product = Product(rows=rows, x=x.data_ptr(), x_stride=k, packed=packed.data_ptr(), n=n, k=k, threads=2)
    product.output, product.out, product.out_stride = OUTPUTS[output], out.data_ptr(), out.shape[1]
    for name, value in tiles.items():
        setattr(product, name, value)
    assert kernels.functions.quartet_product(kernels.kernels, ctypes.byref(product)) == 0


@pytest.mark.parametrize("rows", [5, 16, 17, 40, 64, 65, 100, 672, 1300])
def test_the_bits_are_those_of_a_result_in_rows(rows):
    kernels = library()
    torch.manual_seed(rows)
    x = torch.randn(rows, HIDDEN).bfloat16()
    gate_up = torch.randn(2 * INNER, HIDDEN).bfloat16() * 0.1
    down = torch.randn(HIDDEN, INNER).bfloat16() * 0.1
    before = torch.randn(rows, HIDDEN).bfloat16()
    results = []
    for in_tiles in (0, 1):
        inner = torch.full((padded(rows, ROWS_OF_TILES), INNER), torch.nan, dtype=torch.bfloat16)
        out = before.clone()
        run(kernels, x, rows, gate_up, "gated", inner, out_tiles=in_tiles)
        run(kernels, inner, rows, down, "add", out, x_tiles=in_tiles)
        results.append(out)
    assert torch.isfinite(results[0]).all()
    assert torch.equal(*results)
    assert (
        torch.nn.functional.cosine_similarity(results[0].float() - before.float(), mlp(x, gate_up, down)).min() > 0.999
    )


def mlp(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    gate, up = (x.float() @ gate_up.float().T).chunk(2, dim=1)
    return (torch.nn.functional.silu(gate) * up) @ down.float().T
