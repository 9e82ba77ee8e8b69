"""Documents packed into rows of token ids. Pure apart from the tokenizer: the same seed gives the same batches."""

from collections.abc import Iterator
from itertools import islice
from random import Random

import torch
from tokenizers import Tokenizer

from deploy.demo_model.corpus import Document, documents

# Row length and its share of the tokens. Every row begins with the first token of a document, as a prompt does; the
# short rows give most documents nothing before them, the long ones teach distances that only long prompts have.
ROW_LENGTHS = {48: 0.5, 128: 0.35, 1024: 0.15}
BATCH_TOKENS = 4096
DOCUMENTS_AT_ONCE = 512
PADDING = 0

Row = list[tuple[int, float]]  # token id and its weight in the loss
Batch = tuple[torch.Tensor, torch.Tensor]  # ids and weights, both (rows, length)


def encode(tokenizer: Tokenizer, batch: list[Document]) -> list[Row]:
    """Each document as weighted ids; spans are encoded apart, as prompt and answer are when the model is used."""
    encodings = iter(tokenizer.encode_batch([span.text for document in batch for span in document]))
    return [[(token, span.weight) for span in document for token in next(encodings).ids] for document in batch]


def stack(rows: list[Row], length: int) -> Batch:
    """Rows as tensors, padded to their common length with tokens that weigh nothing."""
    padded = [row + [(PADDING, 0.0)] * (length - len(row)) for row in rows]
    ids = torch.tensor([[token for token, _ in row] for row in padded])
    weights = torch.tensor([[weight for _, weight in row] for row in padded])
    return ids, weights


def batches(tokenizer: Tokenizer, seed: int) -> Iterator[Batch]:
    """Batches without end, each of rows of one length."""
    source, rng = documents(seed), Random(seed)
    rows: dict[int, list[Row]] = {length: [] for length in ROW_LENGTHS}
    while True:
        for document in encode(tokenizer, list(islice(source, DOCUMENTS_AT_ONCE))):
            fitting = [length for length in ROW_LENGTHS if len(document) <= length]
            (length,) = rng.choices(fitting, [ROW_LENGTHS[length] for length in fitting])
            open_rows = rows[length]
            if open_rows and len(open_rows[-1]) + len(document) <= length:
                open_rows[-1] += document
            elif len(open_rows) < BATCH_TOKENS // length:
                open_rows.append(document)
            else:
                yield stack(open_rows, length)
                rows[length] = [document]
