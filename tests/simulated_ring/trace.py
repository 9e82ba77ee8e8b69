"""A message in a few words, the same in every run of a seed."""

from quartet.runtime.control import Abort, ControlCommand, DecideChange
from quartet.runtime.messages import (
    Facts,
    Generate,
    Message,
    Prepared,
    Reply,
    Request,
    Restarted,
    Text,
    Tokenized,
    Tokens,
    unpack_ids,
)

ID_BYTES = 4


def line(message: Message) -> str:
    match message:
        case Generate(request=request) | Tokenized(request=request):
            return f"{type(message).__name__} {asked(request)}"
        case Tokens():
            return f"Tokens {made(message)}"
        case Text(text=text, tokens=tokens):
            return f"Text {made(tokens)} {text!r}"
        case Reply(id=id, success=success, message=said):
            return f"Reply of {message.rank} to {serial(id)} {'done' if success else 'refused'} {said.splitlines()[:1]}"
        case Facts(rank=rank, epoch=epoch, state=state):
            return f"Facts of rank {rank}, epoch {epoch} {state}"
        case Restarted(role=role):
            return f"Restarted {role}"
        case Abort(rid=rid):
            return f"Abort {rid}"
        case DecideChange(change=change, reason=reason):
            return f"DecideChange {serial(change)} for {message.rank} {reason}"
        case Prepared(id=id, rank=rank):
            return f"Prepared {rank} for {serial(id)}"
        case ControlCommand(id=id):
            return f"{type(message).__name__} {serial(id)}"
        case _:
            return type(message).__name__


def asked(request: Request) -> str:
    resumed = len(request.resume_ids) // ID_BYTES
    at_most = request.params.max_new_tokens
    return f"{request.rid} to {request.rank}, attempt {request.attempt}, behind {resumed}, at most {at_most}"


def made(tokens: Tokens) -> str:
    first = " first" if tokens.request else ""
    finish = (
        "" if tokens.finish is None else f" {tokens.finish.reason} {tokens.finish.message or tokens.finish.matched}"
    )
    return f"{tokens.rid} attempt {tokens.attempt}{first} {list(unpack_ids(tokens.ids))}{finish}"


def serial(id: str) -> str:
    """The part of a command's id that is not a process's number."""
    return id.partition(".")[2]
