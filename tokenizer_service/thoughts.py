"""Where a prompt leaves the model's thought: many templates open it for the model, or close it at once."""

from quartet.runtime.messages import Chat, Place, Thought

TAIL_TOKENS = 32  # of the prompt; enough for the tags and what stands around them


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


def last_words(chat: Chat) -> str:
    """The text of the final message."""
    content = chat.messages[-1].get("content") if chat.messages else None
    if isinstance(content, list):
        return "".join(part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str))
    return content if isinstance(content, str) else ""
