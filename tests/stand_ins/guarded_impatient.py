"""The guarded work for tests, with little patience for its preparation."""

import sys

from quartet.runtime.process import guarded
from tests.stand_ins.guarded_work import prepared

if __name__ == "__main__":
    guarded.PREPARE_CPU_S = 0.05
    guarded.serve(int(sys.argv[1]), prepared, memory_bytes=1 << 30)
