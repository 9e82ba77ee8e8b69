"""The real launcher with other modules in its table: `python -m tests.launcher scheduler=tests.x -- <serve flags>`."""

import sys
from dataclasses import replace

from quartet.runtime.launcher.launch import SERVICES, serve


def main(arguments: list[str]) -> int:
    cut = arguments.index("--")
    modules = dict(argument.split("=") for argument in arguments[:cut])
    services = [replace(service, module=modules.get(service.role, service.module)) for service in SERVICES]
    return serve(arguments[cut + 1 :], services)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
