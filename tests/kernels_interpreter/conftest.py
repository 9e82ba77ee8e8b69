"""Kernels in Triton's interpreter. It must be chosen before triton is imported, so this suite has its own process:

TRITON_INTERPRET=1 python -m pytest tests/kernels_interpreter
"""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]

if not collect_ignore_glob:
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    multiply = InterpreterBuilder.create_dot

    def widened(handle: TensorHandle) -> TensorHandle:
        """bfloat16 is kept as raw 16 bits there, and a product would multiply the bits."""
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(builder, a, b, d, *rest):
        return multiply(builder, widened(a), widened(b), d, *rest)

    InterpreterBuilder.create_dot = create_dot
