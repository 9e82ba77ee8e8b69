"""What may be typed behind `quartet bench`, and what is said of the rest."""

import pytest

from quartet.runtime.bench.arguments import PEERS, bench_parser, parse
from quartet.runtime.errors import UsageError


def test_requests_at_once_are_the_default_and_give_way_to_a_rate():
    assert (parse([]).concurrency, parse([]).rate) == (8, None)
    assert (parse(["--rate", "2.5"]).concurrency, parse(["--rate", "2.5"]).rate) == (None, 2.5)


def test_every_run_has_a_new_seed_unless_one_is_given():
    assert parse(["--seed", "7"]).seed == 7
    assert len({parse([]).seed for _ in range(20)}) > 1


def test_limits_are_seconds_by_name():
    assert parse(["--slo", "ttft=0.5,tpot=0.05"]).slo == {"ttft": 0.5, "tpot": 0.05}


def test_a_file_means_its_conversations(tmp_path):
    options = parse(["--file", "x.json"])
    assert (options.workload, options.turns) == ("sharegpt", 1)
    assert parse(["--workload", "multi-turn"]).turns == 4


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--rate", "0"], "--rate"),
        (["--rate", "nan"], "--rate"),
        (["--requests", "1.5"], "--requests"),
        (["--length-spread", "2"], "--length-spread"),
        (["--slo", "speed=1"], "--slo"),
        (["--slo", "ttft"], "--slo"),
        (["--workload", "sharegpt"], "--file"),
        (["--file", "x", "--workload", "random"], "--file"),
        (["--turns", "3"], "--turns"),
        (["--api", "grpc"], "--api"),
        (["--compare", "http://one"], "--compare"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(words, named):
    with pytest.raises(UsageError, match=named):
        parse(words)


@pytest.mark.parametrize("flag", PEERS)
def test_flags_of_other_load_generators_are_answered_with_ours(flag):
    with pytest.raises(UsageError, match=f"it is called {PEERS[flag]} here"):
        parse([flag, "1"])
    assert PEERS[flag] in bench_parser().format_help()
