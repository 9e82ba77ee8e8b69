"""A service that loads for ever."""

import logging
import signal

from quartet.runtime.service import Boot, run


def main(boot: Boot) -> None:
    logging.info("loading for ever")
    signal.pause()


if __name__ == "__main__":
    run(main)
