"""Kernels in Triton's interpreter. It must be chosen before triton is imported, so this suite has its own process:

TRITON_INTERPRET=1 python -m pytest tests/kernels_interpreter
"""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]

if not collect_ignore_glob:
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def numbers(handle: TensorHandle) -> np.ndarray:
        """In float64. bfloat16 is kept as raw 16 bits there, and a product would multiply the bits."""
        data = handle.data
        if handle.dtype.scalar == tl.bfloat16:
            data = (data.astype(np.uint32) << 16).view(np.float32)
        return data.astype(np.float64)

    def create_dot(builder, a, b, d, *rest):
        """A product that does not depend on where in a tile a row lies, as on a GPU; numpy's of float32 would."""
        return TensorHandle((numbers(a) @ numbers(b)).astype(d.data.dtype) + d.data, d.dtype.scalar)

    InterpreterBuilder.create_dot = create_dot
