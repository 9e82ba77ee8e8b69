"""Cases of everything from the last hidden state to the next step's first operation."""

from typing import Any

import torch

from tests.kernels.cases import EPSILON, Arguments, Maker, cases

LOGITS_BLOCK = 4096
HEAD_BLOCK = 64


def choice(make: Maker, rows: int, temperatures: list[float], slots: bool) -> Arguments:
    """How each row draws, and where its token goes."""
    repeated = (temperatures * rows)[:rows]
    return {
        "temperatures": make.given(repeated, torch.float32),
        "seeds": make.integers(-(2**62), 2**62, rows, dtype=torch.int64),
        "positions": make.integers(0, 1 << 20, rows, dtype=torch.int64),
        "slots": make.given([-1, *range(2 * rows, rows + 1, -1)][:rows]) if slots else None,
        "tokens": make.poisoned(2 * rows + 1 if slots else rows, dtype=torch.int64),
        "valid": make.poisoned(rows, dtype=torch.int32),
    }


def mask(make: Maker, rows: int, vocab: int) -> torch.Tensor:
    return make.integers(-(2**31), 2**31 - 1, rows, -(-vocab // 32))


def lm_head_sample(
    make: Maker,
    rows: int,
    hidden: int,
    vocab: int,
    temperatures: list[float],
    norm: bool = True,
    softcap: float | None = None,
    slots: bool = False,
) -> Arguments:
    tiles = -(-vocab // HEAD_BLOCK)
    return {
        "x": make.normal(rows, hidden),
        "norm_weight": make.near_one(hidden) if norm else None,
        "epsilon": EPSILON,
        "plus_one": False,
        "weight": make.normal(vocab, hidden, scale=3 * hidden**-0.5),
        "softcap": softcap,
        "logits": make.poisoned(rows, vocab, dtype=torch.float32),
        "tops": make.poisoned(rows, tiles, dtype=torch.float32),
        "masses": make.poisoned(rows, tiles, dtype=torch.float32),
        "counter": make.zeros(1),
        **choice(make, rows, temperatures, slots),
    }


def logits_of(make: Maker, rows: int, vocab: int) -> torch.Tensor:
    return make.normal(rows, vocab, scale=3.0, dtype=torch.float32)


def process_logits(make: Maker, rows: int, vocab: int, allowed: bool = False) -> Arguments:
    tiles = -(-vocab // LOGITS_BLOCK)
    return {
        "logits": logits_of(make, rows, vocab),
        "allowed": mask(make, rows, vocab) if allowed else None,
        "temperatures": make.given(([0.7, 0.0, 1.3] * rows)[:rows], torch.float32),
        "tops": make.poisoned(rows, tiles, dtype=torch.float32),
        "masses": make.poisoned(rows, tiles, dtype=torch.float32),
    }


def facts(logits: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest logit of each tile and the sum of exp(logit - largest), each (rows, tiles)."""
    parts = logits.split(block, dim=1)
    tops = torch.stack([part.amax(1) for part in parts], 1)
    masses = torch.stack([(part - part.amax(1, keepdim=True)).exp().sum(1) for part in parts], 1)
    return tops, masses


def draw(
    make: Maker, rows: int, vocab: int, temperatures: list[float], block: int = HEAD_BLOCK, slots: bool = False
) -> Arguments:
    logits = logits_of(make, rows, vocab)
    tops, masses = facts(logits, block)
    own = {"logits": logits, "tops": tops, "masses": masses, "block": block}
    return {**own, **choice(make, rows, temperatures, slots)}


def select(
    make: Maker,
    rows: int,
    vocab: int,
    temperatures: list[float],
    top_ks: list[int],
    top_ps: list[float],
    min_ps: list[float],
) -> Arguments:
    def column(values: list[Any], dtype: torch.dtype) -> torch.Tensor:
        return make.given((values * rows)[:rows], dtype)

    logits = logits_of(make, rows, vocab)
    tops, masses = facts(logits, LOGITS_BLOCK)
    row_choice = choice(make, rows, temperatures, slots=False)
    del row_choice["slots"]
    return {
        "logits": logits,
        "tops": tops,
        "masses": masses,
        "top_ks": column(top_ks, torch.int32),
        "top_ps": column(top_ps, torch.float32),
        "min_ps": column(min_ps, torch.float32),
        "candidates": make.poisoned(rows, vocab, dtype=torch.int32),
        **row_choice,
    }


def prepare(make: Maker, rows: int, hidden: int, vocab: int, rotary_dim: int, scale: float = 1.0) -> Arguments:
    slots, pages, page_size = rows + 3, 5, 4
    return {
        "slots": make.given([-1, *range(slots - 1, 0, -1)][:rows]),
        "last_tokens": make.integers(0, vocab, slots, dtype=torch.int64),
        "next_positions": make.integers(0, pages * page_size, slots, dtype=torch.int64),
        "finished": make.given([int(slot == slots - 1) for slot in range(slots)]),
        "page_table": make.integers(1, 99, slots, pages),
        "page_size": page_size,
        "embedding": make.normal(vocab, hidden),
        "scale": scale,
        "rotary": make.normal(pages * page_size, 2, rotary_dim),
        "input_ids": make.poisoned(rows, dtype=torch.int64),
        "positions": make.poisoned(rows, dtype=torch.int64),
        "kv_slots": make.poisoned(rows, dtype=torch.int64),
        "lengths": make.poisoned(rows, dtype=torch.int32),
        "x": make.poisoned(rows, hidden),
        "cos": make.poisoned(rows, 1, rotary_dim),
        "sin": make.poisoned(rows, 1, rotary_dim),
    }


CHOSEN = ("tokens", "valid")
PREPARED = ("next_positions", "input_ids", "positions", "kv_slots", "lengths", "x", "cos", "sin")
MIXED = {"temperatures": [0.8, 0.0, 1.2]}
SMALL = [
    *cases(
        lm_head_sample,
        (*CHOSEN, "logits", "counter"),
        {"rows": 3, "hidden": 48, "vocab": 300, **MIXED, "slots": True},
        {"rows": 6, "hidden": 100, "vocab": 150, **MIXED, "softcap": 2.0, "norm": False},
    ),
    *cases(
        process_logits,
        ("logits",),
        {"rows": 3, "vocab": 5000, "allowed": True},
        {"rows": 2, "vocab": 300},
    ),
    *cases(
        draw,
        CHOSEN,
        {"rows": 12, "vocab": 700, **MIXED},
        {"rows": 3, "vocab": 700, **MIXED, "slots": True},
    ),
    *cases(
        select,
        CHOSEN,
        {"rows": 4, "vocab": 5000, **MIXED, "top_ks": [5, 0], "top_ps": [1.0], "min_ps": [0.0]},
        {"rows": 4, "vocab": 300, "temperatures": [1.0], "top_ks": [0], "top_ps": [0.5, 0.9], "min_ps": [0.0]},
        {"rows": 3, "vocab": 5000, **MIXED, "top_ks": [9, 0], "top_ps": [0.7, 1.0], "min_ps": [0.0, 0.1]},
    ),
    *cases(prepare, PREPARED, {"rows": 4, "hidden": 1200, "vocab": 9, "rotary_dim": 6, "scale": 3.0}),
]
FILTERS = {"temperatures": [1.0], "top_ks": [40, 0], "top_ps": [0.9], "min_ps": [0.05]}
SERVED = [
    *cases(
        lm_head_sample,
        (*CHOSEN, "counter"),
        {"rows": 1, "hidden": 896, "vocab": 151936, **MIXED},
        {"rows": 64, "hidden": 4096, "vocab": 128256, **MIXED},
    ),
    *cases(process_logits, ("logits",), {"rows": 8, "vocab": 151936, "allowed": True}),
    *cases(draw, CHOSEN, {"rows": 64, "vocab": 151936, **MIXED}),
    *cases(select, CHOSEN, {"rows": 8, "vocab": 151936, **FILTERS}),
    *cases(prepare, PREPARED, {"rows": 64, "hidden": 896, "vocab": 151936, "rotary_dim": 64}),
]
