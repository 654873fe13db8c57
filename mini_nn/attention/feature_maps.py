"""Feature maps φ: what stands for the exponential where attention has no softmax.

If sim(q, k) = φ(q)ᵀ ϕ(k), attention needs no n × n matrix (``linear_attention``).  With x a query
or a key, d its length and D that of its features:

=======================================  ====================  ================================
φ(x)                                     sim                   function, source
=======================================  ====================  ================================
x + 1 for x ≥ 0, eˣ below                                      ``elu_plus_one``: Katharopoulos
                                                               et al. 2020, 2006.16236, eq. 7
max(x, 0) and its square                                       ``relu_features``,
                                                               ``squared_relu_features``
eˣ; softmax x over the d features                              ``exp_features``,
                                                               ``softmax_features``: J. Su 2021,
                                                               kexue.fm 8338; Shen et al. 2018,
                                                               1812.01243
[1, x/‖x‖]                               1 + cos(q, k)         ``cosine_features``: J. Su 2020,
                                                               kexue.fm 7546
[1, x, vec(x xᵀ)/√2], x scaled by d^-¼   1 + s + s²/2,         ``taylor_features``: Arora et al.
                                         s = q·k/√d            2024, 2402.18668 ("Based")
x^⊗m/√m!, m = 0 … n                      Σ sᵐ/m!, s = q·k      ``polynomial_features``,
[1, x/√n]^⊗n                             (1 + s/n)ⁿ            ``limit_features``: J. Su 2021,
                                                               kexue.fm 8601
r(x)ᵢ r(x)ᵢ₋ⱼ, j = 1 … ν,                                      ``dpfp_features``: Schlag et al.
r(x) = max([x, −x], 0)                                         2021, 2102.11174, 5.3
=======================================  ====================  ================================

A map takes (…, d) and returns (…, D).  Where queries and keys have different maps, a pair (φ, ϕ)
stands for both; ``map_pair`` takes either form.  None of them contains the 1/√d of softmax
attention but ``taylor_features``: scale the queries first.

Deviations: elu(x) + 1 is not computed as written, because eˣ − 1 + 1 is 0 from x ≈ −17 down in
float32 (−8 in bfloat16).  What underflows in eˣ stays at the least positive number of the dtype, so
that no feature is 0.  ``dpfp_features`` has the paper's products rᵢ rᵢ₊ⱼ in the order of its code,
by the second factor.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from .. import ops
from ..backend import Array
from ..engine import data_of, primitive
from ..ops.elementwise import of

__all__ = [
    "FeatureMap", "cosine_features", "dpfp_features", "elu_plus_one", "exp_features",
    "limit_features", "map_pair", "polynomial_features", "relu_features", "softmax_features",
    "squared_relu_features", "symmetric_taylor_features", "taylor_features",
]  # fmt: skip

FeatureMap = Callable[[Any], Any] | tuple[Callable[[Any], Any], Callable[[Any], Any]]
"""One map of queries and keys, or a pair of them, (φ, ϕ)."""


def map_pair(feature_map: FeatureMap) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """The map of the queries and that of the keys.

    Raises:
        TypeError: neither a callable nor a pair of them.
    """
    pair = feature_map if isinstance(feature_map, tuple) else (feature_map, feature_map)
    if len(pair) != 2 or not all(callable(f) for f in pair):
        raise TypeError(
            f"a feature map is a callable or a pair of them (for queries, for keys), got {pair!r}"
        )
    return pair


# Of each element


@primitive
def elu_plus_one(x: Any) -> Any:
    """x + 1 for x ≥ 0, eˣ below: elu(x) + 1 without its cancellation.

    Continuous with its derivative, which is min(φ, 1).  The second derivative, eˣ below 0 and 0
    above, is 1 at 0.

    Args:
        x: any shape.

    Returns:
        The shape and dtype of x; positive for every finite x.  Where eˣ underflows it is the least
        positive number of the dtype.
    """
    xp, info = of(x), of(x).finfo(x.dtype)
    least = float(info.tiny) * float(info.eps)
    below = xp.exp(x.clip(float("-inf"), 0.0))
    return below.clip(least, 1.0) + x.clip(0.0, float("inf"))  # the one is 1 or the other 0


elu_plus_one.derivative(x=lambda g, y: g * ops.clip(y, 0.0, 1.0))


def relu_features(x: Array) -> Array:
    """max(x, 0), elementwise; a vector without a positive number has no features at all."""
    return ops.relu(x)


def squared_relu_features(x: Array) -> Array:
    """max(x, 0)², elementwise; a vector without a positive number has no features at all."""
    return ops.square(ops.relu(x))


def exp_features(x: Array) -> Array:
    """eˣ, elementwise.

    It overflows above 88 in float32.  For queries ``softmax_features`` gives the same attention
    without that, because a factor of one query cancels; a factor of one key does not.
    """
    return ops.exp(x)


def softmax_features(x: Array) -> Array:
    """eˣ / Σ eˣ over the features, (…, d) → (…, d)."""
    return ops.softmax(x, axis=-1)


# Of the direction


def cosine_features(x: Array) -> Array:
    """[1, x/‖x‖], (…, d) → (…, d + 1): φ(q)ᵀ φ(k) = 1 + cos(q, k), from 0 to 2.

    The first-order Taylor polynomial of the exponential at unit vectors.  Opposite vectors have
    similarity 0, so a query may see nothing.

    Args:
        x: (…, d) of any length: the largest number is divided out first, so no square overflows.

    Returns:
        (…, d + 1).  A zero vector has no direction: [1, 0], which is alike to all others, with
        gradient 0.
    """
    largest = ops.max(ops.abs(data_of(x)), axis=-1, keepdims=True)
    zero = largest == 0
    y = x / ops.where(zero, 1.0, largest)  # a constant for the gradient: the direction ignores it
    squares = ops.sum(y * y, axis=-1, keepdims=True)
    unit = y * ops.where(zero, 0.0, ops.rsqrt(ops.where(zero, 1.0, squares)))
    return ops.concatenate([_ones(x), unit], axis=-1)


# Polynomials


def taylor_features(x: Array) -> Array:
    """[1, u, vec(u uᵀ)/√2] with u = x d^-¼: φ(q)ᵀ φ(k) = 1 + s + s²/2 ≥ ½, s = q·k/√d.

    Args:
        x: (…, d).

    Returns:
        (…, 1 + d + d²).
    """
    u = _quarter(x)
    return ops.concatenate([_ones(x), u, _outer(u, u) * math.sqrt(0.5)], axis=-1)


def symmetric_taylor_features(x: Array) -> Array:
    """``taylor_features`` with each product uᵢ uⱼ, i < j, once instead of twice over √2.

    The inner products are the same.

    Args:
        x: (…, d).

    Returns:
        (…, 1 + d + d(d + 1)/2).
    """
    u = _quarter(x)
    d = x.shape[-1]
    rows = [u[..., i : i + 1] * u[..., i + 1 :] for i in range(d - 1)]
    squares = ops.square(u) * math.sqrt(0.5)
    return ops.concatenate([_ones(x), u, squares, *rows], axis=-1)


def polynomial_features(x: Array, order: int = 2) -> Array:
    """x^⊗m/√m! for m = 0 … n: φ(q)ᵀ φ(k) = Σ sᵐ/m!, s = q·k, which is within
    |s|ⁿ⁺¹ e^|s| / (n + 1)! of eˢ.

    Args:
        x: (…, d).
        order: n ≥ 0.  It is positive for all s if n is even; for odd n it is not.

    Returns:
        (…, 1 + d + … + dⁿ).

    Raises:
        ValueError: ``order`` is negative.
    """
    if order < 0:
        raise ValueError(f"the order of a polynomial is at least 0, got {order}")
    powers = [_ones(x)]
    for m in range(1, order + 1):
        powers.append(_outer(powers[-1], x) * (1.0 / math.sqrt(m)))
    return ops.concatenate(powers, axis=-1)


def limit_features(x: Array, power: int = 2) -> Array:
    """[1, x/√n]^⊗n: φ(q)ᵀ φ(k) = (1 + s/n)ⁿ, s = q·k, which is within s² e^|s| / 2n of eˢ.

    Args:
        x: (…, d).
        power: n ≥ 1.  The similarity is not negative if n is even.

    Returns:
        (…, (1 + d)ⁿ).

    Raises:
        ValueError: ``power`` is below 1.
    """
    if power < 1:
        raise ValueError(f"the power is at least 1, got {power}")
    base = ops.concatenate([_ones(x), x * (1.0 / math.sqrt(power))], axis=-1)
    y = base
    for _ in range(power - 1):
        y = _outer(y, base)
    return y


def dpfp_features(x: Array, nu: int = 1) -> Array:
    """rᵢ rᵢ₋ⱼ for j = 1 … ν with r = max([x, −x], 0), indices modulo 2d: sparse and deterministic.

    Args:
        x: (…, d).
        nu: ν, from 1 to 2d − 1.

    Returns:
        (…, 2 d ν), not negative.  One-dimensional and zero vectors have no features.

    Raises:
        ValueError: ``nu`` is out of range.
    """
    d = x.shape[-1]
    if not 1 <= nu < 2 * d:
        raise ValueError(f"dpfp_features takes 1 ≤ nu ≤ 2 d − 1 = {2 * d - 1}, got {nu}")
    r = ops.relu(ops.concatenate([x, -x], axis=-1))
    return ops.concatenate([r * ops.roll(r, j, axis=-1) for j in range(1, nu + 1)], axis=-1)


def _ones(x: Any) -> Any:
    return of(x).ones((*x.shape[:-1], 1), x.dtype)


def _quarter(x: Any) -> Any:
    if x.shape[-1] == 0:
        raise ValueError(f"taylor_features needs at least one number a vector, got {x.shape}")
    return x * x.shape[-1] ** -0.25


def _outer(a: Any, b: Any) -> Any:
    """a ⊗ b over the last axes, flattened."""
    product = a[..., :, None] * b[..., None, :]
    return product.reshape(*a.shape[:-1], a.shape[-1] * b.shape[-1])
