"""Cuts prompts to the tokens that their request allows. What the tokenizer put around a text stays."""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from quartet.runtime.messages import Request

if TYPE_CHECKING:
    from tokenizers import Encoding

log = logging.getLogger(__name__)

ID_BYTES = 4
CUT = "the prompt of request %r is cut from %d to %d tokens"


def places_kept(request: Request, encoded: "Encoding | None") -> list[int] | None:
    """The places of an encoding's tokens that stay; None: all."""
    if encoded is None or request.truncate is None or len(encoded.ids) <= request.truncate:
        return None
    surplus = len(encoded.ids) - request.truncate
    log.warning(CUT, request.rid, len(encoded.ids), request.truncate)
    texts = [place for place, special in enumerate(encoded.special_tokens_mask) if not special]
    gone = set(texts[:surplus] if request.truncate_side == "left" else texts[max(len(texts) - surplus, 0) :])
    return [place for place in range(len(encoded.ids)) if place not in gone][: request.truncate]


def picked(values: Sequence[int], kept: list[int] | None) -> Sequence[int]:
    return values if kept is None else [values[place] for place in kept]


def cut_ids(packed: bytes, request: Request) -> bytes:
    """The same of a prompt that came as ids: int32."""
    count = len(packed) // ID_BYTES
    if request.truncate is None or count <= request.truncate:
        return packed
    log.warning(CUT, request.rid, count, request.truncate)
    size = request.truncate * ID_BYTES
    return packed[-size:] if request.truncate_side == "left" else packed[:size]
