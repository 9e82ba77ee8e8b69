"""One table of cases for three suites: Triton's interpreter, the compiler for sm_90, a GPU.

A case makes the arguments of one operation for a shape, a dtype and a device. The interpreter and the GPU compare the
Triton kernel with the torch operation of the same name on them; the compiler takes them from the "meta" device.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import nan
from typing import Any

import torch

Arguments = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Maker:
    """Makes tensors of one dtype on one device, the same values each time."""

    dtype: torch.dtype
    device: str
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(5))

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> torch.Tensor:
        if self.device == "meta":
            return torch.empty(shape, dtype=dtype or self.dtype, device="meta")
        return (torch.randn(shape, generator=self.generator) * scale).to(dtype or self.dtype).to(self.device)

    def weight(self, *shape: int) -> torch.Tensor:
        """Rows whose products with unit normal inputs are unit normal again."""
        return self.normal(*shape, scale=shape[-1] ** -0.5)

    def near_one(self, *shape: int) -> torch.Tensor:
        return self.normal(*shape, scale=0.1) if self.device == "meta" else 1 + self.normal(*shape, scale=0.1)

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        if self.device == "meta":
            return torch.empty(shape, dtype=dtype, device="meta")
        return torch.randint(low, high, shape, generator=self.generator).to(dtype).to(self.device)

    def given(self, values: Any, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype).to(self.device)

    def zeros(self, *shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def poisoned(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """An output that shows what was not written."""
        dtype = dtype or self.dtype
        return torch.full(shape, nan if dtype.is_floating_point else -7, dtype=dtype, device=self.device)


@dataclass(frozen=True, slots=True)
class Case:
    """One operation at one shape."""

    op: str
    make: Callable[..., Arguments]
    shape: dict[str, Any]
    outputs: tuple[str, ...] = ("out",)

    @property
    def name(self) -> str:
        return "-".join([self.op, *(f"{key}={value}" for key, value in self.shape.items())])

    def arguments(self, dtype: torch.dtype, device: str) -> Arguments:
        return self.make(Maker(dtype, device), **self.shape)


EPSILON = 1e-6


def cases(op: Callable[..., Arguments], outputs: tuple[str, ...], *shapes: dict[str, Any]) -> list[Case]:
    return [Case(op.__name__, op, shape, outputs) for shape in shapes]


def case_id(case: Case) -> str:
    return case.name


def clone(arguments: Arguments) -> Arguments:
    return {key: x.clone() if isinstance(x, torch.Tensor) else x for key, x in arguments.items()}


def assert_agree(case: Case, left: Any, right: Any, dtype: torch.dtype, device: str, tolerance: float) -> None:
    """Both implementations make the same outputs of the same arguments."""
    arguments = case.arguments(dtype, device)
    expected, found = clone(arguments), clone(arguments)
    getattr(left, case.op)(**expected)
    getattr(right, case.op)(**found)
    for output in case.outputs:
        if found[output] is None:
            continue
        torch.testing.assert_close(
            found[output], expected[output], rtol=tolerance, atol=tolerance, msg=f"{output}: {{}}".format
        )
