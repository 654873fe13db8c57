"""Which array library the code runs on: the only file that may import CuPy.

Arrays decide: ``of(x)`` is the namespace of the array ``x``, and a computation stays where its
inputs live.  Only creation without an input (parameters, data, positions) asks for ``current()``,
which ``use``, ``using`` or the environment variable ``MINI_NN_BACKEND`` set (default: ``numpy``).

Whatever CuPy offers outside NumPy's names (``cupyx.scipy.special``, the scatter) is bound here and
nowhere else.  Another array library joins by ``register``.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import scipy.special

Array = Any
"""An array of whichever library is in use; NumPy's and CuPy's stubs have no common type."""

Namespace = Any
"""A module with NumPy's names."""

Scalar = (np.generic, float, int, bool, complex)
"""What NumPy returns where CuPy returns a 0-d array, and what Python code passes for one."""


@dataclass(frozen=True)
class Backend:
    """One array library: its namespace, its special functions and its way to and from the host."""

    name: str
    xp: Namespace
    special: ModuleType | Any
    array_type: type
    to_host: Callable[[Array], Any]
    scatter_add: Callable[[Array, Any, Array], None]


def _add_at(target: Array, index: Any, values: Array) -> None:
    """``np.add.at``, which reads beyond the end of values that it has to broadcast (NumPy 2.4)."""
    np.add.at(target, index, np.broadcast_to(values, target[index].shape))


def _numpy() -> Backend:
    return Backend("numpy", np, scipy.special, np.ndarray, lambda x: x, _add_at)


def _cupy() -> Backend:
    try:
        import cupy
        import cupyx.scipy.special as special
    except ImportError as missing:
        raise RuntimeError(
            "the backend 'cupy' needs CuPy: pip install 'mini-nn[cuda]' (or the cupy-cuda wheel "
            f"that matches your CUDA toolkit); importing it said: {missing}"
        ) from None
    try:
        cupy.zeros(1)
    except Exception as refusal:  # CuPy raises a different type for each thing that is missing
        raise RuntimeError(
            "CuPy is installed but finds no usable GPU: check that `nvidia-smi` lists one and that "
            f"its driver is new enough for this wheel; CuPy said: {refusal}"
        ) from None
    return Backend("cupy", cupy, special, cupy.ndarray, cupy.asnumpy, cupy.add.at)


_loaders: dict[str, Callable[[], Backend]] = {"numpy": _numpy, "cupy": _cupy}
_loaded: dict[str, Backend] = {}
array_types: dict[type, Backend] = {}  # of the backends in use
_chosen: str | None = None
_scoped: ContextVar[str | None] = ContextVar("mini_nn_backend", default=None)


def register(name: str, loader: Callable[[], Backend]) -> None:
    """Make another array library known as ``name``; ``loader`` runs when it is first asked for."""
    _loaders[name] = loader


def get(name: str) -> Backend:
    """The backend of that name, loaded at first use.

    Raises:
        ValueError: no backend has that name.
        RuntimeError: its package or its device is missing; the message says what to do.
    """
    if name not in _loaded:
        if name not in _loaders:
            raise ValueError(f"no backend {name!r}: choose one of {', '.join(sorted(_loaders))}")
        loaded = _loaders[name]()
        _loaded[name] = loaded
        array_types[loaded.array_type] = loaded
    return _loaded[name]


def backend_of(x: Array) -> Backend:
    """The backend that the array ``x`` belongs to; scalars and lists belong to NumPy.

    Raises:
        TypeError: ``x`` is an array of a library that no backend is registered for.
    """
    found = array_types.get(type(x))
    if found is not None:
        return found
    for loaded in _loaded.values():
        if isinstance(x, loaded.array_type):
            return loaded
    if isinstance(x, (*Scalar, list, tuple)):
        return _host
    if type(x).__module__.partition(".")[0] == "cupy":
        return get("cupy")
    raise TypeError(
        f"expected an array of a known backend ({', '.join(sorted(_loaders))}), got "
        f"{type(x).__module__}.{type(x).__qualname__}: convert it with mini_nn.from_dlpack or "
        "mini_nn.tensor"
    )


def of(x: Array) -> Namespace:
    """The array namespace of ``x``: ``of(x).exp(x)`` runs where ``x`` lives."""
    found = array_types.get(type(x))
    return found.xp if found is not None else backend_of(x).xp


def special(x: Array) -> Any:
    """The ``scipy.special`` of the backend of ``x`` (for CuPy: ``cupyx.scipy.special``)."""
    return backend_of(x).special


def scatter_add(target: Array, index: Any, values: Array) -> None:
    """``target[index] += values`` in place, where duplicate targets add up."""
    backend_of(target).scatter_add(target, index, values)


def segment_sum(values: Array, index: Array, count: int) -> Array:
    """``out`` (count, …) with ``out[index[i]] += values[i]`` for every row i."""
    xp = of(values)
    if xp is not np or values.dtype.itemsize < 4:  # SciPy's sparse matrices know no float16
        out = xp.zeros((count, *values.shape[1:]), values.dtype)
        scatter_add(out, index, values)
        return out
    from scipy.sparse import csc_array  # 45 times as fast as np.add.at, but slow to import

    n = values.shape[0]
    ones = np.ones(n, values.dtype)
    spread = csc_array((ones, np.asarray(index), np.arange(n + 1)), shape=(count, n))
    rows = values.reshape(n, math.prod(values.shape[1:]))
    return (spread @ rows).reshape(count, *values.shape[1:])


def weighted_rows(weights: Array, index: Array, rows: Array) -> Array:
    """``out[r] = Σ_e weights[r, e] rows[index[r, e]]``: a sparse matrix times a dense one.

    Args:
        weights: (r, e).
        index: (r, e) integers in [0, k); an entry with weight 0 needs a number in range too.
        rows: (k, c), of the dtype of ``weights``.

    Raises:
        IndexError: a number is out of range, on the host.
    """
    xp, (count, entries) = of(rows), index.shape
    if xp is np and rows.dtype.itemsize >= 4:
        return _sparse("csr", weights, index, count, len(rows)) @ rows
    out = xp.empty((count, 1, rows.shape[1]), rows.dtype)
    for block in gathered(count, entries * rows.shape[1]):
        out[block] = weights[block, None] @ rows[index[block]]
    return out[:, 0]


def spread_rows(weights: Array, index: Array, values: Array, count: int) -> Array:
    """The transpose of ``weighted_rows``: ``out[index[r, e]] += weights[r, e] values[r]``.

    Args:
        weights, index: (r, e).
        values: (r, c).
        count: k, the number of rows of the result.
    """
    xp, (targets, entries) = of(values), index.shape
    if xp is np and values.dtype.itemsize >= 4:
        return _sparse("csc", weights, index, targets, count) @ values
    out = xp.zeros((count, values.shape[1]), values.dtype)
    for block in gathered(targets, entries * values.shape[1]):
        scatter_add(out, index[block], weights[block, :, None] * values[block, None])
    return out


GATHERED = 1 << 19
"""Numbers that are gathered at a time where there is no sparse product: 2 MiB of float32."""


def gathered(count: int, each: int) -> Iterator[slice]:
    """Slices of ``count`` rows of ``each`` numbers: ``GATHERED`` numbers, or one row, at a time."""
    step = max(1, GATHERED // max(each, 1))
    return (slice(start, start + step) for start in range(0, count, step))


def _sparse(kind: str, weights: Array, index: Array, count: int, size: int) -> Any:
    """SciPy's matrix (count, size) with e entries in each row (csr), or its transpose (csc)."""
    from scipy import sparse  # slow to import, and not everyone samples

    entries = index.shape[1]
    if index.size and (index.min() < 0 or index.max() >= size):  # SciPy does not look
        raise IndexError(
            f"a row has a number from 0 to {size - 1}, got {index.min()} … {index.max()}"
        )
    starts = np.arange(count + 1, dtype=index.dtype) * entries
    make, shape = getattr(sparse, f"{kind}_array"), (count, size)
    parts = (weights.reshape(-1), index.reshape(-1), starts)
    return make(parts, shape=shape if kind == "csr" else shape[::-1])


def to_host(x: Array) -> Any:
    """``x`` as a NumPy array; a NumPy array is returned as it is, a device array is copied."""
    return backend_of(x).to_host(x)


def as_array(data: Any, dtype: Any = None) -> Array:
    """``data`` as an array: an array of a known backend as it is, numbers on the current backend.

    Python floats become float32; arrays and NumPy scalars keep their dtype unless one is given.

    Raises:
        TypeError: ``data`` is an array of an unknown library.
        ValueError: nested lists of unequal lengths.
    """
    numbers = isinstance(data, (list, tuple, bool, int, float)) and not isinstance(data, np.generic)
    array = current().xp.asarray(data) if numbers or isinstance(data, Scalar) else data
    backend_of(array)
    if dtype is None and numbers and array.dtype.kind == "f":
        dtype = "float32"
    return array if dtype is None else array.astype(dtype, copy=False)


def from_dlpack(x: Any) -> Array:
    """An array that shares the memory of ``x``: on the host NumPy's, on a GPU CuPy's.

    Raises:
        TypeError: ``x`` does not speak the DLPack protocol.
    """
    if not hasattr(x, "__dlpack_device__"):
        raise TypeError(f"{type(x).__name__} has no __dlpack__: pass a torch, CuPy or NumPy array")
    cpu = 1  # kDLCPU of the DLPack standard
    name = "numpy" if int(x.__dlpack_device__()[0]) == cpu else "cupy"
    return get(name).xp.from_dlpack(x)


def current() -> Backend:
    """The backend on which arrays are created that have no input to follow."""
    return get(_scoped.get() or _chosen or os.environ.get("MINI_NN_BACKEND") or "numpy")


def use(name: str) -> None:
    """Create parameters and data on this backend from now on (``"numpy"`` or ``"cupy"``).

    Raises:
        ValueError, RuntimeError: as ``get``.
    """
    global _chosen
    get(name)
    _chosen = name


@contextmanager
def using(name: str) -> Iterator[Backend]:
    """As ``use``, inside a ``with`` block and for the thread that runs it."""
    chosen = get(name)
    token = _scoped.set(name)
    try:
        yield chosen
    finally:
        _scoped.reset(token)


def tune_allocator() -> bool:
    """Let glibc keep freed memory instead of returning it: one call at the start of a program.

    By default glibc maps every big array afresh and gives it back when it dies, so each training
    step pays a page fault for each 4 KiB of its activations: up to half of a step's time.
    This raises the mmap and trim thresholds and uses one arena.  It holds for the whole process and
    costs nothing but memory that stays reserved; the library never calls it by itself.

    Returns:
        Whether it took effect: ``False`` where the C library is not glibc.
    """
    m_trim_threshold, m_mmap_threshold, m_arena_max = -1, -3, -8  # malloc.h of glibc
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return all(
        mallopt(option, value) == 1
        for option, value in (
            (m_mmap_threshold, 1 << 30),
            (m_trim_threshold, (1 << 31) - 1),
            (m_arena_max, 1),
        )
    )


_host = get("numpy")
