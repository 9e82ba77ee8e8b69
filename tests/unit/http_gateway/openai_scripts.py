"""What the ring gives to the tests of the OpenAI endpoints, besides the scripts of the harness."""

from collections.abc import Sequence

from quartet.runtime.messages import Finish, Generate, Logprobs, Message, pack_ids
from tests.unit.http_gateway.harness import Script, floats, step

NAN = float("nan")
STOP = Finish(reason="stop", matched=2)


def says(*pieces: str, finish: Finish = STOP, prompt_tokens: int = 3, cached_tokens: int = 0) -> Script:
    """One token per piece; the last one ends the request. Requests for no tokens end at once."""

    def script(generate: Generate) -> list[Message]:
        request = generate.request
        if request.params.max_new_tokens == 0:
            end = Finish(reason="length", length=0)
            scored = prompt_scores(prompt_tokens, generate)
            return [step(request.rid, prompt_tokens=prompt_tokens, finish=end, input_logprobs=scored)]
        return [
            step(
                request.rid,
                [10 + i],
                piece,
                prompt_tokens=prompt_tokens,
                cached_tokens=cached_tokens,
                finish=finish if i == len(pieces) - 1 else None,
                logprobs=scores([10 + i], generate),
                input_logprobs=prompt_scores(prompt_tokens, generate) if i == 0 else None,
            )
            for i, piece in enumerate(pieces)
        ]

    return script


def scores(ids: Sequence[int], generate: Generate, first: float = -0.5) -> Logprobs | None:
    """Token i is written `t<i>`; beside it stand the tokens that follow it in the vocabulary."""
    options = generate.request.logprobs
    if options is None:
        return None
    tops = [token + k for token in ids for k in range(options.top)]
    return Logprobs(
        ids=pack_ids(ids),
        values=floats(first, *([-0.5] * (len(ids) - 1))),
        texts=[b"t%d" % token for token in ids],
        top_ids=pack_ids(tops),
        top_values=floats(*([first] * options.top + [-0.5] * (len(tops) - options.top))),
        top_texts=[b"t%d" % token for token in tops],
    )


def prompt_scores(count: int, generate: Generate) -> Logprobs | None:
    options = generate.request.logprobs
    return scores(range(count), generate, NAN) if options is not None and options.start == 0 else None
