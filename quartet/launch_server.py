"""`python -m quartet.launch_server <flags>` is `quartet serve <flags>`."""

import sys

from quartet.runtime.cli import main

if __name__ == "__main__":
    sys.exit(main(["serve", *sys.argv[1:]]))
