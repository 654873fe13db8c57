"""Functions that only move elements: reshaping, reordering, joining, padding, repeating, creating.

Names, arguments and defaults are NumPy's.  Each is linear, so its derivative is the same kind of
movement backwards and keeps nothing but shapes.  Where NumPy returns a view, so do these.
"""

from __future__ import annotations

from numbers import Integral
from typing import Any

from .. import backend
from ..engine import Tensor, data_of, primitive
from .elementwise import of, of_any

__all__ = [
    "arange", "broadcast_to", "concatenate", "expand_dims", "eye", "flip", "full", "full_like",
    "linspace", "matrix_transpose", "moveaxis", "ones", "ones_like", "pad", "repeat", "reshape",
    "roll", "split", "squeeze", "stack", "swapaxes", "tile", "to_backend", "transpose", "tril",
    "triu", "zeros", "zeros_like",
]  # fmt: skip

Shape = Any
Axis = Any


@primitive
def reshape(x: Any, shape: Shape) -> Any:
    """The same elements, in C order, in another shape; one length may be −1, and is worked out."""
    return x.reshape(shape)


reshape.derivative(x=lambda g, like: reshape(g, like.shape))


@primitive
def transpose(x: Any, axes: Any = None) -> Any:
    """Axis ``axes[i]`` becomes axis i; all in reverse order if ``axes`` is None."""
    return x.transpose(axes)


def _transpose_rule(g: Any, axes: Any) -> Any:
    if axes is None:
        return transpose(g)
    places = [axis % g.ndim for axis in axes]
    return transpose(g, tuple(sorted(range(g.ndim), key=places.__getitem__)))


transpose.derivative(x=_transpose_rule)


@primitive
def swapaxes(x: Any, axis1: int, axis2: int) -> Any:
    """The two axes exchanged."""
    return x.swapaxes(axis1, axis2)


swapaxes.derivative(x=lambda g, axis1, axis2: swapaxes(g, axis1, axis2))


def matrix_transpose(x: Any) -> Any:
    """(…, m, n) → (…, n, m).

    Raises:
        ValueError: there are fewer than two axes.
    """
    if x.ndim < 2:
        raise ValueError(f"matrix_transpose takes (…, m, n), got shape {x.shape}")
    return swapaxes(x, -1, -2)


@primitive
def moveaxis(x: Any, source: Axis, destination: Axis) -> Any:
    """The axes ``source`` at the places ``destination``, the others in their order."""
    return of(x).moveaxis(x, source, destination)


moveaxis.derivative(x=lambda g, source, destination: moveaxis(g, destination, source))


@primitive
def squeeze(x: Any, axis: Axis = None) -> Any:
    """Without the axes of length 1: those given, or all.

    Raises:
        ValueError: an axis given has another length.
    """
    return of(x).squeeze(x, axis)


squeeze.derivative(x=lambda g, like: reshape(g, like.shape))


@primitive
def expand_dims(x: Any, axis: Axis) -> Any:
    """New axes of length 1 at these places of the result."""
    return of(x).expand_dims(x, axis)


expand_dims.derivative(x=lambda g, like: reshape(g, like.shape))


@primitive
def broadcast_to(x: Any, shape: Shape) -> Any:
    """x repeated along axes of length 1 and along new leading ones, as a view not to be written."""
    return of(x).broadcast_to(x, shape)


broadcast_to.derivative(x=lambda g: g)  # the engine sums over what was repeated


# Joining and splitting


@primitive
def _join(*arrays: Any, axis: int = 0, lengths: Any = ()) -> Any:
    return of_any(*arrays).concatenate(arrays, axis=axis)


def _join_rule(g: Any, needs: Any, axis: int, lengths: Any) -> tuple[Any, ...]:
    lead = (slice(None),) * (axis % g.ndim)
    parts, start = [], 0
    for need, length in zip(needs, lengths, strict=True):
        parts.append(g[(*lead, slice(start, start + length))] if need else None)
        start += length
    return tuple(parts)


_join.derivative(arrays=_join_rule)


def concatenate(arrays: Any, axis: int | None = 0) -> Any:
    """The arrays one after the other along an existing axis; flattened first if ``axis`` is None.

    Raises:
        ValueError: there are no arrays, or they differ in another axis.
    """
    arrays = [*arrays]
    if axis is None:
        arrays, axis = [reshape(x, (-1,)) for x in arrays], 0
    if not arrays or not all(x.ndim for x in arrays):
        raise ValueError(
            f"concatenate takes at least one array of at least one axis, got {len(arrays)} arrays "
            f"of shapes {[x.shape for x in arrays]}: use stack to join along a new axis"
        )
    return _join(*arrays, axis=axis, lengths=tuple([x.shape[axis] for x in arrays]))


@primitive
def _stack(*arrays: Any, axis: int = 0) -> Any:
    return of_any(*arrays).stack(arrays, axis=axis)


def _stack_rule(g: Any, needs: Any, axis: int) -> tuple[Any, ...]:
    lead = (slice(None),) * (axis % g.ndim)
    return tuple([g[(*lead, i)] if need else None for i, need in enumerate(needs)])


_stack.derivative(arrays=_stack_rule)


def stack(arrays: Any, axis: int = 0) -> Any:
    """The arrays, all of one shape, side by side along a new axis.

    Raises:
        ValueError: there are no arrays, or their shapes differ.
    """
    arrays = [*arrays]
    if len({x.shape for x in arrays}) != 1:
        raise ValueError(f"stack takes arrays of one shape, got {[x.shape for x in arrays]}")
    return _stack(*arrays, axis=axis)


@primitive
def split(x: Any, indices_or_sections: Any, axis: int = 0) -> Any:
    """x cut along an axis, as a tuple of views.

    Args:
        x: at least one axis.
        indices_or_sections: the number of equal parts, or the places to cut at.
        axis: the axis to cut.

    Raises:
        ValueError: the axis cannot be divided into that many equal parts, or the places go back.
    """
    n, lead = x.shape[axis], (slice(None),) * (axis % x.ndim)
    places = indices_or_sections
    if isinstance(places, Integral):
        if places <= 0 or n % places:
            raise ValueError(
                f"axis {axis} of {x.shape} cannot be divided into {places} equal parts"
            )
        places = [n // places * i for i in range(1, places)]
    ends = zip([0, *places], [*places, n], strict=True)
    parts = tuple([x[(*lead, slice(start, stop))] for start, stop in ends])
    if sum(part.shape[axis] for part in parts) != n:
        raise ValueError(f"split takes places in ascending order, got {indices_or_sections}")
    return parts


split.derivative(x=lambda g, axis: concatenate(g, axis))


# Padding and repeating


def _sides(pad_width: Any, ndim: int) -> list[tuple[int, int]]:
    """How much goes before and after each axis."""
    if isinstance(pad_width, Integral):
        pad_width = (pad_width, pad_width)
    pairs = [pad_width] * ndim if isinstance(pad_width[0], Integral) else [*pad_width]
    pairs = pairs * ndim if len(pairs) == 1 else pairs
    if len(pairs) != ndim or any(len(pair) != 2 or pair[0] < 0 or pair[1] < 0 for pair in pairs):
        raise ValueError(
            "pad_width is a number, a pair (before, after) or one pair for each of the array's "
            f"{ndim} axes, none negative; got {pad_width}"
        )
    return [(before, after) for before, after in pairs]


@primitive
def _surround(x: Any, sides: Any, value: Any) -> Any:
    shape = [before + n + after for n, (before, after) in zip(x.shape, sides, strict=True)]
    y = of(x).full(shape, value, x.dtype)
    y[_inner(x.shape, sides)] = x
    return y


def _inner(shape: tuple[int, ...], sides: Any) -> tuple[slice, ...]:
    return tuple([slice(b, b + n) for n, (b, _) in zip(shape, sides, strict=True)])


_surround.derivative(x=lambda g, sides, like: g[_inner(like.shape, sides)])


def pad(x: Any, pad_width: Any, mode: str = "constant", constant_values: float = 0) -> Any:
    """x with a border.

    Args:
        x: any shape.
        pad_width: a number for all sides, a pair (before, after) for all axes, or a pair for each.
        mode: ``"constant"``; ``"edge"``: the outermost element; ``"reflect"``: mirrored at the
            outermost element, which is not repeated; ``"wrap"``: what stands at the other end.
            Borders longer than the array repeat the pattern.
        constant_values: one number, for ``"constant"``; it gets no gradient.

    Raises:
        ValueError: another mode, a width that does not fit, or an empty axis to be continued.
    """
    sides = _sides(pad_width, x.ndim)
    if mode == "constant":
        return _surround(x, sides, constant_values)
    if mode not in ("edge", "reflect", "wrap"):
        raise ValueError(f"mode is 'constant', 'edge', 'reflect' or 'wrap', got {mode!r}")
    xp = of(x)
    for axis, (before, after) in enumerate(sides):
        if before or after:
            lead, n = (slice(None),) * axis, x.shape[axis]
            source = xp.pad(xp.arange(n), (before, after), mode)
            borders = x[(*lead, source[:before])], x[(*lead, source[before + n :])]
            x = concatenate([borders[0], x, borders[1]], axis)
    return x


@primitive
def flip(x: Any, axis: Axis = None) -> Any:
    """The elements in reverse order along these axes (None: all)."""
    return of(x).flip(x, axis)


flip.derivative(x=lambda g, axis: flip(g, axis))


@primitive
def roll(x: Any, shift: Any, axis: Axis = None) -> Any:
    """The elements moved by ``shift`` places, those pushed out coming in at the other end."""
    return of(x).roll(x, shift, axis)


def _roll_rule(g: Any, shift: Any, axis: Axis) -> Any:
    back = tuple([-s for s in shift]) if isinstance(shift, (tuple, list)) else -shift
    return roll(g, back, axis)


roll.derivative(x=_roll_rule)


def repeat(x: Any, repeats: Any, axis: int | None = None) -> Any:
    """Each element along an axis several times in a row; of the flattened array for None.

    Args:
        x: any shape.
        repeats: how often: a number, or a list or array with a number for each element.
        axis: the axis to repeat along.
    """
    if axis is None:
        x, axis = reshape(x, (-1,)), 0
    axis %= x.ndim
    if isinstance(repeats, Integral):
        lead, n, rest = x.shape[:axis], x.shape[axis], x.shape[axis + 1 :]
        wide = broadcast_to(expand_dims(x, axis + 1), (*lead, n, repeats, *rest))
        return reshape(wide, (*lead, n * repeats, *rest))
    xp = of(x)
    return x[(*(slice(None),) * axis, xp.repeat(xp.arange(x.shape[axis]), data_of(repeats)))]


def tile(x: Any, reps: Any) -> Any:
    """x as a whole several times along each axis; ``reps`` counts from the last axis if shorter."""
    reps = (reps,) if isinstance(reps, Integral) else (*reps,)
    ndim = max(x.ndim, len(reps))
    reps = (1,) * (ndim - len(reps)) + reps
    shape = (1,) * (ndim - x.ndim) + tuple(x.shape)
    wide = broadcast_to(
        reshape(x, [m for n in shape for m in (1, n)]),
        [m for r, n in zip(reps, shape, strict=True) for m in (r, n)],
    )
    return reshape(wide, [r * n for r, n in zip(reps, shape, strict=True)])


@primitive
def tril(x: Any, k: int = 0) -> Any:
    """x with zeros above diagonal ``k`` of its last two axes."""
    return of(x).tril(x, k)


@primitive
def triu(x: Any, k: int = 0) -> Any:
    """x with zeros below diagonal ``k`` of its last two axes."""
    return of(x).triu(x, k)


tril.derivative(x=lambda g, k: tril(g, k))
triu.derivative(x=lambda g, k: triu(g, k))


# Where arrays live, and making them


@primitive
def to_backend(x: Any, source: str, target: str) -> Any:
    """The numbers of x, which lives on backend ``source``, on ``target``; gradients travel back."""
    return x if source == target else backend.get(target).xp.asarray(backend.to_host(x))


to_backend.derivative(x=lambda g, source, target: to_backend(g, target, source))


@primitive
def zeros_like(x: Any, dtype: Any = None) -> Any:
    """Zeros where x lives, of its shape and (unless given) its dtype."""
    return of(x).zeros_like(x, dtype=dtype)


@primitive
def ones_like(x: Any, dtype: Any = None) -> Any:
    """Ones where x lives, of its shape and (unless given) its dtype."""
    return of(x).ones_like(x, dtype=dtype)


@primitive
def full_like(x: Any, fill_value: Any, dtype: Any = None) -> Any:
    """One number, where x lives, in its shape and (unless given) its dtype."""
    return of(x).full_like(x, fill_value, dtype=dtype)


def zeros(shape: Shape, dtype: Any = "float32") -> Tensor:
    """Zeros on the current backend."""
    return Tensor(backend.current().xp.zeros(shape, dtype))


def ones(shape: Shape, dtype: Any = "float32") -> Tensor:
    """Ones on the current backend."""
    return Tensor(backend.current().xp.ones(shape, dtype))


def full(shape: Shape, fill_value: Any, dtype: Any = "float32") -> Tensor:
    """One number on the current backend."""
    return Tensor(backend.current().xp.full(shape, fill_value, dtype))


def eye(N: int, M: int | None = None, k: int = 0, dtype: Any = "float32") -> Tensor:
    """(N, M), M = N if None: ones on diagonal ``k`` and zeros elsewhere, on the current backend."""
    return Tensor(backend.current().xp.eye(N, M, k, dtype))


def arange(start: Any, stop: Any = None, step: Any = 1, dtype: Any = None) -> Tensor:
    """start, start + step, … before stop (one argument: from 0), on the current backend.

    The dtype is int64 if all three are ints, float32 if one is a float.
    """
    if stop is None:
        start, stop = 0, start
    if dtype is None:
        dtype = "int64" if all(isinstance(n, int) for n in (start, stop, step)) else "float32"
    return Tensor(backend.current().xp.arange(start, stop, step, dtype))


def linspace(
    start: float, stop: float, num: int = 50, endpoint: bool = True, dtype: Any = "float32"
) -> Tensor:
    """``num`` numbers at equal distances from start to stop, on the current backend."""
    return Tensor(backend.current().xp.linspace(start, stop, num, endpoint, dtype=dtype))
