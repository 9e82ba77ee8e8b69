"""N-gram drafts where they are meant to help: a real model repeats real code with a small change in it."""

import inspect
import textwrap
from pathlib import Path
from typing import Any

import pytest

from quartet.runtime.model_files import hub, tokenizer_files
from quartet.runtime.sampling import SamplingParams
from tests import real_models
from tests.configs import resolved
from tests.engine import Engine
from tests.real_models import QWEN

pytestmark = [pytest.mark.slow, pytest.mark.real_models]

TOKENS = 96
LEAST_ACCEPTED_LENGTH = 2.5  # tokens a step, of all edits together
EDITS = (  # a function of the standard library, what is to be changed, and what stands in its first line then
    (textwrap.dedent, "Rename the parameter `text` to `source`.", "def dedent(source)"),
    (textwrap.indent, "Rename the parameter `prefix` to `start`.", "def indent(text, start, predicate=None)"),
    (textwrap.shorten, "Rename the parameter `width` to `columns`.", "def shorten(text, columns, **kwargs)"),
)


def prompt(function: Any, change: str) -> str:
    """The conversation as Qwen's template writes it."""
    return (
        "<|im_start|>system\nYou edit code. Answer with the whole code and nothing else.<|im_end|>\n"
        f"<|im_start|>user\n{change}\n```python\n{inspect.getsource(function)}```<|im_end|>\n"
        "<|im_start|>assistant\n```python\n"
    )


def test_edits_of_real_code_take_less_than_half_the_steps_and_say_the_same(tmp_path: Path) -> None:
    config = hub.locate(resolved(model_path=str(real_models.or_skip(QWEN))), tmp_path)
    directory = Path(config.model_dir)
    tokenizer = tokenizer_files.load(directory)
    prompts = [tokenizer.encode(prompt(function, change)).ids for function, change, _ in EDITS]
    plain = Engine(directory, dtype="float32", page_size=16)
    drafting = Engine(directory, worker=plain.worker, page_size=16, speculative_algorithm="NGRAM")
    params = SamplingParams(temperature=0.0, max_new_tokens=TOKENS)
    expected = plain.generate(prompts, params)
    found = drafting.generate(prompts, params)
    assert [answer.ids for answer in found] == [answer.ids for answer in expected]
    texts = [tokenizer.decode(answer.ids) for answer in found]
    edited = [line in text for text, (_, _, line) in zip(texts, EDITS, strict=True)]
    assert any(edited), texts  # so small a model also copies without the change
    print(f"drafts right: {drafting.planner.stats.correct_drafts} of {drafting.planner.stats.proposed_drafts}")
    tokens, correct = sum(len(answer.ids) for answer in found), drafting.planner.stats.correct_drafts
    print(f"{tokens} tokens, {tokens / (tokens - correct):.2f} in a step")
    assert tokens / (tokens - correct) > LEAST_ACCEPTED_LENGTH, (tokens, correct)
