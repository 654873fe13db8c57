"""Reading and adding at positions: indexing, gathering, scattering, sorting.

An index is whatever NumPy takes: numbers, slices, None, Ellipsis, lists, arrays of integers,
boolean masks and any mixture of them in a tuple; Tensors may stand wherever arrays may.  Basic
indices (without lists and arrays) give views.  Reading and scattering are each other's derivative,
whether or not positions repeat: what is read twice receives both gradients.

An integer out of range raises IndexError on NumPy.  CuPy does not look, since the host would have
to wait for the answer, and counts modulo the length: check indices of unknown origin on the host.
"""

from __future__ import annotations

import math
from typing import Any

from .. import backend
from ..engine import data_of, primitive
from .elementwise import of
from .shape import flip

__all__ = [
    "argsort", "gather", "getitem", "nonzero", "one_hot", "scatter", "scatter_add", "sort",
    "take", "take_along_axis", "topk",
]  # fmt: skip

Index = Any

MANY = 4096
"""From so many values on the sum of rows, which costs some 30 µs to set up, is the faster one."""


def _plain(key: Index) -> Index:
    """The index with arrays in place of Tensors."""
    if type(key) is tuple:
        return tuple([_plain(part) for part in key])
    if type(key) is list:
        return [_plain(part) for part in key]
    return data_of(key)


def _repeats(key: Index) -> bool:
    """Whether a position can occur twice: only where integers come in lists or arrays."""
    parts = key if type(key) is tuple else (key,)
    return any(
        type(part) in (list, tuple) or (getattr(part, "ndim", 0) > 0 and part.dtype.kind in "iu")
        for part in parts
    )


@primitive
def _read(x: Any, key: Index, distinct: bool = False) -> Any:
    return x[key]


@primitive
def _write(values: Any, key: Index, shape: Any, distinct: bool = False) -> Any:
    if distinct or not _repeats(key):
        y = of(values).zeros(shape, values.dtype)
        y[key] = values
        return y
    places = _whole_then_integers(key) if values.size >= MANY else None
    if places is not None:
        return _sum_rows(values, *places, shape)
    y = of(values).zeros(shape, values.dtype)
    backend.scatter_add(y, key, values)
    return y


def _whole_then_integers(key: Index) -> tuple[int, Any] | None:
    """The number of leading ``:`` and the arrays of integers behind them, if that is all."""
    parts = key if type(key) is tuple else (key,)
    whole = 0
    while type(parts[whole]) is slice and parts[whole] == slice(None):
        whole += 1
    arrays = parts[whole:]
    return (
        (whole, arrays)
        if all(hasattr(a, "ndim") and a.dtype.kind in "iu" for a in arrays)
        else None
    )


def _sum_rows(values: Any, whole: int, arrays: Any, shape: Any) -> Any:
    """What the arrays address are rows with a number each, and adding up rows is fast."""
    end = whole + len(arrays)
    xp, ahead, addressed, behind = of(values), shape[:whole], shape[whole:end], shape[end:]
    count = math.prod(addressed)
    numbers = xp.arange(count).reshape(addressed)[arrays]
    rows = xp.broadcast_to(values, (*ahead, *numbers.shape, *behind))
    rows = rows.reshape((math.prod(ahead), numbers.size, math.prod(behind))).swapaxes(0, 1)
    sums = backend.segment_sum(rows, numbers.reshape(-1), count)
    return sums.swapaxes(0, 1).reshape(shape)


_read.derivative(x=lambda g, key, distinct, like: _write(g, key, like.shape, distinct))
_write.derivative(values=lambda g, key, distinct: _read(g, key, distinct))


def getitem(x: Any, key: Index) -> Any:
    """x[key]; to take a whole array apart use ``split``, whose derivative is one concatenation.

    Raises:
        IndexError: a number is out of range (on a GPU: not for arrays of them), or there are more
            indices than axes.
    """
    return _read(x, _plain(key))


def scatter(values: Any, key: Index, shape: Any) -> Any:
    """Zeros of this shape with the values added at ``key``: the derivative of ``getitem``.

    Args:
        values: the shape of ``zeros(shape)[key]``, or one that broadcasts to it.
        key: any index; values for the same position add up.
        shape: of the result.
    """
    return _write(values, _plain(key), shape)


@primitive
def _add_at(x: Any, key: Index, values: Any) -> Any:
    y = x.copy()
    if _repeats(key):
        y += _write(of(x).asarray(values, x.dtype), key, x.shape)
    else:
        y[key] += values
    return y


_add_at.derivative(x=lambda g: g, values=lambda g, key: _read(g, key))


def scatter_add(x: Any, key: Index, values: Any) -> Any:
    """A new array: x with the values added at ``key``, where values for the same position add up.

    Args:
        x: any shape.
        key: any index.
        values: broadcasts to the shape of ``x[key]``.
    """
    return _add_at(x, _plain(key), values)


@primitive
def take(x: Any, indices: Any, axis: int | None = None) -> Any:
    """The elements with these numbers along an axis; of the flattened array if ``axis`` is None.

    Args:
        x: (…, n, …).
        indices: integers of any shape, negative ones counted from the end.
        axis: the axis of length n, which the axes of ``indices`` replace.

    Raises:
        IndexError: a number is out of range (on a GPU: not checked).
    """
    return of(x).take(x, indices, axis=axis)


def _take_rule(g: Any, indices: Any, axis: int | None, like: Any) -> Any:
    if axis is None:
        return _write(g, (indices,), (math.prod(like.shape),)).reshape(like.shape)
    lead = (slice(None),) * (axis % len(like.shape))
    return _write(g, (*lead, indices), like.shape)


take.derivative(x=_take_rule)


def _grid(indices: Any, shape: Any, axis: int) -> tuple[Any, ...]:
    """``indices`` for one axis and every position for the others, to be broadcast together."""
    arange, ndim = of(indices).arange, len(shape)
    every = [
        arange(n).reshape([-1 if j == i else 1 for j in range(ndim)]) for i, n in enumerate(shape)
    ]
    return (*every[:axis], indices, *every[axis + 1 :])


def take_along_axis(x: Any, indices: Any, axis: int) -> Any:
    """y[…, i, …] = x[…, indices[…, i, …], …], what ``argsort`` and ``argmax`` give positions for.

    Args:
        x: (…, n, …).
        indices: (…, m, …) integers; the other axes broadcast with those of x.
        axis: the axis of lengths n and m.

    Raises:
        ValueError: x and the indices differ in their number of axes.
    """
    return _along(x, indices, axis, False)


def _along(x: Any, indices: Any, axis: int, distinct: bool) -> Any:
    indices = data_of(indices)
    if indices.ndim != x.ndim:
        raise ValueError(
            f"take_along_axis needs indices with as many axes as the array, got {indices.shape} "
            f"for {x.shape}: use take for the same indices everywhere"
        )
    return _read(x, _grid(indices, x.shape, axis % x.ndim), distinct)


def gather(x: Any, dim: int, index: Any) -> Any:
    """y[i, j, …] = x[index[i, j, …], j, …] for ``dim`` 0, and so on, as torch.gather.

    Args:
        x: any shape.
        dim: the axis that the numbers in ``index`` count along.
        index: integers, as many axes as x, in each other axis at most as long.

    Returns:
        The shape of ``index``.

    Raises:
        ValueError: ``index`` does not fit into x.
    """
    index = data_of(index)
    dim %= max(x.ndim, 1)
    fits = index.ndim == x.ndim and all(
        m <= n for i, (m, n) in enumerate(zip(index.shape, x.shape, strict=True)) if i != dim
    )
    if not fits:
        raise ValueError(
            f"gather along axis {dim} of {x.shape} needs an index with as many axes, no longer "
            f"than the array in the others; got {index.shape}"
        )
    return _read(x, _grid(index, index.shape, dim))


@primitive
def argsort(x: Any, axis: int = -1) -> Any:
    """The positions that put an axis into ascending order; equal elements keep their order."""
    return of(x).argsort(x, axis=axis, kind="stable")


def sort(x: Any, axis: int = -1) -> Any:
    """The elements in ascending order along an axis, nan last.

    The gradient goes to where an element came from; equal elements keep their order.
    """
    return _along(x, argsort(x, axis), axis, True)


def topk(x: Any, k: int, axis: int = -1) -> tuple[Any, Any]:
    """The k largest elements along an axis, largest first, and their positions, as torch.topk.

    Of equal elements the first comes first; nan counts as the largest.

    Raises:
        ValueError: k is negative or more than there are.
    """
    n = x.shape[axis]
    if not 0 <= k <= n:
        raise ValueError(f"topk takes 0 ≤ k ≤ {n}, the length of axis {axis}; got {k}")
    places = _largest(x, k, axis)
    return _along(x, places, axis, True), places


@primitive
def _largest(x: Any, k: int, axis: int) -> Any:
    """Stable and descending: the ascending order of the reversed axis, read from its end."""
    backwards = argsort(flip(x, axis), axis)
    return x.shape[axis] - 1 - take(flip(backwards, axis), of(x).arange(k), axis)


@primitive
def nonzero(x: Any) -> Any:
    """The positions of the elements that are not 0, as a tuple with an array for each axis."""
    return tuple(of(x).nonzero(x))


@primitive
def one_hot(indices: Any, num_classes: int, dtype: Any = "float32") -> Any:
    """1 at the place of the index and 0 elsewhere: integers (…) → (…, num_classes).

    A number outside [0, num_classes) gives a row of zeros.
    """
    places = of(indices).arange(num_classes)
    return (indices.reshape((*indices.shape, 1)) == places).astype(dtype)
