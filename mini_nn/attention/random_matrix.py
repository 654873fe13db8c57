"""Laws of random projections: m directions in d dimensions for the random features of attention.

Letters: W (m, d) with rows w_i = R_i u_i, length times direction.  A row is *Gaussian* if its law
is N(0, I), which is what an unbiased estimate of e^{q·k} asks of every row; how the rows depend on
each other decides the variance only.

==============================================================  =======================
rows independent, N(0, I)                                       ``gaussian_matrix``
directions orthogonal in blocks of d rows, R ~ χ_d: Gaussian,   ``orthogonal_matrix``
Choromanski et al. 2021, arXiv:2009.14794, Section 2.4; Yu et
al. 2016, arXiv:1610.09072, Section 3
the same with R = √d: kernel SMREG ≤ SM, arXiv:2009.14794,      ``regularized_matrix``
Theorem 1
R_i the i / (m + 1) quantile of χ_d: J. Su 2020, kexue.fm 7921  ``quantile_matrix``
the (i − ½) / m quantile                                        ``midpoint_matrix``
the (i − 1 + U_i) / m quantile, rows in random order: Gaussian  ``jittered_matrix``
products of d⌈ln d⌉ random rotations of two axes,               ``givens_matrix``
arXiv:2009.14794's code; Choromanski et al. 2019
H D₁ H D₂ H D₃, H Hadamard's matrix and D random signs: Yu et   ``hadamard_matrix``
al. 2016, Section 4; Choromanski et al. 2017, arXiv:1703.00864
==============================================================  =======================

All have one call, ``law(m, d, rng, dtype="float32")``, and give an array on the current backend;
the numbers are drawn on the host, so that a seed gives the same ones everywhere.  Three of them
also take other lengths, by the keyword ``norms``.

What makes the orthogonal rows Gaussian is easily lost.  Q of a QR decomposition has the Haar
measure only with the signs of R's diagonal (Mezzadri 2006, arXiv:math-ph/0609050): without them
E Q_jj ≠ 0, and positive features are biased by a third at d = 8.  And lengths taken from the matrix
that was decomposed depend on the directions: E w_jj² = (d² + 4(d − j) + 2) / (d² + 2d).

Deviations: the two structured laws are built as dense matrices, so they save random numbers and not
time.  Givens' products start from a permutation with random signs and turn by angles of the whole
circle, so that mean and covariance are exactly a Gaussian's; released code starts from the identity
and turns by angles in [0, π).  All three stratified laws put the lengths in random order.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from .. import backend
from ..backend import Array, using
from ..nn.init import orthogonal_
from ..rng import Rng

__all__ = [
    "chi_norms", "constant_norms", "gaussian_matrix", "givens_matrix", "hadamard_matrix",
    "jittered_matrix", "jittered_norms", "midpoint_matrix", "midpoint_norms", "orthogonal_matrix",
    "quantile_matrix", "quantile_norms", "regularized_matrix",
]  # fmt: skip

Norms = Callable[[int, int, Rng], Array]
"""Draws the lengths (m,) of m rows in d dimensions, float64 on the host."""


# Lengths of the rows


def chi_norms(m: int, d: int, rng: Rng) -> Array:
    """Independent lengths of N(0, I) vectors: χ with d degrees of freedom."""
    return rng.host.chisquare(d, size=m) ** 0.5


def constant_norms(m: int, d: int, rng: Rng) -> Array:
    """√d everywhere, the root of E R² = d."""
    return _on_host((m,)) + math.sqrt(d)


def quantile_norms(m: int, d: int, rng: Rng) -> Array:
    """The lengths that divide χ_d into m + 1 parts of equal probability, in random order.

    Biased low: the tails of both outer parts are cut off, E R² / d = 0.965 at d = m = 8.
    """
    return _chi_quantile((rng.host.permutation(m) + 1.0) / (m + 1.0), d)


def midpoint_norms(m: int, d: int, rng: Rng) -> Array:
    """The medians of m parts of χ_d of equal probability, in random order; slightly biased low."""
    return _chi_quantile((rng.host.permutation(m) + 0.5) / m, d)


def jittered_norms(m: int, d: int, rng: Rng) -> Array:
    """One length from each of m parts of χ_d of equal probability, in random order.

    A part that is chosen uniformly and a point within it are together a draw from χ_d: every single
    length has this law, and only jointly they are stratified.
    """
    return _chi_quantile((rng.host.permutation(m) + rng.host.random(m)) / m, d)


# Laws


def gaussian_matrix(m: int, d: int, rng: Rng, dtype: Any = "float32") -> Array:
    """Independent standard normal entries.

    Args:
        m: rows, the number of features.
        d: columns, the dimension of a head.
        rng: the stream to draw from; the caller keeps it, to draw again later.
        dtype: of the result.

    Returns:
        (m, d), on the current backend.

    Raises:
        ValueError: m or d is below 1.
        TypeError: ``dtype`` is not a floating-point one.
    """
    _check(m, d)
    return _placed(rng.host.standard_normal((m, d)), dtype)


def orthogonal_matrix(
    m: int, d: int, rng: Rng, dtype: Any = "float32", *, norms: Norms = chi_norms
) -> Array:
    """Directions of Haar measure, orthogonal within each block of d rows, and independent lengths.

    Blocks are independent of each other; where d does not divide m the last one is the first rows
    of a block of its own.  With d = 1 the directions are ±1.

    Args:
        m, d, rng, dtype: as for ``gaussian_matrix``.
        norms: draws the lengths.

    Returns:
        (m, d).

    Raises:
        ValueError, TypeError: as ``gaussian_matrix``.
    """
    _check(m, d)
    q = _on_host((m, d))
    for start in range(0, m, d):
        orthogonal_(q[start : start + d], rng=rng)
    return _scaled(q, norms, rng, dtype)


def regularized_matrix(m: int, d: int, rng: Rng, dtype: Any = "float32") -> Array:
    """``orthogonal_matrix`` with all lengths √d; arguments and errors are the same.

    Its kernel is smaller than e^{q·k}, by the factor ₀F₁(d/2; d‖q + k‖²/4) e^{−‖q + k‖²/2}, which
    goes to 1 with d.
    """
    return orthogonal_matrix(m, d, rng, dtype, norms=constant_norms)


def quantile_matrix(m: int, d: int, rng: Rng, dtype: Any = "float32") -> Array:
    """``orthogonal_matrix`` with ``quantile_norms``; arguments and errors are the same."""
    return orthogonal_matrix(m, d, rng, dtype, norms=quantile_norms)


def midpoint_matrix(m: int, d: int, rng: Rng, dtype: Any = "float32") -> Array:
    """``orthogonal_matrix`` with ``midpoint_norms``; arguments and errors are the same."""
    return orthogonal_matrix(m, d, rng, dtype, norms=midpoint_norms)


def jittered_matrix(m: int, d: int, rng: Rng, dtype: Any = "float32") -> Array:
    """``orthogonal_matrix`` with ``jittered_norms``; arguments and errors are the same."""
    return orthogonal_matrix(m, d, rng, dtype, norms=jittered_norms)


def givens_matrix(
    m: int, d: int, rng: Rng, dtype: Any = "float32", *, norms: Norms = chi_norms
) -> Array:
    """Blocks that are products of d⌈ln d⌉ rotations, each in a plane of two random axes.

    Rows are exactly orthogonal within a block, W and −W have one law, and every row has mean 0 and
    covariance I.  Beyond d = 2 it is close to the Haar measure and not equal to it: higher moments,
    and with them e^{q·k}, are not exact.

    Args:
        m, d, rng, dtype, norms: as for ``orthogonal_matrix``.

    Returns:
        (m, d).

    Raises:
        ValueError, TypeError: as ``gaussian_matrix``.
    """
    _check(m, d)
    host, q = rng.host, _on_host((m, d))
    for start in range(0, m, d):
        block = _on_host((d, d))
        block[range(d), host.permutation(d)] = _signs(rng, d)
        for _ in range(d * math.ceil(math.log(d))):
            pair = host.choice(d, 2, replace=False)
            angle = host.uniform(0.0, 2.0 * math.pi)
            c, s = math.cos(angle), math.sin(angle)
            first, second = block[pair]
            block[pair[0]], block[pair[1]] = c * first + s * second, c * second - s * first
        q[start : start + d] = block[: m - start]
    return _scaled(q, norms, rng, dtype)


def hadamard_matrix(
    m: int, d: int, rng: Rng, dtype: Any = "float32", *, norms: Norms = chi_norms
) -> Array:
    """Blocks H D₁ H D₂ H D₃: Hadamard's matrix over √d and independent diagonals of signs.

    Rows are exactly orthogonal within a block, W and −W have one law, and every row has mean 0 and
    covariance I.  There are only 2^{3d} blocks, so it is not the Haar measure: higher moments, and
    with them e^{q·k}, are right up to 1/d; at d = 1 and d = 2 the directions are a handful.

    Args:
        m, d, rng, dtype, norms: as for ``orthogonal_matrix``; d is a power of two.  Yu et al. take
            ``constant_norms``.

    Returns:
        (m, d).

    Raises:
        ValueError, TypeError: as ``gaussian_matrix``; or d is no power of two: pad queries and keys
            with zeros up to the next one, which changes no product w·x.
    """
    _check(m, d)
    if d & (d - 1):
        raise ValueError(
            f"hadamard_matrix needs d to be a power of two, got {d}: pad queries and keys with "
            f"zeros to {1 << d.bit_length()} dimensions, or use orthogonal_matrix"
        )
    h = _on_host((1, 1)) + 1.0
    while len(h) < d:  # Sylvester: H_2d = [[H, H], [H, −H]] / √2
        h = h.repeat(2, 0).repeat(2, 1) * math.sqrt(0.5)
        h[1::2, 1::2] *= -1.0
    q = _on_host((m, d))
    for start in range(0, m, d):
        block = h
        for step in range(3):
            block = (block if step == 0 else block @ h) * _signs(rng, d)
        q[start : start + d] = block[: m - start]
    return _scaled(q, norms, rng, dtype)


def _check(m: int, d: int) -> None:
    if m < 1 or d < 1:
        raise ValueError(f"a projection has m ≥ 1 features of d ≥ 1 dimensions, got m={m}, d={d}")


def _on_host(shape: tuple[int, ...]) -> Array:
    with using("numpy") as host:
        return host.xp.zeros(shape, "float64")


def _signs(rng: Rng, d: int) -> Array:
    return rng.host.integers(0, 2, size=d) * 2.0 - 1.0


def _chi_quantile(p: Array, d: int) -> Array:
    """R with P(χ_d ≤ R) = p: χ_d² / 2 has the gamma law of shape d / 2."""
    return (2.0 * backend.get("numpy").special.gammaincinv(d / 2.0, p)) ** 0.5


def _scaled(q: Array, norms: Norms, rng: Rng, dtype: Any) -> Array:
    m, d = q.shape
    return _placed(q * norms(m, d, rng)[:, None], dtype)


def _placed(w: Array, dtype: Any) -> Array:
    w = w.astype(dtype)
    if w.dtype.kind != "f":
        raise TypeError(f"a projection has a floating-point dtype, got {w.dtype}")
    return backend.current().xp.asarray(w)
