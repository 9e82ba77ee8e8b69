"""A random checkpoint of Qwen2.5-0.5B's shape on disk, for benchmarks: real sizes, no download."""

from pathlib import Path
from typing import Any

VOCAB = 151936
TOKENIZER_VOCAB = 1024


def build(directory: Path, dtype: str, layers: int = 24) -> Path:
    """Write config, weights and a small tokenizer once; returns `directory`. dtype: bfloat16 or float32."""
    if (directory / "tokenizer.json").exists():
        return directory
    import torch
    from transformers import Qwen2ForCausalLM

    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config(layers)).to(getattr(torch, dtype))
    model.save_pretrained(directory)
    write_tokenizer(directory)
    return directory


def config(layers: int = 24) -> Any:
    """transformers' description of the shape."""
    from transformers import Qwen2Config

    return Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=layers,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        rope_theta=1_000_000.0,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )


def write_tokenizer(directory: Path) -> None:
    """A byte-level BPE trained on a few lines; benchmarks send token ids, so only its presence matters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENIZER_VOCAB,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([f"the number {n} follows {n - 1} in the list" for n in range(400)], trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
