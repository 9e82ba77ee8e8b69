"""A simulated CUDA device on a torch without CUDA: what would go wrong on a GPU goes wrong here, and says so.

    python -m pytest -p tests.simulated_gpu.plugin tests/gpu tests/simulated_gpu     (with TRITON_INTERPRET=1)

    memory.py         allocations of the device and page-locked memory of the host, poisoned until they are written
    streams.py        streams and events: a copy has not landed before somebody waits for it
    tensors.py        tensors that say they are on the device, and what is forbidden to them
    graphs.py         capture, which records and does not compute, and replay on the same addresses
    launches.py       Triton's kernels in its interpreter, their pointers checked
    plain_kernels.py  the same operations in plain torch, which most tests take
    cuda.py           the names of torch.cuda that lead here
    plugin.py         installs all of it in a process of pytest

What is simpler than on a device: all that is put in line is computed at once, in the order of its submission, whatever
its stream; only what the host can see of it comes late. Memory that is freed is not handed out again.
"""
