"""What a chat prints: answers, thoughts and remarks dim, one line that tells how far something is.

A model's text may hold anything. On a terminal, what would steer it (escape sequences, text that runs backwards) is
shown and not obeyed; into a file or a pipe the text goes as it is.
"""

import os
import re
import shutil
import sys
from collections.abc import Mapping
from typing import TextIO

from quartet.runtime.log import plain

DIM, NORMAL, CLEAR_LINE = "\x1b[2m", "\x1b[0m", "\r\x1b[K"
STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def harmless(text: str) -> str:
    """The text with what would steer a terminal written out; lines, tabs and emoji stay."""
    return STEERING.sub(lambda found: found[0].encode("unicode_escape").decode(), text.replace("\r\n", "\n"))


class Screen:
    """Prints answers to `out` and remarks to `notes`; colours where that is a terminal that wants them."""

    def __init__(
        self, out: TextIO | None = None, notes: TextIO | None = None, environment: Mapping[str, str] = os.environ
    ) -> None:
        self.out = out or sys.stdout
        self.notes = notes or sys.stderr
        self.is_terminal = self.out.isatty()
        styled = not environment.get("NO_COLOR") and environment.get("TERM") != "dumb"
        self._styled = self.is_terminal and styled
        self._notes_styled = self.notes.isatty() and styled
        self._thinking = False
        self._status = ""

    def thought(self, text: str) -> None:
        """A part of a thought; not shown where only the answer is wanted."""
        if self.is_terminal:
            self._begin(thinking=True)
            self._write(harmless(text))

    def answer(self, text: str) -> None:
        """A part of the answer."""
        if self.is_terminal:
            self._begin(thinking=False)
        self._write(harmless(text) if self.is_terminal else text)

    def end_answer(self, remark: str = "") -> None:
        """End the line, and say something of the answer where a person reads."""
        self._begin(thinking=False, gap=False)
        self._write("\n")
        if self.is_terminal and remark:
            self._write(f"{self._dim(remark)}\n\n")

    def remark(self, text: str) -> None:
        """Something that the chat itself says."""
        self.status("")
        shown = "\n".join(map(plain, text.split("\n")))
        print(f"{DIM}{shown}{NORMAL}" if self._notes_styled else shown, file=self.notes, flush=True)

    def status(self, text: str) -> None:
        """A line that is written over by the next; only on a terminal. Empty: take it away."""
        if not self._notes_styled or text == self._status:
            return
        self._status = text
        width = shutil.get_terminal_size().columns - 1
        print(CLEAR_LINE + (f"{DIM}{plain(text)[:width]}{NORMAL}" if text else ""), end="", file=self.notes, flush=True)

    def _begin(self, *, thinking: bool, gap: bool = True) -> None:
        if thinking == self._thinking:
            return
        self._thinking = thinking
        if self._styled:
            self._write(DIM if thinking else NORMAL)
        if not thinking and gap:
            self._write("\n\n")

    def _dim(self, text: str) -> str:
        return f"{DIM}{text}{NORMAL}" if self._styled else text

    def _write(self, text: str) -> None:
        print(text, end="", file=self.out, flush=True)
