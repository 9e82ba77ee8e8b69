"""The `quartet` command itself."""

import signal
import subprocess
import sys

import pytest

from quartet.runtime import cli
from quartet.runtime.launcher.supervisor import ExitStatus
from quartet.runtime.settings import show
from quartet.runtime.version import version


def test_help_lists_the_commands(capsys):
    assert cli.main([]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in cli.COMMANDS)


def test_version_is_the_installed_one_or_that_of_a_source_tree(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"quartet {version()}\n"
    assert version().startswith("0")


def test_an_unknown_command_suggests_the_right_one(capsys):
    assert cli.main(["sevre"]) == 2
    assert capsys.readouterr().err == "quartet: unknown command sevre; did you mean serve?\n"


def test_a_flag_before_the_command_is_explained(capsys):
    assert cli.main(["--port", "1"]) == 2
    assert "quartet serve --port" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["--help"], ["serve", "--help"]])
def test_help_loads_nothing_slow(command):
    watched = "{'torch', 'transformers', 'zmq', 'yaml', 'starlette'}"
    code = (
        "import sys, contextlib; from quartet.runtime import cli\n"
        f"with contextlib.suppress(SystemExit): cli.main({command!r})\n"
        f"sys.exit(', '.join({watched} & sys.modules.keys()) or 0)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stderr


def test_the_help_of_every_command_loads_nothing_slow():
    watched = "{'torch', 'transformers', 'zmq', 'yaml', 'starlette', 'httpx', 'prompt_toolkit', 'huggingface_hub'}"
    code = (
        "import sys; from quartet.runtime import cli\n"
        "for name, command in cli.COMMANDS.items():\n"
        "    if command.parser or command.server_flags: cli.main([name, '--help'])\n"
        f"sys.exit(', '.join({watched} & sys.modules.keys()) or 0)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("usage: quartet ") >= 8


def test_config_show_prints_each_value_with_its_origin(capsys, tmp_path):
    (tmp_path / "c.yaml").write_text("port: 8000\n")
    assert show.main(["show", "--config", str(tmp_path / "c.yaml"), "--api-key", "secret", "--device", "cpu"]) == 0
    rows = {line.split()[0]: line.split(maxsplit=2)[1:] for line in capsys.readouterr().out.splitlines()}
    assert rows["port"] == ["8000", str(tmp_path / "c.yaml")]
    assert rows["api_key"] == ["***", "command line"]
    assert rows["host"] == ["127.0.0.1", "default"]
    assert rows["page_size"] == ["16", "chosen for this machine"]


def test_config_without_show_says_what_to_type(capsys):
    assert show.main([]) == 2
    assert "quartet config show" in capsys.readouterr().err


@pytest.fixture
def listening():
    """Ctrl-C is heard, though a shell that runs the tests in the background has them ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_ctrl_c_while_a_command_is_imported_ends_it_without_a_traceback(capsys, monkeypatch, command, listening):
    monkeypatch.setattr(cli.importlib, "import_module", lambda name: signal.raise_signal(signal.SIGINT))
    assert cli.main([command]) == cli.INTERRUPTED == ExitStatus.INTERRUPTED
    assert capsys.readouterr() == ("", "")


def test_little_is_imported_before_ctrl_c_is_heard():
    code = "import sys, quartet.runtime.cli; print(*sorted(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    ours = {
        name for name in ran.stdout.split() if name.startswith("quartet.runtime.") and name != "quartet.runtime.process"
    }
    assert ours == {"quartet.runtime.cli", "quartet.runtime.process.streams", "quartet.runtime.errors"}


@pytest.mark.parametrize("module", ["quartet.launch_server", "runtime.launch_server"])
def test_the_module_forms_take_the_same_flags(module):
    command = [sys.executable, "-m", module, "--prot", "1"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (ran.returncode, ran.stderr) == (2, "quartet: unknown flag --prot; did you mean --port?\n")


@pytest.mark.parametrize("command", ["models", "--version", "config show", "serve --help", "completion bash"])
def test_a_command_that_only_prints_fails_where_its_output_is_closed(command: str) -> None:
    ran = subprocess.run(
        ["bash", "-c", f'exec "$0" -m quartet.runtime.cli {command} >&-', sys.executable],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ran.returncode, ran.stderr) == (1, "quartet: the output could not be written: Bad file descriptor\n")
