"""Query and document side by side, as cross-encoders read them."""

from collections.abc import Sequence

from quartet.runtime.messages import pack_ids


def joined(text: str, pair: str | None) -> str | tuple[str, str]:
    """What the tokenizer takes: one text, or two that its post-processor joins with the model's separators."""
    return text if pair is None else (text, pair)


def types_of(types: Sequence[int]) -> bytes:
    """int32 per token: 0 in the first text, 1 in the second; empty where all are 0."""
    return pack_ids(types) if any(types) else b""
