"""The table of processes, and one server's life: bind, resolve, start, serve, drain, clean up.

Services are named by strings, so this process never imports torch or any service.
"""

import contextlib
import errno
import logging
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import setproctitle

from quartet.runtime.config import ServerConfig
from quartet.runtime.errors import StartupError, UsageError
from quartet.runtime.launcher import run_dir, unix_socket
from quartet.runtime.launcher.child import Service, binding_note
from quartet.runtime.launcher.parent import exit_with_parent
from quartet.runtime.launcher.ready_file import ReadyFile, kept
from quartet.runtime.launcher.supervisor import ExitStatus, Signals, Supervisor
from quartet.runtime.log import plain, say, set_up_logging, tell, writes_json
from quartet.runtime.messages import DETOKENIZER, GATEWAY, SCHEDULER, SEVERAL, TOKENIZER
from quartet.runtime.model_files import hub
from quartet.runtime.model_files.model_info import embeds
from quartet.runtime.process import streams
from quartet.runtime.process.memory import Memory, in_words, look, shrink
from quartet.runtime.process.port_holder import holder_of
from quartet.runtime.process.system import check_system
from quartet.runtime.service import TITLE
from quartet.runtime.settings import flags
from quartet.runtime.settings.machine import look_at_machine
from quartet.runtime.settings.resolve import Resolution, resolve
from quartet.runtime.settings.tls import server_context
from quartet.runtime.shorten import short
from quartet.runtime.sockets import endpoint

log = logging.getLogger(__name__)

# glibc gives every large block back to the system when it is freed. A step on the CPU would then take thousands of page
# faults, for its logits alone, and new weights would be packed into fresh pages, which virtual machines hand out at
# less than 1 GB/s. So blocks up to 256 MB stay with the process and come in huge pages; other C libraries ignore this.
KEEPS_MEMORY = {
    "GLIBC_TUNABLES": "glibc.malloc.arena_max=1:glibc.malloc.mmap_threshold=268435456:"
    "glibc.malloc.trim_threshold=4294967296:glibc.malloc.hugetlb=1"
}
# With --low-memory: MKL would keep some 17 MB of buffers for each thread that multiplies.
KEEPS_NO_BUFFERS = {"MKL_DISABLE_FAST_MM": "1"}

# In ring order: each role sends to the next, the last to the first.
SERVICES = (
    Service(GATEWAY, "quartet.http_gateway.main", listens=True),
    Service(TOKENIZER, "quartet.tokenizer_service.main"),
    Service(SCHEDULER, "quartet.scheduler_service.main", threads=0, standby=True, environment=KEEPS_MEMORY),
    Service(DETOKENIZER, "quartet.detokenizer_service.main"),
)
NODE_RANK = "quartet.scheduler_service.node_rank"
RANK_RESTARTS = 30  # within the window: whenever rank 0 ends, so do they
BACKLOG = 2048
PROCESSES_BYTES = 400 << 20  # what the four processes and the launcher take before a model is loaded
LAST_EPOCH = 999_999
COMMAND_CHARS = 60  # of the process that has our port
ANY_ADDRESS = ("0.0.0.0", "::", "")


def main(argv: Sequence[str]) -> int:
    """`quartet serve`: run a server to its end; returns the exit status."""
    return serve(argv, SERVICES)


def serve(argv: Sequence[str], services: Sequence[Service]) -> int:
    """The same with another table of processes. A failure is one line on stderr and a status, never a traceback."""
    streams.keep_standard()
    try:
        check_system()
        streams.check_open_files()
        settings = flags.load(argv, environment=os.environ)
        flags.forget_secrets(os.environ)
        setproctitle.setproctitle(TITLE.format(role="launcher"))
        set_up_logging(settings.config)
        for note in filter(None, [*settings.notes, binding_note(os.environ)]):
            log.warning("%s", note)
        if settings.config.exit_with_parent is not None:
            exit_with_parent(settings.config.exit_with_parent)
        return run(settings.config, services)
    except UsageError as error:
        return fail(ExitStatus.USAGE, str(error))
    except StartupError as error:
        return fail(ExitStatus.STARTUP, str(error))
    except (OSError, MemoryError) as error:
        return fail(ExitStatus.STARTUP, f"the server cannot start: {streams.cause(error)}")
    except KeyboardInterrupt:
        return fail(ExitStatus.INTERRUPTED, "interrupted before the server was up")


def run(config: ServerConfig, services: Sequence[Service]) -> int:
    """Serve until told to stop or until a process dies. Raises StartupError."""
    resolution = resolve(config, look_at_machine())
    if config.node_rank:
        return run_ranks(resolution)
    server_context(config)  # the gateway makes one of its own; what is wrong with the files is said now
    with contextlib.ExitStack() as stack:
        ready_file = stack.enter_context(kept(config.ready_file))
        listener = None if config.disable_tcp else stack.enter_context(listen(config.host, config.port))
        unix_listener = stack.enter_context(unix_socket.listening(config.uds)) if config.uds else None
        resolved = resolution.config
        if listener is not None:
            address, port = listener.getsockname()[:2]
            resolved = msgspec.structs.replace(resolved, port=port, listen_address=address)
        directory, lifeline_fd = stack.enter_context(run_dir.private(run_dir.base(os.environ)))
        for note in resolution.notes:
            log.warning("%s", note)
        table = ranked(saving(services) if resolved.low_memory else services, resolved.dp_size)
        check_path_length(str(directory), table)
        resolved = hub.locate(resolved, directory)
        resolved = msgspec.structs.replace(resolved, is_embedding=embeds(resolved))
        check_memory(look())
        listeners = [found for found in (listener, unix_listener) if found]
        fds = [found.fileno() if found else -1 for found in (listener, unix_listener)]
        with Signals() as signals, Supervisor(table, resolved, directory, lifeline_fd, *fds) as supervisor:
            status = supervisor.run(
                signals, lambda: announce(resolved, ready_file), lambda: stop_listening(listeners, ready_file)
            )
    return fail(status, supervisor.reason) if supervisor.reason else status


def run_ranks(resolution: Resolution) -> int:
    """Run the ranks of a machine that is not the first, until told to stop; it serves no HTTP. Raises StartupError."""
    config = resolution.config
    first = config.node_rank * config.ranks_here
    ranks = [
        Service(f"{SCHEDULER} TP{rank}", NODE_RANK, threads=0, environment=KEEPS_MEMORY)
        for rank in range(first, first + config.ranks_here)
    ]
    ranks = saving(ranks) if config.low_memory else ranks
    for note in resolution.notes:
        log.warning("%s", note)
    with run_dir.private(run_dir.base(os.environ)) as (directory, lifeline_fd):
        check_path_length(str(directory), ranks)
        own = hub.locate(config, directory)
        own = msgspec.structs.replace(own, max_restarts=max(config.max_restarts, RANK_RESTARTS))
        with Signals() as signals, Supervisor(ranks, own, directory, lifeline_fd, -1) as supervisor:
            log.info("Machine %d of %d waits for machine 0 at %s.", own.node_rank, own.nnodes, own.dist_init_addr)
            status = supervisor.run(signals, lambda: log.info("The ranks of this machine take part."), lambda: None)
    return fail(status, supervisor.reason) if supervisor.reason else status


def ranked(services: Sequence[Service], size: int) -> list[Service]:
    """The table with `size` (--dp-size) processes of the role that may have several."""
    return [
        replace(service, rank=rank, of_role=size if service.role == SEVERAL else 1)
        for service in services
        for rank in range(size if service.role == SEVERAL else 1)
    ]


def saving(services: Sequence[Service]) -> list[Service]:
    """The table where libraries keep less memory, see --low-memory."""
    return [replace(service, environment={**service.environment, **KEEPS_NO_BUFFERS}) for service in services]


def check_memory(memory: Memory) -> None:
    """Raise StartupError where the processes have no room even without a model: the kernel would end one of them."""
    if memory.available < PROCESSES_BYTES:
        raise StartupError(
            f"{in_words(memory.available)} may still be used by {memory.limit}, and the processes alone take "
            f"{in_words(PROCESSES_BYTES)}; allow the server more memory"
        )


def listen(host: str, port: int) -> socket.socket:
    """The HTTP socket, taken before anything slow happens. Raises StartupError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except socket.gaierror as error:
        raise StartupError(f"--host {host} is no address of this machine: {error.strerror}") from error
    except OSError as error:
        raise StartupError(f"cannot listen on {host}:{port}: {cause(error, port)}") from error
    return listener


def cause(error: OSError, port: int) -> str:
    """Why a bind failed, and what to do about it."""
    if error.errno == errno.EADDRINUSE and (holder := holder_of(port)):
        name = short(holder.command, COMMAND_CHARS)
        return (
            f"process {holder.pid} ({name}) has that port; stop it (kill {holder.pid}) or choose another --port "
            "(0: any free one)"
        )
    remedies = {
        errno.EADDRINUSE: "another process has that port; stop it or choose another --port (0: any free one)",
        errno.EACCES: "ports under 1024 need a privilege; choose another --port",
        errno.EADDRNOTAVAIL: "--host is no address of this machine; 0.0.0.0 means all of them",
    }
    return remedies.get(error.errno or 0, error.strerror or str(error))


def check_path_length(directory: str, services: Sequence[Service]) -> None:
    """Raise StartupError when a socket's path would be too long."""
    try:
        for service in services:
            endpoint(directory, service.key, LAST_EPOCH)
    except ValueError as error:
        raise StartupError(str(error)) from error


def announce(config: ServerConfig, ready_file: ReadyFile) -> None:
    """Tell supervisors (the log line, the ready file, systemd) and people (what to try next) that the server serves."""
    log.info("The server is fired up and ready to roll!")
    if config.low_memory:
        shrink()
    try:
        ready_file.write(addresses(config))
    except OSError as error:
        log.error("The --ready-file could not be written: %s", error)
    notify(b"READY=1")
    if writes_json():
        log.info("%s is served at %s", config.name, ", ".join(addresses(config)))
    else:
        say(what_next(config), sys.stdout)


def what_next(config: ServerConfig) -> str:
    """A line to paste into another terminal, and where the page is."""
    served = " and ".join(addresses(config))
    url, option = url_of(config), ""
    if config.disable_tcp:
        url, option = "http://localhost", f"--unix-socket {plain(config.uds or '')} "
    path, body = (
        ("encode", {"text": "Hello"})
        if config.is_embedding
        else ("generate", {"text": "What is the capital of France?", "sampling_params": {"temperature": 0}})
    )
    key = "-H 'Authorization: Bearer <your key>' " if config.api_key else ""
    data = msgspec.json.encode(body).decode()
    name = plain(config.name)
    call = f"curl -s {option}{url}/{path} {key}-d '{data}'"
    page = "" if config.disable_tcp else f"Or open {url}/ in a browser. "
    return f"\n{name} is served at {served}. Try:\n\n    {call}\n\n{page}Ctrl-C stops it.\n"


def url_of(config: ServerConfig) -> str:
    """Where a client of this machine reaches the server."""
    host = "127.0.0.1" if config.host in ANY_ADDRESS else config.host
    scheme = "https" if config.ssl_certfile else "http"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{config.port}"


def addresses(config: ServerConfig) -> list[str]:
    """Where the server is reached, on TCP first."""
    on_tcp = [] if config.disable_tcp else [url_of(config)]
    return on_tcp + ([f"unix:{Path(config.uds).absolute()}"] if config.uds else [])


def stop_listening(listeners: Sequence[socket.socket], ready_file: ReadyFile) -> None:
    """Draining begins: the gateway's copies of the sockets are the only ones left, so closing them refuses clients."""
    ready_file.remove()
    notify(b"STOPPING=1")
    log.info("stopping: running requests are finished first; a second signal ends them")
    for listener in listeners:
        listener.close()


def notify(state: bytes) -> None:
    """Notify systemd, where the server runs under it with Type=notify."""
    if address := os.environ.get("NOTIFY_SOCKET"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender, contextlib.suppress(OSError):
            sender.sendto(state, "\0" + address[1:] if address.startswith("@") else address)


def fail(status: ExitStatus, reason: str) -> int:
    tell(reason, logging.ERROR, "quartet: ")
    return status
