"""Work for `runtime/process/guarded.py` that does what its order says: echo, loop, take memory, crash, tell pids."""

import os
import signal
import sys

from quartet.runtime.process import guarded


def prepared(setup: bytes) -> guarded.Handle:
    """Answers `setup` with what it was given."""
    if setup == b"endless":
        while True:
            pass
    return lambda order: setup if order == b"setup" else handle(order)


def handle(order: bytes) -> bytes:
    match order:
        case b"loop":
            while True:
                pass
        case b"memory":
            return bytes(1 << 40)
        case b"crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        case b"stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case b"pids":
            return f"{os.getppid()} {os.getpid()}".encode()
    return order


if __name__ == "__main__":
    guarded.serve(int(sys.argv[1]), prepared, memory_bytes=1 << 30)
