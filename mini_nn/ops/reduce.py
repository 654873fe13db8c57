"""Reductions and scans along axes: sums, products, extremes, their positions, and log-sum-exp.

Names, arguments and defaults are NumPy's: ``axis`` is None for all axes, one axis or a tuple,
counted from the end if negative; ``keepdims`` leaves the reduced axes with length 1.  Conventions:

==========================  =================================================================
``max, min``                ties share the gradient equally; a slice with a nan shares it over all
``prod, cumprod``           right with any number of zeros, to every order: nothing is divided
``std``                     0 where the deviation is 0
``logsumexp``               0 for a slice of −inf only; +inf elements get 1, all others 0
``var, std`` of n ≤ ddof    nan, with NumPy's warning
sums of nothing             sum 0, prod 1, logsumexp −inf; mean nan with NumPy's warning
extremes of nothing         ValueError
==========================  =================================================================
"""

from __future__ import annotations

import builtins
import math
from typing import Any

from ..engine import primitive
from .elementwise import astype, clip, equal, exp, of, where
from .shape import broadcast_to, concatenate, flip, transpose

__all__ = [
    "all", "any", "argmax", "argmin", "count_nonzero", "cumprod", "cumsum", "logsumexp", "max",
    "mean", "min", "prod", "std", "sum", "var",
]  # fmt: skip

Axis = Any


def _axes(axis: Axis, ndim: int) -> tuple[int, ...]:
    """The axes that are reduced, counted from the front."""
    if axis is None:
        return (*range(ndim),)
    return tuple([a % ndim for a in (axis if isinstance(axis, tuple) else (axis,))])


def _count(shape: tuple[int, ...], axis: Axis) -> int:
    """How many elements are reduced to one."""
    return math.prod([shape[a] for a in _axes(axis, len(shape))])


def _restore(reduced: Any, shape: tuple[int, ...], axis: Axis) -> Any:
    """The reduced axes again, with length 1, whether or not they were kept."""
    axes = _axes(axis, len(shape))
    return reduced.reshape(tuple([1 if i in axes else n for i, n in enumerate(shape)]))


@primitive
def sum(x: Any, axis: Axis = None, keepdims: bool = False) -> Any:
    """Σ x; the sum of nothing is 0."""
    return x.sum(axis=axis, keepdims=keepdims)


sum.derivative(
    x=lambda g, axis, like: broadcast_to(_restore(g, like.shape, axis), like.shape),
)


@primitive
def mean(x: Any, axis: Axis = None, keepdims: bool = False) -> Any:
    """Σ x / n; the mean of nothing is nan, with NumPy's warning."""
    return of(x).mean(x, axis=axis, keepdims=keepdims)


def _mean_rule(g: Any, axis: Axis, like: Any) -> Any:
    share = g / builtins.max(_count(like.shape, axis), 1)
    return broadcast_to(_restore(share, like.shape, axis), like.shape)


mean.derivative(x=_mean_rule)


def _centred(x: Any, axis: Axis) -> Any:
    return x - mean(x, axis, True)


def _over(n: int) -> float:
    return 1 / n if n > 0 else math.nan


@primitive
def var(x: Any, axis: Axis = None, ddof: int = 0, keepdims: bool = False) -> Any:
    """Σ (x − x̄)² / (n − ddof)."""
    return of(x).var(x, axis=axis, ddof=ddof, keepdims=keepdims)


def _var_rule(g: Any, x: Any, axis: Axis, ddof: int) -> Any:
    scale = 2 * _over(_count(x.shape, axis) - ddof)
    return _restore(g * scale, x.shape, axis) * _centred(x, axis)


var.derivative(x=_var_rule)


@primitive
def std(x: Any, axis: Axis = None, ddof: int = 0, keepdims: bool = False) -> Any:
    """The square root of ``var``; where it is 0 its derivative is taken as 0."""
    return of(x).std(x, axis=axis, ddof=ddof, keepdims=keepdims)


def _std_rule(g: Any, x: Any, y: Any, axis: Axis, ddof: int) -> Any:
    flat = equal(y, 0)
    slope = where(flat, 0.0, g / where(flat, 1.0, y)) * _over(_count(x.shape, axis) - ddof)
    return _restore(slope, x.shape, axis) * _centred(x, axis)


std.derivative(x=_std_rule)


@primitive
def max(x: Any, axis: Axis = None, keepdims: bool = False) -> Any:
    """The largest element; nan if one is nan.

    Raises:
        ValueError: there is none to choose from.
    """
    return of(x).max(x, axis=axis, keepdims=keepdims)


@primitive
def min(x: Any, axis: Axis = None, keepdims: bool = False) -> Any:
    """The smallest element; nan if one is nan.

    Raises:
        ValueError: there is none to choose from.
    """
    return of(x).min(x, axis=axis, keepdims=keepdims)


def _share(g: Any, lost: Any, axis: Axis) -> Any:
    """g in equal parts to those that have not lost: at least one, even among nan."""
    winners = astype(~lost, g.dtype)
    return _restore(g, lost.shape, axis) / sum(winners, axis, True) * winners


max.derivative(x=lambda g, x, y, axis: _share(g, x < _restore(y, x.shape, axis), axis))
min.derivative(x=lambda g, x, y, axis: _share(g, x > _restore(y, x.shape, axis), axis))


@primitive
def cumsum(x: Any, axis: int | None = None) -> Any:
    """yᵢ = x₁ + … + xᵢ along an axis; of the flattened array if ``axis`` is None."""
    return of(x).cumsum(x, axis=axis)


def _cumsum_rule(g: Any, axis: int | None, like: Any) -> Any:
    along = 0 if axis is None else axis
    return flip(cumsum(flip(g, along), along), along).reshape(like.shape)


cumsum.derivative(x=_cumsum_rule)


@primitive
def cumprod(x: Any, axis: int | None = None) -> Any:
    """yᵢ = x₁ ⋯ xᵢ along an axis; of the flattened array if ``axis`` is None."""
    return of(x).cumprod(x, axis=axis)


def _later(x: Any, steps: int) -> Any:
    """x from ``steps`` places further along the last axis, followed by zeros."""
    tail = (*x.shape[:-1], builtins.min(steps, x.shape[-1]))
    return concatenate([x[..., steps:], of(x).zeros(tail, x.dtype)], axis=-1)


def _before(x: Any) -> Any:
    """The product of all earlier elements of the last axis; 1 for the first."""
    one = of(x).ones((*x.shape[:-1], 1), x.dtype)
    return concatenate([one, cumprod(x, -1)], axis=-1)[..., : x.shape[-1]]


def _cumprod_rule(g: Any, x: Any, axis: int | None, like: Any) -> Any:
    """x̄ᵢ = yᵢ₋₁ hᵢ with hᵢ = ȳᵢ + xᵢ₊₁ hᵢ₊₁, the adjoint of yᵢ = yᵢ₋₁ xᵢ.

    The recurrence is solved by doubling, without a division: after a round, hᵢ holds the terms of
    twice as many places and ``step`` the product of x over them (Blelloch 1990, CMU-CS-90-190).
    """
    along = 0 if axis is None else axis
    if axis is None:
        x = x.reshape((-1,))
    x, h = x.swapaxes(along, -1), g.swapaxes(along, -1)
    step, places = _later(x, 1), 1
    while places < x.shape[-1]:
        h = h + step * _later(h, places)
        step = step * _later(step, places)
        places *= 2
    return (_before(x) * h).swapaxes(along, -1).reshape(like.shape)


cumprod.derivative(x=_cumprod_rule)


@primitive
def prod(x: Any, axis: Axis = None, keepdims: bool = False) -> Any:
    """Π x; the product of nothing is 1."""
    return of(x).prod(x, axis=axis, keepdims=keepdims)


def _prod_rule(g: Any, x: Any, axis: Axis) -> Any:
    """x̄ᵢ = ȳ times the product of all the others: those before times those after."""
    axes = _axes(axis, x.ndim)
    order = [i for i in range(x.ndim) if i not in axes] + [*axes]
    moved = transpose(x, order)
    rows = moved.reshape((*moved.shape[: x.ndim - len(axes)], _count(x.shape, axis)))
    others = _before(rows) * flip(_before(flip(rows, -1)), -1)
    inverse = sorted(range(x.ndim), key=order.__getitem__)
    return _restore(g, x.shape, axis) * transpose(others.reshape(moved.shape), inverse)


prod.derivative(x=_prod_rule)


@primitive
def logsumexp(x: Any, axis: Axis = None, keepdims: bool = False) -> Any:
    """ln Σ eˣ, with the largest x taken out so that nothing overflows.

    A slice of −inf only gives −inf and gradient 0, without nan or warning; a slice with +inf gives
    +inf; the sum of nothing is −inf.

    Raises:
        TypeError: x is not floating point.
    """
    if x.dtype.kind != "f":
        raise TypeError(f"logsumexp takes floats, got {x.dtype}: convert with astype('float32')")
    if not x.size:
        return of(x).sum(x, axis=axis, keepdims=keepdims) - math.inf
    top = of(x).max(x, axis=axis, keepdims=True)
    total = sum(exp(x - _finite(top)), axis, True)
    total = total + (total == 0)  # only where top is −inf
    y = of(x).log(total) + top
    return y if keepdims else of(x).squeeze(y, axis)


def _finite(x: Any) -> Any:
    """±inf as the largest finite numbers, so that the difference of two infinities is not nan."""
    largest = float(of(x).finfo(x.dtype).max)
    return clip(x, -largest, largest)


def _logsumexp_rule(g: Any, x: Any, y: Any, axis: Axis) -> Any:
    """x̄ = ȳ softmax(x); the exponent is never above 0 except for x = +inf."""
    exponent = clip(x - _finite(_restore(y, x.shape, axis)), None, 0.0)
    return _restore(g, x.shape, axis) * exp(exponent)


logsumexp.derivative(x=_logsumexp_rule)


@primitive
def argmax(x: Any, axis: int | None = None, keepdims: bool = False) -> Any:
    """The position of the largest element, the first of several; for None of the flat array."""
    return of(x).argmax(x, axis=axis, keepdims=keepdims)


@primitive
def argmin(x: Any, axis: int | None = None, keepdims: bool = False) -> Any:
    """The position of the smallest element, the first of several; for None of the flat array."""
    return of(x).argmin(x, axis=axis, keepdims=keepdims)


@primitive
def any(x: Any, axis: Axis = None, keepdims: bool = False) -> Any:
    """Whether an element is true (not 0)."""
    return of(x).any(x, axis=axis, keepdims=keepdims)


@primitive
def all(x: Any, axis: Axis = None, keepdims: bool = False) -> Any:
    """Whether no element is false (0)."""
    return of(x).all(x, axis=axis, keepdims=keepdims)


@primitive
def count_nonzero(x: Any, axis: Axis = None, keepdims: bool = False) -> Any:
    """How many elements are not 0."""
    return of(x).sum(x != 0, axis=axis, keepdims=keepdims)
