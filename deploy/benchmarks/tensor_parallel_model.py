"""What tensor parallelism gives, computed from bytes and bandwidths.

    python -m deploy.benchmarks.tensor_parallel_model

A decode step reads all weights and the KV of every request once, and sums the residual stream over the ranks twice a
layer, once for the embeddings, and gathers the logits. Nothing overlaps here, no kernel is measured: the figures are
bounds from the data sheets, to choose a size by, not promises.
"""

import argparse
from dataclasses import dataclass

BYTES = 2  # of a bfloat16 number
REACHED = 0.8  # share of the memory bandwidth that good kernels reach
SMALL_SUM_S = 8e-6  # latency of an all-reduce of few bytes over NVLink among up to 8 GPUs


@dataclass(frozen=True)
class Model:
    """Sizes from config.json."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    @property
    def layer_weights(self) -> int:
        """Numbers of one layer."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate


@dataclass(frozen=True)
class Device:
    """Figures of the data sheet."""

    name: str
    memory_bytes: float
    bandwidth: float  # of its memory, bytes per second
    flops: float  # dense bfloat16
    link: float  # NVLink in one direction, bytes per second


@dataclass(frozen=True)
class StepTime:
    """One decode step of one rank, in seconds, and the bytes that it holds."""

    weights_s: float
    kv_s: float
    compute_s: float
    sums_s: float
    sums: int
    weight_bytes: float
    fits: bool

    @property
    def total_s(self) -> float:
        return max(self.weights_s + self.kv_s, self.compute_s) + self.sums_s


MODELS = (
    Model("Llama-3.1-8B", 32, 4096, 14336, 32, 8, 128, 128256),
    Model("Llama-3.1-70B", 80, 8192, 28672, 64, 8, 128, 128256),
)
DEVICES = (
    Device("H100 SXM", 80e9, 3.35e12, 989e12, 450e9),
    Device("H200 SXM", 141e9, 4.8e12, 989e12, 450e9),
)


def sum_seconds(nbytes: float, ranks: int, device: Device) -> float:
    """A ring all-reduce: each rank sends 2 (N - 1) / N of the bytes."""
    if ranks == 1:
        return 0.0
    return SMALL_SUM_S + 2 * (ranks - 1) / ranks * nbytes / device.link


def step_time(model: Model, device: Device, ranks: int, rows: int, context: int) -> StepTime:
    """A decode step of `rows` requests, each with `context` tokens in the KV pool."""
    head = model.vocabulary * model.hidden
    read = (model.layers * model.layer_weights + head) * BYTES / ranks
    held = (model.layers * model.layer_weights + 2 * head) * BYTES / ranks
    kv_heads = max(1.0, model.kv_heads / ranks)  # ranks share a head where there are fewer
    kv = rows * context * model.layers * 2 * kv_heads * model.head_dim * BYTES
    sums = 2 * model.layers + 1 if ranks > 1 else 0
    sums_s = sums * sum_seconds(rows * model.hidden * BYTES, ranks, device)
    gathered = rows * model.vocabulary * 4 * (ranks - 1) / ranks
    gather_s = SMALL_SUM_S + gathered / device.link if ranks > 1 else 0.0
    return StepTime(
        weights_s=read / (device.bandwidth * REACHED),
        kv_s=kv / (device.bandwidth * REACHED),
        compute_s=rows * read / BYTES * 2 / (device.flops * REACHED),
        sums_s=sums_s + gather_s,
        sums=sums,
        weight_bytes=held,
        fits=held + kv < device.memory_bytes * 0.9,
    )


def main() -> None:
    """Print a table of all models, devices and numbers of ranks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--context", type=int, default=2048, help="tokens of each request in the KV pool")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 64], help="requests of a step")
    arguments = parser.parse_args()
    print("model           device    TP  rows  weights/rank  sums  memory ms  sums ms  step ms  tok/s  speed-up")
    for model in MODELS:
        for device in DEVICES:
            for rows in arguments.rows:
                alone = step_time(model, device, 1, rows, arguments.context)
                for ranks in (1, 2, 4, 8):
                    step = step_time(model, device, ranks, rows, arguments.context)
                    print(
                        f"{model.name:15} {device.name:9} {ranks:2} {rows:5} {step.weight_bytes / 1e9:10.1f} GB "
                        f"{step.sums:5} {(step.weights_s + step.kv_s) * 1e3:10.2f} {step.sums_s * 1e3:8.2f} "
                        f"{step.total_s * 1e3:8.2f} {rows / step.total_s:6.0f} {alone.total_s / step.total_s:8.2f}"
                        f"{'' if step.fits else '  does not fit'}"
                    )


if __name__ == "__main__":
    main()
