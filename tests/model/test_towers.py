"""The language models inside checkpoints that have parts for images give what transformers gives for text."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from quartet.runtime.errors import StartupError
from quartet.scheduler_service.model.decoder import Decoder
from quartet.scheduler_service.weights.formats import checkpoint_of
from quartet.scheduler_service.weights.staging import check_checkpoint
from tests.model import parity, tiny
from tests.model.dense import DenseRunner, serve
from tests.model.test_families import TOLERANCE, prompt

TEXT = {**tiny.SHAPE, "head_dim": 16}
TEXT = {name: value for name, value in TEXT.items() if name != "tie_word_embeddings"}
VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
QWEN_VISION = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 64}
MROPE = {"rope_type": "default", "rope_theta": 1e6}
PARTLY = {**MROPE, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}
# name → (parts of the names of transformers' classes, text_config, vision_config)
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "gemma3": (
        "Gemma3",
        {"sliding_window": 24, "sliding_window_pattern": 2, "query_pre_attn_scalar": 16},
        {**VISION, "image_size": 28, "patch_size": 14},
    ),
    "gemma4": ("Gemma4", tiny.GEMMA4, {**VISION, "num_key_value_heads": 2, "head_dim": 16, "pooling_kernel_size": 2}),
    "llama4": (
        "Llama4",
        tiny.LLAMA4,
        {**VISION, "image_size": 28, "patch_size": 14, "projector_input_dim": 32, "projector_output_dim": 32},
    ),
    "mistral3": ("Mistral3", {"model_type": "mistral"}, {**VISION, "model_type": "pixtral", "head_dim": 16}),
    "qwen2_5_vl": ("Qwen2_5_VL", {"rope_parameters": {**MROPE, "mrope_section": [2, 3, 3]}}, QWEN_VISION),
    "qwen3_vl": (
        "Qwen3VL",
        {"rope_parameters": {**MROPE, "mrope_section": [4, 2, 2]}},
        {**QWEN_VISION, "deepstack_visual_indexes": [0]},
    ),
    "qwen3_vl_moe": (
        "Qwen3VLMoe",
        {**tiny.EXPERTS, "rope_parameters": {**MROPE, "mrope_section": [4, 2, 2]}},
        {**QWEN_VISION, "deepstack_visual_indexes": [0]},
    ),
    "qwen3_5": ("Qwen3_5", {**tiny.LINEAR, "rope_parameters": PARTLY}, QWEN_VISION),
    "qwen3_5_moe": (
        "Qwen3_5Moe",
        {**tiny.EXPERTS, **tiny.LINEAR, "shared_expert_intermediate_size": 80, "rope_parameters": PARTLY},
        QWEN_VISION,
    ),
}


def build(name: str, directory: Path) -> transformers.PreTrainedModel:
    """Write a random model that also reads images; returns it."""
    family, text, vision = MODELS[name]
    config = getattr(transformers, f"{family}Config")(text_config={**TEXT, **text}, vision_config=vision)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config)
    tiny.randomize(model)
    model.eval().save_pretrained(directory)
    tiny.save_tokenizer(directory, tiny.VOCAB_SIZE)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_text_gives_the_logits_of_the_whole_model(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    peer = build(name, tmp_path)
    model = serve(tmp_path)
    assert isinstance(model, Decoder)
    assert "only its language model is served" in caplog.text and "images are refused" in caplog.text
    ids, other = prompt(), prompt(seed=2, length=40)
    runner = DenseRunner(model)
    found = torch.cat((runner.feed([ids[:37], other])[:37], runner.feed([ids[37:], []])))
    with torch.inference_mode():
        expected = peer(input_ids=torch.tensor([ids])).logits[0]
    assert expected.std() > 0.3
    assert (found - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("case", ["prefix hits", "retraction"])
@pytest.mark.parametrize("name", ["gemma3", "qwen3_vl", "qwen3_5"])
def test_the_scheduler_serves_them_as_any_other_model(name: str, case: str, tmp_path: Path) -> None:
    build(name, tmp_path)
    peer = parity.Peer(tmp_path, transformers.AutoModelForImageTextToText)
    found = parity.compare(peer, *parity.CASES[case](tmp_path))
    assert found.tokens_equal and found.error <= parity.TOLERANCE, found


@pytest.mark.parametrize("name", ["gemma3", "llama4", "qwen3_5_moe"])
def test_the_checkpoint_they_came_from_is_taken_as_an_update(name: str, tmp_path: Path) -> None:
    build(name, tmp_path)
    check_checkpoint(checkpoint_of(tmp_path), serve(tmp_path).weights)


def test_names_of_newer_checkpoints_are_found(tmp_path: Path) -> None:
    peer = build("gemma3", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    renamed = {name.replace("language_model.model.", "model.language_model."): tensors[name] for name in tensors}
    save_file(renamed, tmp_path / "model.safetensors")
    with torch.inference_mode():
        expected = peer(input_ids=torch.tensor([prompt()])).logits[0]
    assert (DenseRunner(serve(tmp_path)).feed([prompt()]) - expected).abs().max() <= TOLERANCE


def test_a_text_part_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    build("mistral3", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["model_type"] = "llama"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(StartupError, match="Mistral3ForConditionalGeneration is not a causal language model"):
        serve(tmp_path)
