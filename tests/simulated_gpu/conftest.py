"""These tests need the device that the plugin makes:

TRITON_INTERPRET=1 python -m pytest -p tests.simulated_gpu.plugin tests/simulated_gpu
"""

import sys

collect_ignore_glob = [] if "tests.simulated_gpu.plugin" in sys.modules else ["test_*.py"]
