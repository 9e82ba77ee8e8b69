"""Every implementation of the fused operations has the signatures that are declared in kernels/operations.py."""

import importlib.util
import inspect
from collections.abc import Callable
from importlib import import_module
from types import SimpleNamespace

import pytest

from quartet.kernels import ops
from quartet.kernels.operations import Ops
from quartet.kernels.reference import operations as torch_ops

HAS_TRITON = importlib.util.find_spec("triton") is not None


def arguments(function: Callable[..., None]) -> list[inspect.Parameter]:
    """Those of a function, without a method's `self` and without how a kernel is launched."""
    return [each for name, each in inspect.signature(function).parameters.items() if name not in ("self", "dependent")]


@pytest.mark.parametrize("implementation", ["torch", "triton"] if HAS_TRITON else ["torch"])
def test_an_implementation_has_all_operations_with_the_declared_signatures(implementation: str) -> None:
    module = import_module(ops.MODULES[implementation])
    assert sorted(module.__all__) == sorted(ops.OPERATIONS)
    for name in ops.OPERATIONS:
        assert arguments(getattr(module, name)) == arguments(getattr(Ops, name)), name


def test_dependent_is_an_argument_of_those_kernels_alone_that_can_be_launched_so() -> None:
    module = pytest.importorskip("quartet.kernels.triton.operations")
    takers = {name for name in ops.OPERATIONS if "dependent" in inspect.signature(getattr(module, name)).parameters}
    assert takers == set(ops.DEPENDENT)


def test_dependent_launches_leave_the_other_operations_as_they_are() -> None:
    module = pytest.importorskip("quartet.kernels.triton.operations")
    found = ops.resolve("cuda", dependent=True)
    assert isinstance(found, SimpleNamespace)
    assert found.gemv.keywords == {"dependent": True}
    assert found.rms_norm is module.rms_norm


def test_the_cpu_gets_torch_unless_triton_is_asked_for() -> None:
    assert ops.resolve("cpu").gemv is torch_ops.gemv
    assert ops.resolve("cuda", "torch").gemv is torch_ops.gemv


def test_an_unknown_backend_is_an_error() -> None:
    with pytest.raises(KeyError):
        ops.resolve("cpu", "cuda")  # type: ignore[arg-type]


def test_dependent_launches_are_refused_where_there_are_none() -> None:
    with pytest.raises(ValueError, match="triton"):
        ops.resolve("cpu", dependent=True)
