"""Decodes whole sequences of ids for /detokenize and the echo of a prompt. Long ones are decoded in the background.

The thread has one command at a time, and others wait for it in order; streams go on meanwhile, for the tokenizer leaves
Python's lock.
"""

from collections import deque
from concurrent.futures import Executor, Future, ThreadPoolExecutor

from quartet.detokenizer_service.decode import Vocabulary
from quartet.runtime import limits
from quartet.runtime.control import Detokenize
from quartet.runtime.messages import Reply, unpack_ids

ID_BYTES = 4
FEW_IDS = 4096  # decoded at once, in about a millisecond
BEAT_S = 0.002  # how often to look after the thread when nothing else is there to do
NO_TOKENIZER = "the tokenizer is not initialized (--skip-tokenizer-init)"
BAD_IDS = "tokens must be ids of the vocabulary."
TOO_MANY_IDS = "At most {} ids are decoded in one call, got {}."
TOO_MUCH_TEXT = "The text of these ids has more than {} characters; send them in several calls."


class WholeTexts:
    """The commands that wait, and the one under way."""

    def __init__(self, vocabulary: Vocabulary | None, executor: Executor | None = None) -> None:
        self._vocabulary = vocabulary  # None: nothing is decoded
        self._executor = executor or ThreadPoolExecutor(1, thread_name_prefix="whole-texts")
        self._waiting: deque[Detokenize] = deque()
        self._running: Future[Reply] | None = None

    @property
    def patience_s(self) -> float | None:
        """How long the loop may wait before it looks here again."""
        return BEAT_S if self._running or self._waiting else None

    def take(self, command: Detokenize) -> list[Reply]:
        """The reply, where it is quickly made; else it comes from `done` later."""
        if self._vocabulary is None:
            return [Reply(id=command.id, success=False, message=NO_TOKENIZER, status=400)]
        if id_count(command) <= FEW_IDS:
            return [reply_to(command, self._vocabulary)]
        self._waiting.append(command)
        return self.done()

    def done(self) -> list[Reply]:
        """What the thread has made; it is given the next command."""
        replies: list[Reply] = []
        if self._running is not None and self._running.done():
            replies.append(self._running.result())
            self._running = None
        if self._running is None and self._waiting and self._vocabulary is not None:
            self._running = self._executor.submit(reply_to, self._waiting.popleft(), self._vocabulary)
        return replies


def id_count(command: Detokenize) -> int:
    return sum(map(len, command.ids)) // ID_BYTES


def reply_to(command: Detokenize, vocabulary: Vocabulary) -> Reply:
    """The texts of all sequences, or why there are none."""
    if (count := id_count(command)) > limits.MAX_DETOKENIZED:
        return refused(command, TOO_MANY_IDS.format(limits.MAX_DETOKENIZED, count))
    decode = vocabulary.decode_open if command.open_end else vocabulary.decode
    texts: list[str] = []
    chars = 0
    try:
        for ids in command.ids:
            texts.append(decode(unpack_ids(ids), command.skip_special_tokens))
            chars += len(texts[-1])
            if chars > limits.MAX_DETOKENIZED_CHARS:
                return refused(command, TOO_MUCH_TEXT.format(limits.MAX_DETOKENIZED_CHARS))
    except (ValueError, OverflowError):
        return refused(command, BAD_IDS)
    return Reply(id=command.id, body={"texts": texts})


def refused(command: Detokenize, message: str) -> Reply:
    return Reply(id=command.id, success=False, message=message, status=400)
