"""Models without a native family run through transformers' code with our attention, or are refused in one line."""

import json
from pathlib import Path

import pytest
import torch

from quartet.runtime.errors import StartupError
from quartet.scheduler_service.model.transformers_model import PackedLinear, TransformersModel
from tests.model import tiny
from tests.model.dense import DenseRunner, serve
from tests.model.test_families import TOLERANCE, expected_logits, prompt

SERVED = ["cohere", "starcoder2", "gpt_neox", "gpt2", "opt", "olmoe"]


@pytest.mark.parametrize("family", SERVED)
def test_ragged_chunks_give_the_logits_of_transformers(family: str, tmp_path: Path) -> None:
    model = serve(tiny.build(family, tmp_path))
    assert isinstance(model, TransformersModel)
    assert [spec.layer for spec in model.attention] == [0, 1]
    ids, other = prompt(), prompt(seed=2, length=40)
    runner = DenseRunner(model)
    first, second = runner.feed([ids[:37], other[:21]]), runner.feed([ids[37:], other[21:]])
    found, beside = torch.cat((first[:37], second[:23])), torch.cat((first[37:], second[23:]))
    assert (found - expected_logits(family, ids)).abs().max() <= TOLERANCE
    assert (beside - expected_logits(family, other)).abs().max() <= TOLERANCE


def test_native_families_with_an_unknown_activation_come_here(tmp_path: Path) -> None:
    model = serve(tiny.build("llama", tmp_path, hidden_act="relu"))
    assert isinstance(model, TransformersModel)
    ids = prompt()
    found = DenseRunner(model).feed([ids])
    assert (found - expected_logits("llama", ids, hidden_act="relu")).abs().max() <= TOLERANCE


def test_bfloat16_passes_the_self_check_and_serves(tmp_path: Path) -> None:
    model = serve(tiny.build("cohere", tmp_path), dtype="bfloat16")
    assert model.dtype is torch.bfloat16
    ids = prompt()
    found = DenseRunner(model).feed([ids])
    assert found.dtype is torch.float32
    assert (found - expected_logits("cohere", ids)).abs().mean() < 0.05


def test_an_update_of_the_weights_reaches_the_packed_layers(tmp_path: Path) -> None:
    model = serve(tiny.build("cohere", tmp_path / "old"))
    other = serve(tiny.build("cohere", tmp_path / "new", seed=5))
    assert isinstance(model, TransformersModel) and isinstance(other, TransformersModel)
    assert any(isinstance(module, PackedLinear) for module in model.body.modules())
    model.weights.copy_from(other.weights)
    ids = prompt()
    assert torch.equal(DenseRunner(model).feed([ids]), DenseRunner(other).feed([ids]))


def test_own_embeddings_replace_those_of_tokens(tmp_path: Path) -> None:
    model = serve(tiny.build("cohere", tmp_path))
    assert isinstance(model, TransformersModel)
    ids = prompt()
    embeds = model.body.get_input_embeddings()(torch.tensor(ids))
    everywhere = torch.ones(len(ids), dtype=torch.bool)
    found = DenseRunner(model).feed([[3] * len(ids)], embeds=embeds, embeds_mask=everywhere)
    assert torch.equal(found, DenseRunner(model).feed([ids]))


@pytest.mark.parametrize("family", ["bloom", "mamba"])
def test_models_that_take_no_attention_from_outside_are_refused(family: str, tmp_path: Path) -> None:
    tiny.build(family, tmp_path)
    with pytest.raises(StartupError, match="takes no attention function from outside"):
        serve(tmp_path)


def test_models_that_see_later_tokens_fail_the_self_check(tmp_path: Path) -> None:
    tiny.build("bert", tmp_path)
    with pytest.raises(StartupError, match=r"BertLMHeadModel is not served: .*logits differ from transformers' own by"):
        serve(tmp_path)


def test_models_with_other_masks_are_refused(tmp_path: Path) -> None:
    tiny.build("gemma3", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "use_bidirectional_attention": True}))
    with pytest.raises(StartupError, match="not served with use_bidirectional_attention"):
        serve(tmp_path)


def test_code_from_the_model_directory_is_never_run(tmp_path: Path) -> None:
    tiny.build("llama", tmp_path)
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    config = json.loads((tmp_path / "config.json").read_text())
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    config |= {"architectures": ["EvilForCausalLM"], "model_type": "evil", "auto_map": auto_map}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(StartupError, match="transformers cannot build EvilForCausalLM"):
        serve(tmp_path)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    tiny.build("cohere", tmp_path, num_hidden_layers=1)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    with pytest.raises(StartupError, match=r"lacks \d+ tensors: model\.layers\.1\."):
        serve(tmp_path)
