from quartet.runtime import limits
from quartet.runtime.messages import Finish, unpack_ids
from quartet.scheduler_service.answers import unqueued_end
from tests.rig import PROMPT, Rig
from tests.stepper import tokenized


def test_a_request_that_was_never_queued_is_answered_by_one_message_with_the_request() -> None:
    message = tokenized("a", PROMPT, 3, attempt=2)
    answer = unqueued_end(message, Finish(reason="stop"))
    assert (answer.rid, answer.attempt, answer.prompt_tokens) == ("a", 2, len(PROMPT))
    assert answer.request == message.request and answer.finish == Finish(reason="stop")


def test_only_the_first_message_carries_the_request_and_the_prompts_tail() -> None:
    rig = Rig()
    rig.inbox.put(tokenized("a", range(100, 120), 2))
    rig.run()
    first, second = rig.tokens("a")
    assert first.request is not None and first.request.rid == "a"
    assert list(unpack_ids(first.prompt_tail)) == list(range(112, 120))
    assert second.request is None and second.prompt_tail == b""


def test_hidden_states_that_would_not_fit_into_a_message_are_refused() -> None:
    rig = Rig()
    rig.scheduler.hidden_size = limits.MAX_HIDDEN_STATE_BYTES // (4 * len(PROMPT))
    for rid, prompt in (("fits", PROMPT), ("does not", [*PROMPT, 17])):
        rig.inbox.put(tokenized(rid, prompt, 2, hidden=True))
    rig.run()
    assert rig.tokens("fits")[-1].finish == Finish(reason="length", length=2)
    (refused,) = rig.tokens("does not")
    assert refused.finish is not None and refused.finish.field == "return_hidden_states"
