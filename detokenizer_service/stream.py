"""The text side of one running request: its decoder, its stops, and the cut where it ends."""

from array import array
from collections.abc import Sequence

from quartet.detokenizer_service.decode import Vocabulary
from quartet.detokenizer_service.stops import Cutter, Match, stops_of
from quartet.runtime.messages import Finish, Request, unpack_ids


class Stream:
    """From a request's first Tokens message to its last. A function of the token list alone, so it can be rebuilt."""

    def __init__(self, vocabulary: Vocabulary, request: Request, prompt_tail: bytes) -> None:
        """`request.resume_ids` are taken in silence: the client has their text."""
        params = request.params
        stops = stops_of(params)
        self.request = request
        self.made = 0  # output ids so far
        self.trimmed = False  # the last id was a stop token, which is no text
        self._least = params.min_new_tokens
        self._trim = not params.no_stop_trim
        self._decoder = vocabulary.decoder(unpack_ids(prompt_tail), params.skip_special_tokens)
        self._cutter = Cutter(stops, self._trim) if stops else None
        self.feed(unpack_ids(request.resume_ids), None)

    def feed(self, ids: "array[int]", finish: Finish | None) -> tuple[str, int, Match | None]:
        """New text, how many of the ids it took, and the stop that completes it. `finish`: these ids are the last."""
        before = self.made
        self.made += len(ids)
        self.trimmed = self._trim and _ends_in_stop_token(ids, finish)
        spoken = ids[:-1] if self.trimmed else ids
        text, taken, match = self._pass(spoken, before)
        if match is not None:
            self.trimmed = False  # that id is cut off whole
        else:
            taken = len(ids)
            if finish is not None:
                rest, match = self._rest()
                text += rest
        return text, taken, match

    def _pass(self, ids: Sequence[int], before: int) -> tuple[str, int, Match | None]:
        """The text of ids that stand behind `before` others: no stop is one before the least number of tokens."""
        if self._cutter is None:
            return self._decoder.feed(ids), len(ids), None
        parts = []
        for taken, id in enumerate(ids, 1):  # a token at a time: the one that completes a stop is the last
            text, match = self._cutter.feed(self._decoder.feed((id,)), spared=before + taken < self._least)
            parts.append(text)
            if match:
                return "".join(parts), taken, match
        return "".join(parts), len(ids), None

    def _rest(self) -> tuple[str, Match | None]:
        """What was held back."""
        text = self._decoder.flush()
        if self._cutter is None:
            return text, None
        passed, match = self._cutter.feed(text, spared=self.made < self._least)
        return (passed, match) if match else (passed + self._cutter.flush(), None)


def _ends_in_stop_token(ids: "array[int]", finish: Finish | None) -> bool:
    if finish is None or finish.reason != "stop" or finish.spoken:
        return False
    return len(ids) > 0 and ids[-1] == finish.matched
