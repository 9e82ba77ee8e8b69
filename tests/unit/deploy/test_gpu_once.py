"""The one-command GPU benchmark, as far as a machine without a GPU can show it."""

import json
import re
import zipfile
from pathlib import Path

import pytest
import torch

from deploy.benchmarks import gpu_once
from deploy.benchmarks.gpu import packages
from deploy.benchmarks.gpu.report import Report, table
from deploy.benchmarks.gpu.sections import SECTIONS
from deploy.benchmarks.gpu.shapes import SHAPES, Cost, Limits

H200 = Limits(bytes_per_s=4.3e12, flops_per_s=790e12)
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is at hand")


def test_sections_are_listed_with_their_deadlines(capsys):
    assert gpu_once.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [section.name for section in SECTIONS]


def test_all_sections_together_stay_near_ten_minutes():
    assert sum(section.deadline_s for section in SECTIONS) <= 600
    assert gpu_once.BUDGET_S < 600


@no_gpu
def test_without_a_gpu_every_section_is_skipped_and_says_why(tmp_path, capsys):
    assert gpu_once.main(["--out", str(tmp_path), "--sections", "single", "http"]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert {name: result["status"] for name, result in results.items()} == {
        "single": "skipped: no CUDA device is at hand",
        "http": "skipped: no CUDA device is at hand",
    }
    assert "no CUDA device is at hand" in capsys.readouterr().out


def test_a_section_that_lacks_a_package_names_it():
    (single,) = (section for section in SECTIONS if section.name == "single")
    lacking = gpu_once.lacking(
        type(single)("made", "decoding", "single", 1.0, needs=("msgspec", "no_such_module")), "cpu"
    )
    assert lacking == "not installed: no_such_module"


@pytest.mark.parametrize("arguments", [[], ["--out", "x", "--sections", "unheard-of"]])
def test_wrong_arguments_are_refused(arguments):
    with pytest.raises(SystemExit) as refusal:
        gpu_once.parsed(arguments)
    assert refusal.value.code == 2


def test_no_section_is_begun_when_the_time_is_up(tmp_path):
    assert gpu_once.main(["--rehearse", "--out", str(tmp_path), "--sections", "ceilings", "--budget", "1"]) == 0
    assert json.loads((tmp_path / "results.json").read_text())["ceilings"]["status"] == "skipped: the time is up"


def test_a_section_that_hangs_is_ended_at_its_deadline_and_keeps_what_it_found(tmp_path):
    options = gpu_once.parsed(["--rehearse", "--out", str(tmp_path)])
    (static,) = (section for section in SECTIONS if section.name == "ceilings")
    result = gpu_once.run_one(static, options, "cpu", 0.05, "")
    assert result["status"] == "ended at its deadline of 0 s"


@pytest.mark.slow
@pytest.mark.parametrize("section", ["ceilings", "kernels", "single", "mixed", "reload"])
def test_a_rehearsal_on_the_cpu_runs_a_section_to_its_end(tmp_path, section):
    assert gpu_once.main(["--rehearse", "--out", str(tmp_path), "--sections", section]) == 0
    result = json.loads((tmp_path / "results.json").read_text())[section]
    assert result["status"] == "complete" and result["complete"]
    assert all(figure["value"] > 0 for figure in result["figures"])


def test_wheels_are_unpacked_where_they_fit_this_interpreter(tmp_path):
    for name in ("one-1-py3-none-any.whl", "two-1-cp27-cp27mu-manylinux1_x86_64.whl"):
        with zipfile.ZipFile(tmp_path / name, "w") as wheel:
            wheel.writestr(f"{name[:3]}.py", "")
    target = tmp_path / "unpacked"
    assert packages.unpack(tmp_path, target) == ["one-1-py3-none-any.whl"]
    assert [path.name for path in target.iterdir()] == ["one.py"]
    assert packages.fits("m-1-cp312-cp312-manylinux_2_17_x86_64.manylinux2014_x86_64.whl", "cp312")
    assert packages.fits("l-1-cp39-abi3-manylinux_2_28_x86_64.whl", "cp312")


def test_figures_are_written_as_they_are_found_and_the_fraction_comes_first(tmp_path, capsys):
    report = Report(tmp_path / "x.json")
    report.figure("rate", 50.0, "tok/s", ceiling=200.0, goal=100.0)
    report.figure("time", 8.0, "ms", ceiling=2.0)
    data = json.loads((tmp_path / "x.json").read_text())
    assert [figure["fraction"] for figure in data["figures"]] == [0.25, 0.25]
    text = table({"x": {**data, "status": "complete"}})
    assert re.search(r"^ *25\.0%  rate +50 tok/s of 200 \(goal 100\)", text, re.MULTILINE)


@pytest.mark.parametrize(
    ("name", "gigabytes", "tokens_per_s"),
    [("qwen2.5-0.5b", 0.988, 4353), ("llama-3.1-8b", 15.01, 286), ("qwen1.5-moe-a2.7b", 4.756, 904)],
)
def test_the_least_cost_of_a_step_is_the_one_of_the_plan(name, gigabytes, tokens_per_s):
    cost = Cost(SHAPES[name])
    assert cost.parameters(1) * 2 / 1e9 == pytest.approx(gigabytes, rel=0.01)
    assert 1 / cost.decode_s(1, 0, H200) == pytest.approx(tokens_per_s, rel=0.01)


def test_the_nano_benchmark_has_its_known_numbers_of_tokens(tmp_path):
    from deploy.benchmarks.gpu.decoding import nano_requests
    from deploy.benchmarks.gpu.setting import Setting

    setting = Setting(Path(tmp_path), torch.device("cpu"), False, Report(tmp_path / "nano.json"))
    prompts, news = nano_requests(setting)
    assert (sum(map(len, prompts)), sum(news)) == (142_827, 133_966)
