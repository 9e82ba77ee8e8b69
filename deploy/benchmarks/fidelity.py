"""How far a served model is from another one on real text: perplexity, KL divergence, agreement about the best token.

The text is the docstrings of modules of Python's standard library, so it is the same on every machine with the same
version of Python. It is cut into windows of 512 tokens, and the second half of each is scored, as llama.cpp's
llama-perplexity does: figures of both can stand side by side.

A server tells the TOP most likely tokens of a position, not all. KL divergence is that of the distributions over the
tokens that both sides name, all others taken together. That is never more than the divergence over all tokens, and for
distributions with little beyond the first TOP it is the same to a few digits.
"""

import ast
import importlib.util
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests

WINDOW = 512
TOP = 64
REST_FLOOR = 1e-6  # a rest below that is what rounding leaves
WAIT_S = 600
MODULES = (
    *("argparse", "collections", "contextlib", "_pydecimal", "difflib", "enum", "fractions", "functools", "heapq"),
    *("inspect", "ipaddress", "logging", "pathlib", "random", "statistics", "string", "subprocess", "tarfile"),
    *("textwrap", "threading", "tokenize", "typing", "unittest.mock", "urllib.parse", "zipfile"),
)


@dataclass
class Scores:
    """What a model thinks of scored positions, one entry each."""

    logprobs: list[float] = field(default_factory=list)  # of the tokens that stand there
    tops: list[dict[int, float]] = field(default_factory=list)  # id → logprob of the most likely ones, best first

    @property
    def perplexity(self) -> float:
        return math.exp(-statistics.fmean(self.logprobs))


@dataclass
class Divergence:
    """A model beside a reference, over the same positions."""

    perplexity: float
    perplexity_ratio: float  # to the reference; 1.005 is half a percent worse
    kl_mean: float  # nats
    kl_p99: float
    same_best: float  # share of positions where both take the same token for the most likely one


def text() -> str:
    """All docstrings of MODULES, in the order in which they stand there."""
    return "\n\n".join(docstring for module in MODULES for docstring in docstrings(module))


def docstrings(module: str) -> Iterator[str]:
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None, module
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(Path(spec.origin).read_text())) if isinstance(node, documented)]
    for node in sorted(nodes, key=lambda node: getattr(node, "lineno", 0)):
        if docstring := ast.get_docstring(node):
            yield docstring


def windows(ids: list[int], count: int, bos: int | None = None) -> list[list[int]]:
    """The first `count` runs of WINDOW ids; with `bos`, it takes the place of the first one of each."""
    found = [ids[start : start + WINDOW] for start in range(0, count * WINDOW, WINDOW)]
    assert len(found[-1]) == WINDOW, f"the text has {len(ids)} tokens, {count} windows need {count * WINDOW}"
    return found if bos is None else [[bos, *window[1:]] for window in found]


def windows_of(url: str, count: int) -> list[list[int]]:
    """Windows of the text in the tokens of the model that a Quartet server serves, with its BOS where it has one."""
    ids, with_special = tokens(url, text(), False), tokens(url, "a", True)
    bos = with_special[0] if len(with_special) > len(tokens(url, "a", False)) else None
    return windows(ids, count, bos)


def tokens(url: str, prompt: str, add_special_tokens: bool) -> list[int]:
    body = {"prompt": prompt, "add_special_tokens": add_special_tokens}
    answer = requests.post(f"{url}/tokenize", json=body, timeout=WAIT_S)
    answer.raise_for_status()
    ids: list[int] = answer.json()["tokens"]
    return ids


def of_server(url: str, windows: list[list[int]], top: int = TOP) -> Scores:
    """The scores that a Quartet server gives, by /generate."""
    scores = Scores()
    for window in windows:
        scored = len(window) - len(window) // 2 - 1
        body = {
            "input_ids": window,
            "sampling_params": {"temperature": 0, "max_new_tokens": 1},
            "return_logprob": True,
            "logprob_start_len": len(window) // 2,
            "top_logprobs_num": top,
        }
        answer = requests.post(f"{url}/generate", json=body, timeout=WAIT_S)
        answer.raise_for_status()
        meta = answer.json()["meta_info"]
        scores.logprobs += [logprob for logprob, *_ in meta["input_token_logprobs"][-scored:]]
        for row in meta["input_top_logprobs"][-scored:]:
            scores.tops.append({id: logprob for logprob, id, *_ in row})
    return scores


def of_transformers(model: Any, windows: list[list[int]], top: int = TOP) -> Scores:
    """The scores of a transformers model in this process."""
    import torch

    scores = Scores()
    for window in windows:
        half = len(window) // 2
        with torch.inference_mode():
            logits = model(torch.tensor([window])).logits[0, half:-1]
            logprobs = logits.float().log_softmax(-1)  # (scored positions, vocabulary)
        scores.logprobs += logprobs.gather(1, torch.tensor(window[half + 1 :]).unsqueeze(1)).squeeze(1).tolist()
        values, ids = logprobs.topk(top)
        scores.tops += [dict(zip(*row, strict=True)) for row in zip(ids.tolist(), values.tolist(), strict=True)]
    return scores


def expanded(path: Path) -> Any:
    """transformers' float32 model of a directory or of a GGUF file, whose blocks are expanded."""
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    if path.is_dir():
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )


def divergence(reference: Scores, served: Scores) -> Divergence:
    """Compare scores of the same positions."""
    pairs = list(zip(reference.tops, served.tops, strict=True))
    kls = sorted(kl(ours, theirs) for ours, theirs in pairs)
    return Divergence(
        perplexity=served.perplexity,
        perplexity_ratio=served.perplexity / reference.perplexity,
        kl_mean=statistics.fmean(kls),
        kl_p99=kls[int(0.99 * (len(kls) - 1))],
        same_best=statistics.fmean(next(iter(ours)) == next(iter(theirs)) for ours, theirs in pairs),
    )


def kl(reference: dict[int, float], served: dict[int, float]) -> float:
    """Of one position, in nats, over the ids that both name and one rest."""
    named = reference.keys() & served.keys()
    rest, its_rest = (
        max(REST_FLOOR, 1 - math.fsum(math.exp(logprobs[id]) for id in named)) for logprobs in (reference, served)
    )
    parts = [math.exp(reference[id]) * (reference[id] - served[id]) for id in named]
    return math.fsum(parts) + rest * math.log(rest / its_rest)
