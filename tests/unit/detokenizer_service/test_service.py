"""What the detokenizer answers to each message."""

from array import array

import pytest

from quartet.detokenizer_service.decode import Vocabulary
from quartet.detokenizer_service.service import Detokenizer
from quartet.runtime.control import Abort, Detokenize, FlushCache, Probe
from quartet.runtime.messages import (
    Drafts,
    Facts,
    Finish,
    LogprobOptions,
    Logprobs,
    Message,
    Reply,
    Request,
    Text,
    Tokens,
    pack_ids,
    unpack_ids,
)
from quartet.runtime.sampling import SamplingParams
from tests.tokenizers_to_try import byte_level

TOKENIZER = byte_level()
END = TOKENIZER.token_to_id("<|end|>")
LENGTH = Finish(reason="length", length=9)


@pytest.fixture
def detokenizer() -> Detokenizer:
    return Detokenizer(Vocabulary(TOKENIZER))


def ids_of(text: str) -> list[int]:
    return TOKENIZER.encode(text).ids


def request(**params: object) -> Request:
    return Request(rid="r", params=SamplingParams(**params))  # type: ignore[arg-type]


def floats(*values: float) -> bytes:
    return array("f", values).tobytes()


def texts(messages: list[Message]) -> str:
    return "".join(message.text for message in messages if isinstance(message, Text))


def one_by_one(ids: list[int], of: Request, finish: Finish | None = None) -> list[Tokens]:
    """The messages of a request that makes a token a step."""
    made = [Tokens(rid=of.rid, attempt=of.attempt, ids=pack_ids([id])) for id in ids]
    made[0].request = of
    made[-1].finish = finish
    return made


def test_text_of_a_request_joins_to_the_whole_and_carries_no_request(detokenizer: Detokenizer) -> None:
    out = detokenizer.step(one_by_one(ids_of("Привет, 😀!"), request(), LENGTH))
    assert texts(out) == "Привет, 😀!"
    assert all(isinstance(m, Text) and m.tokens.request is None and not m.tokens.prompt_tail for m in out)
    assert out[-1].tokens.finish == LENGTH


def test_many_tokens_in_one_message_are_one_text(detokenizer: Detokenizer) -> None:
    ids = pack_ids(ids_of("hello there"))
    [out] = detokenizer.step([Tokens(rid="r", request=request(), ids=ids, finish=LENGTH)])
    assert (out.text, out.tokens.ids) == ("hello there", ids)


@pytest.mark.parametrize(("trim", "text"), [(True, "hi"), (False, "hi<|end|>")])
def test_the_stop_token_is_in_the_ids_and_not_in_the_text(detokenizer: Detokenizer, trim: bool, text: str) -> None:
    of = request(no_stop_trim=not trim, skip_special_tokens=False)
    ids = [*ids_of("hi"), END]
    out = detokenizer.step(one_by_one(ids, of, Finish(reason="stop", matched=END)))
    assert texts(out) == text
    assert [unpack_ids(m.tokens.ids)[0] for m in out] == ids


def test_the_token_that_completes_a_grammar_is_named_and_stays_in_the_text(detokenizer: Detokenizer) -> None:
    ids = ids_of("hi there")
    out = detokenizer.step(one_by_one(ids, request(), Finish(reason="stop", matched=ids[-1], spoken=True)))
    assert texts(out) == "hi there"
    assert out[-1].tokens.finish.matched == ids[-1]


def test_a_stop_string_ends_the_request_and_tells_the_scheduler(detokenizer: Detokenizer) -> None:
    out = detokenizer.step(one_by_one(ids_of("one two three"), request(stop=" two")))
    assert texts(out) == "one"
    last, abort = out[-2:]
    assert last.tokens.finish == Finish(reason="stop", matched=" two")
    assert abort == Abort(rid="r", exact=True, attempt=0)


def test_what_follows_a_stop_is_dropped_and_counted(detokenizer: Detokenizer) -> None:
    steps = one_by_one(ids_of("one two three four"), request(stop=" two"))
    first = detokenizer.step(steps)
    later = detokenizer.step([Tokens(rid="r", finish=Finish(reason="abort", message="Aborted"))])
    assert later == []
    made = sum(isinstance(message, Text) for message in first)
    assert detokenizer.counters.dropped == len(steps) - made + 1
    assert detokenizer.counters.stopped == 1


def test_a_stop_in_the_last_step_overrides_length_without_an_abort(detokenizer: Detokenizer) -> None:
    out = detokenizer.step(one_by_one(ids_of("ab stop"), request(stop="stop"), LENGTH))
    assert not any(isinstance(message, Abort) for message in out)
    assert out[-1].tokens.finish == Finish(reason="stop", matched="stop")


def test_tokens_behind_the_stop_are_cut_with_their_logprobs_and_hidden_states(detokenizer: Detokenizer) -> None:
    ids = [*ids_of("go"), *ids_of(" STOP"), *ids_of(" never")]
    kept = len(ids_of("go")) + len(ids_of(" STOP"))
    count = len(ids)
    logprobs = Logprobs(
        ids=pack_ids(ids),
        values=floats(*range(count)),
        top_ids=pack_ids(range(2 * count)),
        top_values=floats(*range(2 * count)),
        asked_values=floats(*range(count)),
        entropies=floats(*range(count)),
        support_counts=pack_ids(range(count)),
        support_ids=pack_ids(range(sum(range(count)))),
        support_values=floats(*range(count)),
    )
    step = Tokens(
        rid="r",
        request=request(stop="STOP"),
        ids=pack_ids(ids),
        logprobs=logprobs,
        hidden_states=floats(*range(2 * (3 + count))),  # three rows of the prompt come first
        hidden_size=2,
    )
    [last, _] = detokenizer.step([step])
    assert last.tokens.ids == pack_ids(ids[:kept])
    assert last.tokens.logprobs.values == floats(*range(kept))
    assert last.tokens.logprobs.top_ids == pack_ids(range(2 * kept))
    assert last.tokens.logprobs.asked_values == floats(*range(kept))
    assert last.tokens.logprobs.entropies == last.tokens.logprobs.support_values == floats(*range(kept))
    assert last.tokens.logprobs.support_ids == pack_ids(range(sum(range(kept))))
    assert last.tokens.hidden_states == floats(*range(2 * (3 + kept)))


def test_drafts_behind_the_stop_do_not_count_as_right(detokenizer: Detokenizer) -> None:
    ids = ids_of("so far and further")
    step = Tokens(
        rid="r", request=request(stop="far"), ids=pack_ids(ids), drafts=Drafts(proposed=30, correct=len(ids) - 1)
    )
    [last, _] = detokenizer.step([step])
    assert last.tokens.drafts == Drafts(proposed=30, correct=len(last.tokens.ids) // 4 - 1)
    assert len(last.tokens.ids) // 4 < len(ids)


def test_one_message_or_many_give_the_same_text_and_ids() -> None:
    ids = ids_of("The quick brown fox jumps over") * 2
    for stop in ("fox j", "own", "brown fox jumps overThe"):
        apart = Detokenizer(Vocabulary(TOKENIZER)).step(one_by_one(ids, request(stop=stop)))
        [together, _] = Detokenizer(Vocabulary(TOKENIZER)).step(
            [Tokens(rid="r", request=request(stop=stop), ids=pack_ids(ids))]
        )
        assert together.text == texts(apart)
        assert together.tokens.ids == b"".join(m.tokens.ids for m in apart if isinstance(m, Text))


def test_held_text_comes_out_at_the_end(detokenizer: Detokenizer) -> None:
    out = detokenizer.step(one_by_one(ids_of("so fa"), request(stop="far away"), LENGTH))
    assert texts(out) == "so fa"
    assert out[-1].text.endswith("fa"[-1])


def test_a_replay_continues_where_the_client_is(detokenizer: Detokenizer) -> None:
    ids = ids_of("count 😀 to the END of it")
    for cut in range(1, len(ids)):
        before = Detokenizer(Vocabulary(TOKENIZER)).step(one_by_one(ids[:cut], request(stop="END")))
        if any(isinstance(message, Abort) for message in before):
            break
        again = Request(rid="r", params=SamplingParams(stop="END"), attempt=1, resume_ids=pack_ids(ids[:cut]))
        after = detokenizer.step(one_by_one(ids[cut:], again))
        assert texts(before) + texts(after) == "count 😀 to the "
    else:
        pytest.fail("the stop was never met")


def test_an_older_attempt_is_dropped(detokenizer: Detokenizer) -> None:
    again = Request(rid="r", params=SamplingParams(), attempt=1)
    detokenizer.step([Tokens(rid="r", attempt=1, request=again, ids=pack_ids(ids_of("a")))])
    assert detokenizer.step([Tokens(rid="r", attempt=0, ids=pack_ids(ids_of("b")))]) == []
    assert detokenizer.step([Tokens(rid="r", attempt=0, finish=LENGTH)]) == []
    [out] = detokenizer.step([Tokens(rid="r", attempt=1, ids=pack_ids(ids_of("c")), finish=LENGTH)])
    assert out.text == "c"


def test_a_refused_prompt_passes_though_it_never_ran(detokenizer: Detokenizer) -> None:
    refused = Tokens(rid="x", finish=Finish(reason="error", message="no", status=400))
    assert detokenizer.step([refused]) == [Text(tokens=refused)]


def test_tokens_of_an_unknown_request_are_dropped(detokenizer: Detokenizer) -> None:
    assert detokenizer.step([Tokens(rid="x", ids=pack_ids([1]))]) == []
    assert detokenizer.counters.dropped == 1


def test_a_vector_passes_untouched(detokenizer: Detokenizer) -> None:
    of = Request(rid="r", params=SamplingParams(), task="embed")
    [out] = detokenizer.step([Tokens(rid="r", request=of, vector=floats(1, 2), finish=LENGTH)])
    assert (out.text, out.tokens.vector, out.tokens.request) == ("", floats(1, 2), None)


def test_logprobs_get_text_where_asked(detokenizer: Detokenizer) -> None:
    a, b, c = ids_of("a") + ids_of("b") + ids_of("c")
    of = Request(rid="r", params=SamplingParams(), logprobs=LogprobOptions(start=0, top=1, token_ids=[c], text=True))
    step = Tokens(
        rid="r",
        request=of,
        ids=pack_ids([a]),
        logprobs=Logprobs(ids=pack_ids([a]), values=floats(0), top_ids=pack_ids([b]), top_values=floats(0)),
        input_logprobs=Logprobs(ids=pack_ids([END, b]), values=floats(0, 0)),
    )
    [out] = detokenizer.step([step])
    assert (out.tokens.logprobs.texts, out.tokens.logprobs.top_texts) == ([b"a"], [b"b"])
    assert out.tokens.logprobs.asked_texts == [b"c"]
    assert out.tokens.input_logprobs.texts == [b"<|end|>", b"b"]


def test_logprobs_get_no_text_unasked(detokenizer: Detokenizer) -> None:
    of = Request(rid="r", params=SamplingParams(), logprobs=LogprobOptions())
    step = Tokens(rid="r", request=of, ids=pack_ids([5]), logprobs=Logprobs(ids=pack_ids([5]), values=floats(0)))
    assert detokenizer.step([step])[0].tokens.logprobs.texts is None


def test_routed_experts_come_with_the_end_though_the_text_stopped_before(detokenizer: Detokenizer) -> None:
    ids = [*ids_of("x"), *ids_of(" STOP"), *ids_of(" y")]
    kept, made, prompt = len(ids) - len(ids_of(" y")), len(ids), 3
    of = Request(rid="r", params=SamplingParams(stop="STOP"), return_routed_experts=True)
    out = detokenizer.step([Tokens(rid="r", request=of, ids=pack_ids(ids), prompt_tokens=prompt)])
    assert out == [Abort(rid="r", exact=True, attempt=0)]
    one_more = Tokens(rid="r", ids=pack_ids([5]), prompt_tokens=prompt)
    experts = pack_ids(range(2 * (prompt + made + 1 - 1)))
    end = Tokens(rid="r", routed_experts=experts, finish=Finish(reason="abort"), prompt_tokens=prompt)
    [last] = detokenizer.step([one_more, end])
    assert last.tokens.finish == Finish(reason="stop", matched="STOP")
    assert last.tokens.routed_experts == pack_ids(range(2 * (prompt + kept - 1)))


@pytest.mark.parametrize("early", [True, False])
def test_routed_experts_are_cut_at_the_stop_when_they_begin_later(detokenizer: Detokenizer, early: bool) -> None:
    ids = [*ids_of("x"), *ids_of(" STOP"), *ids_of(" y")]
    kept, made, prompt, start = len(ids) - len(ids_of(" y")), len(ids), 3, 2
    params = SamplingParams(stop="STOP")
    of = Request(rid="r", params=params, return_routed_experts=True, routed_experts_start_len=start)
    step = Tokens(rid="r", request=of, ids=pack_ids(ids), prompt_tokens=prompt)
    end = Tokens(rid="r", prompt_tokens=prompt) if early else step
    end.routed_experts, end.finish = pack_ids(range(prompt + made - 1 - start)), Finish(reason="length")
    out = detokenizer.step([step, end] if early else [step])
    assert out[-1].tokens.routed_experts == pack_ids(range(prompt + kept - 1 - start))


def facts(epoch: int) -> Facts:
    return Facts(epoch=epoch, max_total_num_tokens=1, max_req_input_len=1, context_length=1, vocab_size=1)


def test_a_new_scheduler_forgets_what_ran_before(detokenizer: Detokenizer) -> None:
    detokenizer.step([facts(0), Tokens(rid="r", request=request(), ids=pack_ids(ids_of("a")))])
    assert detokenizer.step([facts(1)]) == [facts(1)]
    assert detokenizer.step([Tokens(rid="r", ids=pack_ids(ids_of("b")))]) == []


def sent_to(epoch: int) -> Request:
    asked = request()
    asked.epoch = epoch
    return asked


def test_what_a_dead_scheduler_said_opens_no_stream_behind_its_successors_first_word(detokenizer: Detokenizer) -> None:
    late = Tokens(rid="late", request=sent_to(1), ids=pack_ids(ids_of("a")))
    assert detokenizer.step([facts(2), late]) == [facts(2)]
    [probe] = detokenizer.step([Probe()])
    assert probe.counters["detokenizer"]["running"] == 0


def test_the_words_of_a_dead_scheduler_end_nothing_of_its_successor(detokenizer: Detokenizer) -> None:
    detokenizer.step([facts(2), Tokens(rid="r", request=sent_to(2), ids=pack_ids(ids_of("a"))), facts(1)])
    assert texts(detokenizer.step([Tokens(rid="r", ids=pack_ids(ids_of("b")))])) == "b"


@pytest.mark.parametrize("said_before", [True, False])  # this detokenizer may be newer than the scheduler
def test_a_scheduler_that_says_its_facts_again_is_the_same(detokenizer: Detokenizer, said_before: bool) -> None:
    if said_before:
        detokenizer.step([facts(3)])
    detokenizer.step([Tokens(rid="r", request=sent_to(3), ids=pack_ids(ids_of("a"))), facts(3)])
    assert texts(detokenizer.step([Tokens(rid="r", ids=pack_ids(ids_of("b")))])) == "b"


def test_what_waits_for_the_last_message_of_a_dead_scheduler_is_not_told_without_it(detokenizer: Detokenizer) -> None:
    asked = request(stop="b")
    asked.return_routed_experts = True
    detokenizer.step([facts(0), Tokens(rid="r", request=asked, ids=pack_ids(ids_of("ab")))])
    assert detokenizer.step([facts(1)]) == [facts(1)]


def test_detokenize_answers_texts(detokenizer: Detokenizer) -> None:
    command = Detokenize(id="7", ids=[pack_ids(ids_of("hi 你好")), b""], skip_special_tokens=False)
    assert detokenizer.step([command]) == [Reply(id="7", body={"texts": ["hi 你好", ""]})]


@pytest.mark.parametrize("bad", [b"123", pack_ids([-1])])
def test_detokenize_refuses_what_is_no_id(detokenizer: Detokenizer, bad: bytes) -> None:
    [reply] = detokenizer.step([Detokenize(id="7", ids=[bad])])
    assert (reply.success, reply.status) == (False, 400)


def test_probe_gets_our_counters_and_others_pass(detokenizer: Detokenizer) -> None:
    detokenizer.step([Tokens(rid="r", request=request(), ids=pack_ids([5, 6]))])
    probe, flush = detokenizer.step([Probe(), FlushCache(id="1")])
    assert probe.counters["detokenizer"] == {"running": 1, "tokens": 2, "stopped": 0, "dropped": 0}
    assert flush == FlushCache(id="1")


def test_without_a_tokenizer_ids_pass_and_nothing_is_decoded() -> None:
    detokenizer = Detokenizer(None)
    step = Tokens(rid="r", request=request(), ids=pack_ids([5]))
    assert detokenizer.step([step]) == [Text(tokens=Tokens(rid="r", ids=pack_ids([5])))]
    [reply] = detokenizer.step([Detokenize(id="1", ids=[pack_ids([5])])])
    assert reply.status == 400


@pytest.mark.parametrize("stop", [{"stop": "END"}, {"stop_regex": "E?ND"}])
def test_no_stop_ends_a_request_before_its_least_number_of_tokens(detokenizer: Detokenizer, stop: dict) -> None:
    ids = ids_of("a END b END c END")
    out = detokenizer.step(one_by_one(ids, request(min_new_tokens=len(ids) - 3, **stop), LENGTH))
    answers = [message for message in out if isinstance(message, Text)]
    assert texts(answers) == "a END b END c "
    assert sum(len(unpack_ids(text.tokens.ids)) for text in answers) >= len(ids) - 3
    assert answers[-1].tokens.finish.reason == "stop"


def test_the_least_number_of_tokens_counts_those_of_before_a_restart(detokenizer: Detokenizer) -> None:
    ids = ids_of("a END b END c")
    for cut in range(1, len(ids)):
        params = SamplingParams(stop="END", min_new_tokens=len(ids_of("a END b")))
        again = Request(rid="r", params=params, attempt=1, resume_ids=pack_ids(ids[:cut]))
        before = Detokenizer(Vocabulary(TOKENIZER)).step(one_by_one(ids[:cut], Request(rid="r", params=params)))
        if any(isinstance(message, Abort) for message in before):
            break
        assert texts(before) + texts(detokenizer.step(one_by_one(ids[cut:], again, LENGTH))) == "a END b "


def test_logprobs_name_half_characters_by_their_bytes_and_mark_what_is_no_text(detokenizer: Detokenizer) -> None:
    ids = [*ids_of("😀"), TOKENIZER.token_to_id("<|end|>")]
    asked = Request(rid="r", params=SamplingParams(), logprobs=LogprobOptions(text=True))
    scores = Logprobs(ids=pack_ids(ids), values=floats(*([-1.0] * len(ids))))
    end = Finish(reason="stop", matched=ids[-1])
    [out] = detokenizer.step([Tokens(rid="r", request=asked, ids=pack_ids(ids), logprobs=scores, finish=end)])
    assert b"".join(out.tokens.logprobs.texts[:-1]) == "😀".encode()
    assert out.tokens.logprobs.unspoken == [len(ids) - 1]


def test_detokenize_leaves_an_open_end_to_what_follows(detokenizer: Detokenizer) -> None:
    ids = ids_of("a 😀")
    command = Detokenize(id="7", ids=[pack_ids(ids[:-1]), pack_ids(ids)], open_end=True)
    assert detokenizer.step([command]) == [Reply(id="7", body={"texts": ["a ", "a 😀"]})]
