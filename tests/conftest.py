"""What holds for all tests: quiet threads, and properties that are checked the same way on every run."""

import os

from hypothesis import settings

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before any test imports torch
settings.register_profile("quartet", deadline=None, derandomize=True)  # a busy machine is no failure
settings.load_profile("quartet")
