"""`quartet chat`: talk to a model at a terminal, or send what is piped in as one message."""

import argparse
import contextlib
import io
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import httpx

from quartet.runtime.client.answers import Answer
from quartet.runtime.client.arguments import KEY_VARIABLE, chat_hints, chat_parser, parsed
from quartet.runtime.client.connection import ClientError, base_url, connect, served_models
from quartet.runtime.client.conversation import Conversation, Leave
from quartet.runtime.client.screen import Screen
from quartet.runtime.client.started_server import StartedServer, started
from quartet.runtime.errors import UsageError
from quartet.runtime.log import plain, say

USUAL_URL = "http://127.0.0.1:30000"  # where `quartet serve` listens
EMBEDDED = "demo"
PROBE_S = 2.0
INTERRUPTED = 130

Read = Callable[[], str]


def main(argv: Sequence[str]) -> int:
    """Chat until the person leaves or the input ends; returns the exit status."""
    bear_any_text()
    screen = Screen()
    try:
        options = parse(argv)
        if is_interactive():
            with open_chat(options, screen) as chat:
                return chat.converse(reader())
        text = piped()
        with open_chat(options, screen) as chat:
            return chat.ask(text)
    except UsageError as error:
        return fail(2, error)
    except ClientError as error:
        screen.status("")
        return fail(1, error)
    except KeyboardInterrupt:
        screen.status("")
        return INTERRUPTED


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options, with an address in full. Raises UsageError."""
    words = list(argv)
    cut = words.index("--") if "--" in words else len(words)
    options = parsed(chat_parser(), words[:cut], chat_hints())
    options.server_flags = words[cut + 1 :]
    options.api_key = options.api_key or os.environ.get(KEY_VARIABLE)
    if options.url is not None:
        if options.server_flags:
            raise UsageError("flags behind -- are for a server that is started here; leave out --url")
        options.url = base_url(options.url)
    return options


def is_interactive() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


def bear_any_text() -> None:
    """Have characters that the terminal's encoding lacks replaced, rather than end the chat."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def piped() -> str:
    """The message that comes in. Raises UsageError where there is none."""
    if text := sys.stdin.read().strip():
        return text
    raise UsageError("there is nothing to say; pipe a message in, or start the chat at a terminal")


def reader() -> Read:
    """Reads messages from the terminal."""
    from quartet.runtime.client.prompt import Prompt  # here, for it is slow and pipes do not need it

    return Prompt().read


def fail(status: int, error: Exception) -> int:
    say(f"quartet: {plain(str(error))}", sys.stderr)
    return status


class Chat:
    """A conversation with one model of one server."""

    def __init__(
        self,
        client: httpx.Client,
        model: str,
        screen: Screen,
        options: argparse.Namespace,
        server: StartedServer | None = None,
    ) -> None:
        self.conversation = Conversation(options.system)
        self.model = model
        self._client = client
        self._screen = screen
        self._server = server
        given = {"temperature": options.temperature, "max_tokens": options.max_tokens}
        self._settings = {name: value for name, value in given.items() if value is not None}

    def converse(self, read: Read) -> int:
        """Read messages and print answers until the person leaves."""
        where = "" if self._server else f" at {str(self._client.base_url).rstrip('/')}"
        self._screen.remark(f"{self.model}{where}. /help lists commands, Ctrl-D ends.")
        while True:
            try:
                text = read().strip()
                remark = self.conversation.obey(text) if text else ""
            except KeyboardInterrupt:
                self._screen.remark("Ctrl-D ends the chat")
                continue
            except (EOFError, Leave):
                return 0
            if remark:
                self._screen.remark(remark)
            elif text:
                self._turn(text)

    def _turn(self, text: str) -> None:
        """Ask one thing. What goes wrong is said, and the chat goes on while its server runs."""
        try:
            self.ask(text)
        except ClientError as error:
            if self._server is not None and not self._server.alive:
                raise
            self._screen.remark(f"quartet: {error}")

    def ask(self, text: str) -> int:
        """Print the answer to one message while it arrives; Ctrl-C stops it. Returns the exit status.

        Raises ClientError.
        """
        body: dict[str, Any] = {"model": self.model, "messages": self.conversation.asking(text), **self._settings}
        answer = Answer(self._client, body)
        status, remark = 0, ""
        try:
            with contextlib.closing(answer.pieces()) as pieces:
                for piece in pieces:
                    if piece.thought:
                        self._screen.thought(piece.thought)
                    if piece.text:
                        self._screen.answer(piece.text)
            remark = answer.figures()
        except KeyboardInterrupt:  # the stream is closed by now, so the server has dropped the request
            status, remark = INTERRUPTED, "stopped"
        except ClientError as error:
            if answer.text:
                self._screen.end_answer()
            raise (self._server.explain(error) if self._server else error) from error
        self._screen.end_answer(remark)
        self.conversation.add(text, answer.text)
        return status


@contextlib.contextmanager
def open_chat(options: argparse.Namespace, screen: Screen) -> Iterator[Chat]:
    """A chat with the server that the options mean: the one at --url, one that runs here, or one that is started."""
    url = options.url or running(options, screen)
    if url is not None:
        with connect(url, options.api_key) as client:
            yield Chat(client, chosen_model(client, options.model), screen, options)
        return
    name = options.model or EMBEDDED
    began = time.monotonic()

    def show(line: str) -> None:
        screen.status(f"starting {name}, {time.monotonic() - began:.0f} s: {line}")

    with started(name, options.server_flags, options.api_key, show) as server:
        screen.status("")
        with connect(server.url, options.api_key) as client:
            yield Chat(client, chosen_model(client, None), screen, options, server)


def running(options: argparse.Namespace, screen: Screen) -> str | None:
    """The usual address, if a server there has the model that is asked for (any, where none is)."""
    if options.server_flags:
        return None
    try:
        with connect(USUAL_URL, options.api_key, PROBE_S) as client:
            models = served_models(client)
    except ClientError as error:
        if error.status in (401, 403) and options.model is None:
            raise ClientError(f"{USUAL_URL}: {error}", error.status) from error
        return None
    return USUAL_URL if models and (options.model is None or options.model in models) else None


def chosen_model(client: httpx.Client, wanted: str | None) -> str:
    """The model of the server to talk to. Raises ClientError."""
    models = served_models(client)
    if not models:
        raise ClientError(f"the server at {client.base_url} has no model")
    if wanted is not None and wanted not in models:
        raise ClientError(f"the server has no model {wanted}; it has {', '.join(models)}")
    return wanted or models[0]
