"""A GGUF file named as a model: found by path, directory or hub id, and described as a model directory."""

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from quartet.runtime.config import ResolvedConfig
from quartet.runtime.errors import StartupError
from quartet.runtime.model_files import gguf_directory, hub, model_info, tokenizer_files
from tests import gguf_files
from tests.configs import resolved
from tests.gguf_files import F32, Stored

TOKENIZER = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": ["a", "b", "ab", "<|im_end|>", "</s>"],
    "tokenizer.ggml.token_type": [1, 1, 1, 3, 3],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.eos_token_id": 4,
    "tokenizer.chat_template": "{{ messages[0].content }}",
}
LLAMA = {
    "general.architecture": "llama",
    "llama.block_count": 1,
    "llama.context_length": 64,
    "llama.embedding_length": 8,
    "llama.feed_forward_length": 16,
    "llama.attention.head_count": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    **TOKENIZER,
}
EMBEDDINGS = {"token_embd.weight": Stored(F32, (5, 8), bytes(160))}


def write(file: Path, metadata: dict[str, Any] | None = None, **more: Any) -> Path:
    file.parent.mkdir(exist_ok=True)
    keys = {
        **(LLAMA if metadata is None else metadata),
        **{key.replace("__", "."): value for key, value in more.items()},
    }
    return gguf_files.write(file, {key: value for key, value in keys.items() if value is not None}, EMBEDDINGS)


def located(name: Path | str, run_dir: Path, **settings: Any) -> ResolvedConfig:
    run_dir.mkdir(exist_ok=True)
    return hub.locate(resolved(model_path=str(name), **settings), run_dir)


def test_a_file_is_described_as_a_model_directory(tmp_path):
    file = write(tmp_path / "model.gguf")
    config = located(file, tmp_path / "run")
    assert config.model_path == str(file)
    assert Path(config.model_dir).parent == tmp_path / "run"
    info = model_info.load(config)
    assert (info.architecture, info.vocab_size, info.context_length) == ("LlamaForCausalLM", 5, 64)
    assert info.eos_ids == [3, 4]  # the file's own end, and the one of a turn
    assert tokenizer_files.load(Path(config.tokenizer_dir)).encode("ab").ids == [2]
    assert (Path(config.model_dir) / "chat_template.jinja").read_text() == "{{ messages[0].content }}"
    assert (Path(config.model_dir) / "model.gguf").resolve() == file


def test_a_directory_with_one_file_and_a_file_without_its_suffix_serve_too(tmp_path):
    file = write(tmp_path / "models" / "model.gguf")
    assert model_info.load(located(tmp_path / "models", tmp_path / "run")).vocab_size == 5
    blob = file.rename(tmp_path / "sha256-0123")
    assert model_info.load(located(blob, tmp_path / "run")).vocab_size == 5


def test_one_of_several_files_is_chosen_by_its_type(tmp_path):
    models = tmp_path / "models"
    for name, length in (("m-Q4_K_M", 32), ("m-q8_0", 64), ("mmproj-m-Q8_0", 16)):
        write(models / f"{name}.gguf", llama__context_length=length)
    assert model_info.load(located(f"{models}:q4_k_m", tmp_path / "run")).context_length == 32
    assert model_info.load(located(f"{models}:Q8_0", tmp_path / "run")).context_length == 64
    assert model_info.load(located(f"{models}:m-q8_0.gguf", tmp_path / "run")).context_length == 64
    with pytest.raises(StartupError, match=r"several GGUF files \(m-Q4_K_M.gguf, m-q8_0.gguf\); name one of them"):
        located(models, tmp_path / "run")
    with pytest.raises(StartupError, match="holds 0 GGUF files of the type Q4_K; there are m-Q4_K_M"):
        located(f"{models}:Q4_K", tmp_path / "run")


@pytest.mark.parametrize(
    ("names", "example"),
    [
        (["a-Q4_K_M", "a-Q8_0"], "Q4_K_M"),
        (["gemma-3-270m-q4_k_m", "qwen2.5-0.5b-q4_k_m"], "gemma-3-270m-q4_k_m"),
        (["gemma-3-270m-q4_k_m", "qwen2.5-0.5b-q4_k_m", "qwen2.5-0.5b-f16"], "f16"),
        (["one", "other"], "one"),
    ],
)
def test_what_names_one_of_several_files_can_be_copied(tmp_path, names, example):
    models = tmp_path / "models"
    for name in names:
        write(models / f"{name}.gguf")
    with pytest.raises(StartupError, match=f"name one of them, as in {models}:{example}$"):
        located(models, tmp_path / "run")
    assert model_info.load(located(f"{models}:{example}", tmp_path / "run")).vocab_size == 5


def test_weights_in_another_format_come_first(tmp_path):
    models = tmp_path / "models"
    write(models / "model.gguf")
    (models / "config.json").write_text('{"vocab_size": 8}')
    (models / "model.safetensors").write_bytes(b"")
    assert located(models, tmp_path / "run").model_dir == str(models)


def test_the_parts_of_a_model_that_was_split_belong_together(tmp_path):
    write(tmp_path / "m-00001-of-00002.gguf")
    with pytest.raises(StartupError, match=r"m-00002-of-00002.gguf is missing, which belongs to"):
        located(tmp_path / "m-00001-of-00002.gguf", tmp_path / "run")
    gguf_files.write(
        tmp_path / "m-00002-of-00002.gguf", {"split.no": 1}, {"output.weight": EMBEDDINGS["token_embd.weight"]}
    )
    config = located(tmp_path / "m-00001-of-00002.gguf", tmp_path / "run")
    assert model_info.load(config).config["tie_word_embeddings"] is False
    assert len(list(Path(config.model_dir).glob("*.gguf"))) == 2


def test_the_parts_of_a_model_are_found_by_name_where_they_are_links_as_in_the_cache_of_the_hub(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    snapshot.mkdir()
    write(blobs / "01ab")
    gguf_files.write(blobs / "02cd", {"split.no": 1}, {"output.weight": EMBEDDINGS["token_embd.weight"]})
    for number, blob in enumerate(("01ab", "02cd"), 1):
        (snapshot / f"m-0000{number}-of-00002.gguf").symlink_to(blobs / blob)
    config = located(snapshot, tmp_path / "run")
    assert model_info.load(config).config["tie_word_embeddings"] is False


def test_a_tokenizer_of_its_own_stands_in_for_one_that_cannot_be_read(tmp_path):
    file = write(tmp_path / "model.gguf", tokenizer__ggml__pre="unheard-of")
    with pytest.raises(StartupError, match="unheard-of, a way of splitting text that is not known"):
        located(file, tmp_path / "run")
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    assert located(file, tmp_path / "run", tokenizer_path=str(tokenizer)).tokenizer_dir == str(tokenizer)
    assert located(file, tmp_path / "run", skip_tokenizer_init=True).model_dir


def test_another_file_is_still_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(StartupError, match="is a file; name the directory that holds it"):
        located(tmp_path / "notes.txt", tmp_path / "run")


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"general__architecture": "mamba"}, "the architecture mamba, which is not supported; llama, qwen2"),
    ({"general__architecture": None}, "the architecture None, which is not supported"),
    ({"general__architecture": [1]}, "which is not supported"),
    ({"llama__block_count": None}, "has no llama.block_count"),
    ({"llama__block_count": 1 << 31}, "num_hidden_layers is 2147483648; it must be an integer from 1 to 1024"),
    ({"llama__block_count": "many"}, "num_hidden_layers is 'many'"),
    ({"llama__attention__head_count": 0}, "num_attention_heads is 0"),
    ({"llama__attention__head_count": [2, 4]}, r"num_attention_heads is \[2, 4\]"),
    ({"llama__embedding_length": 0}, "hidden_size is 0"),
    ({"llama__rope__freq_base": float("nan")}, "rope_theta is nan"),
    ({"llama__rope__freq_base": -1.0}, "rope_theta is -1"),
    ({"llama__attention__layer_norm_rms_epsilon": float("inf")}, "rms_norm_eps is inf"),
    ({"llama__rope__scaling__type": "su", "llama__rope__scaling__factor": 4.0}, "llama.rope.scaling.type is su"),
    ({"llama__rope__scaling__type": "linear", "llama__rope__scaling__factor": -4.0}, "rope_scaling.factor is -4"),
    (
        {"llama__attention__key_length": 4, "llama__attention__value_length": 8},
        "keys have 4 values per head and values 8",
    ),
    ({"tokenizer__ggml__eos_token_id": "x"}, "tokenizer.ggml.eos_token_id is x, which is no id"),
    ({"tokenizer__chat_template": 5}, "tokenizer.chat_template is no text"),
]


@pytest.mark.parametrize(("more", "said"), REFUSED)
def test_a_model_that_cannot_be_served_is_refused_in_one_line_that_names_file_and_key(more, said, tmp_path):
    file = write(tmp_path / "model.gguf", **more)
    with pytest.raises(StartupError, match=said) as refused:
        located(file, tmp_path / "run")
    assert str(refused.value).startswith(str(file))
    assert "\n" not in str(refused.value)


class Hub(types.ModuleType):
    """Stands in for huggingface_hub: repositories of files, of which a snapshot has those that are asked for."""

    def __init__(self, files: dict[str, Path], cache: Path) -> None:
        super().__init__("huggingface_hub")
        self.files = files
        self.cache = cache
        self.asked: list[str] = []

    def snapshot_download(
        self, name: str, revision: str | None, cache_dir: str | None, allow_patterns: list[str]
    ) -> str:
        from fnmatch import fnmatchcase

        self.asked.append(name)
        self.cache.mkdir(exist_ok=True)
        for path, file in self.files.items():
            if any(fnmatchcase(path, pattern) for pattern in allow_patterns):
                (self.cache / path).parent.mkdir(exist_ok=True)
                (self.cache / path).write_bytes(file.read_bytes())
        return str(self.cache)


@pytest.fixture
def remote(monkeypatch, tmp_path):
    """A hub with one repository of three GGUF files, one of them in a folder."""
    small, large = (
        write(tmp_path / "small", llama__context_length=16),
        write(tmp_path / "large", llama__context_length=32),
    )
    files = {"model-q4_k_m.gguf": small, "Q8_0/model-Q8_0.gguf": large, "model-Q4_K_M_L.gguf": large}
    fake = Hub(files, tmp_path / "cache")
    errors = types.ModuleType("huggingface_hub.errors")
    errors.HFValidationError = ValueError  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", errors)
    return fake


@pytest.mark.parametrize(("choice", "length"), [("Q4_K_M", 16), ("q4_k_m", 16), ("q8_0", 32), ("Q4_K_M_L", 32)])
def test_a_hub_id_with_a_type_fetches_the_file_of_that_type_alone(remote, choice, length, tmp_path):
    config = located(f"owner/name:{choice}", tmp_path / "run")
    assert model_info.load(config).context_length == length
    assert remote.asked == ["owner/name"]
    assert len(list((tmp_path / "cache").rglob("*.gguf"))) == 1
    assert config.model_path == f"owner/name:{choice}"


def test_a_type_that_the_hub_does_not_have_is_refused(remote, tmp_path):
    with pytest.raises(StartupError, match="owner/name holds 0 GGUF files of the type Q2_K"):
        located("owner/name:Q2_K", tmp_path / "run")


def test_the_description_is_written_again_for_the_same_file(tmp_path):
    file = write(tmp_path / "model.gguf")
    (tmp_path / "run").mkdir()
    first = gguf_directory.described(file, tmp_path / "run", tokenizer=False)
    assert not (first / "tokenizer.json").exists()
    write(file, llama__context_length=32)
    assert gguf_directory.described(file, tmp_path / "run", tokenizer=False) == first
    assert json.loads((first / "config.json").read_text())["max_position_embeddings"] == 32
