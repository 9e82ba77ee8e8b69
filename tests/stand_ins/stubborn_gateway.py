"""A gateway with a request that never ends: it hears SIGTERM and goes on."""

import logging
import signal

from quartet.runtime.service import Boot, report_ready, run


def main(boot: Boot) -> None:
    signal.signal(signal.SIGTERM, lambda *_: logging.info("still at it"))
    report_ready(boot)
    while True:
        signal.pause()


if __name__ == "__main__":
    run(main)
