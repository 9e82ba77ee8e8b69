"""`python -m quartet` is the command `quartet`."""

import sys

from quartet.runtime.cli import main

if __name__ == "__main__":
    sys.exit(main())
