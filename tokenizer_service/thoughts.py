"""Where a prompt leaves the model's thought: many templates open it for the model, or close it at once."""

from typing import TYPE_CHECKING

from quartet.runtime.errors import RequestError
from quartet.runtime.messages import Chat, Place, Thought, ThoughtIds

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TAIL_TOKENS = 32  # of the prompt; enough for the tags and what stands around them
BLANKS = ("\n", "\n\n", " ", "  ", "\t", "\r\n")  # that models write before a thought
NO_TOKEN = "thinking_budget needs a model that has a token for the end of its thought; this one has none for {!r}."


def place_of(tail: str, thought: Thought, chat: Chat | None) -> Place:
    """`tail`: the end of the prompt. A final message that is to be continued may hold an open thought."""
    end = tail.rstrip()
    if end.endswith(thought.opening):
        return "inside"
    if end.endswith(thought.closing):
        return "past"
    if chat is None or not chat.continue_final_message:
        return thought.place
    said = last_words(chat)
    opened, closed = said.rfind(thought.opening), said.rfind(thought.closing)
    if opened > closed:
        return "inside"
    return "past" if said.strip() else thought.place


def thought_ids(tokenizer: "Tokenizer", thought: Thought) -> ThoughtIds | None:
    """The tokens by which a budget counts. Raises RequestError where the closing tag is not a token.

    None where it is not and the API of the request does not insist on the budget.
    """
    opening, closing = tokenizer.token_to_id(thought.opening), tokenizer.token_to_id(thought.closing)
    if closing is None and not thought.limited:
        return None
    if closing is None:
        raise RequestError(NO_TOKEN.format(thought.closing), field="thinking_budget")
    blanks = [tokenizer.encode(text, add_special_tokens=False).ids for text in BLANKS]
    single = sorted({ids[0] for ids in blanks if len(ids) == 1})
    return ThoughtIds(opening=-1 if opening is None else opening, closing=closing, blanks=single)


def last_words(chat: Chat) -> str:
    """The text of the final message."""
    content = chat.messages[-1].get("content") if chat.messages else None
    if isinstance(content, list):
        return "".join(part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str))
    return content if isinstance(content, str) else ""
