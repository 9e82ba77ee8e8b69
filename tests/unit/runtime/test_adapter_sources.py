"""The forms in which adapters are named at the start."""

import json

import pytest

from quartet.runtime.adapter_sources import AdapterSource, read_sources
from quartet.runtime.errors import UsageError
from quartet.runtime.settings import flags

OBJECT = {"lora_name": "c", "lora_path": "/c", "pinned": True}
FOUND = [
    AdapterSource(lora_name="a", lora_path="/a"),
    AdapterSource(lora_name="owner/b", lora_path="owner/b"),
    AdapterSource(lora_name="c", lora_path="/c", pinned=True),
]


def test_a_flag_takes_all_three_forms_and_may_be_repeated():
    words = ["--lora-paths", "a=/a", "owner/b", json.dumps(OBJECT)]
    assert read_sources(flags.load(words).config.lora_paths) == FOUND
    words = ["model", "--lora-paths", "a=/a", "--port", "1", "--lora-paths", "owner/b", json.dumps(OBJECT)]
    loaded = flags.load(words).config
    assert read_sources(loaded.lora_paths) == FOUND
    assert (loaded.model_path, loaded.port) == ("model", 1)


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(["a=/a", "owner/b", OBJECT]),
        json.dumps([{"a": "/a"}, "owner/b", json.dumps(OBJECT)]),
    ],
)
def test_one_json_list_is_taken_by_the_flag_and_by_its_variable(text):
    assert read_sources(flags.load([f"--lora-paths={text}"]).config.lora_paths) == FOUND
    assert read_sources(flags.load([], "serve", {"QUARTET_LORA_PATHS": text}).config.lora_paths) == FOUND


def test_a_variable_takes_words():
    found = flags.load([], "serve", {"QUARTET_LORA_PATHS": "a=/a owner/b"}).config.lora_paths
    assert read_sources(found) == FOUND[:2]


@pytest.mark.parametrize(
    "yaml",
    [
        "lora_paths: [a=/a, owner/b]\n",
        "lora-paths:\n- a=/a\n- owner/b\n",
        "lora-paths: {a: /a, owner/b: owner/b}\n",
        "lora-paths:\n- {lora_name: a, lora_path: /a}\n- owner/b\n",
        "lora-paths: a=/a owner/b\n",
    ],
)
def test_a_file_takes_lists_and_mappings(yaml, tmp_path):
    file = tmp_path / "server.yaml"
    file.write_text(yaml)
    assert read_sources(flags.load(["--config", str(file)]).config.lora_paths) == FOUND[:2]


def test_a_path_may_hold_blanks_and_equals_signs():
    [source] = read_sources(["a=/my models/r=8"])
    assert (source.lora_name, source.lora_path) == ("a", "/my models/r=8")


@pytest.mark.parametrize(
    ("items", "said"),
    [
        (["=x"], "needs a name and a path"),
        (["x="], "needs a name and a path"),
        (["a=x", "a=y"], "names the adapter a twice"),
        (['{"lora_name": "a"}'], "lora_path"),
        (['{"lora_name": 1, "lora_path": "x"}'], "lora_name"),
        (['{"lora_name": "", "lora_path": "x"}'], "lora_name"),
        (["{"], "--lora-paths {"),
        ([f"a{number}=x" for number in range(2000)], "at most 1024"),
    ],
)
def test_what_names_no_adapter_is_refused_with_the_flag(items, said):
    with pytest.raises(UsageError, match="--lora-paths") as refused:
        read_sources(items)
    assert said in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("yaml", ["lora_paths: 5\n", "lora_paths: [5]\n", "lora_paths: [[5]]\n", "lora_paths: '[1'\n"])
def test_a_file_with_something_else_is_refused_with_the_flag(yaml, tmp_path):
    file = tmp_path / "server.yaml"
    file.write_text(yaml)
    with pytest.raises(UsageError, match=r"--lora-paths|lora_paths"):
        flags.load(["--config", str(file)])
