"""Single operations at the shapes of served models, beside what torch has for them."""

from functools import partial

import torch
import torch.nn.functional as F

from deploy.benchmarks.gpu.setting import Setting
from deploy.benchmarks.gpu.timing import seconds_of_each
from quartet.kernels.cpu.linear import Linear
from quartet.kernels.operations import Ops
from quartet.kernels.ops import Implementation, resolve
from quartet.scheduler_service.model.products import Products, Workspace

HALF = torch.bfloat16
MATRICES = {
    "0.5B gate/up": (9728, 896),
    "0.5B head": (151936, 896),
    "8B QKV": (6144, 4096),
    "8B gate/up": (28672, 4096),
}
PAGE = 16
CACHE_BYTES = 256 << 20  # several times what stays on the chip


def run(setting: Setting) -> None:
    with torch.inference_mode():
        products(setting)
        decode_attention(setting)
        extend_attention(setting)


def own_ops(setting: Setting) -> Ops:
    return resolve(setting.device.type)


def products(setting: Setting) -> None:
    """A few rows with a matrix: ours and cuBLAS, against the time to read the matrix."""
    for name, (rows, columns) in MATRICES.items():
        rows, columns = setting.size(rows, 128), setting.size(columns, 64)
        copies = setting.size(max(2, CACHE_BYTES // (2 * rows * columns)), 2)
        layers = [layer(rows, columns, setting.device) for _ in range(copies)]
        product = Products(own_ops(setting), Workspace(implementation(setting), setting.device))
        product.reserve(layers[0])
        best = 2 * rows * columns / setting.limits.bytes_per_s
        for tokens in (1, 4, 8, 16, 32, 64):
            x = torch.randn(tokens, columns, device=setting.device).to(HALF)
            ours = [partial(product, x, each) for each in layers]
            cublas = [partial(F.linear, x, each.weight) for each in layers]
            taken, theirs = (seconds_of_each(calls, setting.device, setting.size(4, 1)) for calls in (ours, cublas))
            line = f"{name} {rows}x{columns}, {tokens} rows"
            setting.report.figure(line, taken * 1e6, "us", best * 1e6, note=f"cuBLAS {theirs * 1e6:.1f}")


def implementation(setting: Setting) -> Implementation:
    return "torch" if setting.device.type == "cpu" else "triton"


def layer(rows: int, columns: int, device: torch.device) -> Linear:
    return Linear((torch.randn(rows, columns, device=device) * columns**-0.5).to(HALF))


def paged(setting: Setting, sequences: int, context: int, kv_heads: int, dim: int) -> tuple[torch.Tensor, ...]:
    """Pools and a table whose pages are scattered."""
    size, device = PAGE, setting.device
    pages = -(-context // size)
    count = sequences * pages + 1
    pools = [torch.randn(kv_heads, count * size, dim, device=device).to(HALF) for _ in range(2)]
    table = (torch.randperm(count - 1) + 1).view(sequences, pages).to(torch.int32).to(device)
    return (*pools, table)


def decode_attention(setting: Setting) -> None:
    for name, sequences, context, heads, kv_heads, dim in (
        ("8B", 1, 1024, 32, 8, 128),
        ("8B", 64, 1024, 32, 8, 128),
        ("8B", 64, 4096, 32, 8, 128),
        ("0.5B", 256, 1024, 14, 2, 64),
    ):
        goal = 1 / 0.8 if context == 4096 else None
        decode(setting, name, setting.size(sequences, 2), setting.size(context, 40), (heads, kv_heads, dim), goal)


def decode(
    setting: Setting, name: str, sequences: int, context: int, shape: tuple[int, int, int], goal: float | None
) -> None:
    """One query a sequence over its paged context, against the time to read that context."""
    device, (heads, kv_heads, dim) = setting.device, shape
    workspace = Workspace(implementation(setting), device)
    workspace.reserve(sequences * kv_heads)
    partials = workspace.partials(workspace.decode(sequences, heads, kv_heads, dim, context))
    q = torch.randn(sequences, heads, dim, device=device).to(HALF)
    lengths = torch.full((sequences,), context, dtype=torch.int32, device=device)
    rest = (
        None,
        lengths,
        PAGE,
        context,
        dim**-0.5,
        None,
        None,
        None,
        partials,
        workspace.counters,
        torch.empty_like(q),
    )
    attend = own_ops(setting).paged_decode
    calls = [partial(attend, q, *paged(setting, sequences, context, kv_heads, dim), *rest) for _ in range(2)]
    taken = seconds_of_each(calls, device, setting.size(10, 1))
    best_us = 2 * 2 * sequences * context * kv_heads * dim / setting.limits.bytes_per_s * 1e6
    line = f"decode attention {name}, {sequences} x {context} keys"
    setting.report.figure(line, taken * 1e6, "us", best_us, goal and goal * best_us)


def extend_attention(setting: Setting) -> None:
    for tokens in (1024, 4096, 16384):
        extend(setting, setting.size(tokens, 48), heads=32, kv_heads=8, dim=128)


def extend(setting: Setting, tokens: int, heads: int, kv_heads: int, dim: int) -> None:
    """A prompt over its own paged keys, beside torch's attention over plain tensors."""
    device = setting.device
    k, v, table = paged(setting, 1, tokens, kv_heads, dim)
    q = torch.randn(tokens, heads, dim, device=device).to(HALF)
    starts = torch.tensor([0, tokens], dtype=torch.int32, device=device)
    rest = (PAGE, tokens, dim**-0.5, None, None, True, None, torch.empty_like(q))
    own = partial(own_ops(setting).paged_extend, q, k, v, table, None, starts, starts[1:].clone(), *rest)
    keys, values = (x[:, PAGE : PAGE + tokens].unsqueeze(0) for x in (k, v))
    options = {"is_causal": True, "enable_gqa": True}
    peer = partial(F.scaled_dot_product_attention, q.transpose(0, 1).unsqueeze(0), keys, values, **options)
    ours, theirs = (seconds_of_each([call], device, 2) for call in (own, peer))
    flops = 2 * heads * dim * tokens * tokens  # half of all pairs, two products
    line, best = f"extend attention 8B, {tokens} tokens", setting.limits.flops_per_s / 1e12
    note = f"SDPA {flops / theirs / 1e12:.0f}"
    setting.report.figure(line, flops / ours / 1e12, "TFLOP/s", best, note=note)
