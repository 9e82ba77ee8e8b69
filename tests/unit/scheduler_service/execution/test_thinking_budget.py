"""The end of a thought is forced at the same token in every way of computing it, and the answer follows."""

from pathlib import Path
from typing import Any

import msgspec
import pytest
from tokenizers import Tokenizer

from quartet.runtime.messages import LogprobOptions, Request, Thought, ThoughtIds, pack_ids
from quartet.runtime.sampling import SamplingParams
from quartet.scheduler_service.grammar.grammar_queue import output_grammar
from tests.engine import Answer, Engine, floats
from tests.model import tiny
from tests.unit.scheduler_service.test_overlap import Overlapped

OPEN, CLOSE = 300, 301
INSIDE = Thought(opening="<think>", closing="</think>", place="inside", ids=ThoughtIds(opening=OPEN, closing=CLOSE))
BEFORE = msgspec.structs.replace(INSIDE, place="before")
PROMPTS = [[5, 6, 7] * 8, [9] * 30, list(range(20, 60))]
NGRAM: dict[str, Any] = {"speculative_algorithm": "NGRAM", "speculative_ngram_min_match_window_size": 1}
NEVER = {str(OPEN): -100.0, str(CLOSE): -100.0}  # the model itself writes neither tag


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build("qwen3", tmp_path_factory.mktemp("thoughts"))


def params(budget: int | None, **more: Any) -> SamplingParams:
    asked = {"temperature": 0.0, "max_new_tokens": 24, "ignore_eos": True, "logit_bias": NEVER, **more}
    return SamplingParams(thinking_budget=budget, **asked)


def ids_of(answers: list[Answer]) -> list[list[int]]:
    return [answer.ids for answer in answers]


@pytest.mark.parametrize("budget", [0, 1, 7, 23])
def test_the_tag_stands_right_behind_the_budget(directory: Path, budget: int) -> None:
    free, limited = (Engine(directory).generate(PROMPTS, params(b), thought=INSIDE) for b in (None, budget))
    for one, other in zip(limited, free, strict=True):
        assert one.ids[:budget] == other.ids[:budget] and one.ids[budget] == CLOSE
        assert CLOSE not in one.ids[:budget] + one.ids[budget + 1 :] and len(one.ids) == 24


def test_a_budget_that_is_never_spent_changes_nothing(directory: Path) -> None:
    free, limited = (Engine(directory).generate(PROMPTS, params(b), thought=INSIDE) for b in (None, 24))
    assert ids_of(limited) == ids_of(free)


def test_a_thought_that_has_ended_is_not_ended_again(directory: Path) -> None:
    ended = params(5, logit_bias={str(CLOSE): 100.0}, max_new_tokens=1)
    [first] = Engine(directory).generate(PROMPTS[:1], ended, thought=INSIDE)
    resumed = pack_ids(first.ids)
    [answer] = Engine(directory).generate(PROMPTS[:1], params(5), thought=INSIDE, resume_ids=resumed)
    assert first.ids == [CLOSE] and CLOSE not in answer.ids


def test_only_an_output_that_opens_its_thought_is_limited(directory: Path) -> None:
    [answer] = Engine(directory).generate(PROMPTS[:1], params(3), thought=BEFORE)
    assert CLOSE not in answer.ids
    resumed = pack_ids([OPEN])
    [opened] = Engine(directory).generate(PROMPTS[:1], params(3), thought=BEFORE, resume_ids=resumed)
    assert opened.ids[3] == CLOSE and CLOSE not in opened.ids[:3]


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"temperature": 0.3},
        {"temperature": 0.0, "stop_token_ids": [CLOSE], "min_new_tokens": 20},
        {"frequency_penalty": 0.5},
    ],
)
def test_drafts_and_overlapped_steps_end_it_at_the_same_token(directory: Path, more: dict[str, Any]) -> None:
    asked = [params(budget, max_new_tokens=40, **more) for budget in (6, 0, 17)]

    def run(engine: Engine) -> list[list[int]]:
        rids = [engine.add(p, a, seed=i, thought=INSIDE) for i, (p, a) in enumerate(zip(PROMPTS, asked, strict=True))]
        engine.run()
        return [engine.answers[rid].ids for rid in rids]

    expected = run(Engine(directory))
    assert [ids.index(CLOSE) for ids in expected] == [6, 0, 17]
    assert run(Engine(directory, **NGRAM)) == expected
    assert run(Overlapped(directory)) == expected


def test_overlapped_steps_wait_only_for_the_forced_token(directory: Path) -> None:
    ahead = Overlapped(directory)
    ahead.generate(PROMPTS[:1], params(10), thought=INSIDE)
    assert ahead.steps_ahead >= 20  # of 23


def test_a_retracted_request_ends_its_thought_at_the_same_token(directory: Path) -> None:
    expected = Engine(directory).generate(PROMPTS, params(9), thought=INSIDE)
    engine = Engine(directory)
    rids = [engine.add(prompt, params(9), thought=INSIDE) for prompt in PROMPTS]
    for _ in range(6):
        engine.step()
    engine.planner.retract_all()
    engine.run()
    assert [engine.answers[rid].ids for rid in rids] == ids_of(expected)
    assert all(engine.answers[rid].retractions for rid in rids)


@pytest.mark.parametrize("kept", range(0, 12, 2))
def test_an_interrupted_request_ends_its_thought_at_the_same_token(directory: Path, kept: int) -> None:
    [whole] = Engine(directory).generate(PROMPTS[:1], params(7), thought=INSIDE)
    resumed = pack_ids(whole.ids[:kept])
    [rest] = Engine(directory).generate(PROMPTS[:1], params(7), thought=INSIDE, resume_ids=resumed)
    assert whole.ids[:kept] + rest.ids == whole.ids


def test_the_forced_token_is_certain(directory: Path) -> None:
    options = LogprobOptions(top=1)
    [answer] = Engine(directory).generate(PROMPTS[:1], params(4), thought=INSIDE, logprobs=options)
    assert answer.logprobs is not None and floats(answer.logprobs.values)[4] == 0.0


@pytest.mark.parametrize("settings", [{}, NGRAM])
def test_a_schema_constrains_what_follows_the_forced_end(tmp_path: Path, settings: dict[str, Any]) -> None:
    directory = tiny.build("qwen3", tmp_path)
    tiny.save_tokenizer(directory, 318)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    opening, closing = tokenizer.token_to_id("<think>"), tokenizer.token_to_id("</think>")
    thought = msgspec.structs.replace(INSIDE, ids=ThoughtIds(opening=opening, closing=closing))
    never = {str(opening): -100.0, str(closing): -100.0}
    asked = params(5, json_schema='{"enum": ["yes"]}', max_new_tokens=80, ignore_eos=False, logit_bias=never)
    whole = output_grammar(Request(rid="r", params=asked, thought=thought), "json_schema", asked.json_schema or "")
    engine = Engine(directory, **settings)
    rid = engine.add(PROMPTS[0], asked, thought=thought, grammar=engine.compiler.compile(*whole))
    engine.run()
    ids = engine.answers[rid].ids
    thinking = tokenizer.decode(ids[: ids.index(closing)])
    assert 5 <= ids.index(closing) < 8 and "\ufffd" not in thinking  # where a character had begun, it was completed
    assert engine.answers[rid].finish is not None
    assert tokenizer.decode(ids[ids.index(closing) + 1 :]).strip() == '"yes"'
