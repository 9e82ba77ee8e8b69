"""What the compiler makes of every kernel at the shapes of served models, against a committed table per Triton.

`python -m tests.kernels_sm90.test_binaries` writes the table of the installed one anew; read the difference before
committing it.
"""

import json
import re
from pathlib import Path

import pytest
import torch
import triton

from quartet.kernels.ops import DEPENDENT, resolve
from tests.kernels.cases import Case, case_id
from tests.kernels.table import SERVED
from tests.kernels_sm90.compiler import Binary, use_compiler_only

TABLES = Path(__file__).parent / "binaries"  # by Triton's version
OWN_TABLE = TABLES / (".".join(triton.__version__.split(".")[:2]) + ".json")
SPARE_REGISTERS = 32  # of a Triton without a table, which is held against the newest
# What decides a kernel's speed: 16-byte loads, asynchronous copies, and the two generations of tensor-core products.
INSTRUCTIONS = {
    "LDG.128": r"LDG\.E[.A-Z0-9]*\.128[.A-Z0-9]*",
    "LDGSTS": r"LDGSTS[.A-Z0-9]*",
    "HMMA": r"HMMA[.A-Z0-9]*",
    "HGMMA": r"HGMMA[.A-Zx0-9]*",
}

RECORDER = use_compiler_only()
TRITON = resolve("cuda", "triton")
AHEAD = resolve("cuda", "triton", dependent=True)


def compiled(case: Case) -> list[Binary]:
    """The binaries that one call would load."""
    getattr(TRITON, case.op)(**case.arguments(torch.bfloat16, "meta"))
    return RECORDER.take()


def facts(binary: Binary) -> dict[str, object]:
    found = [name for name, pattern in INSTRUCTIONS.items() if binary.count(pattern)]
    return {"registers": binary.registers, "stack": binary.stack, "instructions": found}


def newest_table() -> Path:
    return max(TABLES.glob("*.json"), key=lambda path: tuple(map(int, path.stem.split("."))))


@pytest.mark.parametrize("case", SERVED, ids=case_id)
def test_binary_is_as_lean_as_the_table_says(case: Case) -> None:
    known = OWN_TABLE.exists()
    table = json.loads((OWN_TABLE if known else newest_table()).read_text())
    for binary in compiled(case):
        expected = table[case.name][binary.kernel]
        assert binary.stack == expected["stack"] == 0, binary.kernel
        assert binary.registers <= expected["registers"] + (0 if known else SPARE_REGISTERS), binary.kernel
        missing = [name for name in expected["instructions"] if not binary.count(INSTRUCTIONS[name])]
        assert missing == [], binary.kernel


@pytest.mark.parametrize("case", [case for case in SERVED if case.op in DEPENDENT], ids=case_id)
def test_a_dependent_launch_loads_weights_before_it_waits(case: Case) -> None:
    getattr(AHEAD, case.op)(**case.arguments(torch.bfloat16, "meta"))
    (binary,) = RECORDER.take()
    code = binary.code
    assert binary.stack == 0
    assert "PREEXIT" in code  # the next kernel may start
    wait = code.index("ACQBULK")
    if case.op != "paged_decode":  # which has no weights
        first_load = re.search(INSTRUCTIONS["LDG.128"], code)
        assert first_load is not None
        assert first_load.start() < wait


def write_table() -> None:
    table = {case.name: {binary.kernel: facts(binary) for binary in compiled(case)} for case in SERVED}
    OWN_TABLE.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    write_table()
