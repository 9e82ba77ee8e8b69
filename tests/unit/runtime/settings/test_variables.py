"""Environment variables for flags."""

import pytest

from quartet.runtime.errors import UsageError
from quartet.runtime.settings import flags

VALUES = {"integer": "7", "number": "0.5", "true | false": "true", "text": "a-text"}


def load(*argv, **environment):
    return flags.load(argv, environment=environment)


@pytest.mark.parametrize("name", flags.settings())
def test_every_flag_has_a_variable_that_says_the_same(name, tmp_path):
    setting = flags.settings()[name]
    value = VALUES.get(setting.takes, setting.takes.split(" | ")[-1])
    if name.endswith("key_file"):
        (tmp_path / "keys").write_text("k\n")
        value = str(tmp_path / "keys")
    value = {"dtype": "float32"}.get(name, value)
    variable = "QUARTET_" + name.upper()
    by_variable, by_flag = load(**{variable: value}), load(f"{setting.spelling}={value}")
    assert by_variable.config == by_flag.config
    assert by_variable.origin(name) == f"variable {variable}"


def test_flags_count_before_the_file_and_the_file_before_variables(tmp_path):
    (tmp_path / "c.yaml").write_text("port: 2\nhost: file\n")
    given = load(
        "--port", "3", QUARTET_CONFIG=f"{tmp_path}/c.yaml", QUARTET_PORT="1", QUARTET_HOST="v", QUARTET_UDS="/s"
    )
    assert (given.config.port, given.config.host, given.config.uds) == (3, "file", "/s")
    assert load("--config", f"{tmp_path}/c.yaml", QUARTET_CONFIG="/nowhere").config.port == 2


def test_an_alias_has_a_variable_too_and_two_values_are_refused():
    assert load(QUARTET_MODEL="m").config.model_path == "m"
    assert load(QUARTET_MODEL="m", QUARTET_MODEL_PATH="m").config.model_path == "m"
    with pytest.raises(UsageError, match=r"^QUARTET_MODEL_PATH and QUARTET_MODEL are one setting with two values"):
        load(QUARTET_MODEL="m", QUARTET_MODEL_PATH="n")


def test_our_name_counts_before_that_of_another_server():
    given = load(QUARTET_REQ_WAITING_TIMEOUT="1", SGLANG_REQ_WAITING_TIMEOUT="2")
    assert given.config.req_waiting_timeout == 1.0


def test_a_wrong_value_is_refused_with_the_name_of_the_variable():
    with pytest.raises(UsageError, match=r"^QUARTET_PORT takes integer, not 'http'$"):
        load(QUARTET_PORT="http")


def test_what_kubernetes_sets_for_a_service_of_that_name_is_no_setting():
    links = {"QUARTET_PORT": "tcp://10.0.0.1:80", "QUARTET_SERVICE_HOST": "10.0.0.1", "QUARTET_PORT_80_TCP_PORT": "80"}
    given = load(**links)
    assert (given.config.port, given.notes) == (30000, [])


def test_a_variable_written_wrongly_is_said_and_one_of_somebody_else_is_not():
    [note] = load(QUARTET_MAX_TOTAL_TOKEN="7", QUARTET_CPU_ISA="avx2", QUARTET_BRANCH="x").notes
    assert note == (
        "The variable QUARTET_MAX_TOTAL_TOKEN is not known and has no effect; did you mean QUARTET_MAX_TOTAL_TOKENS?"
    )


def test_no_process_inherits_a_secret():
    environment = {"QUARTET_API_KEY": "k", "QUARTET_SSL_KEYFILE_PASSWORD": "p", "QUARTET_PORT": "1"}
    flags.forget_secrets(environment)
    assert environment == {"QUARTET_PORT": "1"}
