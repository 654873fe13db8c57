"""Comparisons that take Tensors and arrays of any backend."""

from __future__ import annotations

from typing import Any

import numpy as np

from mini_nn import Tensor, backend

TOLERANCES = {"float16": (2e-3, 1e-3), "float32": (2e-5, 1e-6), "float64": (1e-9, 1e-11)}
"""Relative and absolute tolerance for results of that dtype."""


def host(x: Any) -> Any:
    """A Tensor, an array of any backend, a number or a list of them as a NumPy array."""
    if isinstance(x, Tensor):
        x = x.data
    if isinstance(x, (list, tuple)):
        return np.asarray([host(member) for member in x])
    return np.asarray(x if isinstance(x, np.ndarray) else backend.to_host(x))


def assert_close(
    actual: Any, desired: Any, rtol: float | None = None, atol: float | None = None
) -> None:
    """``actual`` has the shape and, within a tolerance, the values of ``desired``.

    A number as ``desired`` stands for an array full of it.  Without ``rtol`` and ``atol`` the dtype
    with fewer digits of the two decides; giving only one makes the other 0.  nan equals nan.
    """
    got, want = host(actual), host(desired)
    if not isinstance(desired, (bool, int, float, complex)):
        assert got.shape == want.shape, f"shape {got.shape}, wanted {want.shape}"
    if rtol is None and atol is None:
        known = [TOLERANCES[x.dtype.name] for x in (got, want) if x.dtype.name in TOLERANCES]
        rtol, atol = max(known, default=(0.0, 0.0))
    np.testing.assert_allclose(got, want, rtol=rtol or 0.0, atol=atol or 0.0)
