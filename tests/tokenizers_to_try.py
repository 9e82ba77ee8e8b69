"""Small tokenizers of every kind that the text services must handle, trained in a moment on a few lines."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

LINES = [
    "The quick brown fox jumps over the lazy dog. Isn't it? Yes, it is!",
    "Der schnelle Fuchs springt über den faulen Hund; größer, weiter, höher.",
    "你好，世界。今天天气很好。 日本語のテキスト もあります。",
    "Привет, мир! Как дела? مرحبا بالعالم",
    "for i in range(10):\n    print(i * 2)\n\n# a comment\n",
    "emoji: 😀 👍🏽 👩‍👩‍👧‍👦 é e\u0301 ñ",
] * 4


def byte_level(bos: bool = False) -> Tokenizer:
    """As Llama 3 and Qwen have it, with a token that is special and one that is merely added."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(r"\p{N}{1,3}| ?[^\s\p{N}]+|\s+"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<|begin|>", "<|end|>"]
    tokenizer.train_from_iterator(LINES, _quiet(trainers.BpeTrainer, 400, alphabet, specials))
    tokenizer.add_tokens(["<think>", "<a b>", "über alles", "你好啊"])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", pair="<|begin|> $A <|begin|>:1 $B:1", special_tokens=[("<|begin|>", 0)]
        )
    return tokenizer


def byte_fallback(strip: bool = True) -> Tokenizer:
    """As Llama 2 and Mistral have it (Gemma without the strip): spaces are ▁, unknown characters are byte tokens."""
    seed = Tokenizer(models.BPE())
    seed.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    seed.train_from_iterator([LINES[0], LINES[1], LINES[4]], _quiet(trainers.BpeTrainer, 420, [], specials))
    model = json.loads(seed.to_str())["model"]
    tokenizer = Tokenizer(
        models.BPE(model["vocab"], [tuple(m) for m in model["merges"]], byte_fallback=True, unk_token="<unk>")
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.normalizer = normalizers.Sequence(
        [*([normalizers.Prepend("▁")] if strip else []), normalizers.Replace(" ", "▁")]
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def word_piece() -> Tokenizer:
    """As BERT has it."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(LINES, _quiet(trainers.WordPieceTrainer, 400, [], specials))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer


def unigram() -> Tokenizer:
    """As XLM-R and T5 have it: a Metaspace decoder."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, unk_token="<unk>", special_tokens=["<s>", "<pad>", "</s>", "<unk>"], show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return tokenizer


def _quiet(trainer: type, size: int, alphabet: list[str], specials: list[str]) -> object:
    return trainer(vocab_size=size, initial_alphabet=alphabet, special_tokens=specials, show_progress=False)


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte level": cache(byte_level),
    "byte level with bos": cache(lambda: byte_level(bos=True)),
    "byte fallback": cache(byte_fallback),
    "byte fallback without strip": cache(lambda: byte_fallback(strip=False)),
    "word piece": cache(word_piece),
    "unigram": cache(unigram),
}


def save(tokenizer: Tokenizer, directory: Path, **settings: object) -> Path:
    """Write the files that a model directory has; `settings` go into tokenizer_config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **settings}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory
