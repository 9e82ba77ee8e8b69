"""Where a model's files are: embedded, local, or from the hub; and one clear line when nowhere."""

import pytest

from quartet.runtime.errors import StartupError
from quartet.runtime.model_files import hub, model_info
from tests.configs import resolved


@pytest.fixture
def model(tmp_path):
    (tmp_path / "config.json").write_text('{"vocab_size": 8, "architectures": ["LlamaForCausalLM"]}')
    return tmp_path


def test_a_directory_is_used_as_it_is_and_the_name_is_kept(model):
    config = hub.locate(resolved(model_path=str(model)))
    assert (config.model_dir, config.tokenizer_dir, config.model_path) == (str(model), str(model), str(model))


def test_a_tokenizer_of_its_own_is_found(model, tmp_path):
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    config = hub.locate(resolved(model_path=str(model), tokenizer_path=str(tokenizer)))
    assert config.tokenizer_dir == str(tokenizer)
    assert model_info.tokenizer_dir(config) == tokenizer


def test_demo_is_the_embedded_model():
    assert hub.find("--model-path", "demo", resolved(), ()) == model_info.DEMO


def test_the_model_is_read_from_where_it_was_found(model):
    config = hub.locate(resolved(model_path=str(model)))
    assert model_info.load(config).path == str(model)


@pytest.mark.parametrize("name", ["/nowhere/model", "./nowhere", "a/b/c", "~/nowhere-at-all", "", "-x", "a b"])
def test_what_is_neither_a_directory_nor_a_hub_id_is_refused(name):
    with pytest.raises(StartupError, match="a directory, a hub id"):
        hub.locate(resolved(model_path=name))


def test_a_file_is_refused_and_its_directory_named(model):
    with pytest.raises(StartupError, match="name the directory that holds it"):
        hub.locate(resolved(model_path=str(model / "config.json")))


def test_a_directory_without_a_config_is_refused(tmp_path):
    with pytest.raises(StartupError, match=r"no config\.json in"):
        hub.locate(resolved(model_path=str(tmp_path)))


def test_a_hub_id_that_cannot_be_fetched_is_one_line_that_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(StartupError) as refused:
        hub.locate(resolved(model_path="nobody/no-such-model", download_dir=str(tmp_path)))
    assert "could not be fetched from the hub" in str(refused.value)
    assert "pass its directory" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_snapshot_in_the_hub_cache_is_used_without_a_network(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    repository = tmp_path / "models--owner--name"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    config = hub.locate(resolved(model_path="owner/name", download_dir=str(tmp_path)))
    assert config.model_dir == str(snapshot)
