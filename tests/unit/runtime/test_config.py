"""Flags, the YAML file and their order, all derived from ServerConfig."""

import pytest

from quartet.runtime.config import ServerConfig
from quartet.runtime.errors import UsageError
from quartet.runtime.settings import flags

SEED_FLAGS = (
    "--model-path qwen/qwen2.5-0.5b-instruct --host 0.0.0.0 --port 30001 --is-embedding --disable-radix-cache "
    "--chunked-prefill-size -1 --attention-backend triton --expert-distribution-recorder-mode stat "
    "--max-running-requests 128 --max-total-tokens 20480 --cuda-graph-max-bs 4"
)


def load(*argv):
    return flags.load(argv).config


def test_no_flags_is_the_demo_model_on_the_local_port_30000():
    config = load()
    assert (config.model_path, config.host, config.port) == ("demo", "127.0.0.1", 30000)
    assert config == ServerConfig()


def test_every_flag_of_the_documented_sessions_is_accepted_with_its_type():
    config = load(*SEED_FLAGS.split())
    assert config.model_path == "qwen/qwen2.5-0.5b-instruct"
    assert (config.host, config.port) == ("0.0.0.0", 30001)
    assert config.is_embedding
    assert config.disable_radix_cache
    assert config.chunked_prefill_size == -1
    assert config.attention_backend == "triton"
    assert config.expert_distribution_recorder_mode == "stat"
    assert (config.max_running_requests, config.max_total_tokens, config.cuda_graph_max_bs) == (128, 20480, 4)


def test_the_short_spelling_of_model_path_is_the_same_flag():
    assert load("--model", "/m").model_path == "/m"
    assert load("--model=/m").model_path == "/m"


def test_a_first_argument_that_is_no_flag_is_the_model():
    assert load("model.gguf", "--port", "7").model_path == "model.gguf"
    assert load("owner/name:Q4_K_M").model_path == "owner/name:Q4_K_M"


@pytest.mark.parametrize("again", ["--model-path", "--model_path=b", "--model"])
def test_a_model_that_is_named_twice_is_refused(again):
    with pytest.raises(UsageError, match=f"the model is named twice: a and {again}"):
        load("a", again, "b")


def test_a_switch_can_be_turned_off():
    assert load("--enable-metrics", "false").enable_metrics is False
    assert load("--is-embedding", "false").is_embedding is False


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--max-runing-requests", "4"], "unknown flag --max-runing-requests; did you mean --max-running-requests?"),
        (["--model-pth=/m"], "unknown flag --model-pth; did you mean --model-path?"),
        (["--confg", "f"], "unknown flag --confg; did you mean --config?"),
        (["--zzz"], "unknown flag --zzz; `quartet serve --help-all` lists them all"),
        (["demo", "again"], "unexpected argument 'again'; flags start with --"),
        (["--model", "demo", "again"], "unexpected argument 'again'; flags start with --"),
        (
            ["--port", "1", "demo"],
            "unexpected argument 'demo'; a model stands in front of all flags, or behind --model-path",
        ),
        (["--trust-remote-code"], "--trust-remote-code is not supported: Quartet never runs code"),
        (["--speculative-draft-model-path", "x"], "is not supported: Quartet runs no draft model"),
        (["--speculative-num-draft-tokens", "65"], "takes integer <= 64, not '65'"),
        (["--port", "http"], "--port takes integer, not 'http'"),
        (["--port", "65536"], "--port takes integer <= 65535, not '65536'"),
        (["--page-size", "0"], "--page-size takes integer >= 1, not '0'"),
        (["--device", "tpu"], "--device takes auto | cpu | cuda, not 'tpu'"),
        (["--is-embedding", "perhaps"], "--is-embedding takes true | false, not 'perhaps'"),
        (["--port"], "--port"),
        (["--watchdog-timeout", "nan"], "--watchdog-timeout takes number >= 0.0, not 'nan'"),
        (["--drain-timeout", "inf"], "--drain-timeout takes a finite number, not 'inf'"),
        (["--kv-cache-dir-size", "9" * 30], "--kv-cache-dir-size takes integer <= 9223372036854775807, not 9999"),
    ],
)
def test_a_wrong_flag_is_refused_with_the_remedy(argv, message):
    with pytest.raises(UsageError) as refused:
        flags.load(argv)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_file_gives_settings_and_the_command_line_wins(tmp_path):
    file = tmp_path / "server.yaml"
    file.write_text("port: 8000\nmax-total-tokens: 4096\nis_embedding: true\n")
    loaded = flags.load(["--config", str(file), "--port", "9000"])
    assert (loaded.config.port, loaded.config.max_total_tokens, loaded.config.is_embedding) == (9000, 4096, True)
    assert loaded.origin("port") == "command line"
    assert loaded.origin("max_total_tokens") == str(file)
    assert loaded.origin("host") == "default"


def test_an_empty_file_changes_nothing(tmp_path):
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert load("--config", str(tmp_path / "empty.yaml")) == ServerConfig()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prot: 1", "unknown key prot in {file}; did you mean port?"),
        ("port: '1'", "port in {file} takes integer, not '1'"),
        ("model_dir: /m", "unknown key model_dir"),
        ("- port", "must hold `name: value` lines"),
        ("port: [", "is not valid YAML"),
        ("port: !!python/object/apply:os.getcwd []", "is not valid YAML"),
    ],
)
def test_a_wrong_file_is_refused_with_the_remedy(tmp_path, text, message):
    file = tmp_path / "server.yaml"
    file.write_text(text)
    with pytest.raises(UsageError) as refused:
        flags.load(["--config", str(file)])
    assert message.format(file=file) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_missing_file_is_refused_by_name():
    with pytest.raises(UsageError, match=r"cannot read --config /nowhere\.yaml"):
        flags.load(["--config", "/nowhere.yaml"])


def test_help_names_every_flag_with_a_text_and_a_default():
    text = flags.build_parser("serve").format_help()
    for setting in flags.settings().values():
        assert setting.spelling in text
        assert setting.help
    assert "port to listen on; 0: any free one (default: 30000)" in " ".join(text.split())


def test_every_field_is_a_flag_but_those_that_the_launcher_fills_in():
    hidden = set(ServerConfig.__struct_fields__) - flags.settings().keys()
    assert hidden == {"listen_address", "model_dir", "tokenizer_dir"}


def test_secrets_are_masked_when_shown():
    shown = flags.public(load("--api-key", "k", "--port", "1"))
    assert (shown["api_key"], shown["admin_api_key"], shown["port"]) == ("***", None, 1)


@pytest.mark.parametrize(
    ("text", "said"), [("[" * 100_000, "is not valid YAML"), ("a: " + "x" * (1 << 20), "is larger than 1048576 bytes")]
)
def test_a_file_that_would_cost_much_is_refused_in_a_short_line(tmp_path, text, said):
    path = tmp_path / "server.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=said) as refusal:
        flags.load(["--config", str(path)], command="serve", environment={})
    assert len(str(refusal.value)) < 400
