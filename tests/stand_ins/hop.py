"""A service that forwards everything."""

from typing import Any

from quartet.runtime.messages import Finish, Message
from quartet.runtime.service import Boot, run, run_text_service


class Hop:
    whole_batches = True
    patience_s = None

    def step(self, batch: list[Any]) -> list[Message]:
        return batch

    def give_up(self, message: Any, finish: Finish) -> list[Message]:
        return []


def main(boot: Boot) -> None:
    run_text_service(boot, Hop())


if __name__ == "__main__":
    run(main)
