"""Whole sequences of ids become text: short ones at once, long ones in the background, and none without a limit."""

from concurrent.futures import Executor, Future
from typing import Any

import pytest

from quartet.detokenizer_service import whole_texts
from quartet.detokenizer_service.decode import Vocabulary
from quartet.detokenizer_service.service import Detokenizer
from quartet.detokenizer_service.whole_texts import FEW_IDS
from quartet.runtime import limits
from quartet.runtime.control import Detokenize
from quartet.runtime.messages import Message, Reply, pack_ids
from tests.fakes import AtOnce
from tests.tokenizers_to_try import KINDS

TOKENIZER = KINDS["byte level"]()
LONG = TOKENIZER.encode("The quick brown fox. " * FEW_IDS).ids
FEW = TOKENIZER.encode("short").ids


class Later(Executor):
    """Does what it is given when the test says so."""

    def __init__(self) -> None:
        self.given: list[Any] = []

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.given.append(lambda: future.set_result(fn(*args, **kwargs)))
        return future


def asked(id: str, *sequences: list[int]) -> Detokenize:
    return Detokenize(id=id, ids=[pack_ids(ids) for ids in sequences])


def texts_of(message: Message) -> list[str]:
    assert isinstance(message, Reply) and message.body, message
    found: list[str] = message.body["texts"]
    return found


def test_short_sequences_overtake_a_long_one_that_is_decoded_in_the_background() -> None:
    later = Later()
    detokenizer = Detokenizer(Vocabulary(TOKENIZER), later)
    assert detokenizer.patience_s is None
    [short] = detokenizer.step([asked("long", LONG), asked("longer", LONG, FEW), asked("short", FEW)])
    assert (texts_of(short), detokenizer.patience_s) == (["short"], whole_texts.BEAT_S)
    assert detokenizer.step([]) == []
    later.given.pop(0)()
    [long] = detokenizer.step([])
    later.given.pop(0)()
    [longer] = detokenizer.step([])
    assert texts_of(longer) == [*texts_of(long), "short"] == ["The quick brown fox. " * FEW_IDS, "short"]
    assert detokenizer.patience_s is None


def reply(command: Detokenize) -> Reply:
    detokenizer = Detokenizer(Vocabulary(TOKENIZER), AtOnce())
    [message] = [*detokenizer.step([command]), *detokenizer.step([])]
    assert isinstance(message, Reply)
    return message


def test_more_ids_than_the_limit_are_refused_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_DETOKENIZED", FEW_IDS)
    refused = reply(asked("1", LONG))
    assert (refused.status, f"At most {FEW_IDS} ids" in refused.message) == (400, True)


def test_more_text_than_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_DETOKENIZED_CHARS", 1000)
    refused = reply(asked("1", LONG, LONG))
    assert (refused.status, "more than 1000 characters" in refused.message) == (400, True)


def test_ids_that_are_none_are_refused_in_the_background_too() -> None:
    assert reply(asked("1", [*LONG, -1])).message == whole_texts.BAD_IDS
