"""The methods and operators of an ndarray, for Tensor.

The engine knows no primitive, so the methods are written here and grafted onto ``Tensor`` when
``mini_nn.ops`` is imported; to a type checker they are its base class.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .. import backend
from ..engine import Tensor, data_of
from . import elementwise, index, products, reduce, shape

Index = Any
Axis = Any


class ArrayMethods:
    """What a Tensor has in common with an ndarray; each method is the function of that name."""

    data: Any

    # what it is

    @property
    def shape(self) -> tuple[int, ...]:
        """The length of each axis."""
        return self.data.shape

    @property
    def dtype(self) -> Any:
        """The type of the numbers."""
        return self.data.dtype

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return self.data.ndim

    @property
    def size(self) -> int:
        """The number of elements."""
        return self.data.size

    @property
    def T(self) -> Tensor:
        """All axes in reverse order."""
        return shape.transpose(self)

    @property
    def mT(self) -> Tensor:
        """The last two axes swapped."""
        return shape.matrix_transpose(self)

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("a 0-d tensor has no length")
        return self.shape[0]

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        grad = ", requires_grad=True" if getattr(self, "node", None) is not None else ""
        return f"tensor({backend.to_host(self.data)!r}{grad})"

    # to Python and to other libraries; on a GPU each of these waits for the device

    def item(self) -> Any:
        """The only element as a Python number; ValueError if there is not exactly one."""
        return self.data.item()

    def tolist(self) -> Any:
        """The elements as nested Python lists."""
        return self.data.tolist()

    def __float__(self) -> float:
        return float(self.data)

    def __int__(self) -> int:
        return int(self.data)

    def __index__(self) -> int:
        if self.data.dtype.kind not in "iu":
            raise TypeError(f"only an integer tensor can be an index, got {self.dtype}")
        return int(self.data)

    def __bool__(self) -> bool:
        return bool(self.data)

    def numpy(self) -> Any:
        """The numbers as a NumPy array, shared where they are on the host, copied from a GPU."""
        return backend.to_host(self.data)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        if getattr(self, "node", None) is not None:
            raise TypeError(
                "a NumPy function would silently drop this tensor's gradient: use the function of "
                "that name in mini_nn.ops, or .numpy() to take the numbers out of the tape"
            )
        if backend.backend_of(self.data).name != "numpy":
            raise TypeError("this tensor lives on a device: .numpy() copies it to the host")
        return self.data.__array__(dtype, copy=copy)

    def __dlpack__(self, **options: Any) -> Any:
        return self.data.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.data.__dlpack_device__()

    def to(self, name: str) -> Tensor:
        """The same numbers on the backend of that name; gradients travel back."""
        return shape.to_backend(self, backend.backend_of(self.data).name, name)

    # arithmetic

    def __add__(self, other: Any) -> Tensor:
        return elementwise.add(self, other)

    def __radd__(self, other: Any) -> Tensor:
        return elementwise.add(other, self)

    def __sub__(self, other: Any) -> Tensor:
        return elementwise.subtract(self, other)

    def __rsub__(self, other: Any) -> Tensor:
        return elementwise.subtract(other, self)

    def __mul__(self, other: Any) -> Tensor:
        return elementwise.multiply(self, other)

    def __rmul__(self, other: Any) -> Tensor:
        return elementwise.multiply(other, self)

    def __truediv__(self, other: Any) -> Tensor:
        return elementwise.divide(self, other)

    def __rtruediv__(self, other: Any) -> Tensor:
        return elementwise.divide(other, self)

    def __pow__(self, other: Any) -> Tensor:
        return elementwise.power(self, other)

    def __rpow__(self, other: Any) -> Tensor:
        return elementwise.power(other, self)

    def __matmul__(self, other: Any) -> Tensor:
        return products.matmul(self, other)

    def __rmatmul__(self, other: Any) -> Tensor:
        return products.matmul(other, self)

    def __neg__(self) -> Tensor:
        return elementwise.negative(self)

    def __abs__(self) -> Tensor:
        return elementwise.abs(self)

    # comparison: element by element, as in NumPy

    def __eq__(self, other: object) -> Tensor:  # type: ignore[override]
        return elementwise.equal(self, other)

    def __ne__(self, other: object) -> Tensor:  # type: ignore[override]
        return elementwise.not_equal(self, other)

    def __lt__(self, other: Any) -> Tensor:
        return elementwise.less(self, other)

    def __le__(self, other: Any) -> Tensor:
        return elementwise.less_equal(self, other)

    def __gt__(self, other: Any) -> Tensor:
        return elementwise.greater(self, other)

    def __ge__(self, other: Any) -> Tensor:
        return elementwise.greater_equal(self, other)

    def __hash__(self) -> int:
        return id(self)

    def __invert__(self) -> Tensor:
        return Tensor(~self.data)

    def __and__(self, other: Any) -> Tensor:
        return Tensor(self.data & data_of(other))

    def __or__(self, other: Any) -> Tensor:
        return Tensor(self.data | data_of(other))

    __rand__, __ror__ = __and__, __or__  # both are commutative

    def __getitem__(self, key: Index) -> Tensor:
        return index.getitem(self, key)

    # methods

    def astype(self, dtype: Any, copy: bool = False) -> Tensor:
        """ndarray.astype; numbers that are of that dtype already are shared unless ``copy``."""
        return elementwise.astype(self, dtype, copy)

    def clip(self, min: Any = None, max: Any = None) -> Tensor:
        """ndarray.clip."""
        return elementwise.clip(self, min, max)

    def sum(self, axis: Axis = None, keepdims: bool = False) -> Tensor:
        """ndarray.sum."""
        return reduce.sum(self, axis, keepdims)

    def mean(self, axis: Axis = None, keepdims: bool = False) -> Tensor:
        """ndarray.mean."""
        return reduce.mean(self, axis, keepdims)

    def var(self, axis: Axis = None, ddof: int = 0, keepdims: bool = False) -> Tensor:
        """ndarray.var."""
        return reduce.var(self, axis, ddof, keepdims)

    def std(self, axis: Axis = None, ddof: int = 0, keepdims: bool = False) -> Tensor:
        """ndarray.std."""
        return reduce.std(self, axis, ddof, keepdims)

    def prod(self, axis: Axis = None, keepdims: bool = False) -> Tensor:
        """ndarray.prod."""
        return reduce.prod(self, axis, keepdims)

    def max(self, axis: Axis = None, keepdims: bool = False) -> Tensor:
        """ndarray.max."""
        return reduce.max(self, axis, keepdims)

    def min(self, axis: Axis = None, keepdims: bool = False) -> Tensor:
        """ndarray.min."""
        return reduce.min(self, axis, keepdims)

    def argmax(self, axis: Axis = None, keepdims: bool = False) -> Tensor:
        """ndarray.argmax."""
        return reduce.argmax(self, axis, keepdims)

    def argmin(self, axis: Axis = None, keepdims: bool = False) -> Tensor:
        """ndarray.argmin."""
        return reduce.argmin(self, axis, keepdims)

    def any(self, axis: Axis = None, keepdims: bool = False) -> Tensor:
        """ndarray.any."""
        return reduce.any(self, axis, keepdims)

    def all(self, axis: Axis = None, keepdims: bool = False) -> Tensor:
        """ndarray.all."""
        return reduce.all(self, axis, keepdims)

    def cumsum(self, axis: Axis = None) -> Tensor:
        """ndarray.cumsum."""
        return reduce.cumsum(self, axis)

    def cumprod(self, axis: Axis = None) -> Tensor:
        """ndarray.cumprod."""
        return reduce.cumprod(self, axis)

    def reshape(self, *lengths: Any) -> Tensor:
        """ndarray.reshape: the lengths one by one or as one tuple."""
        return shape.reshape(self, lengths[0] if len(lengths) == 1 else lengths)

    def transpose(self, *axes: Any) -> Tensor:
        """ndarray.transpose: the axes one by one or as one tuple; none reverses them."""
        return shape.transpose(self, axes[0] if len(axes) == 1 else axes or None)

    def swapaxes(self, axis1: int, axis2: int) -> Tensor:
        """ndarray.swapaxes."""
        return shape.swapaxes(self, axis1, axis2)

    def squeeze(self, axis: Axis = None) -> Tensor:
        """ndarray.squeeze."""
        return shape.squeeze(self, axis)

    def ravel(self) -> Tensor:
        """ndarray.ravel."""
        return shape.reshape(self, (-1,))

    def flatten(self) -> Tensor:
        """ndarray.flatten."""
        return shape.reshape(self, (-1,))

    def repeat(self, repeats: Any, axis: int | None = None) -> Tensor:
        """ndarray.repeat."""
        return shape.repeat(self, repeats, axis)

    def take(self, indices: Any, axis: int | None = None) -> Tensor:
        """ndarray.take."""
        return index.take(self, indices, axis)

    def dot(self, other: Any) -> Tensor:
        """ndarray.dot."""
        return products.dot(self, other)

    def trace(self) -> Tensor:
        """ndarray.trace: the sum of the diagonal of the first two axes."""
        return products.trace(self)


def graft() -> None:
    """Give Tensor the methods; runs once, when ``mini_nn.ops`` is imported."""
    for name, method in vars(ArrayMethods).items():
        if name not in ("__module__", "__dict__", "__weakref__", "__doc__", "__annotations__"):
            setattr(Tensor, name, method)
