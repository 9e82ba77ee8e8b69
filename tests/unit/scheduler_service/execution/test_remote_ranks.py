"""Who connects to rank 0 is taken for a rank only when it says so in time, with the token of the store."""

import select
import socket
import struct
import threading

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


def greeted(ends: tuple[socket.socket, socket.socket], message: Message) -> Hello | None:
    Channel(ends[1]).send(message)
    return remote_ranks.greeted(ends[0], "secret")


def test_a_rank_with_the_token_is_known_by_its_number(ends: tuple[socket.socket, socket.socket]) -> None:
    assert greeted(ends, Hello(3, "secret", pulses=True)) == Hello(3, "secret", pulses=True)


@pytest.mark.parametrize("message", [Hello(3, "wrong"), Hello(3, "sécret"), Hello(3, "x" * 1000), Commit()])
def test_others_are_not_ranks(ends: tuple[socket.socket, socket.socket], message: Message) -> None:
    assert greeted(ends, message) is None


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r\n\r\n", struct.pack("<Q", 3) + b"\xff\xff\xff", b""])
def test_what_is_no_message_is_not_a_rank(ends: tuple[socket.socket, socket.socket], data: bytes) -> None:
    ends[1].sendall(data)
    ends[1].close()
    assert remote_ranks.greeted(ends[0], "secret") is None


def test_a_rank_that_sends_nothing_for_longer_than_the_watchdog_waits_is_missed(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    silence = remote_ranks.Silence(3, ends[0], 10.0)
    looks = [silence.look(1.0) for _ in range(10)]
    ends[1].sendall(remote_ranks.PULSE * 3)
    wait_for(ends[0])
    looks += [silence.look(1.0) for _ in range(11)]
    assert looks == [""] * 21
    assert (
        silence.look(1.0)
        == "Rank 3 on another machine has not answered for 11 s (--watchdog-timeout). Ending the group."
    )


def test_time_in_which_nobody_looked_is_no_silence(ends: tuple[socket.socket, socket.socket]) -> None:
    silence = remote_ranks.Silence(3, ends[0], 10.0)
    assert [silence.look(1000.0) for _ in range(10)] == [""] * 10


def test_without_a_watchdog_silence_is_borne(ends: tuple[socket.socket, socket.socket]) -> None:
    silence = remote_ranks.Silence(3, ends[0], 0.0)
    assert [silence.look(1.0) for _ in range(100)] == [""] * 100


def test_a_rank_that_has_ended_is_told_from_one_that_is_silent(ends: tuple[socket.socket, socket.socket]) -> None:
    pulses, theirs = socket.socketpair()
    with theirs:
        silence = remote_ranks.Silence(3, pulses, 0.01)
        assert "has not answered for" in remote_ranks.reason_to_end(3, ends[0], silence)
        ends[1].close()
        silence = remote_ranks.Silence(3, pulses, 1e6)
        assert "has ended" in remote_ranks.reason_to_end(3, ends[0], silence)


def test_signs_of_life_are_sent_until_nobody_hears_them() -> None:
    ours, theirs = socket.socketpair()
    sending = threading.Thread(target=remote_ranks.send_pulses, args=(theirs,))
    sending.start()
    assert ours.recv(1) == remote_ranks.PULSE
    ours.close()
    sending.join()


def wait_for(connection: socket.socket) -> None:
    """Until there is something to read."""
    select.select([connection], [], [])


def test_the_interface_of_an_own_address_is_found() -> None:
    assert interface_towards("127.0.0.1") == "lo"


def test_an_address_of_another_machine_ends_the_start_before_anybody_waits() -> None:
    config = resolved(tp_size=2, nnodes=2, dist_init_addr="203.0.113.9:1")
    with pytest.raises(StartupError, match=r"203\.0\.113\.9 is no address of this machine"):
        remote_ranks.listen(config)
