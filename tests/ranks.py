"""A function run by several ranks at once, each a process of its own, over Gloo."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as multiprocessing

from quartet.scheduler_service.host.parallel import Parallel, join


def run_ranks(count: int, directory: Path, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `function(parallel, *arguments)` returned, by rank; raises what a rank raised."""
    multiprocessing.spawn(_rank, (count, directory, function, arguments), nprocs=count)
    return [torch.load(directory / f"result.{rank}") for rank in range(count)]


def _rank(rank: int, count: int, directory: Path, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    parallel = Parallel(rank, count)
    join(parallel, torch.device("cpu"), str(directory / "store"))
    torch.save(function(parallel, *arguments), directory / f"result.{rank}")
