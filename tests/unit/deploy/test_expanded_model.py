"""The models that deploy.benchmarks.expanded_model makes compute the same function with other weights."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from deploy.benchmarks.expanded_model import main, reorder, widen

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 96,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}


def random_model(kind: str, tied: bool):
    config, model = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}[kind]
    torch.manual_seed(1)
    made = model(config(**SHAPE, tie_word_embeddings=tied, rms_norm_eps=1e-3)).eval()
    for name, values in made.named_parameters():
        values.requires_grad_(False).normal_(1.0 if "norm" in name else 0.0, 0.2)
    return made


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("change", [reorder, lambda model: widen(model, 160)], ids=["reordered", "wider"])
def test_another_model_has_the_same_function(kind, tied, change, tmp_path):
    model, ids = random_model(kind, tied), torch.arange(60).view(2, 30)
    original, before = model.state_dict(), model(ids).logits
    original = {name: values.clone() for name, values in original.items()}
    change(model)
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-4)
    name = "model.layers.1.mlp.down_proj.weight"
    assert not torch.equal(model.state_dict()[name], original[name])
    model.save_pretrained(tmp_path)
    read = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(read(ids).logits, before, rtol=1e-4, atol=1e-4)


def test_a_wider_model_has_zeros_behind_its_own_channels_and_heads():
    model = random_model("qwen2", tied=True)
    own = model.model.layers[0].self_attn.q_proj.weight.clone().view(2, 48, 96)
    widen(model, 160)
    wide = model.model.layers[0].self_attn.q_proj.weight.view(2, 80, 160)
    assert torch.equal(wide[:, :48, :96], own)
    assert not wide[:, 48:].any() and not wide[:, :, 96:].any()
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert not model.lm_head.weight[:, 96:].any()


@pytest.mark.parametrize("width", [64, 100, 112])
def test_a_width_that_makes_no_whole_heads_is_refused(width):
    with pytest.raises(SystemExit, match=f"--width {width} is not a multiple of 32 from 96 on"):
        widen(random_model("qwen2", tied=False), width)


@pytest.mark.parametrize("contents", [None, b"", b"GGU", b"no GGUF file"])
def test_what_is_no_gguf_file_is_refused(contents, tmp_path, monkeypatch):
    path = tmp_path / "model.gguf"
    if contents is not None:
        path.write_bytes(contents)
    monkeypatch.setattr("sys.argv", ["expanded_model", str(path), str(tmp_path / "out")])
    with pytest.raises(SystemExit, match=r"model\.gguf is not a (GGUF )?file"):
        main()
