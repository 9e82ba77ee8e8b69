"""Every command of the README's tour runs as it is printed, and prints what stands below it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from deploy import supported_models
from quartet.runtime.cli import COMMANDS, parser_of
from quartet.runtime.client.arguments import parsed
from quartet.runtime.settings import flags
from tests.readme import README, ROOT, Tour, agrees, examples, log_lines, mentioned, sandboxed, tours

TEXT = README.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tour(tmp_path_factory: pytest.TempPathFactory) -> Tour:
    out = tmp_path_factory.mktemp("readme") / "tour.json"
    command = sandboxed([sys.executable, "-m", "tests.readme", str(out)])
    if command is None:
        pytest.skip("this machine allows no namespaces (unshare), and the tour needs port 30000 and kills by name")
    subprocess.run(command, cwd=ROOT, check=True, timeout=280)
    return Tour(*json.loads(out.read_text()))


def without_parts(text: str) -> str:
    """Without lines that the next line begins with, as a text does that grows."""
    lines = text.splitlines()
    return "\n".join(line for line, after in zip(lines, [*lines[1:], ""], strict=True) if not after.startswith(line))


@pytest.mark.parametrize("number", range(len(tours(TEXT))), ids=lambda n: tours(TEXT)[n][0].command[:40])
def test_a_command_prints_what_the_readme_says(tour: Tour, number: int) -> None:
    printed, now = "\n".join(example.output for example in tours(TEXT)[number]), tour.outputs[number]
    # On a busy machine a part of a stream may have come together with the next one.
    told = agrees(printed, now) or agrees(without_parts(printed), without_parts(now))
    assert told, f"printed:\n{printed}\n\nnow:\n{now}"


@pytest.mark.parametrize("line", log_lines(TEXT))
def test_the_server_writes_the_lines_of_its_log_that_the_readme_shows(tour: Tour, line: str) -> None:
    assert agrees(line, tour.log), tour.log[-5000:]


@pytest.mark.parametrize("words", mentioned(TEXT), ids=" ".join)
def test_a_command_that_is_only_named_has_flags_that_exist(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("keys").write_text("a-key\n")  # as one of the commands names it
    command, *rest = words[1:]
    if not COMMANDS[command].server_flags:
        if COMMANDS[command].parser:
            parsed(parser_of(COMMANDS[command]), rest)
        return
    rest = rest[rest[:1] == ["show"] :]  # of config
    if not {"--help", "--help-all", "--yaml"} & set(rest) and "--config" not in rest:
        flags.load(rest, command=command, environment={})


def test_the_table_of_models_is_the_one_that_its_command_prints() -> None:
    assert supported_models.table() in TEXT


def test_text_in_the_readme_that_is_wrong_is_found() -> None:
    (example,) = examples(['$ echo \'{"id":"1",', '  "text":"Paris"}\'', '{"id":"1…", "text": "Paris"}'])
    assert example.command.endswith("}'") and Path(ROOT).is_dir()
    assert agrees(example.output, '{"id":"2","text":"Paris"}')
    assert not agrees(example.output, '{"id":"2","text":"Rome"}')
    assert without_parts(" On\n Once\n Once upon\nOne") == " Once upon\nOne"
