"""A trainer beside a server. Threads of torch that wait must not spin: the server needs the cores."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read once, when torch is imported
