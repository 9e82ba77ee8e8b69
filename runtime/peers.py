"""Commands of other servers and of ollama: what to type here instead. Flags are in `settings/foreign_flags.py`."""

from collections.abc import Sequence

SERVE, CHAT, BENCH = "quartet serve {}", "quartet chat {}", "quartet bench --url http://127.0.0.1:30000"

# command → what to type; {} stands for the first argument that is no flag
COMMANDS = {
    "run": CHAT,
    "cli": CHAT,
    "talk": CHAT,
    "generate": CHAT,
    "complete": CHAT,
    "start": SERVE,
    "server": SERVE,
    "api-server": SERVE,
    "launch-server": SERVE,
    "launch": SERVE,
    "up": SERVE,
    "list": "quartet models",
    "ls": "quartet models",
    "show": "quartet models",
    "cache": "quartet models",
    "rm": "quartet models rm {}",
    "remove": "quartet models rm {}",
    "delete": "quartet models rm {}",
    "download": "quartet pull {}",
    "fetch": "quartet pull {}",
    "get": "quartet pull {}",
    "ps": "quartet health http://127.0.0.1:30000",
    "status": "quartet health http://127.0.0.1:30000",
    "ping": "quartet health http://127.0.0.1:30000",
    "benchmark": BENCH,
    "bench-serving": BENCH,
    "perf": BENCH,
    "env": "quartet config show",
    "collect-env": "quartet config show",
    "check-env": "quartet config show",
    "settings": "quartet config show",
    "help": "quartet --help",
    "version": "quartet --version",
}


def instead(command: str, arguments: Sequence[str]) -> str:
    """What to type here for a command of others; empty for one that nobody has."""
    known = COMMANDS.get(command.lower().replace("_", "-"), "")
    first = next((word for word in arguments if not word.startswith("-")), "")
    return known.format(first).strip()
