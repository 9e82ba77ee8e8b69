"""A function run by several ranks at once, each a process of its own, over Gloo; engines whose model they compute."""

import faulthandler
import os
import pickle
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as multiprocessing

from quartet.runtime.config import ResolvedConfig
from quartet.runtime.model_files import model_info
from quartet.scheduler_service.execution.rank_messages import Channel
from quartet.scheduler_service.execution.rank_updates import FollowingUpdates
from quartet.scheduler_service.execution.ranks import Followers
from quartet.scheduler_service.execution.worker import Worker
from quartet.scheduler_service.follower import Follower
from quartet.scheduler_service.host.parallel import Parallel, join, open_store
from quartet.scheduler_service.model.batch import ServedModel
from quartet.scheduler_service.model.registry import load_model
from quartet.scheduler_service.weights.update import Updates
from tests.configs import resolved
from tests.engine import DEFAULTS, Answer, Engine
from tests.model.cases import CASES, NEW_TOKENS
from tests.model.dense import DenseRunner

Served = tuple[list[list[int]], list[Answer]]  # prompts and answers
Computed = tuple[dict[tuple[str, str], Served], dict[str, torch.Tensor]]

CPU = torch.device("cpu")


def run_ranks(count: int, directory: Path, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `function(parallel, *arguments)` returned, by rank; raises what a rank raised."""
    multiprocessing.spawn(_rank, (count, directory, function, arguments), nprocs=count)
    return [pickle.loads((directory / f"result.{rank}").read_bytes()) for rank in range(count)]


def _rank(rank: int, count: int, directory: Path, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """Ends as a service does: at once, since threads that still work can abort a Python process that ends slowly."""
    faulthandler.enable()
    torch.set_num_threads(1)
    parallel = Parallel(rank, count)
    join(parallel, CPU, open_store(parallel, str(directory / "store")))
    (directory / f"result.{rank}").write_bytes(pickle.dumps(function(parallel, *arguments)))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def load(parallel: Parallel, directory: Path, dtype: str, **settings: Any) -> ServedModel:
    """A rank's part of a model."""
    config = resolved(model_path=str(directory), device="cpu", dtype=dtype, **settings)
    return load_model(config, model_info.load(config), CPU, parallel)


def serve_cases(
    parallel: Parallel, directory: Path, cases: dict[str, list[str]], tokens: int = NEW_TOKENS
) -> dict[tuple[str, str], Served]:
    """Cases of the parity table by family, of models in folders of their names; rank 0 has what came of them."""
    served = {}
    for family, names in cases.items():
        place = directory / family
        with leading(parallel, load(parallel, place, "float32"), place) as make_worker:
            for name in names if make_worker else ():
                served[family, name] = CASES[name](place, tokens, make_worker=make_worker)
    return served


def logits(parallel: Parallel, directory: Path, dtype: str, ids: list[int], **settings: Any) -> torch.Tensor:
    """(tokens, vocab), of a prompt in two chunks."""
    return logits_of(load(parallel, directory, dtype, **settings), ids)


def logits_of(model: ServedModel, ids: list[int]) -> torch.Tensor:
    """The same of a model that is loaded."""
    runner, half = DenseRunner(model), len(ids) // 2
    return torch.cat([runner.feed([ids[:half]]), runner.feed([ids[half:]])])


def computed(
    parallel: Parallel, directory: Path, cases: dict[str, list[str]], tokens: int, families: list[str], ids: list[int]
) -> Computed:
    """Cases by family, whose requests make so many tokens, and the logits of a prompt in bfloat16."""
    bfloat16 = {family: logits(parallel, directory / family, "bfloat16", ids) for family in families}
    return serve_cases(parallel, directory, cases, tokens), bfloat16


@contextmanager
def serving(parallel: Parallel, directory: Path, **settings: Any) -> Iterator[Engine | None]:
    """On rank 0 an engine whose model all ranks compute; the other rank of two follows meanwhile, and gets None."""
    place = {"model_path": str(directory), "model_dir": str(directory), "device": "cpu", "tp_size": parallel.size}
    config = resolved(**(DEFAULTS | settings | place))
    model = load_model(config, model_info.load(config), CPU, parallel)
    with leading(parallel, model, directory, config) as make_worker:
        yield Engine(directory, make_worker=make_worker, **settings) if make_worker else None


@contextmanager
def leading(
    parallel: Parallel, model: ServedModel, directory: Path, config: ResolvedConfig | None = None
) -> Iterator[Callable[..., Worker] | None]:
    """On rank 0, what makes workers; the other rank of two follows meanwhile, and gets None at the end."""
    listener, place = socket.socket(socket.AF_UNIX), directory / "channel"
    if parallel.rank:
        parallel.sum(torch.zeros(1))  # rank 0 listens
        listener.connect(str(place))
        config = config or resolved(model_path=str(directory))
        updates = FollowingUpdates(Updates(model.weights, config, str(directory)))
        Follower(model, CPU, Channel(listener), parallel, updates).run()
        yield None
        return
    place.unlink(missing_ok=True)
    listener.bind(str(place))
    listener.listen()
    parallel.sum(torch.zeros(1))
    with listener, listener.accept()[0] as connection:
        followers = Followers(parallel, [Channel(connection)])
        yield partial(Worker, load=lambda *_: model, followers=followers)
