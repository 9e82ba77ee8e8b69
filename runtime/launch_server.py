"""`python -m runtime.launch_server <flags>` is `quartet serve <flags>`."""

import sys

from runtime.cli import main

if __name__ == "__main__":
    sys.exit(main(["serve", *sys.argv[1:]]))
