"""What the demo model gets right: `python -m deploy.demo_model.evaluate [FOLDER]` prints the card's tables.

Answers are greedy and come from transformers. An answer names the capital when the capital is in it; it is exact when
it is the taught answer to the letter and ends there.
"""

import argparse
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from deploy.demo_model import corpus, vocabulary
from deploy.demo_model.facts import COUNTRIES
from deploy.demo_model.phrasings import (
    COMPLETIONS,
    HELD_OUT_COMPLETIONS,
    HELD_OUT_QUESTIONS,
    JSON_QUESTIONS,
    QUESTIONS,
    REVERSED,
    REVERSED_COMPLETIONS,
    Exchange,
    Phrasing,
)
from quartet.runtime.model_files.model_info import DEMO

Model = Any  # generate() is typed for a protocol that transformers' own classes do not meet

SAMPLE_SEED = 2
SAMPLES_PER_TASK = 300
MAX_NEW_TOKENS = 200
LARGEST_BATCH = 256

FRAMES = {
    "raw": "{}",
    "Q: A:": "Q: {}\nA:",
    "chat": "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
}


class Case(NamedTuple):
    """One prompt, what must be in the answer and what the answer was in training."""

    prompt: str
    needed: str
    taught: str


class Score(NamedTuple):
    """Shares of the cases, in percent."""

    named: float
    exact: float


def capital_cases(phrasing: Phrasing, frame: str) -> list[Case]:
    """One phrasing in one frame, for every country. A reversed phrasing needs the country instead of the capital."""
    cases = []
    for country in COUNTRIES:
        prompt, answer = phrasing.ask(country)
        needed = country.label if "{capital}" in phrasing.prompt else country.capital
        cases.append(Case(FRAMES[frame].format(prompt), needed, answer))
    return cases


def task_cases(exchanges: Sequence[Exchange], frame: str) -> list[Case]:
    return [Case(FRAMES[frame].format(prompt), answer, answer) for prompt, answer in exchanges]


def generate(model: Model, tokenizer: Tokenizer, prompts: list[str]) -> list[str]:
    """The greedy answers, in order. Prompts of one length run together, so nothing is padded."""
    by_length: dict[int, list[tuple[int, list[int]]]] = defaultdict(list)
    for index, encoding in enumerate(tokenizer.encode_batch(prompts)):
        by_length[len(encoding.ids)].append((index, encoding.ids))
    answers = [""] * len(prompts)
    for length, group in by_length.items():
        for start in range(0, len(group), LARGEST_BATCH):
            part = group[start : start + LARGEST_BATCH]
            ids = torch.tensor([ids for _, ids in part])  # (prompts, length)
            output = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=MAX_NEW_TOKENS
            )
            texts = tokenizer.decode_batch(output[:, length:].tolist(), skip_special_tokens=False)
            for (index, _), text in zip(part, texts, strict=True):
                answers[index] = text
    return answers


def score(cases: list[Case], answers: list[str], misses: list[str]) -> Score:
    """How many answers hold what is needed, and how many are exact. The wrong ones are added to `misses`."""
    named = exact = 0
    for case, text in zip(cases, answers, strict=True):
        answer, ended, _ = text.partition(corpus.END_OF_TEXT)
        answer, turned, _ = answer.partition(corpus.TURN_END)
        named += case.needed in answer
        exact += bool(ended or turned) and answer.strip() == case.taught
        if case.needed not in answer:
            misses.append(f"{case.prompt!r} -> {answer!r}, not {case.needed!r}")
    return Score(100 * named / len(cases), 100 * exact / len(cases))


class Table:
    """A table of the card: rows of names, columns of frames, cells of cases that are answered all together."""

    def __init__(self, first: str, frames: Sequence[str]) -> None:
        self.first = first
        self.frames = frames
        self.cells: dict[str, dict[str, list[Case]]] = {}

    def add(self, name: str, frame: str, cases: list[Case]) -> None:
        self.cells.setdefault(name, {})[frame] = cases

    def measure(self, model: Model, tokenizer: Tokenizer, misses: list[str]) -> list[str]:
        """The lines of the table in Markdown, each cell as "named / exact"."""
        cases = [case for row in self.cells.values() for cell in row.values() for case in cell]
        answers = iter(generate(model, tokenizer, [case.prompt for case in cases]))
        lines = [f"| {self.first} | {' | '.join(self.frames)} |", "|---" * (len(self.frames) + 1) + "|"]
        for name, row in self.cells.items():
            texts = []
            for frame in self.frames:
                cell = row.get(frame)
                result = score(cell, [next(answers) for _ in cell], misses) if cell else None
                texts.append(f"{result.named:.1f} / {result.exact:.1f}" if result else "–")
            lines.append(f"| {name} | {' | '.join(texts)} |")
        return lines


def shown(phrasing: Phrasing) -> str:
    """A template as a table shows it."""
    blanks = {"{the}": "…", "{label}": "…", "{whose}": "…'s", "{capital}": "…", "\n": " ⏎ "}
    text = phrasing.prompt
    for blank, sign in blanks.items():
        text = text.replace(blank, sign)
    return f"`{text}`"


def question_table(phrasings: Sequence[Phrasing]) -> Table:
    table = Table("Question", list(FRAMES))
    for phrasing in phrasings:
        for frame in FRAMES:
            table.add(shown(phrasing), frame, capital_cases(phrasing, frame))
    return table


def completion_table(phrasings: Sequence[Phrasing]) -> Table:
    table = Table("Sentence to complete", ["raw"])
    for phrasing in phrasings:
        table.add(shown(phrasing), "raw", capital_cases(phrasing, "raw"))
    return table


def held_out_sums(rng: Random) -> list[Exchange]:
    """Sums and differences that training never showed."""
    pairs = [(a, b) for a in range(100) for b in range(100) if corpus.is_held_out(a, b)]
    return [
        Exchange(f"What is {a} + {b}?", f"{a} + {b} = {a + b}.")
        if rng.random() < 0.5 or a < b
        else Exchange(f"What is {a} - {b}?", f"{a} - {b} = {a - b}.")
        for a, b in rng.sample(pairs, SAMPLES_PER_TASK)
    ]


def other_table() -> Table:
    """The other things it was taught, on examples drawn with a seed that training did not use."""
    rng = Random(SAMPLE_SEED)
    tasks = {
        "sums and differences": corpus.sum_question,
        "counting": corpus.count_question,
        "repeating": corpus.copy_question,
        "a person as JSON": corpus.person_json,
        "is … the capital of …?": corpus.yes_or_no_question,
    }
    table = Table("Task", ["raw", "chat"])
    for name, task in tasks.items():
        exchanges = [task(rng) for _ in range(SAMPLES_PER_TASK)]
        for frame in table.frames:
            table.add(name, frame, task_cases(exchanges, frame))
    exchanges = held_out_sums(rng)
    for frame in table.frames:
        table.add("sums and differences held out of training", frame, task_cases(exchanges, frame))
    return table


TABLES = {
    "Capitals, phrasings it was trained on": question_table(QUESTIONS),
    "Capitals, sentences it was trained to complete": completion_table(COMPLETIONS),
    "Capitals, phrasings held out of training": question_table(HELD_OUT_QUESTIONS),
    "Capitals, sentences held out of training": completion_table(HELD_OUT_COMPLETIONS),
    "The country of a capital": question_table(REVERSED),
    "The country of a capital, sentences": completion_table(REVERSED_COMPLETIONS),
    "Capitals as JSON": question_table(JSON_QUESTIONS),
    "Other tasks": other_table(),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "folder", type=Path, nargs="?", default=DEMO, help="model directory (default: the one in the package)"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="default: %(default)s")
    parser.add_argument("--misses", type=int, default=0, help="wrong answers to show after each table")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    model = AutoModelForCausalLM.from_pretrained(arguments.folder, dtype=arguments.dtype)
    tokenizer = vocabulary.load(arguments.folder)
    for title, table in TABLES.items():
        misses: list[str] = []
        print(f"### {title}\n", *table.measure(model, tokenizer, misses), "", sep="\n", flush=True)
        print(*misses[: arguments.misses], sep="\n")


if __name__ == "__main__":
    main()
