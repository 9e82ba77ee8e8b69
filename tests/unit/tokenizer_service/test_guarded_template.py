"""Chat templates in a process of their own: whatever one does, the tokenizer has its answer and renders the next."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from quartet.runtime.config import ServerConfig
from quartet.runtime.errors import Kind, RequestError, StartupError
from quartet.runtime.messages import Chat
from quartet.runtime.model_files import model_info
from quartet.tokenizer_service.guarded_template import GuardedTemplate, packed, started_template, unpacked

HOSTILE = [
    '("{" * 3000 ~ ":" * 3000).format(1)',
    '("{:9999}" * 20000).format(*range(20000))',
    '("%9999d" * 20000) % range(20000)',
    '("<" * 60000) | striptags',
    '("a" * 60000) | wordwrap(1)',
    '("a " * 30000) | title | wordwrap(2) | wordcount',
    '("\\n" * 60000) | indent(10000)',
    "9 ** 9 ** 9",
    "range(10 ** 9) | list",
    "range(99999) | map('string') | map('upper') | sort | unique | join",
    '"x".center(10 ** 12)',
    '"x".zfill(99999) * 99999',
    '("9" * 60000) | int',
    "(1 / 3) | round(4000)",
    '("é" * 60000) | urlencode | urlencode | urlencode',
    '(("a" * 500 ~ "b") * 100).count("a" * 30000)',
    "[[[[[[range(9999) | list] * 99] * 99] * 99] * 99] * 99] | tojson",
    "dict(a=range(99999) | list) | tojson(indent=32)",
    '("a,b;" * 15000).split(",") | groupby(0) | list',
    '("a" * 60000).replace("a", "a" * 60000)',
    '"".join(["a" * 60000] * 60000)',
    'messages | map(attribute="content") | batch(99999999) | list',
]


def chat(content: str) -> Chat:
    return Chat(messages=[{"role": "user", "content": content}])


def started(directory: Path, template: str) -> GuardedTemplate:
    (directory / "config.json").write_text('{"vocab_size": 5}')
    (directory / "chat_template.jinja").write_text(template)
    config = ServerConfig(model_path=str(directory))
    found = started_template(model_info.load(config), config)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GuardedTemplate]:
    """Does what the content, a number, says; anything else it says again."""
    cases = "".join(f"{{% elif c == '{n}' %}}{{{{ {hostile} }}}}" for n, hostile in enumerate(HOSTILE))
    source = "{% set c = messages[0].content %}{% if not c %}" + cases + "{% else %}<{{ c }}>{% endif %}"
    found = started(tmp_path_factory.mktemp("model"), source)
    yield found
    found.close()


@pytest.mark.parametrize("number", range(len(HOSTILE)), ids=HOSTILE)
def test_a_hostile_template_ends_its_request_alone(template: GuardedTemplate, number: int) -> None:
    try:
        assert len(template.render(chat(str(number)))) < 1 << 20
    except RequestError as error:
        assert error.kind is Kind.BAD_REQUEST and error.message.startswith(
            ("the chat template failed", "the chat template made")
        )
    assert template.render(chat("good")) == "<good>"


def test_a_long_conversation_has_the_time_that_it_needs(tmp_path: Path) -> None:
    template = started(tmp_path, "{% for m in messages %}{{ m.role | upper | trim ~ m.content | trim }}{% endfor %}")
    messages = [{"role": "user", "content": "x"}] * 2000
    assert template.render(Chat(messages=messages)) == "USERx" * 2000
    with pytest.raises(RequestError) as refusal:
        template.render(Chat(messages=messages * 2))
    assert refusal.value.code == "context_length_exceeded"
    template.close()


def test_a_renderer_that_was_killed_is_started_again(template: GuardedTemplate) -> None:
    template._process.end()
    assert template.render(chat("again")) == "<again>"


def test_a_refusal_comes_over_as_it_was(template: GuardedTemplate) -> None:
    with pytest.raises(RequestError, match=r"Messages cannot be empty\.") as refusal:
        template.render(Chat(messages=[]))
    assert refusal.value.field == "messages"
    error = RequestError("m", Kind.TOO_LARGE, "f")
    assert vars(unpacked(packed(error))) == vars(error)


def test_a_template_that_cannot_be_compiled_ends_the_start(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="cannot be compiled"):
        started(tmp_path, "{% if %}")


def test_a_model_without_a_template_has_none(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"vocab_size": 5}')
    config = ServerConfig(model_path=str(tmp_path))
    assert started_template(model_info.load(config), config) is None


def test_the_log_says_which_template_is_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        started(tmp_path, "{{ messages }}").close()
    assert "Using default HuggingFace chat template with detected content format: string" in caplog.messages
