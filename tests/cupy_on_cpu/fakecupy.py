"""What the stand-in for CUDA cannot answer, answered by NumPy: call ``install`` before using CuPy.

Sorting is precompiled device code inside CuPy's wheel (Thrust); decompositions and Fourier
transforms are calls of cuSOLVER and cuFFT.  Their data stay in the memory of the device, their
names and keywords are CuPy's own, and only the numbers come from NumPy.  A decomposition or a
transform counts a wait and copies that a GPU would not make.
"""

from __future__ import annotations

import ctypes
import functools
import inspect
import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import cupy
import numpy as np
from cupy.cuda import thrust

_library = ctypes.CDLL("libfakecuda.so")
_library.fakecuda_stats.restype = ctypes.POINTER(ctypes.c_long)

COUNTED = ("h2d", "d2h", "d2d", "sync", "launch", "malloc", "badcopy")

LINALG = (
    *("cholesky", "det", "eigh", "eigvalsh", "inv", "lstsq", "matrix_rank", "pinv", "qr"),
    *("slogdet", "solve", "svd"),
)
FFT = (
    *("fft", "ifft", "rfft", "irfft", "fft2", "ifft2", "rfft2", "irfft2"),
    *("fftn", "ifftn", "rfftn", "irfftn"),
)


def stats() -> dict[str, int]:
    """Since the start: copies by direction, waits, launches, allocations and refused copies."""
    return dict(zip(COUNTED, _library.fakecuda_stats()[: len(COUNTED)], strict=True))


# Thrust: functions of addresses


def _view(address: int, dtype: Any, shape: Sequence[int]) -> Any:
    size = math.prod(shape) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(address), dtype).reshape(shape)


def _sort(dtype: Any, data: int, keys: int, shape: Sequence[int]) -> None:
    _view(data, dtype, shape).sort(axis=-1, kind="stable")


def _argsort(dtype: Any, index: int, data: int, keys: int, shape: Sequence[int]) -> None:
    order = np.argsort(_view(data, dtype, shape), axis=-1, kind="stable")
    _view(index, np.intp, shape)[...] = order


def _lexsort(dtype: Any, index: int, keys: int, k: int, n: int) -> None:
    _view(index, np.intp, (n,))[...] = np.lexsort(_view(keys, dtype, (k, n)))


# cuSOLVER and cuFFT: functions of arrays


def _down(value: Any) -> Any:
    return value.get() if isinstance(value, cupy.ndarray) else value


def _up(value: Any) -> Any:
    return cupy.asarray(value) if isinstance(value, (np.ndarray, np.generic)) else value


def _answered_by(theirs: Callable[..., Any], real: Callable[..., Any]) -> Callable[..., Any]:
    """``real`` with NumPy's numbers; what its signature refuses and host arrays are TypeErrors."""
    signature = inspect.signature(real)

    @functools.wraps(real)
    def function(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        for value in (*bound.args, *bound.kwargs.values()):
            if isinstance(value, np.ndarray):
                raise TypeError(f"{real.__name__} got an array of NumPy")
        keywords = {name: _down(value) for name, value in bound.kwargs.items()}
        result = theirs(*map(_down, bound.args), **keywords)
        if isinstance(result, tuple):
            return tuple(map(_up, result))
        return _up(result)

    return function


def _replace(module: ModuleType, numpys: ModuleType, names: Sequence[str]) -> None:
    for name in names:
        setattr(module, name, _answered_by(getattr(numpys, name), getattr(module, name)))


def install() -> None:
    """Replace what has no stand-in, for the whole process."""
    thrust.sort, thrust.argsort, thrust.lexsort = _sort, _argsort, _lexsort
    _replace(cupy.linalg, np.linalg, LINALG)
    _replace(cupy.fft, np.fft, FFT)
