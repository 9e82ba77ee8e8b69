"""Command lines written for other servers."""

import re

import pytest

from quartet.runtime.config import ServerConfig
from quartet.runtime.errors import UsageError
from quartet.runtime.settings import flags, show
from quartet.runtime.settings.foreign_flags import FLAGS
from quartet.runtime.settings.foreign_values import VALUES


def load(*argv):
    return flags.load(argv)


@pytest.mark.parametrize(
    "argv",
    [
        ["--grammar-backend", "xgrammar"],
        ["--grammar-backend=llguidance"],
        ["--disable-overlap-schedule"],
        ["--tokenizer-worker-num", "1"],
        ["--pp-size", "1"],
        ["--ep-size", "1"],
        ["--schedule-conservativeness", "1.0"],
        ["--sampling-backend", "flashinfer"],
        ["--lora-backend", "csgmv"],
        ["--lora-eviction-policy", "lru"],
        ["--json-model-override-args", "{}"],
        ["--enable-prefix-caching"],
        ["--jinja"],
        ["-fa", "on"],
        ["-cb"],
        ["-sm", "none"],
    ],
)
def test_a_flag_that_means_what_holds_anyway_is_accepted_and_said(argv):
    loaded = load(*argv)
    assert loaded.config == ServerConfig()
    assert all(" has no effect here: " in note for note in loaded.notes)
    assert len(loaded.notes) == sum(word.startswith("-") for word in argv)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--max-model-len", "4096"], "--max-model-len is not supported: use --context-length"),
        (["--max_model_len=4096"], "use --context-length"),
        (["--lora-modules", "a=b", "c=d"], "use --lora-paths"),
        (["--lora-eviction-policy", "fifo"], "least recently used first"),
        (["--pp", "2"], "--pp 2 is not supported: there is no pipeline parallelism"),
        (["--pp=2"], "no pipeline parallelism"),
        (["--pp-size", "4"], "start several servers behind a router"),
        (["--tokenizer-worker-num", "4"], "there is one tokenizer process"),
        (["--grammar-backend", "none"], "cannot be turned off"),
        (["--cuda-graph-bs", "1", "2", "4"], "use --cuda-graph-max-bs"),
        (["--quantization", "hqq"], "--quantization takes auto | none | int8 | int4, not 'hqq'"),
        (["--gpu-memory-utilization", "0.9"], "use --mem-fraction-static"),
        (["--max-num-seqs", "64"], "use --max-running-requests"),
        (["--enforce-eager"], "use --disable-cuda-graph"),
        (["--seed", "1"], "use --random-seed"),
        (["-m", "model.gguf"], "use --model-path"),
        (["-ngl", "99"], "use --device"),
        (["-hf", "o/n:Q4_K_M"], "quartet serve OWNER/NAME:Q4_K_M"),
        (["-cnv"], "use `quartet chat`"),
        (["--tensor-split", "3,1"], "start several behind a router"),
        (["--ctx-size", "4096"], "use --context-length"),
        (["-c", "4096"], "use --context-length"),
        (["--parallel", "4"], "use --max-running-requests"),
        (["--temp", "0.7"], "use --preferred-sampling-params"),
        (["--trust-remote-code"], "Quartet never runs code"),
        (["--schedule-policy", "lof"], "--schedule-policy takes fcfs | lpm | priority, not 'lof'"),
        (["Qwen/Qwen3-8B", "other", "--port", "1"], "a model is named by --model-path"),
    ],
)
def test_a_flag_that_asks_for_something_else_is_refused_with_the_right_advice(argv, said):
    with pytest.raises(UsageError) as refused:
        load(*argv)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_token_in_a_refused_flag_is_not_repeated():
    with pytest.raises(UsageError, match="use the variable HF_TOKEN") as refused:
        load("--hf-token", "hf_s3cr3t")
    assert "s3cr3t" not in str(refused.value)


@pytest.mark.parametrize(
    ("argv", "field", "value"),
    [
        (["--disable-radix"], "disable_radix_cache", True),
        (["--max-running", "3"], "max_running_requests", 3),
        (["--mem-frac=0.5"], "mem_fraction_static", 0.5),
        (["--served_model_name", "m"], "served_model_name", "m"),
        (["--chunked", "-1"], "chunked_prefill_size", -1),
    ],
)
def test_an_unambiguous_prefix_is_the_flag(argv, field, value):
    loaded = load(*argv)
    assert getattr(loaded.config, field) == value
    assert loaded.origin(field) == "command line"


@pytest.mark.parametrize("word", ["--max", "--api", "--enable", "--log", "--speculative-num"])
def test_an_ambiguous_prefix_is_refused_with_what_it_may_mean(word):
    with pytest.raises(UsageError, match=f"^{word} may mean --") as refused:
        load(word, "1")
    assert all(spelling.startswith(word) for spelling in re.findall(r"--[a-z-]+", str(refused.value)))


def test_a_key_that_begins_with_a_dash_is_not_taken_for_a_flag_and_shown():
    with pytest.raises(UsageError, match="--api-key=<key>") as refused:
        load("--api-key", "-s3cr3t")
    assert "s3cr3t" not in str(refused.value)
    assert load("--api-key=-s3cr3t").config.api_key == "-s3cr3t"


@pytest.mark.parametrize(
    ("argv", "field", "value", "said"),
    [
        (["--schedule-policy", "random"], "schedule_policy", "fcfs", "promises no order"),
        (["--schedule-policy", "dfs-weight"], "schedule_policy", "lpm", "as lpm does"),
        (["--attention-backend", "fa3"], "attention_backend", None, "chosen by device"),
        (["--attention-backend", "flashinfer"], "attention_backend", None, "chosen by device"),
    ],
)
def test_a_value_of_other_servers_becomes_the_nearest_of_ours_and_is_said(argv, field, value, said):
    loaded = load(*argv)
    assert getattr(loaded.config, field) == value
    [note] = loaded.notes
    assert said in note and note.startswith(" ".join(argv))


def test_the_settings_file_takes_them_likewise(tmp_path):
    file = tmp_path / "server.yaml"
    file.write_text(
        "pipeline-parallel-size: 1\nlog_requests: false\nlora-backend: triton\ngrammar_backend: xgrammar\n"
        "schedule-policy: random\nquantization: null\n"
    )
    loaded = load("--config", str(file))
    assert loaded.config == ServerConfig()
    assert len(loaded.notes) == 6
    file.write_text("pp-size: 2\n")
    with pytest.raises(UsageError, match="no pipeline parallelism"):
        load("--config", str(file))


def test_config_show_says_what_has_no_effect(capsys):
    assert show.main(["show", "--pp", "1"]) == 0
    assert "note: --pp 1 has no effect here" in capsys.readouterr().out


def test_no_flag_is_ours_and_foreign_at_once():
    ours = {spelling for setting in flags.settings().values() for spelling in setting.spellings}
    assert not ours & FLAGS.keys()


def test_every_flag_that_an_advice_names_exists():
    ours = {spelling for setting in flags.settings().values() for spelling in setting.spellings}
    advised = {name for flag in FLAGS.values() for name in re.findall(r"(?<![\w-])--[a-z][a-z-]+", flag.advice)}
    assert advised
    assert advised <= ours


def test_every_value_that_is_translated_belongs_to_a_flag_and_becomes_one_it_takes():
    for (name, _), value in VALUES.items():
        given = [] if value.instead is None else [f"--{name.replace('_', '-')}", value.instead]
        assert name in flags.settings()
        load(*given)


def test_advice_is_one_short_plain_line():
    for name, flag in FLAGS.items():
        assert flag.advice and "\n" not in flag.advice and not flag.advice.endswith("."), name
