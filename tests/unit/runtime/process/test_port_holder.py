"""Whoever finds a port taken learns by which process, from the kernel's tables."""

import os
import socket
import subprocess
import sys

import pytest

from quartet.runtime.process.port_holder import holder_of

INHERITS = """
import os, socket, subprocess, sys
listener = socket.create_server(("127.0.0.1", 0))
child = subprocess.Popen([sys.executable, "-c", "input()"], pass_fds=[listener.fileno()])
print(listener.getsockname()[1], flush=True)
input()
child.kill(); child.wait()
"""


@pytest.mark.parametrize("address", [("127.0.0.1", 0), ("0.0.0.0", 0), ("::1", 0)])
def test_the_process_that_listens_is_found_with_its_command(address):
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    with socket.create_server(address, family=family) as listener:
        found = holder_of(listener.getsockname()[1])
    assert found is not None and found.pid == os.getpid()
    assert "pytest" in found.command or "python" in found.command


def test_of_a_server_and_the_processes_it_gave_its_socket_to_the_server_is_named():
    with subprocess.Popen(
        [sys.executable, "-c", INHERITS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        found = holder_of(int(server.stdout.readline()))
        server.communicate("\n", timeout=120)
    assert found is not None and found.pid == server.pid


def test_a_port_that_is_only_used_as_a_client_is_held_by_nobody():
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as client,
    ):
        assert holder_of(client.getsockname()[1]) is None


def test_where_the_kernel_tells_nothing_nobody_is_named(tmp_path):
    assert holder_of(80, tmp_path / "nowhere") is None
    table = "  sl  local_address rem_address\n   0: 00000000:0050 00000000:0000 0A 0:0 00:0 0 0 0 4242 1\n"
    (tmp_path / "net").mkdir()
    (tmp_path / "net/tcp").write_text(table)
    (tmp_path / "77").mkdir()  # of another user: its descriptors are hidden
    assert holder_of(80, tmp_path) is None
    (tmp_path / "77/fd").mkdir()
    (tmp_path / "77/fd/3").symlink_to("socket:[4242]")
    assert holder_of(80, tmp_path) == (77, "")
    assert holder_of(81, tmp_path) is None
