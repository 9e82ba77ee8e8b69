"""What the trial of the Dockerfile makes of it: instructions, variables, and the files that its build sees."""

from pathlib import Path, PurePosixPath

import pytest

from deploy.clean_root import dockerfile, image
from deploy.clean_root.first_answer import megabytes_fetched
from deploy.clean_root.root import Root

OURS = Path(image.REPOSITORY)


def test_instructions_are_joined_over_lines_and_comments_left_out():
    steps = dockerfile.parse("# why\nFROM a\n\nRUN one \\\n    && two\n# and\nENV A=1 \\\n    B='x y'\n")
    assert steps == [("FROM", "a"), ("RUN", "one && two"), ("ENV", "A=1 B='x y'")]


def test_an_instruction_that_is_not_carried_out_is_refused():
    with pytest.raises(ValueError, match="ONBUILD is not known here"):
        dockerfile.parse("ONBUILD RUN x")


def test_variables_are_put_in_from_those_before():
    assert dockerfile.assignments("A=1 B=${X}/c C=$X D", {"X": "/x"}) == {"A": "1", "B": "/x/c", "C": "/x", "D": ""}


@pytest.mark.parametrize(
    ("path", "visible"),
    [
        ("runtime/cli.py", True),
        ("runtime/launcher/__pycache__/child.pyc", False),
        ("quartet", True),
        ("pyproject.toml", True),
        ("tests/rig.py", False),
        (".venv/bin/python", False),
        ("docs/runtime", False),
    ],
)
def test_the_build_sees_what_the_package_is_made_of_and_nothing_else(path, visible):
    patterns = dockerfile.patterns_of((OURS / ".dockerignore").read_text())
    assert dockerfile.is_visible(PurePosixPath(path), patterns) == visible


def test_our_dockerfile_copies_only_what_its_build_sees_and_all_that_the_package_needs():
    patterns = dockerfile.patterns_of((OURS / ".dockerignore").read_text())
    steps = dockerfile.parse((OURS / "deploy/Dockerfile").read_text())
    copied = {word for name, text in steps if name == "COPY" for word in text.split()[:-1]}
    assert all((OURS / each).exists() and dockerfile.is_visible(PurePosixPath(each), patterns) for each in copied)
    assert {line.removeprefix("!") for line in patterns if line.startswith("!")} == copied
    assert {"LICENSE", "README.md", "pyproject.toml", "quartet"} <= copied


def test_a_build_argument_wins_over_the_default_and_ends_with_the_build():
    build = image.Build(Root(Path("/nowhere")), {"INDEX": "mine"})
    for step in dockerfile.parse("ARG INDEX=theirs\nARG OTHER=1\nENV PLACE=${INDEX}\nUSER quartet\n"):
        build.carry_out(step)
    assert build.variables == {"INDEX": "mine", "OTHER": "1"}
    assert (build.environment, build.user) == ({"PLACE": "mine"}, "quartet")


def test_files_are_copied_as_the_instruction_says_and_links_stay_links(tmp_path):
    build = image.Build(Root(tmp_path), {}, directory="/opt/quartet")
    build.copy(["pyproject.toml", "LICENSE", "./"])
    build.copy(["quartet", "quartet"])
    copied = tmp_path / "opt/quartet"
    assert (copied / "LICENSE").read_text() == (OURS / "LICENSE").read_text()
    assert (copied / "quartet/runtime").is_symlink() and (copied / "quartet/__init__.py").is_file()
    with pytest.raises(FileNotFoundError, match="COPY tests"):
        build.copy(["tests", "tests"])


def test_a_command_has_only_the_variables_it_is_given_and_the_home_of_its_user(tmp_path):
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\nquartet:x:1000:1000::/home/quartet:/bin/sh\n")
    script = Root(tmp_path, environment={"A": "1"}).command("make it", {"B": "a b"}, "/opt", "quartet")[-1]
    assert "chroot --userspec=quartet:quartet . /usr/bin/env -i" in script
    assert "HOME=/home/quartet A=1 'B=a b' /bin/sh -c 'cd /opt && make it'" in script


def test_what_pip_fetched_is_summed_from_what_it_prints_each_file_once(tmp_path):
    (tmp_path / "a.whl").write_bytes(bytes(1_500_000))
    printed = f"""
Collecting x
  Downloading x-1-py3-none-any.whl.metadata (12 kB)
  Downloading x-1-py3-none-any.whl (1.2 MB)
Downloading x-1-py3-none-any.whl (1.2 MB)
Processing {tmp_path}/a.whl (from y)
Processing /opt/no.whl
"""
    assert megabytes_fetched(printed) == pytest.approx(2.7)
