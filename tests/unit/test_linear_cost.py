"""What functions on the way of a request cost grows no faster than what they are given.

CPU time of one thread at a size and at sixteen times that size, the least of a few tries; quadratic cost would be 256
times as much. `python -m tests.linear_cost` does the same with whole servers.
"""

import json
import time
from array import array
from collections.abc import Callable

import msgspec
import pytest

from quartet.detokenizer_service.decode import Vocabulary
from quartet.detokenizer_service.stops import Cutter, stops_of
from quartet.http_gateway.anthropic.content import ContentBlocks
from quartet.http_gateway.anthropic.conversation import chat_body
from quartet.http_gateway.anthropic.types import MessagesBody
from quartet.http_gateway.embedding.embeddings import probabilities
from quartet.http_gateway.embedding.score import shares
from quartet.http_gateway.generation.intake import Rules, check_distinct
from quartet.http_gateway.generation.output import Output
from quartet.http_gateway.http.counting import ValueCounter
from quartet.http_gateway.native.generate_body import GenerateBody, to_job
from quartet.http_gateway.openai.answers import CalledFunction, Delta, ToolCall
from quartet.http_gateway.openai.chat_turn import continued
from quartet.http_gateway.openai.item_references import chosen
from quartet.http_gateway.openai.response_tools import offered
from quartet.http_gateway.openai.response_types import ResponsesBody
from quartet.http_gateway.routes.endpoint import Bounds
from quartet.http_gateway.routes.response_store import StoredResponse
from quartet.runtime import limits
from quartet.runtime.errors import RequestError
from quartet.runtime.messages import Generate, LogprobOptions, Logprobs, Request, Text, Tokens, pack_ids
from quartet.runtime.model_files.embedding import Embedding
from quartet.runtime.sampling import SamplingParams
from quartet.scheduler_service.core.ngrams import NGrams
from quartet.scheduler_service.core.prefix_tree import PrefixTree
from quartet.tokenizer_service.encode import Encoder
from quartet.tokenizer_service.turns import in_turns
from tests.fakes import AtOnce
from tests.tokenizers_to_try import KINDS

GROWTH = 16
MOST = 100  # times the cost: room for a logarithm, and for caches that hold the small size and not the large one
LEAST_S = 0.001  # what is measured at the smaller size, at least
TRIES = 10
RULES = Rules(vocab_size=1000, hidden_size=2, most_bytes=1 << 40)

Work = Callable[[], object]


def counting(size: int) -> Work:
    bodies = ['{"a":[' + ",".join(['{"b":"c"}'] * (size // 10)) + "]}", json.dumps("\\" * size + '"' * size)]
    parts = [body[at : at + (1 << 16)].encode() for body in bodies for at in range(0, len(body), 1 << 16)]

    def work() -> None:
        counter = ValueCounter()
        for part in parts:
            counter.feed(part)

    return work


def ids_to_job(size: int) -> Work:
    body = GenerateBody(input_ids=[i % 1000 for i in range(size)])
    return lambda: to_job(body, RULES)


def batch_to_job(size: int) -> Work:
    params = {"logit_bias": {str(i): 1.0 for i in range(100)}, "stop": ["a"] * 20}
    asked = list(range(50))
    texts = ["a"] * (size // 256)
    body = GenerateBody(text=texts, sampling_params=params, return_logprob=True, token_ids_logprob=[*asked])

    def work() -> None:
        for _ in range(10):
            to_job(body, RULES)

    return work


def distinct_rids(size: int) -> Work:
    rids = [f"rid-{i // 2}" for i in range(size // 8)]

    def work() -> None:
        for _ in range(10):
            with pytest.raises(RequestError, match="Duplicate"):
                check_distinct(rids)

    return work


def encoding(kind: str, unit: str) -> Callable[[int], Work]:
    tokenizer = KINDS[kind]()

    def make(size: int) -> Work:
        text = unit * (size // len(unit))

        def work() -> None:
            encoder = Encoder(tokenizer, executor=AtOnce())
            encoder.step([Generate(request=Request(rid="r", params=SamplingParams()), text=text)])
            while encoder.patience_s is not None:
                encoder.step([])

        return work

    return make


def decoding(kind: str) -> Callable[[int], Work]:
    vocabulary = Vocabulary(KINDS[kind]())
    ids = KINDS[kind]().encode("The quick brown fox, 世界. ", add_special_tokens=False).ids

    def make(size: int) -> Work:
        def work() -> None:
            decoder = vocabulary.decoder()
            for at in range(size // 20):
                decoder.feed((ids[at % len(ids)],))

        return work

    return make


def stopping(span: int = limits.MAX_STOP_SPAN_CHARS, **params: object) -> Callable[[int], Work]:
    """`span`: of the text that may be held back, beyond which a search costs the same for every token."""

    def make(size: int) -> Work:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(limits, "MAX_STOP_SPAN_CHARS", span)
            stops = stops_of(SamplingParams(**params))  # type: ignore[arg-type]
        assert stops is not None

        def work() -> None:
            cutter = Cutter(stops, trim=True)
            for _ in range(size // 20):
                cutter.feed("ab ")

        return work

    return make


def collecting(size: int) -> Work:
    request = Request(rid="r", params=SamplingParams(), logprobs=LogprobOptions())
    scored = Logprobs(ids=pack_ids([7]), values=array("f", [-1.0]).tobytes())

    def work() -> None:
        output = Output(request, 0.0, "v")
        for _ in range(size // 50):
            output.add(Text(text="a", tokens=Tokens(rid="r", ids=pack_ids([7]), logprobs=scored)))
        output.answer()

    return work


def drafting(size: int) -> Work:
    ids = array("i", [1, 2, 3, 4] * (size // 4))

    def work() -> None:
        grams = NGrams(2, 8)
        while not grams.follow(ids):
            pass
        grams.continuation(ids, 8)

    return work


def caching(size: int) -> Work:
    tokens = pack_ids(range(size))

    def work() -> None:
        tree = PrefixTree(page_size=1)
        for share in (2, 4, 1):
            tree.insert(b"0/", tokens[: len(tokens) // share // 4 * 4], list(range(size // share)))
        tree.match(b"0/", tokens)

    return work


def checking_parameters(size: int) -> Work:
    body = msgspec.json.encode({"text": "a", "sampling_params": {"regex": "a" * size}, "rid": "r"})
    return lambda: msgspec.json.decode(body, type=GenerateBody)


def conversing(size: int) -> Work:
    use = {"type": "tool_use", "id": "t", "name": "f", "input": {"a": 1}}
    result = {"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text", "text": "b"}]}
    turns = [{"role": "assistant", "content": [use, use]}, {"role": "user", "content": [result, result]}]
    alternating, of_one_role = turns * (size // 256), [{"role": "user", "content": "a"}] * (size // 64)
    bodies = [{"messages": messages, "max_tokens": 1} for messages in (alternating, of_one_role)]
    read = [msgspec.convert(body, MessagesBody) for body in bodies]

    def work() -> None:
        for body in read:
            chat_body(body)

    return work


def calling(size: int) -> Work:
    arguments = '{"a": [' + "[1], " * (size // 8)
    pieces = [Delta(tool_calls=[continued(0, arguments[at : at + 8])]) for at in range(0, len(arguments), 8)]

    def work() -> None:
        content = ContentBlocks("s")
        for delta in (Delta(tool_calls=[ToolCall(id="c", index=0, function=CalledFunction("", "f"))]), *pieces):
            for _ in content.take(delta):
                pass
        content.content()

    return work


def scoring(size: int) -> Work:
    scores = [-1.0] * (size // 16)
    return lambda: (
        shares(scores, among_labels=True),
        probabilities(scores, Embedding(pooling=("mean",), labels=len(scores))),
    )


def leaving_out(size: int) -> Work:
    tools: list[dict[str, object]] = [{"type": "web_search"}] * (size // 16)
    body = ResponsesBody(input="a", tools=[*tools, {"type": "function", "name": "f"}])
    return lambda: offered(body, leave_out=True)


def referring(size: int) -> Work:
    """To an item as large as they are many."""
    own = "0" * 32
    response = {"id": f"resp_{own}", "output": [{"id": f"msg_{own}", "text": "a" * size}]}
    kept = [StoredResponse(b"[]", msgspec.json.encode(response))]
    wanted = dict.fromkeys(range(size // 16), f"msg_{own}")
    bounds = Bounds(1 << 16, "", limits.MAX_BODY_VALUES)

    def work() -> None:
        with pytest.raises(RequestError, match="exceeds the limit"):
            chosen(kept, wanted, bounds, 0)

    return work


def taking_turns(size: int) -> Work:
    texts: list[dict[str, object]] = [{"role": "user", "content": "a" * 64}] * (size // 8)
    parts: list[dict[str, object]] = [{"role": "user", "content": [{"type": "text", "text": "a"}]}] * (size // 8)
    return lambda: (in_turns(texts), in_turns(parts))


CASES: dict[str, Callable[[int], Work]] = {
    "a body's values are counted": counting,
    "ids become a request": ids_to_job,
    "a batch with shared parameters becomes requests": batch_to_job,
    "rids are compared": distinct_rids,
    **{
        f"{kind} text of {name} is encoded": encoding(kind, unit)
        for kind in KINDS
        for name, unit in {"words": "The quick fox. ", "blanks": " ", "one letter": "a", "newlines": "\n"}.items()
    },
    **{f"{kind} tokens are decoded one by one": decoding(kind) for kind in KINDS},
    "text that holds nothing back is searched for stops": stopping(stop=["xyz", "b c"], stop_regex=["x+y"]),
    "text that is held back is searched for a pattern": stopping(span=64, stop_regex=r"(?s)a.*b.*y"),
    "text that is held back is searched for a large pattern": stopping(span=64, stop_regex=r"(?:[ab ]{20}){30}z"),
    "an answer is collected": collecting,
    "an index of drafts grows": drafting,
    "prefixes are kept and found": caching,
    "a body is decoded": checking_parameters,
    "blocks become a conversation": conversing,
    "a call that is cut off becomes a block": calling,
    "scores become shares": scoring,
    "tools are left out": leaving_out,
    "an item is referred to many times": referring,
    "a conversation is put into turns": taking_turns,
}


def cost_s(work: Work) -> float:
    began = time.thread_time()
    work()
    return time.thread_time() - began


def size_to_measure(make: Callable[[int], Work]) -> int:
    """A size that takes long enough to be measured."""
    size = 1 << 12
    while cost_s(make(size)) < LEAST_S and size < 1 << 20:
        size *= 2
    return size


@pytest.mark.parametrize("name", CASES)
def test_costs_grow_no_faster_than_sizes(name: str) -> None:
    make = CASES[name]
    size = size_to_measure(make)
    small, large = make(size), make(GROWTH * size)
    least_small = least_large = float("inf")
    for _ in range(TRIES):
        least_small = min(least_small, cost_s(small))
        least_large = min(least_large, cost_s(large))
        if least_large <= MOST * least_small:
            return
    raise AssertionError(f"{name}: {least_small:.4f} s at {size}, {least_large:.4f} s at {GROWTH * size}")
