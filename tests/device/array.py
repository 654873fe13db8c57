"""The array of the stand-in device: NumPy's numbers behind CuPy's refusals.

What CuPy would not do raises the error CuPy raises; what CuPy does differently from NumPy is done
CuPy's way.  Stricter than CuPy, on purpose: NumPy's own functions are refused altogether, host
arrays as assigned values too, and a location that one assignment writes twice is an error instead
of an undefined number.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

from . import counters

SCALARS = (bool, int, float, complex, np.generic)
NUMERIC = "biufc"


class Flags:
    """The layout of an array; CuPy has no ``writeable``."""

    __slots__ = ("c_contiguous", "f_contiguous", "owndata")

    def __init__(self, flags: Any) -> None:
        for name in self.__slots__:
            object.__setattr__(self, name, getattr(flags, name))

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"the flag {name!r} cannot be set on a device array")


class ndarray:
    """An array on the stand-in device; made by the functions of the namespace."""

    __slots__ = ("_host", "__weakref__")
    __array_ufunc__ = None  # a host array or NumPy scalar leaves the operation to our operators
    __array_priority__ = 100
    __hash__ = None  # type: ignore[assignment]
    __contains__ = None  # Python would fall back to iterating, one wait for each element
    _host: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError("make device arrays with the functions of the namespace, as empty(shape)")

    # what it is: known to the host without asking the device

    @property
    def shape(self) -> tuple[int, ...]:
        return self._host.shape  # type: ignore[no-any-return]

    @property
    def dtype(self) -> Any:
        return self._host.dtype

    @property
    def ndim(self) -> int:
        return self._host.ndim  # type: ignore[no-any-return]

    @property
    def size(self) -> int:
        return self._host.size  # type: ignore[no-any-return]

    @property
    def itemsize(self) -> int:
        return self._host.itemsize  # type: ignore[no-any-return]

    @property
    def nbytes(self) -> int:
        return self._host.nbytes  # type: ignore[no-any-return]

    @property
    def strides(self) -> tuple[int, ...]:
        return self._host.strides  # type: ignore[no-any-return]

    @property
    def flags(self) -> Flags:
        return Flags(self._host.flags)

    @property
    def device(self) -> str:
        return "strict:0"

    @property
    def base(self) -> Any:
        return None if self._host.base is None else wrap(self._host.base)

    @property
    def T(self) -> ndarray:
        return wrap(self._host.T)

    @property
    def mT(self) -> ndarray:
        return wrap(self._host.mT)

    @property
    def real(self) -> ndarray:
        return wrap(self._host.real)

    @property
    def imag(self) -> ndarray:
        return wrap(self._host.imag)

    def __len__(self) -> int:
        return len(self._host)

    def __iter__(self) -> Iterator[ndarray]:
        if not self.shape:
            raise TypeError("iteration over a 0-d array")
        return (self[i] for i in range(len(self)))

    # to the host: each of these waits

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        raise TypeError("implicit conversion of a device array to a NumPy array is not allowed")

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0  # kDLCUDA of the DLPack standard

    def __dlpack__(self, **options: Any) -> Any:
        raise BufferError("the stand-in device does not export its memory")

    def get(
        self, stream: Any = None, order: str = "C", out: Any = None, blocking: bool = True
    ) -> Any:
        counters.to_host("get()")
        if out is None:
            return self._host.copy(order)
        out[...] = self._host
        return out

    def item(self) -> Any:
        counters.to_host("item()")
        return self._host.item()

    def tolist(self) -> Any:
        counters.to_host("tolist()")
        return self._host.tolist()

    def tobytes(self, order: str = "C") -> bytes:
        return self.get().tobytes(order)  # type: ignore[no-any-return]

    def __bool__(self) -> bool:
        if self.size == 0:
            message = "the truth value of an empty array is ambiguous: it is False for now"
            warnings.warn(message, DeprecationWarning, stacklevel=2)
            return False
        if self.size > 1:
            raise ValueError("the truth value of an array with more than one element is ambiguous")
        return bool(self.item())

    def __float__(self) -> float:
        return float(self.get())

    def __int__(self) -> int:
        return int(self.get())

    def __complex__(self) -> complex:
        return complex(self.get())

    def __repr__(self) -> str:
        return repr(self.get())

    def __str__(self) -> str:
        return str(self.get())

    def __format__(self, spec: str) -> str:
        return format(self.get(), spec)

    def __reduce__(self) -> Any:
        return from_host, (self.get(),)

    def __copy__(self) -> ndarray:
        return wrap(self._host.copy())

    def __deepcopy__(self, memo: Any) -> ndarray:
        return wrap(self._host.copy())

    # elements

    def __getitem__(self, key: Any) -> ndarray:
        key, masks, arrays = self._key(key)
        if masks:
            counters.waits("reading by a boolean mask")
        if masks or arrays:
            return wrap(counters.launch(self._host.__getitem__, key))
        if not any(part is Ellipsis for part in key):
            key = (*key, Ellipsis)  # a view also where NumPy would copy one number
        return wrap(self._host[key])

    def __setitem__(self, key: Any, value: Any) -> None:
        key, masks, arrays = self._key(key)
        if masks:
            counters.waits("writing by a boolean mask")
        several = isinstance(value, ndarray) and value.size > 1
        if several and arrays and self._twice(key):
            raise ValueError(
                "an index array names the same place twice in one assignment: what is stored there "
                "is undefined on a GPU; add up with scatter_add"
            )
        counters.launch(self._host.__setitem__, key, self._assigned(value))

    def __delitem__(self, key: Any) -> None:
        raise ValueError("cannot delete array elements")

    def _assigned(self, value: Any) -> Any:
        if isinstance(value, ndarray):
            return value._host
        if isinstance(value, SCALARS):
            return value
        raise ValueError(f"a device array takes no {type(value).__name__}: make it one by asarray")

    def _key(self, key: Any) -> tuple[tuple[Any, ...], bool, bool]:
        """The key for NumPy, with CuPy's wrap-around; whether it holds masks; integer arrays."""
        parts = [_part(part) for part in (key if isinstance(key, tuple) else (key,))]
        kinds = [part.dtype.kind if isinstance(part, np.ndarray) else "" for part in parts]
        arrays = any(kind in "iu" for kind in kinds if kind)
        if arrays:
            used = sum(_axes(part) for part in parts)
            axis = 0
            for i, part in enumerate(parts):
                if part is Ellipsis:
                    axis += self.ndim - used
                elif kinds[i] and kinds[i] in "iu" and axis < self.ndim:
                    parts[i] = wrapped(part, self.shape[axis])
                axis += _axes(part)
        return tuple(parts), "b" in kinds, arrays

    def _twice(self, key: tuple[Any, ...]) -> bool:
        """Whether the index arrays of a key, which select together, name one place twice."""
        used = sum(_axes(part) for part in key)
        axis, total, together = 0, 1, np.zeros((), np.int64)
        for part in key:
            if part is Ellipsis:
                axis += self.ndim - used
            elif isinstance(part, np.ndarray):
                for one in part.nonzero() if part.dtype.kind == "b" else (part,):
                    n = self.shape[axis]
                    together = together * n + np.remainder(one, n, dtype=np.int64, casting="unsafe")
                    total, axis = total * n, axis + 1
                continue
            axis += _axes(part)
        seen = np.zeros(total, bool)
        seen[together] = True
        return bool(np.count_nonzero(seen) != together.size)

    # operators

    def __pos__(self) -> ndarray:
        return wrap(counters.launch(np.positive, self._host))

    def __neg__(self) -> ndarray:
        return wrap(counters.launch(np.negative, self._host))

    def __abs__(self) -> ndarray:
        return wrap(counters.launch(np.absolute, self._host))

    def __invert__(self) -> ndarray:
        return wrap(counters.launch(np.invert, self._host))


def wrap(host: Any) -> ndarray:
    """A device array of these numbers; what NumPy gives as a scalar becomes 0-d."""
    made: ndarray = object.__new__(ndarray)
    made._host = host if type(host) is np.ndarray else np.asarray(host)
    return made


def from_host(numbers: Any, dtype: Any = None) -> ndarray:
    """A copy of host numbers on the device."""
    copied = np.array(numbers, dtype=dtype)
    if copied.dtype.kind not in NUMERIC or copied.dtype.char in "gG":
        raise ValueError(f"unsupported dtype {copied.dtype} on a device")
    counters.to_device()
    return wrap(copied)


def operand(x: Any) -> Any:
    """The other side of an operator for NumPy; NotImplemented for a type that may know better."""
    if type(x) is ndarray:
        return x._host
    if isinstance(x, SCALARS):
        return x
    if isinstance(x, (np.ndarray, list, tuple)):
        raise TypeError(f"a device array and a {_kind(x)} do not mix: copy it with asarray first")
    return NotImplemented


def argument(x: Any) -> Any:
    """As ``operand``, for functions: there an unknown type is an error."""
    found = operand(x)
    if found is NotImplemented:
        raise TypeError(f"unsupported type {type(x).__module__}.{type(x).__qualname__}")
    return found


def _kind(x: Any) -> str:
    return "NumPy array" if isinstance(x, np.ndarray) else type(x).__name__


def wrapped(index: Any, length: int) -> Any:
    """Integer indices modulo the length of their axis: on a device none is out of range."""
    if length == 0:
        if index.size:
            raise IndexError("a non-empty index into an axis of length 0")
        return index
    if index.size and (index.min() < -length or index.max() >= length):
        return np.remainder(index, length)
    return index


def index_array(x: Any) -> Any:
    """Indices as a NumPy array: a device array's, or host integers, which are copied silently."""
    if isinstance(x, ndarray):
        return x._host
    if not isinstance(x, (int, np.integer)):
        counters.to_device()
    found = np.asarray(x)
    return found.astype(np.int64) if isinstance(x, (list, tuple)) and found.size == 0 else found


def _part(part: Any) -> Any:
    """One part of a key for NumPy: arrays and lists as arrays, anything else as it is."""
    if part is None or part is Ellipsis or isinstance(part, slice):
        return part
    if isinstance(part, (int, np.integer)) and not isinstance(part, bool):
        return part
    if not isinstance(part, (ndarray, np.ndarray, list, tuple, bool, np.bool_)):
        raise IndexError(f"a {type(part).__name__} is no index: use integers, slices or arrays")
    found = index_array(part)
    if found.dtype.kind not in "biu":
        raise IndexError(f"index arrays are of integer or boolean dtype, got {found.dtype}")
    return found


def _axes(part: Any) -> int:
    """How many axes a part of a key uses up."""
    if part is None or part is Ellipsis:
        return 0
    return part.ndim if isinstance(part, np.ndarray) and part.dtype.kind == "b" else 1


def _operators(name: str, ufunc: Any) -> dict[str, Any]:
    """The operator, its reflection and, except for comparisons, its in-place form."""

    def forward(self: ndarray, other: Any) -> Any:
        other = other._host if type(other) is ndarray else operand(other)
        if other is NotImplemented:
            return other
        return wrap(counters.launch(ufunc, self._host, other))

    def reflected(self: ndarray, other: Any) -> Any:
        other = operand(other)
        return other if other is NotImplemented else wrap(counters.launch(ufunc, other, self._host))

    def in_place(self: ndarray, other: Any) -> ndarray:
        counters.launch(ufunc, self._host, argument(other), out=self._host)
        return self

    made = {f"__{name}__": forward}
    if name not in ("eq", "ne", "lt", "le", "gt", "ge"):
        made[f"__r{name}__"] = reflected
        if name != "matmul":  # CuPy has no __imatmul__: a @= b binds a to a new array
            made[f"__i{name}__"] = in_place
    return made


for _name, _ufunc in {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "truediv": np.true_divide,
    "floordiv": np.floor_divide,
    "mod": np.remainder,
    "pow": np.power,
    "matmul": np.matmul,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "lshift": np.left_shift,
    "rshift": np.right_shift,
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}.items():
    for _special, _operator in _operators(_name, _ufunc).items():
        setattr(ndarray, _special, _operator)
