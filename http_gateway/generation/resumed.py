"""Output that another server has made and a client has: what follows it is as if nothing had happened between.

A draw depends on the seed, the position and the logits alone, so the client has to name the seed where it samples.
"""

from quartet.http_gateway.generation.intake import Rules
from quartet.runtime.errors import RequestError
from quartet.runtime.messages import first_outside, pack_ids, unpack_ids
from quartet.runtime.sampling import SamplingParams

FIELD = "resume_ids"
MOST_BITS = 31  # of an id


def read_resumed(ids: list[int] | None, params: SamplingParams, single: bool, rules: Rules) -> bytes:
    """The ids, packed; empty where there are none. Raises RequestError."""
    if not ids:
        return b""
    if not single or params.n != 1:
        raise RequestError(f"{FIELD} belongs to a single prompt with n 1.", field=FIELD)
    if params.max_new_tokens is not None and len(ids) >= params.max_new_tokens:
        raise RequestError(
            f"{FIELD} has {len(ids)} ids, and max_new_tokens, which counts them, is {params.max_new_tokens}: "
            "nothing is left.",
            field=FIELD,
        )
    if any(id.bit_length() > MOST_BITS for id in ids):
        raise RequestError(f"{FIELD} has an id that is too large.", field=FIELD)
    packed = pack_ids(ids)
    wrong = first_outside(unpack_ids(packed), rules.vocab_size)
    if wrong is not None:
        raise RequestError(f"{FIELD} has the id {wrong}, which is not in [0, {rules.vocab_size}).", field=FIELD)
    return packed
