"""What a function does to a standard normal number: its moments, its gain, its kernel.

=====================================================  ========================================
c_f = E f(z)², gain c_f^(−1/2)                         ``gaussian_moments``, ``gain``
F(v) = E f(√v z)² / c_f, its fixed point 1, F'(1)      ``second_moment_map``, ``stability``
E f(u₁) f(u₂) / c_f, (u₁, u₂) of correlation c         ``correlation_map``
E f = 0, E f² = 1 for SELU                             ``selu_constants``
=====================================================  ========================================

J. Su 2021, kexue.fm/archives/8620 (corrected activations); B. Poole et al. 2016, arXiv:1606.05340,
eqs. 3 and 5 (the maps); Y. Cho, L. Saul 2009, *Kernel Methods for Deep Learning* (ReLU in closed
form); G. Klambauer, T. Unterthiner, A. Mayr, S. Hochreiter 2017, arXiv:1706.02515, eq. 14 (SELU).

A law of initialisation that gives a layer's weights the variance gain²/fan_in keeps the second
moment 1 through layers of infinite width.  Whether it also comes back to 1 after a disturbance is
F'(1) < 1; for GELU, SiLU and Mish it is above 1, so that errors of finite width grow from layer to
layer and a test of one layer sees nothing.

All of it is quadrature in float64 on the host, Gauss-Legendre in pieces that are halved until they
agree with their halves: exact to about 1e-12 wherever f has its kinks and jumps; in two dimensions
where it has them at 0, and to about 1e-8 where it has kinks elsewhere.

Deviations: none.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ..backend import Array

Function = Callable[[Any], Any]
"""Maps a float64 array of any shape to one, elementwise."""

__all__ = [
    "correlation_map", "expectation", "gain", "gaussian_moments", "second_moment_map",
    "selu_constants", "stability",
]  # fmt: skip

REACH = 13.0
"""Standard deviations; beyond, the density is below 1e-37."""

HALVINGS = 50


@functools.cache
def _rule() -> tuple[Array, Array]:
    """Nodes and weights for [0, 2]."""
    nodes, weights = np.polynomial.legendre.leggauss(24)
    return 1.0 + nodes, weights


def _spread(low: Array, high: Array) -> tuple[Array, Array]:
    """Nodes and weights for each [low, high]: (pieces, nodes)."""
    nodes, weights = _rule()
    half = (high - low)[:, None] / 2.0
    return low[:, None] + half * nodes, half * weights


def _pieces(g: Function, low: Array, high: Array) -> Array:
    """The integrals of g over [low, high], one for each pair."""
    z, weights = _spread(low, high)
    return (weights * g(z)).sum(axis=1)


def _integral(g: Function, edges: list[float], tolerance: float = 1e-14) -> float:
    """∫ g from the first edge to the last, with no piece across an edge."""
    low, high = np.asarray(edges[:-1]), np.asarray(edges[1:])
    whole = _pieces(g, low, high)
    total, tolerance = 0.0, tolerance * abs(whole).sum()
    for _ in range(HALVINGS):
        middle = (low + high) / 2.0
        left, right = _pieces(g, low, middle), _pieces(g, middle, high)
        differ = abs(left + right - whole) > tolerance  # nan is as good as it gets
        total += float((left + right)[~differ].sum())
        if not differ.any():
            break
        low, middle, high = low[differ], middle[differ], high[differ]
        whole = np.concatenate([left[differ], right[differ]])
        low, high = np.concatenate([low, middle]), np.concatenate([middle, high])
    else:
        total += float(whole.sum())
    return total


def expectation(f: Function) -> float:
    """E f(z) for a standard normal z.

    Args:
        f: elementwise; it should grow slower than exp(z²/4).
    """
    edges = [-REACH, -6.0, -3.0, -1.0, 0.0, 1.0, 3.0, 6.0, REACH]
    return _integral(lambda z: f(z) * np.exp(-z * z / 2.0), edges) / math.sqrt(2.0 * math.pi)


def gaussian_moments(f: Function) -> tuple[float, float]:
    """(E f, E f²) for a standard normal argument."""
    return expectation(f), expectation(lambda z: f(z) ** 2)


def gain(f: Function) -> float:
    """1/√(E f²): the standard deviation, times √fan_in, of the weights after f.

    Raises:
        ValueError: f is 0 almost everywhere.
    """
    power = gaussian_moments(f)[1]
    if power == 0.0:
        raise ValueError("a function that is 0 almost everywhere has no gain")
    return 1.0 / math.sqrt(power)


def second_moment_map(f: Function, v: float) -> float:
    """F(v) = E f(√v z)² / E f(z)²: the second moment one layer after it was v; F(1) = 1.

    Raises:
        ValueError: v is negative.
    """
    if v < 0:
        raise ValueError(f"a second moment is at least 0, got {v}")
    root = math.sqrt(v)
    return expectation(lambda z: f(root * z) ** 2) * gain(f) ** 2


def stability(f: Function) -> float:
    """F'(1): by what factor a small error of the second moment changes per layer.

    By Stein's identity, d/dv E g(√v z) at 1 is E (z² − 1) g(z) / 2, so f needs no derivative.
    """
    return expectation(lambda z: (z * z - 1.0) / 2.0 * f(z) ** 2) * gain(f) ** 2


def correlation_map(f: Function, c: float) -> float:
    """E f(u₁) f(u₂) / E f² for standard normal u₁, u₂ of correlation c.

    For an f with E f = 0 it is the cosine of two signals after a wide layer; a layer without that
    drives all cosines up.

    Args:
        c: in [−1, 1].

    Raises:
        ValueError: c is no correlation.
    """
    if not -1.0 <= c <= 1.0:
        raise ValueError(f"a correlation lies in [−1, 1], got {c}")
    if abs(c) == 1.0:
        return expectation(lambda z: f(z) * f(c * z)) * gain(f) ** 2
    # u₁ = r cos t, u₂ = r cos(t − t₀) with cos t₀ = c: in polar coordinates what f does at 0 is on
    # lines through the origin, which are edges
    between = math.acos(c)
    lines = [k * math.pi / 2 + turn for k in (-1, 1) for turn in (0.0, between)]
    r, weight = _radii()

    def along_rays(t: Array) -> Array:
        t = t[..., None]
        return (weight * f(r * np.cos(t)) * f(r * np.cos(t - between))).sum(axis=-1)

    total = _integral(along_rays, sorted([*lines, lines[0] + 2 * math.pi]), 1e-10)
    return total / (2.0 * math.pi) * gain(f) ** 2


def _radii() -> tuple[Array, Array]:
    """Nodes r and weights of ∫ … r exp(−r²/2) dr, finer towards 0."""
    edges = np.asarray([0, 2**-8, 2**-6, 2**-4, 2**-2, 1, 2, 3, 4, 5, 6, 8, REACH])
    r, weights = (part.reshape(-1) for part in _spread(edges[:-1], edges[1:]))
    return r, weights * r * np.exp(-r * r / 2.0)


def selu_constants() -> tuple[float, float]:
    """(λ, α) for which λ · elu(z, α) has mean 0 and second moment 1, in closed form.

    With E₁ = E (eᶻ − 1) and E₂ = E (eᶻ − 1)² over z < 0: α = −1 / (√(2π) E₁), and
    λ = (1/2 + α² E₂)^(−1/2).
    """
    # E e^{kz} over z < 0 is e^{k²/2} Φ(−k)
    below = [math.exp(k * k / 2.0) * math.erfc(k / math.sqrt(2.0)) / 2.0 for k in (0, 1, 2)]
    alpha = -1.0 / (math.sqrt(2.0 * math.pi) * (below[1] - below[0]))
    square = below[2] - 2.0 * below[1] + below[0]
    return 1.0 / math.sqrt(0.5 + alpha * alpha * square), alpha
