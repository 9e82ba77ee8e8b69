"""The two implementations of the fused operations have one interface."""

import ast
from dataclasses import fields
from pathlib import Path

import pytest

from quartet.kernels import ops
from quartet.kernels.reference import operations as torch_ops

ROOT = Path(__file__).resolve().parents[3]


def signatures(modules: dict[str, tuple[str, ...]]) -> dict[str, str]:
    """Every operation's positional arguments as they are written, read without importing triton."""
    found = {}
    for module, names in modules.items():
        body = ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text()).body
        functions = {node.name: node.args.args for node in body if isinstance(node, ast.FunctionDef)}
        found.update({name: ", ".join(ast.unparse(each) for each in functions[name]) for name in names})
    return found


def test_both_backends_take_the_same_arguments() -> None:
    assert signatures(ops.TORCH) == signatures(ops.TRITON)
    assert signatures(ops.TORCH).keys() == {field.name for field in fields(ops.Ops)}


def test_the_cpu_gets_torch_unless_triton_is_asked_for() -> None:
    assert ops.resolve("cpu").gemv is torch_ops.gemv
    assert ops.resolve("cuda", "torch").gemv is torch_ops.gemv


def test_an_unknown_backend_is_an_error() -> None:
    with pytest.raises(KeyError):
        ops.resolve("cpu", "cuda")  # type: ignore[arg-type]


def test_dependent_launches_are_refused_where_there_are_none() -> None:
    with pytest.raises(ValueError, match="triton"):
        ops.resolve("cpu", dependent=True)
