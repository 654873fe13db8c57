"""The namespaces of the stand-in device: CuPy's names and keywords over NumPy's arithmetic.

``xp`` has the names that ``surface.json`` found in the real package and no others, so that a
function or a keyword that only NumPy has fails here as it would fail on a GPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import scipy.special

from . import counters
from .array import argument, ndarray, wrap
from .functions import CUSTOM, SCATTER_DTYPES, Bound, bound, plain, scatter
from .make_surface import load

SURFACE = load()
KINDS = ("names", "ufuncs", "functions")
CALL_KEYWORDS = {"out", "dtype", "casting"}
MATMUL_KEYWORDS = {*CALL_KEYWORDS, "axes", "axis", "keepdims", "order", "signature"}


class Ufunc:
    """One of CuPy's ufuncs: no ``where=``, no lists, and few of the methods."""

    def __init__(self, name: str, host: Any, keywords: set[str] = CALL_KEYWORDS) -> None:
        self.__name__ = self.name = name
        self._host = host
        self._keywords = keywords
        self.nin = getattr(host, "nin", 1)
        self.nout = getattr(host, "nout", 1)

    def __repr__(self) -> str:
        return f"<ufunc '{self.name}' of the stand-in device>"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        operands = [a._host if type(a) is ndarray else argument(a) for a in args[: self.nin]]
        if not kwargs and len(args) == self.nin:
            return self._wrapped(counters.launch(self._host, *operands))
        unknown = kwargs.keys() - self._keywords
        if unknown or not self.nin <= len(args) <= self.nin + self.nout:
            raise TypeError(f"wrong arguments for {self.name}: {sorted(unknown) or len(args)}")
        out = args[self.nin :] or kwargs.pop("out", ())
        out = out if isinstance(out, tuple) else () if out is None else (out,)
        if not all(isinstance(one, ndarray) for one in out):
            raise TypeError(f"out= of {self.name} is a device array")
        if out:
            kwargs["out"] = tuple(one._host for one in out)
        result = counters.launch(self._host, *operands, **kwargs)
        return self._wrapped(result) if not out else out[0] if self.nout == 1 else out

    @staticmethod
    def _wrapped(result: Any) -> Any:
        return tuple(map(wrap, result)) if type(result) is tuple else wrap(result)

    def outer(self, a: Any, b: Any, **kwargs: Any) -> Any:
        return self(a.reshape(*a.shape, *(1,) * b.ndim), b, **kwargs)

    def at(self, a: ndarray, indices: Any, b: Any = None) -> None:
        if self.name not in SURFACE["scatter"]:
            raise NotImplementedError(f"{self.name}.at is not supported by CuPy")
        scatter(self._host, a, indices, b)

    def reduce(
        self, array: Any, axis: Any = 0, dtype: Any = None, out: Any = None, keepdims: bool = False
    ) -> Any:
        method = self._only({"add": "sum", "multiply": "prod"}, "reduce")
        return getattr(array, method)(axis, dtype, out, keepdims)

    def accumulate(self, array: Any, axis: Any = 0, dtype: Any = None, out: Any = None) -> Any:
        method = self._only({"add": "cumsum", "multiply": "cumprod"}, "accumulate")
        return getattr(array, method)(axis, dtype, out)

    def reduceat(self, array: Any, indices: Any, axis: Any = 0, dtype: Any = None) -> Any:
        self._only({"add": "sum"}, "reduceat")
        host = argument(array), argument(indices)
        return wrap(counters.launch(np.add.reduceat, *host, axis, dtype))

    def _only(self, methods: dict[str, str], which: str) -> str:
        if self.name not in methods:
            raise NotImplementedError(f"{self.name}.{which} is not supported by CuPy")
        return methods[self.name]


def namespace(section: str, host: Any) -> ModuleType:
    """A module with the names of a section of the surface, over NumPy's module ``host``."""
    made = ModuleType(f"strict.{section}")
    for name in SURFACE[f"{section}.names"]:
        found = getattr(host, name, None)
        if isinstance(found, (type, float, int)) or name == "newaxis":
            setattr(made, name, found)
    for name in SURFACE[f"{section}.ufuncs"]:
        if hasattr(host, name):
            setattr(made, name, Ufunc(name, getattr(host, name)))
    for name, signature in SURFACE[f"{section}.functions"].items():
        if hasattr(host, name) and not isinstance(getattr(host, name), type):
            setattr(made, name, bound(name, signature, getattr(host, name), section))

    everything = {name for kind in KINDS for name in SURFACE[f"{section}.{kind}"]}

    def __getattr__(name: str) -> Any:
        if name in everything:
            raise AttributeError(f"{section} of CuPy has {name!r}, but the stand-in has not")
        whose = "NumPy's alone" if hasattr(host, name) else "nobody's"
        raise AttributeError(
            f"{section} of CuPy {SURFACE['version']} has no {name!r}: it is {whose}"
        )

    vars(made)["__getattr__"] = __getattr__
    return made


def _method(name: str, signature: str, function: Callable[..., Any]) -> Any:
    """A method of the array with CuPy's arguments, by the function of that name."""
    if isinstance(function, Bound) and function.called.endswith(f"(a, {signature})"):
        return lambda self, *args, **kwargs: function(self, *args, **kwargs)
    names = [part.strip("=") for part in signature.split(", ")] if signature else []

    def call(self: ndarray, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False))
        if len(args) > len(names) or not kwargs.keys() <= set(names) - given.keys():
            raise TypeError(f"ndarray.{name}({signature}) does not take {args} and {[*kwargs]}")
        given = {**given, **kwargs}
        return function(self, **given)

    return call


def _clip(self: ndarray, min: Any = None, max: Any = None, out: Any = None) -> ndarray:
    return xp.clip(self, min, max, out=out)  # type: ignore[no-any-return]


def _compress(self: ndarray, condition: Any, axis: Any = None, out: Any = None) -> ndarray:
    return xp.compress(condition, self, axis=axis, out=out)  # type: ignore[no-any-return]


def _reshape(self: ndarray, *shape: Any, order: str = "C", copy: Any = None) -> ndarray:
    lengths = shape[0] if len(shape) == 1 else shape
    return wrap(self._host.reshape(plain(lengths), order=order))


def _transpose(self: ndarray, *axes: Any) -> ndarray:
    return wrap(self._host.transpose(*map(plain, axes)))


def _astype(
    self: ndarray,
    dtype: Any,
    order: str = "K",
    casting: Any = None,
    subok: Any = None,
    copy: bool = True,
) -> ndarray:
    converted = counters.launch(self._host.astype, dtype, order, copy=copy)
    return self if converted is self._host else wrap(converted)


def _view(self: ndarray, dtype: Any = None, type: Any = None) -> ndarray:
    return wrap(self._host.view(dtype) if dtype is not None else self._host.view())


def _flatten(self: ndarray, order: str = "C") -> ndarray:
    return wrap(counters.launch(self._host.flatten, order))


def _fill(self: ndarray, value: Any) -> None:
    counters.launch(self._host.fill, self._assigned(value))


def _sort(self: ndarray, axis: int = -1, kind: Any = None) -> None:
    self._host[...] = xp.sort(self, axis, kind)._host


def _set(self: ndarray, arr: Any, stream: Any = None) -> None:
    if not isinstance(arr, np.ndarray) or (arr.shape, arr.dtype) != (self.shape, self.dtype):
        raise TypeError("set takes a host array of the same shape and dtype")
    counters.to_device()
    self._host[...] = arr


def _scatterer(name: str, ufunc: Any) -> Any:
    def call(self: ndarray, slices: Any, value: Any) -> None:
        message = f"ndarray.{name} is deprecated: use {ufunc.__name__}.at"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        scatter(ufunc, self, slices, value)

    return call


WRITTEN_OUT = {
    "clip": _clip,
    "compress": _compress,
    "reshape": _reshape,
    "transpose": _transpose,
    "astype": _astype,
    "view": _view,
    "flatten": _flatten,
    "fill": _fill,
    "sort": _sort,
    "set": _set,
    "scatter_add": _scatterer("scatter_add", np.add),
    "scatter_max": _scatterer("scatter_max", np.maximum),
    "scatter_min": _scatterer("scatter_min", np.minimum),
}


def _assemble() -> ModuleType:
    made = namespace("cupy", np)
    made.ndarray = ndarray
    made.matmul = Ufunc("matmul", np.matmul, MATMUL_KEYWORDS)
    for name, function in CUSTOM.items():
        setattr(made, name, function)
    made.get_array_module = lambda *xs: made if any(isinstance(x, ndarray) for x in xs) else np
    made.is_available = lambda: True
    made.linalg = namespace("linalg", np.linalg)
    made.fft = namespace("fft", np.fft)
    made.lib = ModuleType("strict.lib")
    made.lib.stride_tricks = namespace("stride_tricks", np.lib.stride_tricks)
    for name, signature in SURFACE["methods"].items():
        if name in WRITTEN_OUT:
            setattr(ndarray, name, WRITTEN_OUT[name])
        elif name not in vars(ndarray) and hasattr(made, name):
            setattr(ndarray, name, _method(name, signature, getattr(made, name)))
    return made


xp = _assemble()
special = namespace("special", scipy.special)

assert set(SURFACE["scatter"]) == set(SCATTER_DTYPES)
