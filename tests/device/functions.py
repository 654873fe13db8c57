"""The functions of the stand-in: NumPy's, called with CuPy's arguments and nothing else.

``Bound`` is made from CuPy's signature.  The argument names say which arguments hold arrays; an
array anywhere else (a shape, an axis, a count) is refused, as CuPy's arrays have no ``__index__``.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from . import counters
from .array import SCALARS, argument, from_host, index_array, ndarray, wrap, wrapped


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


ARRAYS = _words(
    "a a1 a2 append ar ar1 ar2 arr arr1 arr2 array ary A a_min a_max aweights b choices "
    "condition dst element f fill_value fp fweights indices keys left m mask max min out p "
    "prepend prototype q right sample src start stop test_elements to_begin to_end v val vals "
    "values weights where x x1 x2 xp y z"
)
"""Names of arguments that hold a device array or a number."""

SEQUENCES = _words(
    "tup arys args arrays arrays_and_dtypes xi condlist choicelist multi_index varargs"
)
"""Names of arguments that hold several device arrays."""

EITHER = _words("bins q repeats")
"""Names of arguments that hold a device array or numbers of the host."""

MORE_ARRAYS = {("matrix_power", "M"), ("matrix_rank", "M")}
NO_ARRAYS = {("arange", "start"), ("arange", "stop"), ("cond", "p")}
"""Exceptions to ``ARRAYS``."""

NUMBERS_TOO = _words(
    "allclose array_equal atleast_1d atleast_2d atleast_3d broadcast_to imag isclose "
    "iscomplexobj isrealobj isscalar linspace logspace min_scalar_type nan_to_num ndim real "
    "result_type shape size"
)
"""Functions whose first argument may be a number; CuPy asks others for ``number.sum`` etc."""

HOST_RESULT = _words(
    "base_repr binary_repr broadcast_shapes can_cast common_type isdtype isfortran "
    "iscomplexobj isrealobj isscalar issubdtype iterable may_share_memory min_scalar_type "
    "mintypecode ndim promote_types result_type shape shares_memory size typename"
)
"""Functions that answer from the array's shape and dtype, with a Python value."""

WAIT = _words(
    "argwhere array_repr array_str bincount choose compress extract flatnonzero histogram "
    "histogram2d histogramdd intersect1d nanmax nanmin nonzero polyfit ravel_multi_index roots "
    "setdiff1d setxor1d trim_zeros union1d unique unique_all unique_counts unique_inverse "
    "unique_values"
)
"""Functions that wait: the size of their result depends on the numbers, or they check them."""

NOT_HERE = _words(
    "apply_along_axis apply_over_axes piecewise mask_indices tofile byteswap dump dumps"
)


class Bound:
    """``target``, a NumPy function, behind the arguments of CuPy's ``owner.name``.

    Required arguments travel by position, the others by name: so CuPy and NumPy may differ in the
    order of the latter and in the names of the former.
    """

    def __init__(self, name: str, signature: str, target: Callable[..., Any], owner: str) -> None:
        self.__name__ = name
        self.called = f"{owner}.{name}({signature})"
        self.target = target
        parts = signature.split(", ") if signature else []
        self.starred = next((part[1:] for part in parts if part.startswith("*")), None)
        self.names = [part.strip("=") for part in parts if not part.startswith("*")]
        self.required = [name for name in self.names if name in parts]
        self.must = {*self.required}
        parameters = inspect.signature(target).parameters
        self.known = {*parameters}
        self.takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        every = [*self.names, self.starred]
        self.convert = {key: _converter(key, name) for key in every if key is not None}
        first = next(iter(self.required), "")
        checked = name not in NUMBERS_TOO and owner != "special"
        if checked and self.convert.get(first) is argument:
            self.convert[first] = _device_array
        self.waits = name in WAIT
        self.host_result = name in HOST_RESULT

    def __repr__(self) -> str:
        return f"<{self.called} of the stand-in device>"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given, rest = self._bind(args, kwargs)
        if self.waits or given.get("weights") is not None:
            counters.waits(self.__name__)
        convert = self.convert
        host = {key: None if value is None else convert[key](value) for key, value in given.items()}
        positional = [host.pop(key) for key in self.required]
        if rest:
            positional += [convert[self.starred](one) for one in rest]
        if not self.takes_any and not host.keys() <= self.known:
            for key in host.keys() - self.known:
                if host.pop(key) is not None:
                    raise NotImplementedError(f"{key!r} of {self.called} is not NumPy's")
        result = _run(self.__name__, self.target, positional, host)
        if given.get("out") is not None:
            return given["out"]
        return result if self.host_result else _result(result)

    def _bind(self, args: Any, kwargs: dict[str, Any]) -> tuple[dict[str, Any], Any]:
        """The arguments by name, and those of ``*args``."""
        count = len(self.names if self.starred is None else self.required)
        given = dict(zip(self.names, args[:count], strict=False))
        rest = args[count:]
        if rest and self.starred is None:
            raise TypeError(f"{self.called} does not take {len(args)} arguments")
        for key, value in kwargs.items():
            if key not in self.names or key in given:
                raise TypeError(f"{self.called} does not take the keyword {key!r}")
            given[key] = value
        if not given.keys() >= self.must:
            raise TypeError(f"{self.called} misses {self.must - given.keys()}")
        return given, rest


def bound(name: str, signature: str, target: Callable[..., Any], owner: str) -> Any:
    """A function of the namespace, or one that says that it is not there yet."""
    if signature == "..." or name in NOT_HERE:
        return _missing(name)
    return Bound(name, signature, target, owner)


def _missing(name: str) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"CuPy has {name}, the stand-in has not: add it in tests/device")

    return call


def _converter(key: str, function: str) -> Callable[[Any], Any]:
    """What makes NumPy's argument of ours, or raises the error that CuPy would raise."""
    if key in EITHER or function in HOST_RESULT:
        return _either
    if key in SEQUENCES:
        return _one_or_several
    if (key in ARRAYS or (function, key) in MORE_ARRAYS) and (function, key) not in NO_ARRAYS:
        return argument
    return plain


def _either(value: Any) -> Any:
    return value._host if isinstance(value, ndarray) else value


def _one_or_several(value: Any) -> Any:
    return _several(value) if isinstance(value, (list, tuple)) else argument(value)


def _device_array(value: Any) -> Any:
    if not isinstance(value, ndarray):
        raise TypeError(f"the first argument is a device array, got a {type(value).__name__}")
    return value._host


def plain(value: Any) -> Any:
    """A shape, an axis, a count: Python's numbers."""
    if isinstance(value, ndarray) or (
        isinstance(value, (list, tuple)) and any(isinstance(one, ndarray) for one in value)
    ):
        raise TypeError("a device array has no __index__: shapes, axes and counts are Python ints")
    if isinstance(value, dict):
        raise TypeError("CuPy takes no dict here")
    return value


def _several(values: Any) -> Any:
    for one in values:
        if not isinstance(one, (ndarray, list, tuple)):
            raise TypeError(f"device arrays can be joined, a {type(one).__name__} is among them")
    return [_several(one) if isinstance(one, (list, tuple)) else one._host for one in values]


def _run(name: str, target: Any, positional: list[Any], named: dict[str, Any]) -> Any:
    if name in ("sort", "argsort"):
        if named.get("kind") not in (None, "stable"):
            raise ValueError(f"only kind='stable' (or None) is there, got {named['kind']!r}")
        named["kind"] = "stable"
    empty = positional and isinstance(positional[0], np.ndarray) and positional[0].size == 0
    if name.startswith("nan") or empty or named.get("ddof"):
        with warnings.catch_warnings():  # "mean of empty slice" is none of NumPy's errstate
            warnings.simplefilter("ignore", RuntimeWarning)
            return counters.launch(target, *positional, **named)
    return counters.launch(target, *positional, **named)


def _result(x: Any) -> Any:
    if isinstance(x, (np.ndarray, *SCALARS)):
        return wrap(x)
    if isinstance(x, (list, tuple)):
        members = [_result(one) for one in x]
        named = hasattr(x, "_fields") and type(x).__name__.startswith("Unique")
        return type(x)(*members) if named else members if isinstance(x, list) else tuple(members)
    return x


# Functions that need more than NumPy's own


def array(
    obj: Any, dtype: Any = None, copy: Any = True, order: Any = "K", subok: bool = False,
    ndmin: int = 0, blocking: bool = False,
) -> ndarray:  # fmt: skip
    if isinstance(obj, ndarray):
        made = np.array(obj._host, dtype, copy=copy, order=order or "K", ndmin=ndmin)
        return obj if made is obj._host else wrap(made)
    if isinstance(obj, (list, tuple)) and _holds_device(obj):
        counters.launch(int)
        return wrap(np.array(_several(obj), dtype, ndmin=ndmin))
    if not isinstance(obj, (np.ndarray, list, tuple, range, *SCALARS)):
        raise TypeError(f"unsupported type {type(obj).__module__}.{type(obj).__qualname__}")
    made = from_host(obj, dtype)
    return made if made.ndim >= ndmin else wrap(np.array(made._host, ndmin=ndmin))


def _holds_device(numbers: Any) -> bool:
    return any(
        isinstance(one, ndarray) or (isinstance(one, (list, tuple)) and _holds_device(one))
        for one in numbers
    )


def asarray(
    a: Any, dtype: Any = None, order: Any = None, copy: Any = None, blocking: bool = False
) -> ndarray:
    return array(a, dtype, copy, order or "K", blocking=blocking)


def ascontiguousarray(a: Any, dtype: Any = None) -> ndarray:
    made = array(a, dtype, None, "C")
    return made if made.ndim else wrap(made._host.reshape(1))


def asfortranarray(a: Any, dtype: Any = None) -> ndarray:
    return array(a, dtype, None, "F")


def asnumpy(
    a: Any, stream: Any = None, order: str = "C", out: Any = None, blocking: bool = True
) -> Any:
    if not isinstance(a, ndarray):
        return np.asarray(a, order=order)
    return a.get(stream, order, out, blocking)


def poisoned(shape: Any, dtype: Any = None, order: str = "C") -> ndarray:
    """``empty``: what a device's memory holds is not zeros."""
    made = np.empty(plain(shape), dtype, order)
    kind = made.dtype.kind
    made.fill(np.nan if kind in "fc" else True if kind == "b" else np.iinfo(made.dtype).max)
    return wrap(made)


def poisoned_like(
    prototype: Any, dtype: Any = None, order: str = "K", subok: Any = None, shape: Any = None
) -> ndarray:
    return poisoned(prototype.shape if shape is None else shape, dtype or prototype.dtype)


def where(condition: Any, x: Any = None, y: Any = None) -> Any:
    if (x is None) != (y is None):
        raise ValueError("where takes both x and y, or neither")
    if isinstance(condition, (bool, int, float)) and not isinstance(condition, np.generic):
        raise AttributeError(
            f"the condition is an array: a {type(condition).__name__} has no astype"
        )
    if x is None:
        counters.waits("where(condition)")
        return _result(counters.launch(np.nonzero, argument(condition)))
    return wrap(counters.launch(np.where, argument(condition), argument(x), argument(y)))


def take(a: ndarray, indices: Any, axis: Any = None, out: Any = None) -> ndarray:
    if not isinstance(a, ndarray):
        raise TypeError(f"take takes a device array, got a {type(a).__name__}")
    index = index_array(indices)
    if index.dtype.kind not in "iu":
        raise IndexError(f"indices are integers, got {index.dtype}")
    axis = plain(axis)
    target = None if out is None else argument(out)
    taken = counters.launch(np.take, a._host, index, axis, target, "wrap")
    return wrap(taken) if out is None else out


def take_along_axis(a: ndarray, indices: ndarray, axis: Any) -> ndarray:
    source, index = argument(a), argument(indices)
    if axis is None:
        source, axis = source.ravel(), 0
    index = wrapped(index, source.shape[axis])
    return wrap(counters.launch(np.take_along_axis, source, index, axis))


def put_along_axis(arr: ndarray, indices: ndarray, values: Any, axis: Any) -> None:
    index = wrapped(argument(indices), arr.shape[axis])
    sorted_index = np.sort(np.remainder(index, arr.shape[axis]), axis=axis)
    values = argument(values)
    if np.size(values) > 1 and (np.diff(sorted_index, axis=axis) == 0).any():
        raise ValueError("put_along_axis names a place twice: what is stored there is undefined")
    counters.launch(np.put_along_axis, arr._host, index, values, axis)


def einsum(*operands: Any, dtype: Any = None, optimize: Any = False, **unknown: Any) -> ndarray:
    if unknown:
        raise TypeError(f"einsum does not take {[*unknown]}")
    if isinstance(operands[0], str):
        host = [operands[0], *map(argument, operands[1:])]
    else:  # array, its labels, …, and perhaps the labels of the result
        host = [one if isinstance(one, (list, tuple)) else argument(one) for one in operands]
    return wrap(counters.launch(np.einsum, *host, dtype=dtype, optimize=optimize))


def scatter_add(a: ndarray, slices: Any, value: Any) -> None:
    scatter(np.add, a, slices, value)


SCATTER_DTYPES = {
    "add": "int32 int64 uint32 uint64 float16 float32 float64",
    "subtract": "int32 uint32",
    "maximum": "int32 int64 uint32 uint64 float32 float64",
    "minimum": "int32 int64 uint32 uint64 float32 float64",
    "bitwise_and": "int32 int64 uint32 uint64",
    "bitwise_or": "int32 int64 uint32 uint64",
    "bitwise_xor": "int32 int64 uint32 uint64",
}


def scatter(ufunc: Any, a: ndarray, slices: Any, value: Any) -> None:
    """``ufunc.at``: values are first converted to the target's dtype."""
    if not isinstance(a, ndarray):
        raise TypeError(f"{ufunc.__name__}.at takes a device array, got a {type(a).__name__}")
    key, masks, arrays = a._key(slices)
    if masks:
        counters.waits("scattering by a boolean mask")
    if arrays and a.dtype.name not in SCATTER_DTYPES[ufunc.__name__].split():
        raise TypeError(f"{ufunc.__name__}.at does not support {a.dtype}")
    host = np.asarray(argument(value)).astype(a.dtype, copy=False)
    if masks or arrays:  # NumPy 2.4's ufunc.at reads beyond the end of what it has to broadcast
        values = np.broadcast_to(host, a._host[key].shape)
        counters.launch(ufunc.at, a._host, key, values)
    else:
        view = a[slices]._host
        counters.launch(ufunc, view, host, out=view)


CUSTOM = {
    "array": array,
    "asarray": asarray,
    "asanyarray": asarray,
    "ascontiguousarray": ascontiguousarray,
    "asfortranarray": asfortranarray,
    "asnumpy": asnumpy,
    "einsum": einsum,
    "empty": poisoned,
    "empty_like": poisoned_like,
    "put_along_axis": put_along_axis,
    "take": take,
    "take_along_axis": take_along_axis,
    "where": where,
}
