"""Linear layers: every route gives the product, and the packed one the same bits in any batch."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from quartet.kernels.cpu import linear as module
from quartet.kernels.cpu.linear import Linear, can_pack, multiply, row_size

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def packed(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Linear:
    layer = Linear(weight, bias)
    layer.adopt(layer.pack(weight))
    return layer


def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return (torch.randn(*shape) * shape[-1] ** -0.5).to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("rows", [0, 1, 2, 7, 64])
@pytest.mark.parametrize("with_bias", [False, True])
def test_product_is_that_of_f_linear(dtype: torch.dtype, rows: int, with_bias: bool) -> None:
    weight = random(96, 2048, dtype=dtype)
    bias = random(96, dtype=dtype) if with_bias else None
    x = torch.randn(rows, 2048).to(dtype)
    found = packed(weight, bias)(x)
    assert found.dtype is dtype and found.shape == (rows, 96)
    assert torch.allclose(found, F.linear(x, weight, bias), atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [64, 896, 2048, 4096])
def test_a_row_has_the_same_bits_whatever_rows_are_beside_it(dtype: torch.dtype, columns: int) -> None:
    if not can_pack(dtype):
        pytest.skip("this CPU multiplies no packed weights of this dtype")
    layer = packed(random(320, columns, dtype=dtype))
    x = torch.randn(130, columns).to(dtype)
    most = 32 if adds_up_otherwise_among_many(dtype) else 130
    together = layer(x[:most])
    for rows in (1, 2, 3, 5, 8, 16, 17, 31, 64, 129):
        if rows < most:
            assert torch.equal(layer(x[:rows]), together[:rows]), rows


def adds_up_otherwise_among_many(dtype: torch.dtype) -> bool:
    """bfloat16 with AMX, whose products are the same for up to 32 rows only."""
    return dtype is torch.bfloat16 and torch.cpu._is_amx_tile_supported()


def test_rows_need_not_be_contiguous() -> None:
    layer = packed(random(32, 64, dtype=torch.float32))
    x = torch.randn(10, 128)
    assert torch.equal(layer(x[::2, 64:]), layer(x[::2, 64:].contiguous()))


def test_new_values_count_from_adopt_on() -> None:
    weight = random(32, 64, dtype=torch.float32)
    layer = packed(weight)
    x = torch.randn(4, 64)
    form = layer.pack(weight * 2)
    before = layer(x)
    layer.adopt(form)
    assert torch.allclose(layer(x), before * 2, atol=1e-5)


def test_a_layer_that_was_never_packed_uses_its_weight() -> None:
    weight = random(32, 64, dtype=torch.float32)
    x = torch.randn(4, 64)
    assert torch.equal(Linear(weight)(x), F.linear(x, weight))


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("rows", [1, 2, 64])
def test_gelu_on_the_way_out_is_gelu_of_the_product(dtype: torch.dtype, rows: int) -> None:
    weight, bias = random(96, 256, dtype=dtype), random(96, dtype=dtype)
    x = torch.randn(rows, 256).to(dtype)
    expected = F.gelu(F.linear(x, weight, bias))
    for layer in (packed(weight, bias), Linear(weight, bias)):
        assert torch.allclose(layer(x, gelu=True), expected, atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("rows", [1, 5])
def test_what_is_written_elsewhere_is_the_product_widened(
    dtype: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK_FEATURES", 32)
    layer = packed(random(80, 64, dtype=dtype), random(80, dtype=dtype))  # three blocks where it is packed
    x = torch.randn(rows, 64).to(dtype)
    out = torch.full((rows, 80), torch.nan)
    layer.write(x, out)
    assert torch.equal(out.to(dtype), layer(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(60, 2048), (1, 64), (8, 64), (320, 64), (96, 48), (1152, 896), (896, 4864)])
def test_a_layer_that_keeps_order_gives_a_row_the_same_bits_in_any_company(shape, dtype):
    layer = Linear(torch.randn(shape).to(dtype))
    layer.adopt(layer.pack(layer.weight))
    layer.keep_order()
    x = torch.randn(130, shape[1]).to(dtype)
    whole = layer(x)
    for rows in (*range(1, 40), 63, 64, 65, 99, 129):
        assert torch.equal(layer(x[1 : 1 + rows]), whole[1 : 1 + rows]), rows


@pytest.mark.parametrize("counts", [(1,), (2,), (1, 2, 3), (2, 3, 8)])
def test_a_layer_that_keeps_order_multiplies_only_numbers_of_rows_that_the_probe_has_found(counts, monkeypatch):
    multiplied = []

    def multiply(x, *more):
        multiplied.append(len(x))
        return real(x, *more)

    real = module.multiply
    monkeypatch.setattr(module, "counts_in_order", lambda *_: counts)
    monkeypatch.setattr(module, "multiply", multiply)
    layer = packed(random(40, 64, dtype=torch.float32), random(40, dtype=torch.float32))
    layer.keep_order()
    multiplied.clear()
    x = torch.randn(23, 64)
    for rows in (1, 2, 4, 8, 9, 23):
        assert torch.allclose(layer(x[:rows]), F.linear(x[:rows], layer.weight, layer.bias), atol=1e-5)
    assert set(multiplied) <= set(counts)


def test_blocks_of_a_weight_that_agree_on_no_number_are_multiplied_row_by_row(monkeypatch):
    monkeypatch.setattr(module, "BLOCK_FEATURES", 32)
    monkeypatch.setattr(module, "counts_in_order", lambda height, *_: (1,) if height == 32 else (2, 4))
    layer = packed(random(40, 64, dtype=torch.float32))
    layer.keep_order()
    assert layer.sizes(3) == [1, 1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_probe_sees_rows_that_are_added_up_in_another_order(dtype, monkeypatch):
    if not can_pack(dtype):
        pytest.skip("this CPU multiplies no packed weights of this dtype")

    def multiply(x, packed, bias, gelu=False):
        for whole in real(x, packed, bias, gelu):
            halves = [torch.where(torch.arange(600) < 300, x, 0), torch.where(torch.arange(600) < 300, 0, x)]
            split = sum(next(real(half, packed, bias)) for half in halves)
            yield torch.cat([whole[:12], split[12:]]) if len(x) < 20 else split

    real = module.multiply
    monkeypatch.setattr(module, "multiply", multiply)
    counts = module.counts_in_order.__wrapped__(64, 600, dtype, True, torch.get_num_threads())
    assert set(counts) <= {1, 2, 3, 4, 6, 8, 12} and max(counts) == 12


def test_products_of_all_numbers_of_rows_are_computed_with_a_few_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: set[int] = set()

    def noting(x: torch.Tensor, *rest: object) -> Iterator[torch.Tensor]:
        sizes.add(len(x))
        return multiply(x, *rest)

    layer = packed(random(8, 16, dtype=torch.float32))
    x = torch.randn(1024, 16)
    monkeypatch.setattr(module, "multiply", noting)
    for rows in range(1, 1025):
        assert len(layer(x[:rows])) == rows
    assert len(sizes) <= 64


@pytest.mark.parametrize("rows", [0, 1, 8, 16, 512])
def test_full_steps_and_small_batches_are_filled_with_nothing(rows: int) -> None:
    assert row_size(rows) == rows


def test_rows_that_fill_a_product_up_are_an_eighth_at_most() -> None:
    assert all(rows <= row_size(rows) <= rows * 9 / 8 for rows in range(1, 5000))
