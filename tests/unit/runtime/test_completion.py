"""Scripts for completion, run by the shells that are here."""

import shutil
import subprocess

import pytest

from quartet.runtime import completion
from quartet.runtime.cli import COMMANDS


def script(shell: str) -> str:
    return completion.SHELLS[shell](tuple(completion.commands()))


def completed(*words: str) -> set[str]:
    """What bash offers for the last word."""
    line = " ".join(f"'{word}'" for word in words)
    shows = 'printf "%s\\n" "${COMPREPLY[@]}"'
    code = f"{script('bash')}\nCOMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _quartet; {shows}"
    ran = subprocess.run(["bash", "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert ran.stderr == ""
    return set(ran.stdout.split())


def test_commands_are_offered_first():
    assert {*COMMANDS, "--help"} <= completed("quartet", "")
    assert completed("quartet", "mo") == {"models"}


def test_the_flags_of_a_command_are_offered():
    assert completed("quartet", "serve", "--quant") == {"--quantization"}
    assert {"--url", "--system"} <= completed("quartet", "chat", "--")
    assert completed("quartet", "chat", "--rate") == set()


def test_values_are_offered_where_they_are_few():
    assert completed("quartet", "serve", "--device", "") == {"auto", "cpu", "cuda"}
    assert completed("quartet", "bench", "--api", "open") == {"openai", "openai-chat"}


def test_words_and_files_are_offered_behind_a_command(tmp_path, monkeypatch):
    (tmp_path / "model.gguf").touch()
    monkeypatch.chdir(tmp_path)
    assert completed("quartet", "config", "") == {"show", "model.gguf"}
    assert completed("quartet", "models", "r") == {"rm"}
    assert completed("quartet", "serve", "mod") == {"model.gguf"}


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_script_is_one_that_its_shell_can_read(shell, tmp_path):
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"{shell} is not installed")
    file = tmp_path / "script"
    file.write_text(script(shell))
    ran = subprocess.run([program, "-n", str(file)], capture_output=True, text=True, timeout=120, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_every_script_names_every_command_and_flag():
    for shell in completion.SHELLS:
        text = script(shell)
        assert all(name in text for name in COMMANDS), shell
        assert all(f"{flag}" in text for flag in ("max-running-requests", "length-spread", "download-dir")), shell


def test_quotes_in_a_description_end_nothing():
    assert completion.quoted("it's") == "'it'\\''s'"
    assert completion.fish_quoted("it's \\") == "'it\\'s \\\\'"
    assert completion.escaped("[a:b]") == "\\[a\\:b\\]"


def test_an_unknown_shell_is_refused(capsys):
    assert completion.main(["tcsh"]) == 2
    assert "tcsh" in capsys.readouterr().err
