"""Messages within one output, each with a head that says on which channel and to whom it speaks: Harmony, of gpt-oss.

<|channel|>analysis<|message|>thought<|end|>
<|start|>assistant<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{…}<|call|>
<|start|>assistant to=functions.NAME<|channel|>commentary json<|message|>{…}<|call|>
<|start|>assistant<|channel|>final<|message|>answer<|return|>
"""

import re
from dataclasses import dataclass
from typing import NamedTuple

MAX_HEAD_CHARS = 512


@dataclass(frozen=True)
class Channels:
    """The tags of messages."""

    heads: tuple[str, ...] = ("<|start|>", "<|channel|>", "<|message|>")  # what a head may begin with
    recipient: str = "to="  # what it may begin with too, where the output begins: the prompt has the rest
    ends: tuple[str, ...] = ("<|end|>", "<|return|>", "<|call|>")  # of a message
    thought: str = "analysis"  # the channel of thoughts; the others are for the reader
    namespace: str = "functions."  # of the functions to which a message may be addressed


class MessageHead(NamedTuple):
    end: int  # where the message begins; 0: this was no head
    channel: str = ""
    recipient: str = ""


HARMONY = Channels()
START = HARMONY.heads[0]
END = re.compile("|".join(map(re.escape, (*HARMONY.heads[::2], *HARMONY.ends))))
CHARS = re.compile(r"[\w\s.+/=<|>\-]*")
HEAD = re.compile(
    r"""(?:<\|start\|>\s*assistant\s*)?
        (?:to=(?P<before>[\w.\-]+)\s*)?
        (?:<\|channel\|>\s*(?P<channel>\w+)\s*(?:to=(?P<behind>[\w.\-]+)\s*)?)?
        (?:<\|constrain\|>\s*)?(?:[\w.+/\-]+\s*)?  # the type of the content
        <\|message\|>""",
    re.VERBOSE,
)


def read_head(text: str, at: int) -> MessageHead | None:
    """The head that begins at `at`. None: more text must tell."""
    limit = at + MAX_HEAD_CHARS
    end = END.search(text, at + len(START) if text.startswith(START, at) else at, limit)
    if end is None:
        possible = len(text) < limit and CHARS.fullmatch(text, at)
        return None if possible else MessageHead(0)
    match = HEAD.fullmatch(text, at, end.end())
    if match is None:
        return MessageHead(0)
    return MessageHead(end.end(), match["channel"] or "", match["before"] or match["behind"] or "")
