"""A small process that tries a grammar before the scheduler does, and that may die of it.

Some schemas keep the engine busy for hours, and a thread cannot be stopped. So each grammar is compiled first in a
fork of this process, under the kernel's own timer and memory limit. Grammars come on stdin and verdicts leave on
stdout, each as four bytes of length and UTF-8; an empty verdict means that the grammar is good. End of file on stdin
is the end: this process cannot outlive the one that started it by more than one grammar's time.

Run as a script, with the CPU seconds and the bytes of memory that one grammar may take. It imports nothing of ours.
"""

import os
import resource
import signal
import struct
import sys
from typing import IO

from llguidance import LLMatcher, LLParserLimits

LENGTH = struct.Struct("<I")
MAX_VERDICT_BYTES = 2000  # below a pipe's atomic write


def read_frame(stream: IO[bytes]) -> str | None:
    """The next frame, or None at the end of the stream."""
    head = stream.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    return stream.read(LENGTH.unpack(head)[0]).decode()


def write_frame(stream: IO[bytes], text: str) -> None:
    data = text.encode()
    stream.write(LENGTH.pack(len(data)) + data)
    stream.flush()


def verdict(grammar: str) -> str:
    """Empty when the engine takes the grammar, else why not."""
    failed, messages = LLMatcher.validate_grammar_with_warnings(grammar, limits=LLParserLimits(verbose_errors=False))
    return messages[0] if failed else ""


def try_in_fork(grammar: str, cpu_s: float, memory_bytes: int) -> str:
    """The verdict of a child that the kernel ends when it takes too much."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.setitimer(signal.ITIMER_PROF, cpu_s)  # SIGPROF ends the child: no handler is set
        os.write(writing, verdict(grammar).encode()[:MAX_VERDICT_BYTES])
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        answer = pipe.read().decode(errors="replace")
    _, status = os.waitpid(child, 0)
    return answer if status == 0 else f"it takes more than {cpu_s * 1000:.0f} ms or too much memory to compile"


def main() -> None:
    cpu_s, memory_bytes = float(sys.argv[1]), int(sys.argv[2])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while (grammar := read_frame(sys.stdin.buffer)) is not None:
        write_frame(sys.stdout.buffer, try_in_fork(grammar, cpu_s, memory_bytes))


if __name__ == "__main__":
    main()
