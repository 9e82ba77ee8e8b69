"""A short-lived process that reads checkpoint files of torch.save and writes their tensors as safetensors.

It is the only user of torch.load here; quartet.scheduler_service.weights.pickled starts it. A pickle is a program.
`weights_only` lets it build tensors and nothing else, and this process has limits of memory, time and output, holds
nothing of a server, and writes only to descriptors that it was given.

    python -m quartet.scheduler_service.weights.convert_bin PARENT_PID [FILE DESCRIPTOR]...

It prints nothing when all files were converted, else one line that says which file could not be read, and why.
"""

import json
import os
import resource
import struct
import sys
import zipfile
from pathlib import Path
from typing import Any, NoReturn

import torch

from quartet.runtime.model_files.files import opened
from quartet.runtime.process.guarded import limit
from quartet.runtime.process.parent_death import arm_death_signal
from quartet.runtime.shorten import short
from quartet.scheduler_service.weights.checkpoint import (
    DTYPES,
    LENGTH_BYTES,
    MAX_HEADER_BYTES,
    MAX_NAME_CHARS,
    MAX_RANK,
    MAX_TENSORS,
)
from quartet.scheduler_service.weights.pickled import BASE_MEMORY_BYTES, output_limit, time_limit_s

NAMES = {dtype: name for name, dtype in DTYPES.items()}
NAMES |= {torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32"}
NAMES |= {torch.int64: "I64"}


class Refused(ValueError):
    """The file holds something else than plain tensors by name."""


def convert_file(file: Path, descriptor: int) -> None:
    """Write the tensors of a file to a descriptor. Raises Refused and whatever torch.load raises."""
    with opened(file) as found:  # a regular file, which torch.load then opens by its name
        size = os.fstat(found).st_size
        mapped = zipfile.is_zipfile(os.fdopen(os.dup(found), "rb"))
    tensors = plain_tensors(torch.load(file, map_location="cpu", weights_only=True, mmap=mapped), output_limit(size))
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, tensor in tensors.items():
        entries[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, position + tensor.nbytes],
        }
        position += tensor.nbytes
    header = json.dumps(entries).encode()
    if len(header) > MAX_HEADER_BYTES:
        raise Refused(f"it holds too many tensors: {len(tensors)}")
    with os.fdopen(descriptor, "wb") as output:
        output.write(struct.pack("<Q", len(header)) + header)
        for tensor in tensors.values():
            output.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)


def plain_tensors(state: Any, most_bytes: int) -> dict[str, torch.Tensor]:
    """The tensors by name. Raises Refused where there is anything else."""
    if not isinstance(state, dict) or not state:
        raise Refused("it does not hold tensors by name")
    if len(state) > MAX_TENSORS:
        raise Refused(f"it holds more than {MAX_TENSORS} tensors")
    total = 0
    for name, tensor in state.items():
        if not isinstance(name, str) or len(name) > MAX_NAME_CHARS:
            raise Refused(f"{short(name)} is no name of a tensor")
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise Refused(f"{short(name)} is no plain tensor")
        if tensor.dtype not in NAMES or tensor.is_quantized or tensor.dim() > MAX_RANK:
            raise Refused(
                f"tensor {short(name)} is {tensor.dtype} of {tensor.dim()} dimensions, which is not supported"
            )
        total += tensor.nbytes
    if total > most_bytes:
        raise Refused(f"its tensors take {total} bytes, far more than the file")
    return {name: tensor.detach() for name, tensor in state.items()}


def main() -> None:
    """Convert the files of the command line, within limits."""
    arm_death_signal(int(sys.argv[1]))
    torch.set_num_threads(1)
    files = [Path(name) for name in sys.argv[2::2]]
    set_limits([file.stat().st_size for file in files])
    for file, descriptor in zip(files, map(int, sys.argv[3::2]), strict=True):
        try:
            with torch.no_grad():
                convert_file(file, descriptor)
        except Refused as error:
            fail(file, str(error))
        except Exception as error:  # what is wrong with a pickle can be anything
            fail(file, f"{type(error).__name__}: {error}")


def set_limits(sizes: list[int]) -> None:
    """Limit memory, output and time for converting files of these sizes, one after the other."""
    limit(resource.RLIMIT_AS, BASE_MEMORY_BYTES + 3 * max(sizes))
    limit(resource.RLIMIT_FSIZE, output_limit(max(sizes)) + MAX_HEADER_BYTES + LENGTH_BYTES)
    limit(resource.RLIMIT_CPU, round(time_limit_s(sum(sizes))))
    limit(resource.RLIMIT_CORE, 0)


def fail(file: Path, reason: str) -> NoReturn:
    first = (reason.strip().splitlines() or ["no reason given"])[0]
    os.write(1, f"{file}: {short(first, 300)}\n".encode(errors="replace"))
    os._exit(1)


if __name__ == "__main__":
    main()
