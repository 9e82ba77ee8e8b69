"""The demo model's tokenizer: byte-level BPE whose merges are learned from the corpus."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from deploy.demo_model.corpus import END_OF_TEXT, TURN_END, TURN_START, documents

SPECIAL_TOKENS = [END_OF_TEXT, TURN_START, TURN_END]  # their ids are 0, 1, 2, as the config files say
SAMPLE_DOCUMENTS = 60_000

# A word or a run of signs with the space before it; digits one by one, so that sums can be learned; other space alone.
PIECES = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s"


def sample(seed: int) -> Iterator[str]:
    """The texts whose words become tokens."""
    for document in islice(documents(seed), SAMPLE_DOCUMENTS):
        for span in document:
            text = span.text
            for token in SPECIAL_TOKENS:
                text = text.replace(token, "")
            yield text


def learn(vocab_size: int, seed: int) -> Tokenizer:
    """A tokenizer of that many tokens. It keeps every byte: decoding gives back what was encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample(seed), trainer)
    return tokenizer


def load(folder: Path) -> Tokenizer:
    """The tokenizer that lies beside the model."""
    return Tokenizer.from_file(str(folder / "tokenizer.json"))
