"""What Gemma 3n and Gemma 4 have that no other family has: shared keys, inputs for each layer, several streams."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from quartet.kernels.cpu.native import build
from quartet.runtime.errors import StartupError
from quartet.runtime.model_files import model_info
from quartet.scheduler_service.model.decoder import Decoder
from quartet.scheduler_service.model.registry import decoder_spec
from quartet.scheduler_service.model.spec import NotNative
from quartet.scheduler_service.weights.formats import checkpoint_of
from quartet.scheduler_service.weights.staging import check_checkpoint
from tests.configs import resolved
from tests.model import tiny
from tests.model.dense import DenseRunner, serve
from tests.model.test_families import TOLERANCE, expected_logits, prompt, rewrite_config, served

FAMILIES = ["gemma3n", "gemma4"]
READING = (3, 4)  # layers of the tiny models that have no keys and values of their own
WIDE: dict[str, Any] = {"hidden_size": 128, "head_dim": 32, "hidden_size_per_layer_input": 32}


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_that_read_others_keys_keep_none(family: str, tmp_path: Path) -> None:
    model = served(family, tmp_path)
    assert [spec.layer for spec in model.attention] == [0, 1, 2]
    dims = [spec.head_dim for spec in model.attention]
    assert dims == ([16, 32, 16] if family == "gemma4" else [16, 16, 16])


@pytest.mark.parametrize("family", FAMILIES)
def test_released_keys_that_nobody_reads_are_left_out(family: str, tmp_path: Path) -> None:
    directory = tiny.build(family, tmp_path)
    tensors = load_file(directory / "model.safetensors")
    for layer in READING:
        for name in ("k_proj", "v_proj", "k_norm"):
            tensors[f"model.layers.{layer}.self_attn.{name}.weight"] = torch.ones(3, 5)
    save_file(tensors, directory / "model.safetensors")
    model = serve(directory)
    check_checkpoint(checkpoint_of(directory), model.weights)  # it would be taken as an update
    ids = prompt()
    assert (DenseRunner(model).feed([ids]) - expected_logits(family, ids)).abs().max() <= TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_language_models_inside_checkpoints_with_other_parts(
    family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tiny.build(family, tmp_path)
    tensors = load_file(directory / "model.safetensors")
    inside = {name.replace("model.", "model.language_model.", 1): tensors[name] for name in tensors}
    inside |= {"model.vision_tower.first.weight": torch.ones(2, 2), "model.embed_vision.weight": torch.ones(2, 2)}
    save_file(inside, directory / "model.safetensors")
    text = json.loads((directory / "config.json").read_text())
    whole = {"architectures": [text["architectures"][0].replace("CausalLM", "ConditionalGeneration")]}
    (directory / "config.json").write_text(json.dumps({**whole, "model_type": family, "text_config": text}))
    model = serve(directory)
    assert "only its language model is served, 2 tensors of other parts are left out, and images are refused" in (
        caplog.text
    )
    ids = prompt()
    assert (DenseRunner(model).feed([ids]) - expected_logits(family, ids)).abs().max() <= TOLERANCE


def test_sizes_by_layer_are_those_of_released_configs_and_of_written_ones(tmp_path: Path) -> None:
    directory = tiny.build("gemma4", tmp_path)
    written = decoder_spec(model_info.load(resolved(model_path=str(directory))))
    rewrite_config(directory, remove=["per_layer_config"], global_head_dim=32)
    assert decoder_spec(model_info.load(resolved(model_path=str(directory)))) == written
    rewrite_config(directory, per_layer_config={"1": {"num_attention_heads": 2}})
    with pytest.raises(NotNative, match="layers that differ in num_attention_heads"):
        decoder_spec(model_info.load(resolved(model_path=str(directory))))


def test_tokens_beyond_the_second_table_have_its_first_row(tmp_path: Path) -> None:
    changes = {"vocab_size_per_layer_input": tiny.VOCAB_SIZE // 2}
    model = served("gemma3n", tmp_path, **changes)
    ids = prompt()
    assert max(ids) >= changes["vocab_size_per_layer_input"]
    assert (DenseRunner(model).feed([ids]) - expected_logits("gemma3n", ids, **changes)).abs().max() <= TOLERANCE


def test_embeddings_that_a_request_brings_have_no_row_in_the_second_table(tmp_path: Path) -> None:
    model = served("gemma3n", tmp_path)
    ids, given = prompt(), torch.randn(len(prompt()), tiny.SHAPE["hidden_size"])
    with torch.inference_mode():
        expected = tiny.random_model("gemma3n")(inputs_embeds=given.unsqueeze(0)).logits[0]
    everywhere = torch.ones(len(ids), dtype=torch.bool)
    found = DenseRunner(model).feed([ids], embeds=given, embeds_mask=everywhere)
    assert (found - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("family", [*FAMILIES, "gemma4_moe"])
def test_bfloat16_is_as_close_to_float32_as_transformers_is(family: str, tmp_path: Path) -> None:
    ids = prompt()
    exact = expected_logits(family, ids)
    theirs = (expected_logits(family, ids, dtype=torch.bfloat16) - exact).square().mean().sqrt()
    found = DenseRunner(serve(tiny.build(family, tmp_path), dtype="bfloat16")).feed([ids])
    assert (found - exact).square().mean().sqrt() <= 1.5 * theirs


@pytest.mark.skipif(not build.is_possible(), reason="no compiler, or another kind of machine")
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_in_8_bits_are_close_to_plain_ones(family: str, tmp_path: Path) -> None:
    directory = tiny.build(family, tmp_path, **WIDE)
    plain, small = (serve(directory, dtype="bfloat16", quantization=choice) for choice in ("none", "int8"))
    buffers = {buffer.partition(":")[0] for buffer, _ in small.weights.schemes}
    assert buffers >= {"embed", "embed_by_layer", "qkv", "output", "gate_up", "down", "layer_gate", "layer_projection"}
    assert small.weights.nbytes() < 0.6 * plain.weights.nbytes()
    exact, found = (DenseRunner(model).feed([prompt()]) for model in (plain, small))
    assert (found - exact).square().mean().sqrt() < 0.1 * exact.std()


def test_experts_that_are_chosen_are_those_of_transformers(tmp_path: Path) -> None:
    recorded: dict[int, torch.Tensor] = {}
    ids, chosen = prompt(), list[torch.Tensor]()
    DenseRunner(served("gemma4_moe", tmp_path)).feed([ids], record_experts=recorded.__setitem__)
    peer = tiny.random_model("gemma4_moe")
    for layer in peer.model.layers:
        layer.router.register_forward_hook(lambda *call: chosen.append(call[2][2]))
    with torch.inference_mode():
        peer(torch.tensor([ids]))
    assert sorted(recorded) == list(range(5))
    for layer, expected in enumerate(chosen):
        assert torch.equal(recorded[layer].sort().values, expected.sort().values)


def test_attention_both_ways_is_not_served(tmp_path: Path) -> None:
    directory = tiny.build("gemma4", tmp_path)
    rewrite_config(directory, use_bidirectional_attention="all")
    with pytest.raises(StartupError, match="not served with use_bidirectional_attention"):
        serve(directory)


def test_the_whole_model_that_also_reads_images_gives_the_same(tmp_path: Path) -> None:
    text = {name: value for name, value in {**tiny.SHAPE, **tiny.GEMMA4}.items() if name != "tie_word_embeddings"}
    config = transformers.Gemma4Config(text_config=text, vision_config=None, audio_config=None)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    peer = transformers.Gemma4ForConditionalGeneration(config).eval()
    tiny.randomize(peer)
    peer.save_pretrained(tmp_path)
    tiny.save_tokenizer(tmp_path, tiny.VOCAB_SIZE)
    model = serve(tmp_path)
    assert isinstance(model, Decoder)
    with torch.inference_mode():
        expected = peer(input_ids=torch.tensor([prompt()])).logits[0]
    assert (DenseRunner(model).feed([prompt()]) - expected).abs().max() <= TOLERANCE
