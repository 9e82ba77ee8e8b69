"""What people take for a model that can be served, and what they are told instead."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from quartet.runtime.errors import StartupError
from quartet.runtime.model_files import families, hub, servable
from quartet.scheduler_service.model import registry
from tests.configs import resolved

NOBODY = 65534
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 8}
LLAVA = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "vision_config": {}}
CLIP = {"architectures": ["CLIPModel"], "model_type": "clip", "vision_config": {}}
WHISPER = {"architectures": ["WhisperForConditionalGeneration"], "model_type": "whisper", "num_mel_bins": 80}
WHISPER |= {"is_encoder_decoder": True}
T5 = {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "is_encoder_decoder": True}
REMOTE = {"architectures": ["NewForCausalLM"], "model_type": "new", "auto_map": {"AutoModelForCausalLM": "new.New"}}
TOO_NEW = {"architectures": ["NewForCausalLM"], "model_type": "new"}


def told(directory: Path, **settings: object) -> str:
    """What the operator is told of a directory."""
    with pytest.raises(StartupError) as refused:
        hub.locate(resolved(model_path=str(directory), **settings))
    assert "\n" not in str(refused.value)
    return str(refused.value)


def holding(directory: Path, **files: object) -> Path:
    """The directory with JSON files, named without their suffix."""
    directory.mkdir(exist_ok=True)
    for name, value in files.items():
        (directory / f"{name}.json").write_text(json.dumps(value))
    return directory


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"adapter_config": {}}, "is a LoRA adapter, and names no base; name it: --model-path BASE"),
        ({"model_index": {"_class_name": "Flux"}}, "makes images"),
        ({"params": {"dim": 4096}}, r"in Hugging Face's layout \(its name often ends in -hf\), or a GGUF file"),
        ({}, r"no config\.json in .*; --model-path takes a directory that has one, a GGUF file, a hub id"),
    ],
)
def test_a_directory_without_a_config_is_named_for_what_it_is(tmp_path, files, said):
    with pytest.raises(StartupError, match=said):
        hub.locate(resolved(model_path=str(holding(tmp_path, **files))))


def test_an_adapter_merged_into_its_model_is_a_model(tmp_path):
    holding(tmp_path, adapter_config={}, config=LLAMA)
    assert hub.locate(resolved(model_path=str(tmp_path))).model_dir == str(tmp_path)


@pytest.mark.parametrize("inside", ["checkpoint-500", "snapshots/0123"])
def test_a_directory_around_a_model_leads_to_it(tmp_path, inside):
    (tmp_path / inside).mkdir(parents=True)
    holding(tmp_path / inside, config=LLAMA)
    assert told(tmp_path).endswith(f"did you mean {tmp_path / inside}?")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (LLAVA, "is a model of images or sound (LlavaForConditionalGeneration)"),
        (CLIP, "is a model of images or sound (CLIPModel)"),
        (WHISPER, "is a model of images or sound (WhisperForConditionalGeneration)"),
        (T5, "is an encoder-decoder (T5ForConditionalGeneration)"),
        (REMOTE, "has code of its own ({'AutoModelForCausalLM': 'new.New'}), and Quartet never runs code"),
        (TOO_NEW, "neither Quartet nor the installed transformers knows"),
    ],
)
@pytest.mark.parametrize("is_embedding", [False, True])
def test_a_model_that_nothing_here_computes_is_refused_with_what_to_take(tmp_path, config, said, is_embedding):
    message = told(holding(tmp_path, config=config), is_embedding=is_embedding)
    assert message.startswith(str(tmp_path)) and said in message


@pytest.mark.parametrize(
    "config",
    [
        LLAMA,
        {},
        {**LLAMA, "auto_map": {"AutoModelForCausalLM": "own.Own"}},  # it needs none of its own code here
        {**LLAMA, "architectures": ["MyLlamaForCausalLM"]},
        {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "vision_config": {}},
        {"architectures": ["Qwen3VLForConditionalGeneration"], "model_type": "qwen3_vl", "vision_config": {}},
        {"architectures": ["BertModel"], "model_type": "bert"},
        {"architectures": ["Qwen2ForSequenceClassification"], "model_type": "qwen2"},
        {"architectures": ["LlamaForRewardModel"], "model_type": "custom"},
    ],
)
def test_what_may_be_served_passes(tmp_path, config):
    assert hub.locate(resolved(model_path=str(holding(tmp_path, config=config)))).model_dir == str(tmp_path)


def test_the_table_of_transformers_has_every_family_of_ours():
    known = servable.causal_models()
    assert len(known) > 100
    assert set(registry.FAMILIES) <= set(known.values())


def test_the_names_of_our_families_are_those_of_the_registry():
    assert set(families.NATIVE) == set(registry.FAMILIES)


@pytest.mark.parametrize(
    ("architecture", "nearest"),
    [
        ("Qwen3ForCausalLLM", "Qwen3ForCausalLM"),
        ("SmolLM4ForCausalLM", "SmolLM3ForCausalLM"),
        ("Gemma3NextForConditionalGeneration", "Gemma3nForConditionalGeneration"),
        ("ZebraForCausalLM", None),
    ],
)
def test_the_nearest_name_of_ours_is_told(architecture, nearest):
    said = servable.refusal({"architectures": [architecture], "model_type": "unheard"}, {"llama": "LlamaForCausalLM"})
    assert (f"the nearest name that Quartet computes is {nearest})" in said) == (nearest is not None)


@pytest.mark.parametrize(
    ("version", "said"),
    [
        ("99.1.0", "it was saved by transformers 99.1.0 and"),
        ("4.40.0", "which is not newer than the installed"),
        ("mine", "a newer transformers may (pip install -U transformers)"),
        (None, "a newer transformers may (pip install -U transformers)"),
    ],
)
def test_the_version_that_saved_an_unknown_model_tells_whether_a_newer_one_would_know_it(version, said):
    config = {"architectures": ["NewForCausalLM"], "model_type": "new", "transformers_version": version}
    assert said in servable.refusal(config, {"llama": "LlamaForCausalLM"})


def test_without_transformers_nothing_is_refused_for_its_architecture(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    servable.causal_models.cache_clear()
    try:
        assert servable.causal_models() == {}
        assert servable.refusal(LLAVA, {}) == ""
    finally:
        servable.causal_models.cache_clear()


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "model.gguf"])
def test_a_pointer_of_git_lfs_is_told_from_a_file(tmp_path, name):
    holding(tmp_path, config=LLAMA)
    (tmp_path / name).write_bytes(POINTER)
    assert "is a Git LFS pointer" in told(tmp_path if name != "model.gguf" else tmp_path / name)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_link_to_nothing_is_told_from_a_file(tmp_path, name):
    holding(tmp_path, config=LLAMA)
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).symlink_to("../blobs/abc")
    assert "leads to ../blobs/abc, which is not there; download the model again" in told(tmp_path)


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """As a user who may read only what everybody may."""
    if os.geteuid() != 0:  # whoever owns the files is refused by their modes
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def open_directory():
    """A directory that everybody may look into; pytest's own are private."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_file_that_may_not_be_read_is_named_with_its_owner_and_the_remedy(open_directory, name):
    holding(open_directory, config=LLAMA)
    (open_directory / name).touch()
    (open_directory / name).chmod(0)
    with as_nobody():
        message = told(open_directory)
    assert message.startswith(f"cannot read {open_directory / name}: permission denied (it belongs to ")
    assert ", mode 0, and this is " in message and message.endswith("; chmod a+r makes it readable")


@pytest.mark.parametrize("mode", [0o000, 0o111])
def test_a_directory_that_may_not_be_read_is_named_with_the_remedy(open_directory, mode):
    model = holding(open_directory / "model", config=LLAMA)
    model.chmod(mode)
    with as_nobody():
        message = told(model)
    model.chmod(0o755)
    assert f"cannot read {model}: permission denied" in message
    assert message.endswith("chmod a+rx makes it readable")


def test_a_path_behind_a_directory_that_may_not_be_read_is_told_from_one_that_is_not_there(open_directory):
    model = holding(open_directory / "private", config=LLAMA) / "model"
    model.parent.chmod(0)
    with as_nobody():
        message = told(model)
    model.parent.chmod(0o755)
    assert message.startswith(f"--model-path {model}: cannot read {model.parent}: permission denied")
