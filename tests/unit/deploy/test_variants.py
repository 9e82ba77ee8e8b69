"""How streams that go to several servers in turns are compared."""

import pytest

from deploy.benchmarks.variants import compared, parsed


def test_ratios_are_those_of_rounds_and_of_the_rounds_with_quick_memory():
    found = compared({"bf16": [30.0, 20.0, 40.0], "int8": [15.0, 16.0, 10.0]})
    assert found["bf16"] == {"ms a token": 30.0, "ratio": 1.0, "ratio where memory is quick": 1.0}
    assert found["int8"] == {"ms a token": 15.0, "ratio": 2.0, "ratio where memory is quick": 1.625}


@pytest.mark.parametrize(
    "wrong", [["a:", "a:--dtype bfloat16"], [":"], ["a:", "--rounds", "0"], ["a:", "--tokens", "1"]]
)
def test_a_wrong_command_line_is_refused(wrong, capsys):
    with pytest.raises(SystemExit):
        parsed(wrong)
    assert "error: " in capsys.readouterr().err
