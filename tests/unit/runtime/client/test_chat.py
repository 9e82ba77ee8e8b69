"""The chat's own logic, on a server of known answers: turns, commands, what goes wrong, which server is used."""

import io
import json
import re

import httpx
import pytest

from quartet.runtime.client import chat
from quartet.runtime.client.chat import Chat, parse
from quartet.runtime.client.connection import ClientError
from quartet.runtime.client.screen import Screen
from quartet.runtime.errors import UsageError


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Server:
    """Answers "Yes." and remembers what it was asked; refuses what contains "bad"."""

    def __init__(self, models: tuple[str, ...] = ("demo",)) -> None:
        self.bodies: list[dict] = []
        self.models = models

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": name} for name in self.models]})
        body = json.loads(request.content)
        self.bodies.append(body)
        if "bad" in body["messages"][-1]["content"]:
            return httpx.Response(400, json={"error": {"message": "that is bad"}})
        events = [{"choices": [{"delta": {"content": "Yes."}, "finish_reason": "stop"}]}]
        text = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
        return httpx.Response(200, content=iter([text.encode() + b"data: [DONE]\n\n"]))

    def client(self) -> httpx.Client:
        return httpx.Client(transport=httpx.MockTransport(self), base_url="http://server")


def talk(server: Server, *typed: str | type[BaseException], words: tuple[str, ...] = ()) -> str:
    """What the screen shows when a person types this and leaves."""
    lines = iter([*typed, EOFError])

    def read() -> str:
        line = next(lines)
        if isinstance(line, str):
            return line
        raise line

    out = Terminal()
    Chat(server.client(), "demo", Screen(out, out, {"NO_COLOR": "1"}), parse(words)).converse(read)
    return out.getvalue()


def test_every_turn_carries_the_conversation_and_the_settings():
    server = Server()
    talk(server, "One?", "", "Two?", words=("--system", "Be brief.", "--max-tokens", "9"))
    assert [m["content"] for m in server.bodies[1]["messages"]] == ["Be brief.", "One?", "Yes.", "Two?"]
    assert server.bodies[1]["max_tokens"] == 9
    assert "temperature" not in server.bodies[1]


def test_commands_change_the_conversation_and_are_not_sent():
    server = Server()
    shown = talk(server, "One?", "/reset", "/system Rhyme.", "Two?")
    assert [m["content"] for m in server.bodies[1]["messages"]] == ["Rhyme.", "Two?"]
    assert "the conversation is forgotten" in shown


def test_a_refusal_is_shown_and_the_chat_goes_on_without_that_turn():
    server = Server()
    shown = talk(server, "bad", "Two?")
    assert "quartet: that is bad" in shown
    assert server.bodies[-1]["messages"] == [{"role": "user", "content": "Two?"}]


def test_ctrl_c_at_the_prompt_says_how_to_end():
    assert "Ctrl-D ends the chat" in talk(Server(), KeyboardInterrupt)


def test_the_chat_ends_by_a_command_too():
    server = Server()
    talk(server, "/exit", "never sent")
    assert server.bodies == []


def test_a_model_that_the_server_lacks_is_refused_and_those_it_has_are_named():
    with pytest.raises(ClientError, match=r"no model other; it has demo, two"):
        chat.chosen_model(Server(("demo", "two")).client(), "other")
    assert chat.chosen_model(Server().client(), None) == "demo"


@pytest.mark.parametrize(
    ("words", "models", "used"),
    [
        ((), ("demo",), True),
        (("demo",), ("demo",), True),
        (("other",), ("demo",), False),
        (("--", "--dtype", "float32"), ("demo",), False),
    ],
)
def test_a_server_that_runs_is_used_when_it_has_the_model(monkeypatch, words, models, used):
    monkeypatch.setattr(chat, "connect", lambda *_: Server(models).client())
    assert (chat.running(parse(words), Screen(io.StringIO(), io.StringIO())) == chat.USUAL_URL) is used


def test_what_stands_behind_two_dashes_is_for_the_server_that_is_started():
    options = parse(["demo", "--", "--dtype", "float32"])
    assert (options.model, options.server_flags) == ("demo", ["--dtype", "float32"])
    assert parse(["--", "--dtype", "float32"]).model is None
    with pytest.raises(UsageError, match="leave out --url"):
        parse(["--url", "http://a", "--", "--dtype", "float32"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--dtype", "float32"], "put it behind --, when one is started: quartet chat MODEL -- --dtype"),
        (["--model_path", "x"], "the model comes first"),
        (["-hf", "o/n"], "the model comes first"),
        (["--temp", "1"], "use --temperature"),
        (["--max-model-len", "99"], "use --context-length; flags of the server stand behind --"),
        (["--sistem", "x"], "did you mean --system?"),
        (["--frobnicate"], "see quartet chat --help"),
        (["demo", "hello"], "unexpected argument 'hello'"),
    ],
)
def test_flags_that_a_chat_does_not_have_are_answered_with_what_to_type(words, said):
    with pytest.raises(UsageError, match=re.escape(said)):
        parse(words)


def test_the_key_comes_from_the_variable_unless_it_is_given(monkeypatch):
    monkeypatch.setenv("QUARTET_API_KEY", "k")
    assert (parse([]).api_key, parse(["--api-key", "l"]).api_key) == ("k", "l")


def test_nothing_piped_in_is_an_error_before_a_server_is_started(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO(" \n"))
    monkeypatch.setattr(chat, "open_chat", lambda *_: pytest.fail("a server was looked for"))
    assert chat.main([]) == 2
    assert "nothing to say" in capsys.readouterr().err
