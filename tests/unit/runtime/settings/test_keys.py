"""Keys from flags, files and the environment, and the places where none of them may be seen."""

import os
import stat
from pathlib import Path

import msgspec
import pytest

from quartet.runtime.errors import UsageError
from quartet.runtime.launcher.launch import SERVICES
from quartet.runtime.launcher.supervisor import Supervisor
from quartet.runtime.service import Boot
from quartet.runtime.settings import flags, keys, show
from tests.configs import resolved

SECRET = "s3cr3t"


def load(*argv, environment=None):
    return flags.load(argv, environment=environment or {}).config


@pytest.mark.parametrize("blank", ["", " ", "\t", ",", "a,", "a,,b"])
@pytest.mark.parametrize("flag", ["--api-key", "--admin-api-key"])
def test_a_blank_key_is_refused_and_its_flag_named(flag, blank):
    with pytest.raises(UsageError, match=f"^{flag} holds an empty key"):
        load(flag, blank)


def test_an_unset_variable_that_was_passed_on_is_refused():
    with pytest.raises(UsageError, match="is a variable unset"):
        load("--api-key", "", environment={"QUARTET_API_KEY": "k"})


@pytest.mark.parametrize("variable", ["QUARTET_API_KEY", "QUARTET_ADMIN_API_KEY"])
def test_a_blank_variable_is_refused_and_named_itself(variable):
    with pytest.raises(UsageError, match=f"^{variable} holds an empty key.* Leave {variable} out"):
        load(environment={variable: ""})


def test_a_blank_key_in_the_settings_file_is_refused(tmp_path):
    (tmp_path / "c.yaml").write_text('api_key: ""\n')
    with pytest.raises(UsageError, match=r"^api_key in .*c\.yaml holds an empty key"):
        load("--config", str(tmp_path / "c.yaml"))


@pytest.mark.parametrize("key", ["a\nb", "a\x00", "a\x1b[0m", "\udcff"])
def test_a_key_that_no_header_can_carry_is_refused(key):
    with pytest.raises(UsageError, match="control character"):
        load("--api-key", key)


def test_a_key_longer_than_a_head_is_refused():
    with pytest.raises(UsageError, match="more than 4096 bytes"):
        load("--api-key", "k" * 4097)


def test_keys_come_from_a_file_one_a_line_without_comments(tmp_path):
    file = tmp_path / "keys"
    file.write_bytes("\ufeff# team a\nalpha \r\n\n  # team b\nbeta\n".encode())
    assert load("--api-key-file", str(file)).api_key == "alpha,beta"
    assert load("--api-key", "gamma", "--api-key-file", str(file)).api_key == "gamma,alpha,beta"
    assert load("--admin-api-key-file", str(file)).admin_api_key == "alpha,beta"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "holds no key"),
        (b"# only a comment\n", "holds no key"),
        (b"s3cr3t,b\n", "key 1 holds a comma"),
        (b"\xff\xfe\n", "it is not UTF-8 text"),
        (b"a\x00s3cr3t\n", "control character"),
        (b"#" * ((1 << 20) + 1), "is longer than"),
    ],
)
def test_a_wrong_key_file_is_refused_without_showing_what_it_holds(tmp_path, content, said):
    file = tmp_path / "keys"
    file.write_bytes(content)
    with pytest.raises(UsageError, match=said) as refused:
        load("--api-key-file", str(file))
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize("path", ["/nowhere/keys", "/"])
def test_a_key_file_that_cannot_be_read_is_refused_by_name(path):
    with pytest.raises(UsageError, match=f"cannot read --api-key-file {path}: "):
        load("--api-key-file", path)


def test_the_command_line_wins_over_the_file_and_the_file_over_the_environment(tmp_path):
    (tmp_path / "c.yaml").write_text("api_key: from-file\n")
    environment = {"QUARTET_API_KEY": "from-environment", "QUARTET_ADMIN_API_KEY": "admin"}
    assert load(environment=environment).api_key == "from-environment"
    assert load(environment=environment).admin_api_key == "admin"
    assert load("--config", str(tmp_path / "c.yaml"), environment=environment).api_key == "from-file"
    settings = ["--config", str(tmp_path / "c.yaml"), "--api-key", "from-flag"]
    assert load(*settings, environment=environment).api_key == "from-flag"


def test_a_repeated_flag_gives_several_keys():
    assert load("--api-key", "a", "--api-key", "b,c", "--api-key", "a").api_key == "a,b,c"


@pytest.mark.parametrize(
    "argv",
    [
        ["--api-key", "a", SECRET],
        ["--api-key=a", SECRET],
        ["--admin-api-key", "a", SECRET],
        ["--api-key", f"{SECRET}\n"],
    ],
)
def test_an_error_about_keys_repeats_none(argv):
    try:
        load(*argv)
    except UsageError as error:
        assert SECRET not in str(error)


def test_a_key_of_the_wrong_type_is_refused_without_showing_it(tmp_path):
    (tmp_path / "c.yaml").write_text("api_key: 12345678\n")
    with pytest.raises(UsageError, match="takes text, not what it was given"):
        load("--config", str(tmp_path / "c.yaml"))


def test_config_show_masks_keys_of_every_source(tmp_path, capsys, monkeypatch):
    (tmp_path / "keys").write_text(f"{SECRET}\n")
    monkeypatch.setenv("QUARTET_ADMIN_API_KEY", SECRET)
    assert show.main(["show", "--api-key-file", str(tmp_path / "keys")]) == 0
    shown = capsys.readouterr().out
    assert SECRET not in shown
    rows = {line.split()[0]: line.split(maxsplit=2)[1:] for line in shown.splitlines() if line}
    assert rows["admin_api_key"] == ["***", "variable QUARTET_ADMIN_API_KEY"]
    assert rows["api_key"][0] == "***"


def test_processes_started_later_inherit_no_key():
    environment = {"QUARTET_API_KEY": "a", "QUARTET_ADMIN_API_KEY": "b", "HOME": "/"}
    flags.forget_secrets(environment)
    assert environment == {"HOME": "/"}


def test_only_the_gateway_is_told_the_keys_and_no_other_user_can_read_its_boot_file(tmp_path, monkeypatch):
    config = resolved(api_key=SECRET, admin_api_key=SECRET)
    read_fd, write_fd = os.pipe()
    with Supervisor(SERVICES, config, tmp_path, read_fd, read_fd) as supervisor:
        monkeypatch.setattr("quartet.runtime.launcher.supervisor.start", lambda service, inherited: Silent())
        monkeypatch.setattr(supervisor, "stop", lambda: None)
        old = os.umask(0)
        try:
            for service in SERVICES:
                supervisor.spawn(service)
        finally:
            os.umask(old)
    os.close(read_fd)
    os.close(write_fd)
    for file in tmp_path.glob("*.boot"):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        boot = msgspec.msgpack.decode(file.read_bytes(), type=Boot)
        assert (boot.config.api_key == SECRET) is (boot.role == "gateway")
        assert (SECRET.encode() in file.read_bytes()) is (boot.role == "gateway")
    assert len(list(tmp_path.glob("*.boot"))) == len(SERVICES)


def test_a_configuration_without_keys_keeps_everything_else():
    config = resolved(api_key="a", admin_api_key="b", port=1)
    assert keys.without(config) == resolved(port=1)


class Silent:
    """A process that was never started."""

    their_ready_fd = 0
    exited = False

    def give(self, boot_file: Path, epoch: int) -> None:
        pass
