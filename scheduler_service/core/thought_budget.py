"""A budget of thought: where one output is in its thought, and when the closing tag must come."""

from array import array

from quartet.runtime.messages import Request, ThoughtIds

UNLIMITED = 1 << 62


class ThoughtBudget:
    """A function of the request and of its output ids, so it can be rebuilt after a retraction or a death."""

    __slots__ = ("_before", "_ids", "_left", "_prompt_len", "_seen")

    def __init__(self, tokens: int, ids: ThoughtIds, prompt_len: int, inside: bool) -> None:
        """`tokens`: that the thought may have. `inside`: the prompt has opened it."""
        self._ids = ids
        self._left = tokens
        self._before = not inside  # the output may still open its thought
        self._prompt_len = prompt_len
        self._seen = 0  # output tokens

    def take(self, token: int) -> None:
        """Note the next output token."""
        self._seen += 1
        if self._before:
            self._before = token in self._ids.blanks
            if not self._before and token != self._ids.opening:
                self._left = UNLIMITED
        elif token == self._ids.closing:
            self._left = UNLIMITED
        else:
            self._left -= 1

    def follow(self, ids: "array[int]") -> None:
        """Note what is new in the ids of the whole sequence."""
        for token in ids[self._prompt_len + self._seen :]:
            self.take(token)

    @property
    def free(self) -> int:
        """How many of the next tokens are the model's own choice at least, whatever they are."""
        return max(0, self._left) + self._before

    def forced_at(self, position: int) -> int | None:
        """The token that must stand there, where that is the next position and the budget is spent."""
        due = not self._before and self._left <= 0 and position == self._prompt_len + self._seen
        return self._ids.closing if due else None


def thought_budget_of(request: Request, prompt_len: int) -> ThoughtBudget | None:
    """The budget at the beginning of the output; None where the request has none, or no thought that it could end."""
    tokens, thought = request.params.thinking_budget, request.thought
    if tokens is None or thought is None or thought.ids is None or thought.place == "past":
        return None
    return ThoughtBudget(tokens, thought.ids, prompt_len, thought.place == "inside")
