"""Recordings of experts as pictures."""

from pathlib import Path

import pytest

from quartet.runtime import cli
from quartet.runtime.experts_plot import loads

PNG = b"\x89PNG"
TABLE = "layer_id,expert_id,count\n0,0,3\n0,1,1\n1,0,0\n1,1,0\n"


@pytest.fixture
def dump(tmp_path: Path) -> Path:
    (tmp_path / "dump_1.5.csv").write_text(TABLE)
    return tmp_path / "dump_1.5.pt"


@pytest.mark.parametrize("action", ["plot", "PLOT"])
def test_a_dump_becomes_a_picture_beside_it(action: str, dump: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert cli.main(["experts", action, str(dump)]) == 0
    picture = dump.with_suffix(".png")
    assert picture.read_bytes().startswith(PNG)
    assert capsys.readouterr().out == f"{picture}: 2 layers x 2 experts, 4 choices\n"


def test_the_table_itself_will_do_and_the_picture_goes_where_it_is_told(dump: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    target = tmp_path / "picture.png"
    assert cli.main(["experts", "plot", str(dump.with_suffix(".csv")), "-o", str(target)]) == 0
    assert target.read_bytes().startswith(PNG)


def test_loads_are_relative_to_an_even_share_of_the_layer() -> None:
    even, none = loads([[3, 1], [0, 0]])
    assert even == [1.5, 0.5]
    assert [load == load for load in none] == [False, False]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b,c\n0,0,1\n", "is no table of layer_id, expert_id, count"),
        ("layer_id,expert_id,count\n", "is no table"),
        ("layer_id,expert_id,count\n0,0,1\n0,99999999999,1\n", "is no table"),
        ("layer_id,expert_id,count\n0,x,1\n", "cannot read"),
        ("layer_id,expert_id,count\n0,1\n", "cannot read"),
    ],
)
def test_what_is_no_recording_is_refused_in_one_line(
    content: str, message: str, dump: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dump.with_suffix(".csv").write_text(content)
    assert cli.main(["experts", "plot", str(dump)]) == 2
    assert message in (said := capsys.readouterr().err) and said.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["draw", "x.pt"], ["plot", "nowhere.pt"]])
def test_a_wrong_command_is_explained(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["experts", *arguments]) == 2
    assert capsys.readouterr().err.startswith("quartet: ")
