"""Variables of other servers in the environment."""

import re

import pytest

from quartet.runtime.errors import UsageError
from quartet.runtime.settings import flags
from quartet.runtime.settings.environment import HONOURED, WITHOUT_EFFECT


def load(**environment):
    return flags.load([], environment=environment)


def test_time_limits_come_from_their_variables_and_flags_win():
    loaded = load(SGLANG_REQ_WAITING_TIMEOUT="2.5", SGLANG_REQ_RUNNING_TIMEOUT="60")
    assert (loaded.config.req_waiting_timeout, loaded.config.req_running_timeout) == (2.5, 60.0)
    assert loaded.origin("req_waiting_timeout") == "variable SGLANG_REQ_WAITING_TIMEOUT"
    assert loaded.notes == []
    won = flags.load(["--req-waiting-timeout", "1"], environment={"SGLANG_REQ_WAITING_TIMEOUT": "9"})
    assert won.config.req_waiting_timeout == 1.0


@pytest.mark.parametrize("value", ["soon", "", "nan", "inf", "-2"])
def test_a_wrong_value_is_refused_with_the_variables_name(value):
    with pytest.raises(UsageError, match=r"^SGLANG_REQ_WAITING_TIMEOUT takes "):
        load(SGLANG_REQ_WAITING_TIMEOUT=value)


@pytest.mark.parametrize("name", sorted(WITHOUT_EFFECT))
def test_a_variable_without_effect_is_said_once_with_what_to_do(name):
    [note] = load(**{name: "7"}).notes
    assert name in note and WITHOUT_EFFECT[name] in note


@pytest.mark.parametrize("name", sorted(HONOURED))
def test_a_variable_that_counts_or_is_true_anyway_is_not_spoken_of(name):
    assert load(**{name: "7"}).notes == []


def test_an_unknown_variable_is_said_to_be_unknown():
    [note] = load(SGLANG_SOMETHING_NEW="1", HOME="/", QUARTET_X="1").notes
    assert note == "The variable SGLANG_SOMETHING_NEW is not known here and has no effect"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SGLANG_USE_MODELSCOPE", "false"),
        ("SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN", "0"),
        ("SGLANG_SOMETHING_NEW", ""),
        ("SGLANG_SET_CPU_AFFINITY", "1"),
        ("SGLANG_MOE_PADDING", "1"),
        ("SGLANG_ENABLE_JIT_DEEPGEMM", "0"),
        ("VLLM_WORKER_MULTIPROC_METHOD", "spawn"),
    ],
)
def test_what_changes_no_answer_is_not_spoken_of(name, value):
    assert load(**{name: value}).notes == []


def test_every_flag_that_a_note_names_exists():
    ours = {spelling for setting in flags.settings().values() for spelling in setting.spellings}
    assert {flag for text in WITHOUT_EFFECT.values() for flag in re.findall(r"--[a-z-]+", text)} <= ours


def test_help_names_the_variables():
    text = " ".join(flags.build_parser("serve").format_help().split())
    assert "(or the variable QUARTET_API_KEY)" in text
    assert "(or the variable SGLANG_REQ_WAITING_TIMEOUT)" in text
