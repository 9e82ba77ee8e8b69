"""A message in a few words, the same in every run of a seed."""

from quartet.runtime.control import Abort, ControlCommand
from quartet.runtime.messages import (
    Facts,
    Generate,
    Message,
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
            return f"Reply to {serial(id)} {'done' if success else 'refused'} {said.splitlines()[:1]}"
        case Facts(epoch=epoch, state=state):
            return f"Facts of epoch {epoch} {state}"
        case Restarted(role=role):
            return f"Restarted {role}"
        case Abort(rid=rid):
            return f"Abort {rid}"
        case ControlCommand(id=id):
            return f"{type(message).__name__} {serial(id)}"
        case _:
            return type(message).__name__


def asked(request: Request) -> str:
    resumed = len(request.resume_ids) // ID_BYTES
    return f"{request.rid} attempt {request.attempt}, behind {resumed}, at most {request.params.max_new_tokens}"


def made(tokens: Tokens) -> str:
    first = " first" if tokens.request else ""
    finish = (
        "" if tokens.finish is None else f" {tokens.finish.reason} {tokens.finish.message or tokens.finish.matched}"
    )
    return f"{tokens.rid} attempt {tokens.attempt}{first} {list(unpack_ids(tokens.ids))}{finish}"


def serial(id: str) -> str:
    """The part of a command's id that is not a process's number."""
    return id.partition(".")[2]
