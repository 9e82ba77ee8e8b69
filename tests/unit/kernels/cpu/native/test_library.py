"""The CPU kernels against plain torch, on every instruction set that this machine has."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from quartet.kernels.cpu.linear import no_pause
from quartet.kernels.cpu.native import build, library
from quartet.kernels.cpu.native.library import INSTRUCTION_SETS, Library
from quartet.kernels.reference import layers as reference

pytestmark = pytest.mark.skipif(not build.is_possible(), reason="no compiler, or another kind of machine")

SHAPES = [(96, 64), (100, 70), (1, 64), (1152, 896), (48, 4864)]  # of weights: (n, k)
ROWS = [1, 2, 3, 4, 5, 8, 15, 16, 17, 31, 33, 65, 257]


@pytest.fixture(params=INSTRUCTION_SETS)
def kernels(request):
    try:
        return Library(library.functions(request.param), request.param)
    except LookupError:
        pytest.skip(f"this machine has no {request.param}")


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).bfloat16()


def weight_of(n: int, k: int) -> torch.Tensor:
    return (torch.randn(n, k) * k**-0.5).bfloat16()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_product_is_that_of_torch_summed_in_float32(kernels, shape):
    n, k = shape
    weight, bias = weight_of(n, k), random(n)
    packed = kernels.pack(weight, no_pause)
    for rows in ROWS:
        x = random(rows, k)
        expected = F.linear(x.double(), weight.double(), bias.double())
        out = torch.full((rows, n), torch.nan)
        kernels.product(x, packed, n, bias, out, "float")
        torch.testing.assert_close(out.double(), expected, atol=2e-5, rtol=1e-5)
        rounded = torch.full((rows, n), torch.nan, dtype=torch.bfloat16)
        kernels.product(x, packed, n, bias, rounded, "bf16")
        assert torch.equal(rounded, out.bfloat16()), rows


@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_has_the_same_bits_whatever_rows_are_beside_it(kernels, shape):
    n, k = shape
    packed = kernels.pack(weight_of(n, k), no_pause)
    x = random(300, k)
    whole, some = torch.empty(300, n), torch.empty(300, n)
    kernels.product(x, packed, n, None, whole, "float")
    for rows in ROWS:
        kernels.product(x[7 : 7 + rows], packed, n, None, some[:rows], "float")
        assert torch.equal(some[:rows], whole[7 : 7 + rows]), rows


@pytest.mark.parametrize("rows", [1, 4, 40])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_the_norm_before_a_product_is_that_of_torch(kernels, rows, offset):
    x, norm, weight = random(rows, 200) * 3, random(200), torch.eye(200).bfloat16()
    function = reference.rms_norm_plus_one if offset else reference.rms_norm
    out = torch.empty_like(x)
    kernels.product(x, kernels.pack(weight, no_pause), 200, None, out, "bf16", norm=(norm, 1e-5, offset))
    torch.testing.assert_close(out, function(x, norm, 1e-5), atol=0, rtol=2**-7)  # one unit in the last place


@pytest.mark.parametrize("rows", [1, 4, 40])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_a_gated_product_is_activation_of_one_half_times_the_other(kernels, rows, activation):
    x, weight, bias = random(rows, 64), weight_of(96, 64), random(96)
    gate, up = F.linear(x.double(), weight.double(), bias.double()).chunk(2, 1)
    expected = up * (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh"))
    out = torch.empty(rows, 48, dtype=torch.bfloat16)
    kernels.product(x, kernels.pack(weight, no_pause), 96, bias, out, "gated", activation)
    torch.testing.assert_close(out.double(), expected, atol=1e-4, rtol=2**-8)


@pytest.mark.parametrize("rows", [1, 4, 40])
def test_a_product_is_added_to_what_was_there_and_to_nothing_beside_it(kernels, rows):
    x, weight = random(rows, 64), weight_of(40, 64)
    room = random(rows, 60)
    before = room.clone()
    kernels.product(x, kernels.pack(weight, no_pause), 40, None, room[:, 10:50], "add")
    expected = before[:, 10:50].double() + F.linear(x.double(), weight.double())
    torch.testing.assert_close(room[:, 10:50].double(), expected, atol=1e-4, rtol=2**-8)
    assert torch.equal(room[:, :10], before[:, :10]) and torch.equal(room[:, 50:], before[:, 50:])


def test_numbers_that_are_none_stay_in_their_row(kernels):
    x, weight = random(5, 64), weight_of(64, 64)
    x[3, 1] = torch.nan
    packed = kernels.pack(weight, no_pause)
    for output, columns in (("bf16", 64), ("gated", 32)):
        out = torch.empty(5, columns, dtype=torch.bfloat16)
        kernels.product(x, packed, 64, None, out, output)
        assert out[3].isnan().all() and out[[0, 1, 2, 4]].isfinite().all()


@pytest.mark.parametrize("rows", [1, 3, 7, 70])
def test_the_result_does_not_depend_on_the_number_of_threads(kernels, rows):
    """More threads than rows, too, which divide the numbers of a row and its norm."""
    x, packed, weight = random(rows, 896), kernels.pack(weight_of(320, 896), no_pause), torch.rand(896).bfloat16()
    threads = (1, 2, 3, 5, 11)
    results = [torch.full((rows, 320), torch.nan) for _ in threads]
    before = torch.get_num_threads()
    try:
        for count, out in zip(threads, results, strict=True):
            torch.set_num_threads(count)
            kernels.product(x, packed, 320, None, out, "float", norm=(weight, 1e-6, 0.0))
    finally:
        torch.set_num_threads(before)
    assert results[0].isfinite().all() and all(torch.equal(out, results[0]) for out in results)


@pytest.mark.parametrize(("dim", "rotary"), [(64, 64), (96, 32), (128, 128), (256, 64), (512, 512)])
@pytest.mark.parametrize("normed", [False, True])
def test_heads_are_normed_and_rotated_and_keys_and_values_written_to_their_places(kernels, dim, rotary, normed):
    tokens, heads, kv_heads = 7, 6, 2
    qkv = random(tokens, (heads + 2 * kv_heads) * dim)
    cos, sin = reference.rotation(torch.arange(tokens) * 90, torch.rand(rotary // 2), 1.0, torch.bfloat16)
    slots = torch.tensor([3, 9, 0, 11, 5, 6, 7])
    keys, values = random(kv_heads, 12, dim), random(kv_heads, 12, dim)
    before, q = keys.clone(), torch.empty(tokens, heads, dim).bfloat16()
    norms = [(random(dim), 1e-6, 1.0) for _ in range(2)] if normed else [None, None]
    kernels.rotate(qkv, *norms, cos, sin, slots, keys, values, q)
    parts = list(qkv.float().view(tokens, -1, dim).split((heads, kv_heads, kv_heads), 1))
    for place, norm in enumerate(norms):
        if norm:
            parts[place] = reference.rms_norm_plus_one(parts[place], norm[0], norm[1])
        parts[place] = reference.rotate(parts[place], cos.float(), sin.float())
    torch.testing.assert_close(q.float(), parts[0], atol=1e-5, rtol=2**-8)
    torch.testing.assert_close(keys[:, slots].transpose(0, 1).float(), parts[1], atol=1e-5, rtol=2**-8)
    assert torch.equal(values[:, slots].transpose(0, 1).float(), parts[2])
    others = [1, 2, 4, 8, 10]
    assert torch.equal(keys[:, others], before[:, others])


@pytest.mark.parametrize("from_keys", [False, True])
def test_values_are_normed_and_may_be_made_of_keys(kernels, from_keys):
    tokens, heads, kv_heads, dim = 5, 4, 2, 64
    qkv = random(tokens, (heads + (1 if from_keys else 2) * kv_heads) * dim)
    cos, sin = reference.rotation(torch.arange(tokens) * 9, torch.rand(dim // 2), 1.0, torch.bfloat16)
    slots, q = torch.arange(tokens), torch.empty(tokens, heads, dim).bfloat16()
    keys, values = random(kv_heads, tokens, dim), random(kv_heads, tokens, dim)
    norms = [(random(dim), 1e-6, 0.0) for _ in range(3)]
    kernels.rotate(qkv, *norms[:2], cos, sin, slots, keys, values, q, norms[2], from_keys)
    raw = qkv.float().view(tokens, -1, dim)[:, -kv_heads:]
    expected = reference.rms_norm(raw, norms[2][0].float(), 1e-6)
    torch.testing.assert_close(values.transpose(0, 1).float(), expected, atol=1e-5, rtol=2**-8)
    own = qkv.float().view(tokens, -1, dim)[:, heads : heads + kv_heads]
    turned = reference.rotate(reference.rms_norm(own, norms[1][0].float(), 1e-6), cos.float(), sin.float())
    torch.testing.assert_close(keys.transpose(0, 1).float(), turned, atol=1e-5, rtol=2**-8)


def test_queries_alone_are_rotated_where_there_are_no_heads_of_keys(kernels):
    tokens, heads, dim = 3, 4, 64
    x, slots, nothing = random(tokens, heads * dim), torch.arange(tokens), torch.empty(0, 0, dim).bfloat16()
    cos, sin = reference.rotation(torch.arange(tokens) * 9, torch.rand(dim // 2), 1.0, torch.bfloat16)
    q = torch.empty(tokens, heads, dim).bfloat16()
    kernels.rotate(x, None, None, cos, sin, slots, nothing, nothing, q)
    expected = reference.rotate(x.float().view(tokens, heads, dim), cos.float(), sin.float())
    torch.testing.assert_close(q.float(), expected, atol=1e-5, rtol=2**-8)


def test_a_product_of_no_rows_is_nothing(kernels):
    packed = kernels.pack(weight_of(32, 64), no_pause)
    kernels.product(random(0, 64), packed, 32, None, torch.empty(0, 32), "float")


def test_shapes_that_do_not_belong_together_are_refused(kernels):
    packed, out = kernels.pack(weight_of(32, 64), no_pause), torch.empty(2, 32)
    with pytest.raises(AssertionError):
        kernels.product(random(2, 96), packed, 32, None, out, "float")
    with pytest.raises(AssertionError):
        kernels.product(random(2, 64), packed, 48, None, out, "float")
    with pytest.raises(AssertionError):
        kernels.product(random(2, 64), packed, 32, random(31), out, "float")
    with pytest.raises(AssertionError):
        kernels.product(random(2, 64), packed, 32, None, out.bfloat16(), "float")


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "amx"),
        ({"QUARTET_CPU_ISA": "avx2"}, "avx2"),
        ({"QUARTET_CPU_ISA": "none"}, "none"),
        ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}, "avx512"),
        ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"}, "avx512_vnni"),
        ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, "avx512_bf16"),
        ({"ONEDNN_MAX_CPU_ISA": "avx2", "QUARTET_CPU_ISA": "amx"}, "avx2"),
        ({"ONEDNN_MAX_CPU_ISA": "SSE41"}, "none"),
        ({"ONEDNN_MAX_CPU_ISA": "ALL"}, "amx"),
    ],
)
def test_the_environment_limits_the_instruction_set(variables, expected, monkeypatch):
    for name in ("QUARTET_CPU_ISA", "ONEDNN_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert library.highest_wanted() == expected


def test_an_instruction_set_that_does_not_exist_is_refused(monkeypatch):
    monkeypatch.setenv("QUARTET_CPU_ISA", "avx3")
    with pytest.raises(ValueError, match="QUARTET_CPU_ISA is avx3"):
        library.candidates()


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="there is one CPU")
def test_the_other_threads_stay_off_the_cpu_of_the_caller():
    code = """
import os, torch
from quartet.kernels.cpu.native import library
kernels, allowed = library.library(), os.sched_getaffinity(0)
threads = lambda: {int(name) for name in os.listdir("/proc/self/task")}
torch.set_num_threads(len(allowed))
x, weight = torch.randn(4, 64).bfloat16(), torch.randn(320, 64).bfloat16()
before = threads()
kernels.product(x, kernels.pack(weight, lambda: None), 320, None, torch.empty(4, 320), "float")
masks = [os.sched_getaffinity(thread) for thread in threads() - before]
assert len(masks) == min(len(allowed), 64) - 1, masks
assert all(mask < allowed for mask in masks), masks
if len(allowed) <= 64:
    assert len(set().union(*masks)) == len(masks) and all(len(mask) == 1 for mask in masks), masks
assert os.sched_getaffinity(0) == allowed
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_child_process_of_a_fork_can_compute_too():
    code = """
import os, torch
from quartet.kernels.cpu.linear import Linear
torch.set_num_threads(2)
layer = Linear(torch.randn(64, 64).bfloat16())
layer.adopt(layer.pack(layer.weight))
x = torch.randn(3, 64).bfloat16()
expected = layer(x)
child = os.fork()
if not child:
    os._exit(not torch.equal(layer(x), expected))
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
