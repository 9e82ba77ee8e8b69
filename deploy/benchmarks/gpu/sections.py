"""The sections in their order: the code of each, how long it may take, and what it needs."""

from dataclasses import dataclass

from deploy.benchmarks.gpu.packages import ENGINE, SERVER

TRANSFORMERS = ("transformers",)
TRITON = ("triton",)


@dataclass(frozen=True, slots=True)
class Section:
    """A function of a module of this package, run in a process of its own."""

    name: str
    module: str
    function: str
    deadline_s: float
    needs: tuple[str, ...] = ()  # modules; without them the section is skipped
    on_gpu: tuple[str, ...] = ()  # and these on a GPU
    what: str = ""


SECTIONS = (
    Section("ceilings", "ceilings", "run", 25, (), TRITON, "bandwidth, GEMM, cost of a launch"),
    Section("compile", "compiling", "run", 60, ENGINE, TRITON, "every kernel of every model, in parallel"),
    Section("correctness", "correctness", "run", 60, ENGINE, TRITON, "operations, graphs and draws against torch"),
    Section("single", "decoding", "single", 70, ENGINE, TRITON, "one stream (G1 to G4)"),
    Section("batches", "decoding", "batches", 55, ENGINE, TRITON, "64 and 256 streams (G5, G6, G14)"),
    Section("kernels", "operations", "run", 45, (), TRITON, "single operations beside torch's (G13)"),
    Section("nano", "decoding", "nano", 45, ENGINE, TRITON, "nano-vllm's benchmark (G7)"),
    Section("mixed", "decoding", "mixed", 35, ENGINE, TRITON, "prompts, and prompts beside streams (G8)"),
    Section(
        "reload", "reload", "run", 30, (*ENGINE, "safetensors"), TRITON, "weights from files, swap under load (G9)"
    ),
    Section("start", "reload", "start_up", 30, ENGINE, TRITON, "a fresh process (G10)"),
    Section("determinism", "decoding", "determinism", 30, ENGINE, TRITON, "alone and in company (G11)"),
    Section("http", "server", "run", 30, SERVER, TRITON, "the whole server on the loopback"),
    Section("transformers-static", "peers", "static_cache", 45, TRANSFORMERS, (), "static cache and compile"),
    Section(
        "transformers-batching", "peers", "continuous_batching", 40, (*ENGINE, *TRANSFORMERS), TRITON, "generate_batch"
    ),
)
