"""What every control command has in common. The commands are in `runtime/control.py`."""

from typing import ClassVar

from quartet.runtime.messages import Message
from quartet.runtime.reply_shapes import EVERYTHING, ReplyShape


class ControlCommand(Message, kw_only=True):
    """Base of all commands. `path` is None for those that no client may send."""

    path: ClassVar[str | None] = None
    aliases: ClassVar[tuple[str, ...]] = ()
    methods: ClassVar[tuple[str, ...]] = ("POST",)
    reply: ClassVar[ReplyShape] = EVERYTHING
    admin: ClassVar[bool] = True  # guarded by the admin key where there is one
    read_only: ClassVar[bool] = False  # changes nothing, so it may run twice
    for_schedulers: ClassVar[bool] = True  # else a text service answers
    all_or_none: ClassVar[bool] = False  # where there are several, all prepare it, and all do it or none does
    one_scheduler: ClassVar[str] = ""  # what to do instead where there are several: what it changes is on no disk

    id: str = ""  # set by the gateway, copied into the Reply
    epoch: int | None = None  # set by the gateway: of the scheduler that may run it; None: any
    rank: int = 0  # set by the gateway: the scheduler that gets it
    waits_for_others: bool = False  # set by the gateway: do it only once it says that all schedulers are prepared

    @property
    def ends_requests(self) -> bool:
        """Whether the command ends all requests that came before it."""
        return False
