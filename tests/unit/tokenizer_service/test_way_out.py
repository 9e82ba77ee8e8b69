"""Where the tokenizer's messages go when there are several schedulers."""

from collections.abc import Sequence

from quartet.runtime.control import Abort, Detokenize, FlushCache, Probe, Tokenize
from quartet.runtime.messages import Message, Reply, Request, Restarted, Tokenized, Tokens
from quartet.runtime.sampling import SamplingParams
from quartet.tokenizer_service.way_out import Crossroads


class Sent:
    def __init__(self) -> None:
        self.messages: list[Message] = []

    def send(self, messages: Sequence[Message]) -> None:
        self.messages += messages


def test_what_names_a_scheduler_goes_to_it_and_the_rest_past_them() -> None:
    schedulers, past = [Sent(), Sent()], Sent()
    request = Request(rid="r", params=SamplingParams(), rank=1)
    first: list[Message] = [FlushCache(id="f"), Probe(id="p"), Restarted(role="gateway")]
    second: list[Message] = [Tokenized(request=request, prompt_ids=b""), Abort(rid="r", rank=1)]
    rest: list[Message] = [
        Tokens(rid="refused"),
        Reply(id="t"),
        Restarted(role="tokenizer"),
        Detokenize(id="d"),
        Tokenize(id="t"),
    ]
    Crossroads(schedulers, past).send([first[0], second[0], rest[0], *first[1:], *rest[1:], second[1]])
    assert [sent.messages for sent in [*schedulers, past]] == [first, second, rest]
