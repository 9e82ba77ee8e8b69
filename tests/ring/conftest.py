"""Fixtures that start whole servers. `launch(*flags, services={...}, ready=True)` returns a tests.servers.Server."""

import contextlib
from collections.abc import Callable, Iterator

import pytest

from tests.servers import STAND_INS, Server, launched

FAKE_SCHEDULER = {"scheduler": "tests.fake_scheduler"}


@pytest.fixture
def launch() -> Iterator[Callable[..., Server]]:
    """Start servers that live until the end of the test."""
    with contextlib.ExitStack() as stack:
        yield lambda *flags, **options: stack.enter_context(launched(*flags, **options))


@pytest.fixture(scope="module")
def launch_for_module() -> Iterator[Callable[..., Server]]:
    """Start servers that live until the end of the test's module."""
    with contextlib.ExitStack() as stack:
        yield lambda *flags, **options: stack.enter_context(launched(*flags, **options))


@pytest.fixture
def launch_fake(launch: Callable[..., Server]) -> Callable[..., Server]:
    """`launch` with the scheduler replaced by one that needs no model."""
    return lambda *flags, **options: launch(*flags, services=FAKE_SCHEDULER, **options)


@pytest.fixture
def launch_stand_ins(launch: Callable[..., Server], model: str) -> Callable[..., Server]:
    """`launch` with stand-ins for all services but those given: what the launcher itself does, in a second."""
    return lambda *flags, services=None, **options: launch(
        "--model-path", model, *flags, services=STAND_INS | (services or {}), **options
    )


@pytest.fixture
def model(tmp_path) -> str:
    """A directory that looks like a model to the launcher."""
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "vocab_size": 8}')
    return str(tmp_path)
