"""A random checkpoint with a small body and a real vocabulary: Qwen2.5's 151,936 tokens and its tokenizer."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

from quartet.runtime.model_files import gguf_directory
from tests import real_models

VOCAB = 151_936
SPREAD = 3.0  # standard deviation of the logits


def build(directory: Path, hidden: int, layers: int) -> Path:
    """Write config, weights and the tokenizer once; returns `directory`. Raises real_models.NotFetched."""
    if (directory / "tokenizer.json").exists():
        return directory
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=1,
        max_position_embeddings=32768,
        tie_word_embeddings=False,  # else a token is likely to come again
        bos_token_id=None,
        eos_token_id=151_645,
    )
    model: Any = Qwen2ForCausalLM(config)
    torch.nn.init.normal_(model.lm_head.weight, std=SPREAD / hidden**0.5)
    model.to(torch.bfloat16).save_pretrained(directory)
    write_tokenizer(directory)
    return directory


def write_tokenizer(directory: Path) -> None:
    """The tokenizer that the file of a real model holds."""
    with tempfile.TemporaryDirectory() as work:
        described = gguf_directory.described(real_models.fetch(real_models.QWEN), Path(work), tokenizer=True)
        for name in ("tokenizer_config.json", "tokenizer.json"):
            shutil.copy(described / name, directory / name)
