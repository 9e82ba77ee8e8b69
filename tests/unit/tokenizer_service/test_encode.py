"""What the tokenizer service answers to each message."""

import itertools
from array import array

import pytest
from tokenizers import Tokenizer, models

from quartet.runtime.control import FlushCache, Probe, Tokenize
from quartet.runtime.messages import Chat, Generate, Message, Reply, Request, Tokenized, Tokens, pack_ids, unpack_ids
from quartet.runtime.sampling import SamplingParams
from quartet.tokenizer_service.encode import Encoder
from quartet.tokenizer_service.text_encoder import VERY_LONG_CHARS
from tests.tokenizers_to_try import KINDS, byte_level

TOKENIZER = byte_level(bos=True)
SERIALS = itertools.count(1)


class Bracketed:
    """A chat template."""

    def render(self, chat: Chat) -> str:
        return "<|begin|>" + "".join(f"[{message['content']}]" for message in chat.messages)


@pytest.fixture
def encoder() -> Encoder:
    return Encoder(TOKENIZER, template=Bracketed(), hidden_size=2)


def request(rid: str = "", **params: object) -> Request:
    rid = rid or f"r{next(SERIALS)}"  # two that wait never have the same
    return Request(rid=rid, params=SamplingParams(**params), attempt=3)  # type: ignore[arg-type]


def ids_of(message: Message) -> list[int]:
    assert isinstance(message, Tokenized), message
    return list(unpack_ids(message.prompt_ids))


def refusal(message: Message) -> str:
    """The text of a terminal Tokens message."""
    assert isinstance(message, Tokens)
    assert message.finish is not None
    assert (message.finish.reason, message.finish.status, message.attempt) == ("error", 400, 3)
    return message.finish.message


def test_text_gets_the_models_special_tokens(encoder: Encoder) -> None:
    [out] = encoder.step([Generate(request=request(), text="hello")])
    assert ids_of(out) == [0, *TOKENIZER.encode("hello", add_special_tokens=False).ids]


def test_a_chat_is_rendered_and_gets_no_second_start(encoder: Encoder) -> None:
    chat = Chat(messages=[{"role": "user", "content": "hi"}])
    [out] = encoder.step([Generate(request=request(), chat=chat)])
    assert ids_of(out) == TOKENIZER.encode("<|begin|>[hi]", add_special_tokens=False).ids


def test_a_chat_without_a_template_is_refused() -> None:
    chat = Chat(messages=[{"role": "user", "content": "hi"}])
    assert "no chat template" in refusal(Encoder(TOKENIZER).step([Generate(request=request(), chat=chat)])[0])


def test_a_mixed_batch_keeps_its_order(encoder: Encoder) -> None:
    batch = [
        Generate(request=request("a"), text="one"),
        FlushCache(id="f"),
        Generate(request=request("b"), input_ids=pack_ids([5, 6])),
        Generate(request=request("c"), chat=Chat(messages=[{"content": "x"}])),
        Generate(request=request("d"), text_pair="two", text="one"),
        Generate(request=request("e"), input_ids=b""),
        Generate(request=request("g"), text="three"),
    ]
    out = encoder.step(batch)
    assert [getattr(m, "rid", None) or getattr(getattr(m, "request", None), "rid", None) for m in out] == [
        "a", None, "b", "c", "d", "e", "g"
    ]  # fmt: skip
    assert out[1] is batch[1]
    assert ids_of(out[2]) == [5, 6]
    assert ids_of(out[6]) == TOKENIZER.encode("three").ids


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_gives_what_each_text_gives_alone(kind: str) -> None:
    texts = ["", "a", "The quick brown fox.", "你好，世界 😀", "  spaces  and\nlines\n"]
    out = Encoder(KINDS[kind]()).step([Generate(request=request(), text=text) for text in texts])
    for text, message in zip(texts, out, strict=True):
        expected = KINDS[kind]().encode(text).ids
        assert (ids_of(message) == expected) if expected else ("empty" in refusal(message))


@pytest.mark.parametrize(
    "prompt",
    [Generate(request=request(), text=""), Generate(request=request()), Generate(request=request(), embeds=b"")],
)
def test_an_empty_prompt_is_refused(prompt: Generate) -> None:
    assert refusal(Encoder(byte_level()).step([prompt])[0]) == "input_ids cannot be empty."


def test_ids_that_are_no_int32_are_refused(encoder: Encoder) -> None:
    assert "input_ids" in refusal(encoder.step([Generate(request=request(), input_ids=b"12345")])[0])


def test_vectors_stand_at_zero_ids(encoder: Encoder) -> None:
    rows = array("f", [0.5] * 6).tobytes()
    [out] = encoder.step([Generate(request=request(), embeds=rows)])
    assert (ids_of(out), out.embeds) == ([0, 0, 0], rows)


def test_vectors_of_a_wrong_width_are_refused(encoder: Encoder) -> None:
    [out] = encoder.step([Generate(request=request(), embeds=array("f", [0.5] * 5).tobytes())])
    assert refusal(out) == "input_embeds must have rows of 2 numbers."


def test_a_pair_has_token_types_where_the_model_has_them() -> None:
    pair = Generate(request=request(), text="a dog", text_pair="it is")
    tokenizer = KINDS["word piece"]()
    expected = tokenizer.encode("a dog", "it is")
    [typed] = Encoder(tokenizer, token_types=True).step([pair])
    [untyped] = Encoder(tokenizer).step([pair])
    assert ids_of(typed) == ids_of(untyped) == expected.ids
    assert list(unpack_ids(typed.token_types)) == expected.type_ids
    assert 1 in expected.type_ids
    assert untyped.token_types == b""


def test_one_text_alone_has_no_token_types() -> None:
    [out] = Encoder(KINDS["word piece"](), token_types=True).step([Generate(request=request(), text="a dog")])
    assert out.token_types == b""


def test_a_bad_stop_pattern_is_refused_before_scheduling(encoder: Encoder) -> None:
    bad = Generate(request=request(stop_regex=["ok", "("]), text="hi")
    good = Generate(request=request(stop_regex="a|b"), text="hi")
    refused, fine = encoder.step([bad, good])
    assert refusal(refused).startswith("stop_regex '(' does not compile")
    assert isinstance(fine, Tokenized)
    assert (encoder.counters.prompts, encoder.counters.refused) == (1, 1)


def test_a_text_that_cannot_be_encoded_fails_alone() -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="[UNK]"))  # its unknown token is not in the vocabulary
    bad, good = Encoder(tokenizer).step([Generate(request=request(), text=text) for text in ("zzz", "a")])
    assert "cannot be tokenized" in refusal(bad)
    assert ids_of(good) == [0]


@pytest.mark.parametrize("params", [{"stop": "x"}, {"stop_regex": "x"}, {"min_new_tokens": 1}])
def test_without_a_tokenizer_what_needs_one_is_refused(params: dict[str, object]) -> None:
    [out] = Encoder(None).step([Generate(request=request(**params), input_ids=pack_ids([1]))])
    assert refusal(out).startswith(next(iter(params)))


def test_without_a_tokenizer_ids_pass_and_text_is_refused() -> None:
    ids, text = Encoder(None).step(
        [Generate(request=request(), input_ids=pack_ids([1])), Generate(request=request(), text="x")]
    )
    assert ids_of(ids) == [1]
    assert "tokenizer is not initialized" in refusal(text)


def test_a_text_that_cannot_fit_is_refused_before_it_is_encoded() -> None:
    encoder = Encoder(TOKENIZER, context_length=8)
    long, pair, fits = encoder.step(
        [
            Generate(request=request(), text=" " * (VERY_LONG_CHARS + 1)),
            Generate(request=request(), text="a", text_pair="b" * VERY_LONG_CHARS),
            Generate(request=request(), text="a longer text than the context, left to the scheduler"),
        ]
    )
    message = "The input (more than 8 tokens) is longer than the model's context length (8 tokens)."
    assert refusal(long) == refusal(pair) == message
    assert isinstance(fits, Tokenized)


def test_tokenize_answers_ids(encoder: Encoder) -> None:
    plain = TOKENIZER.encode("hello", add_special_tokens=False).ids
    assert encoder.step([Tokenize(id="1", texts=["hello"])]) == [
        Reply(id="1", body={"tokens": [pack_ids([0, *plain])]})
    ]
    [bare] = encoder.step([Tokenize(id="2", texts=["hello", ""], add_special_tokens=False)])
    assert bare.body == {"tokens": [pack_ids(plain), b""]}
    [chat] = encoder.step([Tokenize(id="3", chat=Chat(messages=[{"content": "x"}]))])
    assert chat.body == {"tokens": [pack_ids(TOKENIZER.encode("<|begin|>[x]", add_special_tokens=False).ids)]}


def test_tokenize_that_cannot_be_done_says_why() -> None:
    [reply] = Encoder(None).step([Tokenize(id="1", texts=["hello"])])
    assert (reply.id, reply.success, reply.status) == ("1", False, 400)
    [reply] = Encoder(TOKENIZER).step([Tokenize(id="2", chat=Chat(messages=[]))])
    assert "no chat template" in reply.message


def test_probe_gets_our_counters(encoder: Encoder) -> None:
    encoder.step([Generate(request=request(), text="hello"), Generate(request=request())])
    [probe] = encoder.step([Probe()])
    assert probe.counters["tokenizer"]["prompts"] == 1
    assert probe.counters["tokenizer"]["refused"] == 1


def test_stop_patterns_that_are_large_together_are_refused(encoder: Encoder) -> None:
    patterns = [f"(?:{letter}{{30}}){{30}}" for letter in "abcdefghij"]
    [one] = encoder.step([Generate(request=request(stop_regex=patterns[:1]), text="hi")])
    [all_of_them] = encoder.step([Generate(request=request(stop_regex=patterns), text="hi")])
    assert isinstance(one, Tokenized)
    assert refusal(all_of_them).startswith("The patterns of stop_regex are too large together")
