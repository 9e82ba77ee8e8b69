"""A gateway without HTTP routes: answers every connection with a line, drains at SIGTERM."""

import signal
import socket

from quartet.runtime.service import Boot, report_ready, run
from quartet.runtime.sockets import Inbox


def main(boot: Boot) -> None:
    inbox = Inbox(boot.inbox)
    listener = socket.socket(fileno=boot.listen_fd)
    signal.signal(signal.SIGTERM, lambda *_: listener.close())
    report_ready(boot)
    while listener.fileno() >= 0:
        try:
            connection, _ = listener.accept()
        except OSError:
            break
        with connection:
            connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n" + str(inbox.rejected).encode())


if __name__ == "__main__":
    run(main)
