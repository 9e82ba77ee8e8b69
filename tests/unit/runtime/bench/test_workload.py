"""Sessions made of a seed, and of files."""

import json
import math
from itertools import pairwise

import pytest

from quartet.runtime.bench.workload import Lengths, make, start_times
from quartet.runtime.errors import UsageError

LENGTHS = Lengths(input=20, output=10, vocabulary=1000)


def test_the_same_seed_gives_the_same_sessions_and_another_gives_others():
    assert make("random", 5, LENGTHS, seed=1) == make("random", 5, LENGTHS, seed=1)
    assert make("random", 5, LENGTHS, seed=1) != make("random", 5, LENGTHS, seed=2)


def test_random_prompts_have_the_lengths_that_are_asked_for_and_ids_of_the_vocabulary():
    for (turn,) in make("random", 50, LENGTHS, seed=1):
        assert (len(turn.ids), len(turn.text.split()), turn.output_tokens) == (20, 20, 10)
        assert all(100 <= i < 900 for i in turn.ids)


def test_lengths_vary_by_the_share_that_is_asked_for():
    sessions = make("random", 300, LENGTHS._replace(spread=0.5), seed=1)
    assert {len(turn.ids) for (turn,) in sessions} == set(range(10, 21))
    assert {turn.output_tokens for (turn,) in sessions} == set(range(5, 11))


def test_shared_prefixes_are_few_and_what_follows_differs():
    sessions = make("shared-prefix", 40, LENGTHS._replace(prefix=30, prefixes=3), seed=1)
    assert len({turn.ids[:30] for (turn,) in sessions}) == 3
    assert len({turn.ids[30:] for (turn,) in sessions}) == 40


def test_a_session_of_several_turns_has_new_words_in_each():
    (session,) = make("multi-turn", 1, LENGTHS._replace(turns=4), seed=1)
    assert len({turn.ids for turn in session}) == 4


def test_moments_are_a_poisson_process_of_that_rate():
    times = start_times(4000, rate=5, seed=3)
    gaps = [after - before for before, after in pairwise(times)]
    mean = sum(gaps) / len(gaps)
    assert times[0] == 0
    assert mean == pytest.approx(0.2, rel=0.05)
    deviation = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps))
    assert deviation == pytest.approx(mean, rel=0.05)  # as an exponential distribution has it
    assert start_times(4000, rate=5, seed=3) == times


def test_an_infinite_rate_begins_all_at_once():
    assert start_times(3, math.inf, seed=0) == [0, 0, 0]


SHAREGPT = [
    {
        "id": "a",
        "conversations": [
            {"from": "human", "value": "One?"},
            {"from": "gpt", "value": "x" * 40},
            {"from": "human", "value": "Two?"},
            {"from": "gpt", "value": "y" * 80},
        ],
    },
    {"id": "b", "conversations": [{"from": "gpt", "value": "Nobody asked."}]},
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Three?"},
            {"role": "assistant", "content": "z"},
        ]
    },
]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "sharegpt.json"
    path.write_text(json.dumps(SHAREGPT))
    return path


def test_a_file_gives_questions_and_the_lengths_of_their_answers(file):
    sessions = make("sharegpt", 4, Lengths(), seed=0, file=file)
    assert {(turn.text, turn.output_tokens) for (turn,) in sessions} == {("One?", 10), ("Three?", 1)}


def test_a_file_gives_several_turns_where_they_are_asked_for(file):
    sessions = make("sharegpt", 2, Lengths(turns=3, output=7), seed=0, file=file)
    texts = sorted([turn.text for turn in session] for session in sessions)
    assert texts == [["One?", "Two?"], ["Three?"]]
    assert {turn.output_tokens for session in sessions for turn in session} == {7}


@pytest.mark.parametrize("text", ["{", "[]", '[{"conversations": 3}]', '[{"conversations": []}]', "\x00"])
def test_a_file_that_cannot_be_used_is_named(tmp_path, text):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"--file .*bad\.json"):
        make("sharegpt", 1, Lengths(), seed=0, file=path)
