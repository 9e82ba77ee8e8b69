"""Kernels compiled for sm_90. The compiler's stand-in for a driver holds for a process, so this suite has its own:

KERNEL_TARGET=sm90 python -m pytest tests/kernels_sm90
"""

import os

collect_ignore_glob = [] if os.environ.get("KERNEL_TARGET") == "sm90" else ["test_*.py"]
