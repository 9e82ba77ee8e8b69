"""Pieces of Lark grammars as the engine reads them."""

import json
import re
from collections.abc import Mapping

SpecialTokens = Mapping[str, int]  # text → id, of tokens that ordinary text is never encoded to

ANY_TEXT = r"/(.|\n)*/"


def literal(text: str, special_tokens: SpecialTokens) -> str:
    """The Lark of a fixed text: special tokens by id, the rest as string literals."""
    return " ".join(
        f"<[{special_tokens[part]}]>" if part in special_tokens else json.dumps(part)
        for part in split_at_tokens(text, special_tokens)
    )


def split_at_tokens(text: str, special_tokens: SpecialTokens) -> list[str]:
    """The special tokens in a text and what stands between them, in order; no empty parts."""
    names = "|".join(re.escape(name) for name in sorted(special_tokens, key=len, reverse=True) if name)
    return [part for part in (re.split(f"({names})", text) if names else [text]) if part]
