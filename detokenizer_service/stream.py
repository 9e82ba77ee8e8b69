"""The text side of one running request: its decoder, its stops, and the cut where it ends."""

from array import array

from detokenizer_service.decode import Vocabulary
from detokenizer_service.stops import Cutter, Match, stops_of
from runtime.messages import Finish, Request, unpack_ids


class Stream:
    """From a request's first Tokens message to its last. A function of the token list alone, so it can be rebuilt."""

    def __init__(self, vocabulary: Vocabulary, request: Request, prompt_tail: bytes) -> None:
        self.request = request
        self.attempt = request.attempt
        params = request.params
        self._trim = not params.no_stop_trim
        self._decoder = vocabulary.decoder(unpack_ids(prompt_tail), params.skip_special_tokens)
        stops = stops_of(params)
        self._cutter = Cutter(stops, self._trim) if stops else None
        self.feed(unpack_ids(request.resume_ids))  # the client has this text already

    def feed(self, ids: "array[int]") -> tuple[str, int, Match | None]:
        """New text, how many of the ids it took, and the stop that those ids completed."""
        if self._cutter is None:
            return self._decoder.feed(ids), len(ids), None
        parts = []
        for taken, id in enumerate(ids, 1):  # a token at a time: the one that completes a stop is the last
            text, match = self._cutter.feed(self._decoder.feed((id,)))
            parts.append(text)
            if match:
                return "".join(parts), taken, match
        return "".join(parts), len(ids), None

    def flush(self) -> tuple[str, Match | None]:
        """What was held back, at the end of the request."""
        text = self._decoder.flush()
        if self._cutter is None:
            return text, None
        passed, match = self._cutter.feed(text)
        return (passed, match) if match else (passed + self._cutter.flush(), None)

    def spoken(self, ids: "array[int]", finish: Finish | None) -> "array[int]":
        """The ids whose text the client gets: all but the stop token."""
        ended = finish is not None and finish.reason == "stop" and isinstance(finish.matched, int)
        if ended and self._trim and ids and finish is not None and ids[-1] == finish.matched:
            return ids[:-1]
        return ids
