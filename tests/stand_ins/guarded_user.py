"""Uses guarded work from a thread, prints the pids of its processes, and then waits, working on an endless order."""

import threading

from quartet.runtime.process.guarded import Guarded


def use(guarded: Guarded) -> None:
    print(guarded.run(b"pids", cpu_s=1.0).decode(), flush=True)
    guarded.run(b"loop", cpu_s=60.0)


if __name__ == "__main__":
    thread = threading.Thread(target=use, args=(Guarded("tests.stand_ins.guarded_work"),))
    thread.start()
    thread.join()
