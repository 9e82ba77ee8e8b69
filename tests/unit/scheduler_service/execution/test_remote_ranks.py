"""Who connects to rank 0 is taken for a rank only when it says so in time, with the token of the store."""

import socket
import struct

import pytest

from quartet.runtime.errors import StartupError
from quartet.scheduler_service.execution import remote_ranks
from quartet.scheduler_service.execution.rank_messages import Channel, Commit, Hello, Message
from quartet.scheduler_service.host.parallel import interface_towards
from tests.configs import resolved


@pytest.fixture
def ends() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        return listener.accept()[0], client


def greeted(ends: tuple[socket.socket, socket.socket], message: Message) -> int:
    Channel(ends[1]).send(message)
    return remote_ranks.greeted(ends[0], "secret")


def test_a_rank_with_the_token_is_known_by_its_number(ends: tuple[socket.socket, socket.socket]) -> None:
    assert greeted(ends, Hello(3, "secret")) == 3


@pytest.mark.parametrize("message", [Hello(3, "wrong"), Hello(3, "sécret"), Hello(3, "x" * 1000), Commit()])
def test_others_are_not_ranks(ends: tuple[socket.socket, socket.socket], message: Message) -> None:
    assert greeted(ends, message) == -1


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r\n\r\n", struct.pack("<Q", 3) + b"\xff\xff\xff", b""])
def test_what_is_no_message_is_not_a_rank(ends: tuple[socket.socket, socket.socket], data: bytes) -> None:
    ends[1].sendall(data)
    ends[1].close()
    assert remote_ranks.greeted(ends[0], "secret") == -1


def test_the_interface_of_an_own_address_is_found() -> None:
    assert interface_towards("127.0.0.1") == "lo"


def test_an_address_of_another_machine_ends_the_start_before_anybody_waits() -> None:
    config = resolved(tp_size=2, nnodes=2, dist_init_addr="203.0.113.9:1")
    with pytest.raises(StartupError, match=r"203\.0\.113\.9 is no address of this machine"):
        remote_ranks.listen(config)
