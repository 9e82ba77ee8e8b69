"""The sessions of a run, made of a seed: the same seed gives the same prompts, lengths and moments."""

import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from quartet.runtime.bench.records import Session, Turn
from quartet.runtime.errors import UsageError

DEFAULT_OUTPUT = 64
CHARS_A_TOKEN = 4  # of an answer in a file: its length in tokens is estimated, since tokenizers differ
QUESTIONS, ANSWERS = ("human", "user"), ("gpt", "assistant", "chatgpt", "bing", "bard")
COMMON = (
    "the of and to in a is that for it as was with be by on not he his but at are this have from or had an they which "
    "one you were all her she there would their we him been has when who will no more if out so up said what its about "
    "than into them can only other time new some could these two may first then do any like my now over such our man "
    "even most made after also did many off before must well back through years much where your way down should"
)
WORDS = COMMON.split()


class Lengths(NamedTuple):
    """Sizes of a workload, in tokens. `output`: None means the file's own answers, or DEFAULT_OUTPUT."""

    input: int = 128
    output: int | None = None
    spread: float = 0.0  # a length n becomes one from n - n·spread to n, all equally likely
    prefix: int = 512
    prefixes: int = 4
    turns: int = 1
    vocabulary: int = 10_000


class Maker:
    """Makes turns of random ids, and words that stand for them where an API takes no ids."""

    def __init__(self, lengths: Lengths, seed: int) -> None:
        self._lengths = lengths
        self._random = random.Random(seed)
        # the ends of a vocabulary are where models keep their special tokens
        self._ids = range(lengths.vocabulary // 10, max(lengths.vocabulary * 9 // 10, lengths.vocabulary // 10 + 1))

    def ids(self, size: int) -> tuple[int, ...]:
        return tuple(self._random.choices(self._ids, k=size))

    def length(self, most: int) -> int:
        least = max(1, math.ceil(most * (1 - self._lengths.spread)))
        return self._random.randint(least, most)

    def turn(self, prefix: tuple[int, ...] = ()) -> Turn:
        """A prompt of `prefix` and random ids behind it."""
        ids = prefix + self.ids(self.length(self._lengths.input))
        return Turn(in_words(ids), self.length(self._lengths.output or DEFAULT_OUTPUT), ids)

    def choice(self, prefixes: list[tuple[int, ...]]) -> tuple[int, ...]:
        return self._random.choice(prefixes)


def in_words(ids: tuple[int, ...]) -> str:
    """A word for each id."""
    return " ".join(WORDS[i % len(WORDS)] for i in ids)


def make(workload: str, count: int, lengths: Lengths, seed: int, file: Path | None = None) -> list[Session]:
    """`count` sessions. Raises UsageError for a file that cannot be used."""
    if workload == "sharegpt":
        assert file is not None, workload
        return sampled(read_conversations(file, lengths), count, seed)
    maker = Maker(lengths, seed)
    if workload == "shared-prefix":
        prefixes = [maker.ids(lengths.prefix) for _ in range(lengths.prefixes)]
        return [(maker.turn(maker.choice(prefixes)),) for _ in range(count)]
    return [tuple(maker.turn() for _ in range(lengths.turns)) for _ in range(count)]


def start_times(count: int, rate: float, seed: int) -> list[float]:
    """Seconds from the start at which sessions begin: a Poisson process of `rate` a second, or all at once."""
    source, now, times = random.Random(seed), 0.0, []
    for _ in range(count):
        times.append(now)
        now += 0.0 if math.isinf(rate) else source.expovariate(rate)
    return times


def sampled(sessions: list[Session], count: int, seed: int) -> list[Session]:
    """So many of them in a random order; from the beginning again where there are fewer."""
    order = random.Random(seed).sample(sessions, len(sessions))
    return [order[i % len(order)] for i in range(count)]


# files


class Message(msgspec.Struct):
    speaker: str = msgspec.field(default="", name="from")
    value: str = ""
    role: str = ""
    content: str = ""


class Conversation(msgspec.Struct):
    conversations: list[Message] = []
    messages: list[Message] = []


def read_conversations(file: Path, lengths: Lengths) -> list[Session]:
    """The conversations of a file that have at least one question and its answer. Raises UsageError."""
    try:
        found = msgspec.json.decode(file.read_bytes(), type=list[Conversation])
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read --file {file}: {error}") from error
    sessions = [tuple(turns_of(conversation, lengths)) for conversation in found]
    if usable := [session for session in sessions if session]:
        return usable
    raise UsageError(f"--file {file} has no conversation with a question and an answer to it")


def turns_of(conversation: Conversation, lengths: Lengths) -> Iterator[Turn]:
    """Questions that are followed by an answer, --turns of them at most."""
    said = conversation.conversations or conversation.messages
    lines = [((m.speaker or m.role).lower(), m.value or m.content) for m in said]
    if lines and lines[0][0] == "system":
        lines = lines[1:]
    for i in range(0, min(len(lines) - 1, 2 * lengths.turns), 2):
        (asker, question), (answerer, answer) = lines[i], lines[i + 1]
        if asker not in QUESTIONS or answerer not in ANSWERS or not question or not answer:
            return
        yield Turn(question, lengths.output or max(1, len(answer) // CHARS_A_TOKEN))
