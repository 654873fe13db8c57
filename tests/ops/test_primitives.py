"""Every function of ``mini_nn.ops`` against its oracle and the laws of primitives."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_nn import Tensor, grad, no_grad, ops
from mini_nn.check import check_grads
from tests.support import assert_close, host

from . import catalogue, catalogue_layers  # noqa: F401  (they fill the list of cases)
from .cases import CASES, Case

all_cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)


def place(xp: Any, values: list[Any], dtype: str = "float64") -> list[Any]:
    """The host arrays on the backend under test, the floating-point ones in this dtype."""
    return [xp.asarray(v.astype(dtype) if is_float(v) else v) for v in values]


def is_float(x: Any) -> bool:
    return x.dtype.kind == "f"


def outputs(result: Any) -> tuple[Any, ...]:
    return result if isinstance(result, tuple) else (result,)


def differentiable(case: Case) -> bool:
    return any(isinstance(spec, tuple) or is_float(spec) for spec in case.specs)


def test_the_catalogue_has_every_function() -> None:
    public = {
        name
        for name, value in vars(ops).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert public == {case.name for case in CASES}


@all_cases
def test_values(xp: Any, case: Case) -> None:
    for dtype in ("float32", "float64"):
        check_values(xp, case, dtype)


def check_values(xp: Any, case: Case, dtype: str) -> None:
    """Arrays give arrays, Tensors give Tensors with the same values: those of the oracle."""
    inputs = place(xp, case.inputs(), dtype)
    wanted = outputs(case.oracle(*[host(x) for x in place(xp, case.inputs(), dtype)]))
    plain = outputs(case.call(*inputs))
    recorded = outputs(case.call(*[Tensor(x, requires_grad=is_float(x)) for x in inputs]))
    with no_grad():
        unrecorded = outputs(case.call(*[Tensor(x, requires_grad=is_float(x)) for x in inputs]))
    assert all(y.node is None for y in unrecorded)
    for want, array, tensor in zip(wanted, plain, recorded, strict=True):
        assert isinstance(tensor, Tensor) and isinstance(array, Tensor) == (not inputs)
        np.testing.assert_array_equal(host(array), host(tensor))
        got = host(tensor)
        if got.dtype.kind == "f" and differentiable(case):
            assert got.dtype == dtype
        else:
            assert got.dtype.kind == want.dtype.kind
        scale = float(np.abs(want[np.isfinite(want)]).max(initial=1.0))
        digits = 2e-5 if got.dtype == "float32" else 1e-10
        assert_close(got, want, rtol=digits, atol=digits * scale)


@all_cases
def test_derivatives(xp: Any, case: Case) -> None:
    """To order 2, with the laws that check_grads adds: dtypes, shapes, f(x, x), no mutation."""
    if differentiable(case):
        check_grads(case.call, *place(xp, case.inputs()))


@given(st.sampled_from([case for case in CASES if differentiable(case)]), st.integers(0, 2**32))
def test_derivatives_of_other_numbers(xp: Any, case: Case, seed: int) -> None:
    check_grads(case.call, *place(xp, case.inputs(seed)))


def gradients(case: Case, inputs: list[Any]) -> tuple[list[Any], list[Any]]:
    """The outputs, and the gradients of their sum weighed by cosines of their positions."""
    tensors = [Tensor(x, requires_grad=is_float(x)) for x in inputs]
    results = outputs(case.call(*tensors))
    live = [y for y in results if y.node is not None]
    leaves = [x for x in tensors if x.node is not None]
    if not live or not leaves:
        return [*results], []
    weights = [
        ops.elementwise.of(y).asarray(np.cos(np.arange(y.size)).reshape(y.shape).astype(y.dtype))
        for y in live
    ]
    return [*results], [*grad(live, leaves, weights, materialize_grads=True)]


@all_cases
def test_float32_gradients(xp: Any, case: Case) -> None:
    """They are the float64 ones, to float32's precision."""
    single = gradients(case, place(xp, case.inputs(), "float32"))[1]
    double = gradients(case, place(xp, [host(x) for x in place(xp, case.inputs(), "float32")]))[1]
    for s, d in zip(single, double, strict=True):
        assert s.dtype == "float32"
        scale = float(np.abs(host(d)).max(initial=1e-3))
        assert_close(s, d, rtol=1e-4, atol=1e-5 * scale)


def layouts(xp: Any, x: Any) -> dict[str, Any]:
    """The same numbers, otherwise in memory: column-major, backwards, with gaps."""
    backwards = (slice(None, None, -1),) * x.ndim
    gaps = xp.zeros([2 * n for n in x.shape], x.dtype)[(slice(None, None, 2),) * x.ndim]
    gaps[...] = x
    return {
        "column-major": xp.transpose(xp.ascontiguousarray(xp.transpose(x))),
        "backwards": xp.ascontiguousarray(x[backwards])[backwards],
        "gaps": gaps,
    }


@all_cases
def test_layout_in_memory_does_not_matter(xp: Any, case: Case) -> None:
    inputs = place(xp, case.inputs())
    if not any(x.ndim and x.size for x in inputs):
        return
    expected = gradients(case, inputs)
    for layout in ("column-major", "backwards", "gaps"):
        found = gradients(case, [layouts(xp, x)[layout] if x.ndim else x for x in inputs])
        for one, other in zip(expected[0] + expected[1], found[0] + found[1], strict=True):
            assert_close(other, one, rtol=1e-12, atol=1e-12)
