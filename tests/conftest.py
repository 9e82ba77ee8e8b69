"""What holds for all tests: quiet threads, and properties that are checked the same way on every run."""

import os

from hypothesis import HealthCheck, settings

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before any test imports torch
settings.register_profile(  # a busy machine is no failure
    "quartet", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("quartet")
