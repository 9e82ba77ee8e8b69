"""What the device can do at best: the figures that all others are divided by."""

from functools import partial

import torch

from deploy.benchmarks.gpu.setting import Setting
from deploy.benchmarks.gpu.timing import seconds, seconds_of_each
from quartet.kernels.ops import resolve

GB = 1 << 30


def run(setting: Setting) -> None:
    bandwidth(setting)
    products(setting)
    launches(setting)
    for shape in ((1152, 896), (896, 4864), (9728, 896), (57344, 4096)):
        streaming(setting, *shape)


def bandwidth(setting: Setting) -> None:
    report, device = setting.report, setting.device
    size = setting.size(4 * GB, 1 << 22)
    source = torch.empty(size // 4, dtype=torch.float32, device=device).normal_()
    target = torch.empty_like(source)
    copied = 2 * size / seconds(lambda: target.copy_(source), device)
    report.figure("copy bandwidth", copied / 1e9, "GB/s")
    read = size / seconds(source.sum, device)
    report.figure("read bandwidth (torch.sum)", read / 1e9, "GB/s")
    report.put(bytes_per_s=max(read, copied))


def products(setting: Setting) -> None:
    report, device = setting.report, setting.device
    side = setting.size(8192, 256)
    a, b = (torch.randn(side, side, device=device).to(torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    flops = 2 * side**3 / seconds(lambda: torch.mm(a, b, out=out), device)
    report.figure(f"GEMM {side} bf16", flops / 1e12, "TFLOP/s")
    report.put(flops_per_s=flops)


def launches(setting: Setting) -> None:
    """The cost of a node in a recorded step: a kernel with next to nothing to do."""
    report, device = setting.report, setting.device
    x = torch.randn(1, 896, device=device).to(torch.bfloat16)
    weight, out = torch.ones(896, device=device, dtype=torch.bfloat16), torch.empty_like(x)
    norm = partial(resolve(device.type).rms_norm, x, weight, 1e-6, False, out)
    taken = seconds_of_each([norm], device, setting.size(200, 2))
    report.figure("one small kernel in a graph", taken * 1e6, "us")


def streaming(setting: Setting, rows: int, columns: int) -> None:
    """One row with a matrix: how close to the bandwidth our own product comes."""
    report, device = setting.report, setting.device
    rows = setting.size(rows, 64)
    matrix_bytes = 2 * rows * columns
    copies = setting.size(max(2, (256 << 20) // matrix_bytes), 2)  # more than the caches hold
    x = torch.randn(1, columns, device=device).to(torch.bfloat16)
    matrices = [torch.randn(rows, columns, device=device).to(torch.bfloat16) for _ in range(copies)]
    out = torch.empty(1, rows, dtype=torch.bfloat16, device=device)
    gemv = resolve(device.type).gemv
    taken = seconds_of_each(
        [partial(gemv, x, matrix, None, None, out) for matrix in matrices], device, setting.size(4, 1)
    )
    best = matrix_bytes / setting.limits.bytes_per_s
    report.figure(f"gemv {rows}x{columns}, one row, {matrix_bytes / 1e6:.0f} MB", taken * 1e6, "us", best * 1e6)
