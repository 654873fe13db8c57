"""Limits on gradients: by their joint norm, or element by element.

Pascanu, Mikolov & Bengio 2013, "On the difficulty of training recurrent neural networks",
arXiv:1211.5063, algorithm 1.

Deviations: as torch, 1e-6 is added to the norm that is divided by.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from .. import backend
from ..backend import Array, of
from ..engine import Tensor
from .base import number


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor], max_norm: float, norm_type: float = 2.0
) -> Array:
    """Multiply all gradients, in place, by min(1, max_norm / (norm + 1e-6)) with their joint norm.

    Args:
        parameters: those without a gradient are skipped.
        max_norm: at least 0.
        norm_type: the order of the norm, positive; ``math.inf`` for the largest absolute value.

    Returns:
        The norm before clipping: a 0-d array, which stays on the device; 0 if there is no gradient.
        If it is inf or nan the gradients become 0 or nan: look at it before the step.

    Raises:
        TypeError, ValueError: ``max_norm`` is negative or ``norm_type`` not positive.
    """
    limit, order = number("max_norm", max_norm), number("norm_type", norm_type)
    if order == 0:
        raise ValueError("norm_type is positive, got 0: use 2.0, 1.0 or math.inf")
    grads = [g for g in _grads(parameters) if g.size]
    if not grads:
        return backend.current().xp.zeros((), "float32")
    xp = of(grads[0])
    total = xp.asarray(_norm(xp.stack([xp.asarray(_norm(g, order)) for g in grads]), order))
    factor = xp.asarray(xp.minimum(limit / (total + 1e-6), 1.0))
    for g in grads:
        xp.multiply(g, factor.astype(g.dtype), out=g)
    return total


def clip_grad_value_(parameters: Tensor | Iterable[Tensor], clip_value: float) -> None:
    """Limit every element of the gradients, in place, to [-clip_value, clip_value]; nan stays nan.

    Raises:
        TypeError, ValueError: ``clip_value`` is not a number or is negative.
    """
    limit = number("clip_value", clip_value)
    for g in _grads(parameters):
        of(g).clip(g, -limit, limit, out=g)


def _grads(parameters: Tensor | Iterable[Tensor]) -> list[Array]:
    params = [parameters] if isinstance(parameters, Tensor) else parameters
    return [p.grad for p in params if p.grad is not None]


def _norm(x: Array, order: float) -> Array:
    if x.dtype.itemsize < 4:  # the square of a float16 overflows above 256
        x = x.astype("float32")
    xp = of(x)
    if order == 2:
        return xp.linalg.norm(x)
    size = xp.abs(x)
    return size.max() if order == math.inf else xp.power(xp.power(size, order).sum(), 1.0 / order)
