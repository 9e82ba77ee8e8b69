"""`python -m runtime.launch_server <flags>`, from a checkout's directory: the same as `quartet serve <flags>`."""

import sys

from quartet.runtime.cli import main

if __name__ == "__main__":
    sys.exit(main(["serve", *sys.argv[1:]]))
