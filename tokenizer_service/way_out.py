"""Where the tokenizer's messages go when there are several schedulers.

What a scheduler must have goes to the one that it names. The rest, answers and ends of requests, goes straight to the
detokenizer, so that it needs no scheduler that lives.
"""

from collections.abc import Sequence

from quartet.runtime.control import ControlCommand
from quartet.runtime.messages import DETOKENIZER, GATEWAY, SCHEDULER, Message, Restarted, Tokenized, process_key
from quartet.runtime.process.progress import ProgressWord
from quartet.runtime.service import Boot, Sender, to_next
from quartet.runtime.sockets import Outbox, stable_path


class Crossroads:
    """Sends each message to its scheduler, or past them."""

    def __init__(self, schedulers: Sequence[Sender], past: Sender) -> None:
        self._schedulers = schedulers
        self._past = past

    def send(self, messages: Sequence[Message]) -> None:
        """Send the messages, one frame for each receiver; their order holds for each of them."""
        for rank, scheduler in enumerate(self._schedulers):
            scheduler.send([message for message in messages if rank_of(message) == rank])
        self._past.send([message for message in messages if rank_of(message) is None])


def rank_of(message: Message) -> int | None:
    """The scheduler that a message is for; None: none of them."""
    match message:
        case Tokenized(request=request):
            return request.rank
        case ControlCommand(rank=rank) if message.for_schedulers:
            return rank
        case Restarted(role=role, rank=rank) if role == GATEWAY:
            return rank
        case _:
            return None


def way_out(boot: Boot, progress: ProgressWord) -> Sender:
    """Frames for a scheduler that is being started again are kept for it, so that the others do not wait."""
    if boot.config.dp_size == 1:
        return to_next(boot, progress)
    keys = [process_key(SCHEDULER, rank) for rank in range(boot.config.dp_size)]
    schedulers = [Outbox(stable_path(boot.run_dir, key), waits=False) for key in keys]
    return Crossroads(schedulers, Outbox(stable_path(boot.run_dir, DETOKENIZER), progress.wait))
