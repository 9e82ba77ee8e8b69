"""Log-probabilities of output and prompt tokens, packed for the wire. All in float32."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from quartet.kernels.cpu import draw
from quartet.runtime.messages import LogprobOptions, Logprobs, pack_ids
from quartet.scheduler_service.host.transfer import fetch, upload
from quartet.scheduler_service.sampling.choose import filter_weights, largest
from quartet.scheduler_service.sampling.rows import SamplingRows

ITEM_BYTES = 4  # of an id or a value on the wire
BLOCK_BYTES = 64 << 20  # of logits that are alive at once while a prompt is scored


@dataclass(slots=True)
class Scores:
    """Logprobs of some rows."""

    ids: torch.Tensor  # (rows,)
    values: torch.Tensor  # (rows,)
    top_ids: torch.Tensor  # (rows, top)
    top_values: torch.Tensor  # (rows, top)
    asked_values: torch.Tensor  # (rows, asked ids)
    entropies: torch.Tensor  # (rows,); (0,) if not requested

    def packed(self) -> Logprobs:
        """All rows in one."""
        return Logprobs(
            ids=as_bytes(self.ids, torch.int32),
            values=as_bytes(self.values, torch.float32),
            top_ids=as_bytes(self.top_ids, torch.int32),
            top_values=as_bytes(self.top_values, torch.float32),
            asked_values=as_bytes(self.asked_values, torch.float32),
            entropies=as_bytes(self.entropies, torch.float32),
        )

    def fetched(self) -> "Scores":
        """The same on the host, once an Arrival made afterwards has been waited for."""
        return Scores(*map(fetch, self.columns))

    @property
    def columns(self) -> tuple[torch.Tensor, ...]:
        return self.ids, self.values, self.top_ids, self.top_values, self.asked_values, self.entropies

    def by_row(self, tops: list[int]) -> list[Logprobs]:
        """Each row on its own, with the best `tops[row]` only."""
        whole = self.packed()
        top_bytes, asked_bytes = (ITEM_BYTES * x.shape[1] for x in (self.top_ids, self.asked_values))
        return [
            Logprobs(
                ids=cut(whole.ids, row * ITEM_BYTES, ITEM_BYTES),
                values=cut(whole.values, row * ITEM_BYTES, ITEM_BYTES),
                top_ids=cut(whole.top_ids, row * top_bytes, top * ITEM_BYTES),
                top_values=cut(whole.top_values, row * top_bytes, top * ITEM_BYTES),
                asked_values=cut(whole.asked_values, row * asked_bytes, asked_bytes),
                entropies=cut(whole.entropies, row * ITEM_BYTES, ITEM_BYTES),
            )
            for row, top in enumerate(tops)
        ]


@dataclass(slots=True)
class Support:
    """The tokens that a row's draw chose from."""

    row: int
    ids: torch.Tensor  # (tokens,)
    value: torch.Tensor  # (): the drawn token's logprob among them

    def add_to(self, logprobs: Logprobs) -> None:
        logprobs.support_counts = pack_ids((len(self.ids),))
        logprobs.support_ids = as_bytes(self.ids, torch.int32)
        logprobs.support_values = as_bytes(self.value, torch.float32)


@dataclass(slots=True)
class OutputScores:
    """Logprobs of a step's drawn tokens, on their way to the host."""

    count: int  # rows of the step
    parts: list[tuple[list[int], list[int], Scores]]  # rows, the `top` of each, and their scores
    supports: list[Support]

    def by_row(self) -> list[Logprobs | None]:
        """Those of every row; None where not requested."""
        found: list[Logprobs | None] = [None] * self.count
        for rows, tops, scores in self.parts:
            for row, logprobs in zip(rows, scores.by_row(tops), strict=True):
                found[row] = logprobs
        for support in self.supports:
            support.add_to(scored(found, support.row))
        return found


def scored(found: list[Logprobs | None], row: int) -> Logprobs:
    logprobs = found[row]
    assert logprobs is not None, row
    return logprobs


def cut(data: bytes, start: int, length: int) -> bytes:
    return data[start : start + length]


def as_bytes(values: torch.Tensor, dtype: torch.dtype) -> bytes:
    """Little-endian bytes in row order."""
    return bytes(values.to("cpu", dtype).contiguous().numpy().tobytes())


def score(
    logits: torch.Tensor, ids: torch.Tensor, top: int, asked: list[int], entropy: bool = False, raw: bool = False
) -> Scores:
    """Logprobs of ids (rows,), of the best `top` tokens and of the `asked` ones, from logits (rows, vocab).

    `raw`: of the asked ones the logits themselves.
    """
    norm = log_of_sums(logits)  # (rows, 1)
    columns = upload(asked, logits.device, torch.int64)
    top_values, top_ids = largest(logits, min(top, logits.shape[1])) if top else (logits[:, :0], logits[:, :0])
    return Scores(
        ids=ids,
        values=logits.gather(1, ids.unsqueeze(1)).squeeze(1) - norm.squeeze(1),
        top_ids=top_ids,
        top_values=top_values - norm,
        asked_values=logits[:, columns] - (0.0 if raw else norm),
        entropies=entropies(logits - norm) if entropy else norm[:0, 0],
    )


def entropies(logprobs: torch.Tensor) -> torch.Tensor:
    """In nats, of each row of logprobs (rows, vocab); what is impossible adds nothing."""
    terms = logprobs.exp() * logprobs.clamp(min=torch.finfo(logprobs.dtype).min)
    several = terms if len(terms) > 1 else terms.expand(2, -1)  # a single row would be added up in another order
    return -several.sum(1)[: len(terms)]


def log_of_sums(logits: torch.Tensor) -> torch.Tensor:
    """log(sum(exp(row))) of logits (rows, vocab): (rows, 1), the same bits for a row whatever the other rows are.

    torch adds up a single row with several threads, and each of several rows with one; a GPU splits rows by how
    many there are, which float64 makes too small to be seen. On a CPU a kernel of our own takes one pass over a row.
    """
    if draw.can_draw(logits):
        return draw.log_of_sums(logits)
    if logits.device.type != "cpu":
        return torch.logsumexp(logits.double(), 1, keepdim=True).to(logits.dtype)
    several = logits if len(logits) > 1 else logits.expand(2, -1)
    return torch.logsumexp(several, 1, keepdim=True)[: len(logits)]


def output_logprobs(
    logits: torch.Tensor, tokens: torch.Tensor, options: list[LogprobOptions | None], rows: SamplingRows
) -> OutputScores:
    """Logprobs of each row's drawn token (rows,), for the rows whose request asks for them.

    `logits` (rows, vocab) are those the draw was made from, before top-k, top-p and min-p.
    """
    scored_rows = [i for i, option in enumerate(options) if option is not None and option.support]
    scored = OutputScores(len(options), [], [support_of(logits, tokens, i, rows) for i in scored_rows])
    for asked, raw in {asked_of(option) for option in options if option is not None}:
        own = [i for i, option in enumerate(options) if option is not None and asked_of(option) == (asked, raw)]
        tops = [option.top for i in own if (option := options[i]) is not None]
        entropy = any(option.entropy for i in own if (option := options[i]) is not None)
        part, ids = logits, tokens
        if len(own) < len(options):
            picked = upload(own, logits.device)
            part, ids = logits[picked], tokens[picked]
        scored.parts.append((own, tops, score(part, ids, max(tops), list(asked), entropy, raw).fetched()))
    return scored


def asked_of(option: LogprobOptions) -> tuple[tuple[int, ...], bool]:
    """The ids whose values a request wants at every position, and whether as logits."""
    return tuple(option.token_ids or ()), option.raw


def support_of(logits: torch.Tensor, tokens: torch.Tensor, row: int, rows: SamplingRows) -> Support:
    """What a row's draw chose from: its token alone where it takes the best. A device is waited for."""
    if not rows.temperatures[row]:
        return Support(row, fetch(tokens[row : row + 1]), torch.zeros(()))
    weights = (logits[row : row + 1] - logits[row].max()).exp()
    filter_weights(weights, rows, [row])
    weights[0, tokens[row]].clamp_(min=torch.finfo(weights.dtype).tiny)  # it was drawn, whatever the last bit says
    ids = weights[0].nonzero().squeeze(1)
    share = weights[0, tokens[row]] / weights.sum()
    return Support(row, fetch(ids), fetch(share.log()))


def prompt_logprobs(
    hidden: torch.Tensor,
    ids: torch.Tensor,
    to_logits: Callable[[torch.Tensor], torch.Tensor],
    vocab_size: int,
    options: LogprobOptions,
) -> Logprobs:
    """Logprobs of prompt tokens: row i of hidden (rows, hidden) predicts ids[i], at temperature 1."""
    asked = list(options.token_ids or ())
    block = max(1, BLOCK_BYTES // (4 * vocab_size))
    parts = []
    for first in range(0, len(ids), block):
        rows = slice(first, first + block)
        parts.append(score(to_logits(hidden[rows]), ids[rows], options.top, asked))
    columns = zip(*(part.columns for part in parts), strict=True)
    return Scores(*map(torch.cat, columns)).packed()
