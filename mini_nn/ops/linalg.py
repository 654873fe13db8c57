"""Norms, systems of linear equations, factorisations; the products are in ``products``.

Names, arguments and defaults are NumPy's; matrices are the last two axes, leading axes are
batches.  Ȳ is the cotangent of Y and Aᵀ swaps the last two axes.  Rules: M. Giles, "Collected
matrix derivative results for forward and reverse mode algorithmic differentiation" (2008);
Cholesky: I. Murray 2016, arXiv:1602.07527; QR: Walter & Lehmann, "Algorithmic differentiation of
linear algebra functions with application in optimum experimental design" (2010), arXiv:1001.1654.

Conventions:

=======================  =================================================================
``norm`` at 0            every derivative is 0, for every ``ord``
``norm`` with ord ±inf   elements of the same size share the gradient equally
``norm`` with other ord  an element that is 0 gets 0
``cholesky``             reads the lower triangle; its gradient is symmetric, as A must be
``slogdet``              the sign has derivative 0
``det, slogdet``         of a singular matrix have values, their derivatives LinAlgError
=======================  =================================================================
"""

from __future__ import annotations

import math
from typing import Any

from ..engine import primitive
from .elementwise import abs as absolute
from .elementwise import equal, of, power, sqrt, where
from .products import matmul
from .reduce import count_nonzero
from .reduce import max as largest
from .reduce import min as smallest
from .reduce import sum as total
from .shape import expand_dims, matrix_transpose, reshape, tril, triu

__all__ = ["cholesky", "det", "inv", "norm", "qr", "slogdet", "solve"]


# Norms


@primitive
def _euclidean(x: Any, axis: Any, keepdims: bool) -> Any:
    return sqrt(total(x * x, axis, keepdims))


def _euclidean_rule(g: Any, x: Any, y: Any, axis: Any) -> Any:
    """x̄ = ȳ x / |x|, and 0 where |x| = 0."""
    zero = equal(y, 0)
    scale = where(zero, 0.0, g / where(zero, 1.0, y))
    axes = range(x.ndim) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    ones = {a % x.ndim for a in axes}
    return reshape(scale, tuple([1 if i in ones else n for i, n in enumerate(x.shape)])) * x


_euclidean.derivative(x=_euclidean_rule)


def norm(x: Any, ord: Any = None, axis: Any = None, keepdims: bool = False) -> Any:
    """The length of vectors, or a norm of matrices.

    Args:
        x: any shape.
        ord: for vectors a number p > 0, (Σ |x|ᵖ)^(1/p), also ±inf for the largest and smallest |x|
            and 0 for the number of elements that are not 0; for matrices ``"fro"``, or ±1 and ±inf
            for the largest (smallest) sum over a column and over a row; None: the root of the sum
            of all squares.
        axis: the axis of vectors, or the two axes of matrices; None: all axes for ``ord`` None, the
            vector or the matrix that x is otherwise.
        keepdims: leave the axes with length 1.

    Raises:
        ValueError: ``ord`` is none of these.
    """
    if ord is None:
        return _euclidean(x, axis, keepdims)
    if axis is None:
        if x.ndim not in (1, 2):
            raise ValueError(
                f"norm of shape {x.shape} with ord {ord!r} needs its axis (or two axes)"
            )
        axis = (*range(x.ndim),)
    axes = axis if isinstance(axis, tuple) else (axis,)
    if len(axes) == 2:
        return _matrix_norm(x, ord, axes, keepdims)
    if ord == 2:
        return _euclidean(x, axes, keepdims)
    if ord == 0:
        return count_nonzero(x, axes, keepdims).astype(x.dtype)
    if ord == 1:
        return total(absolute(x), axes, keepdims)
    if ord == math.inf:
        return largest(absolute(x), axes, keepdims)
    if ord == -math.inf:
        return smallest(absolute(x), axes, keepdims)
    if isinstance(ord, str) or ord < 0 or len(axes) != 1:
        raise ValueError(
            f"ord is None, 'fro' (of matrices), ±inf, 0 or a number above; got {ord!r}"
        )
    size = absolute(x)
    return _safe_power(total(_safe_power(size, ord), axes, keepdims), 1 / ord)


def _safe_power(x: Any, p: float) -> Any:
    """xᵖ for x ≥ 0, all of whose derivatives are 0 at 0."""
    zero = equal(x, 0)
    return where(zero, 0.0, power(where(zero, 1.0, x), p))


def _matrix_norm(x: Any, ord: Any, axes: Any, keepdims: bool) -> Any:
    if ord == "fro":
        return _euclidean(x, axes, keepdims)
    rows, columns = [a % x.ndim for a in axes]
    if ord not in (1, -1, math.inf, -math.inf):
        raise ValueError(f"ord of a matrix norm is None, 'fro', ±1 or ±inf, got {ord!r}")
    over = (rows, columns) if ord in (1, -1) else (columns, rows)
    sums = total(absolute(x), over[0], True)
    y = (largest if ord > 0 else smallest)(sums, over, True)
    return y if keepdims else reshape(y, [n for i, n in enumerate(x.shape) if i not in over])


# Systems of equations and factorisations


@primitive
def solve(a: Any, b: Any) -> Any:
    """X with A X = B.

    Args:
        a: (…, n, n).
        b: (n,), or (…, n, k); leading axes broadcast.

    Returns:
        (…, n) for a vector b, else (…, n, k).

    Raises:
        LinAlgError: a is singular (on a GPU the result has inf or nan instead) or not square.
    """
    xp = of(a)
    columns = b.reshape((-1, 1)) if b.ndim == 1 else b
    batch = _batch(a.shape[:-2], columns.shape[:-2])
    a = xp.broadcast_to(a, (*batch, *a.shape[-2:]))
    columns = xp.broadcast_to(columns, (*batch, *columns.shape[-2:]))
    x = xp.linalg.solve(a, columns)
    return x.reshape(x.shape[:-1]) if b.ndim == 1 else x


def _batch(first: Any, second: Any) -> tuple[int, ...]:
    """The leading axes that both broadcast to."""
    longer, shorter = sorted((first, second), key=len, reverse=True)
    shorter = (1,) * (len(longer) - len(shorter)) + tuple(shorter)
    return tuple([n if m == 1 else m for n, m in zip(longer, shorter, strict=True)])


@solve.joint_derivative("a", "b")
def _solve_rule(g: Any, needs: Any, a: Any, y: Any) -> tuple[Any, Any]:
    """B̄ = A⁻ᵀ X̄ and Ā = −B̄ Xᵀ."""
    vector = y.ndim < a.ndim
    if vector:
        g, y = expand_dims(g, -1), expand_dims(y, -1)
    back = solve(matrix_transpose(a), g)
    return (
        -matmul(back, matrix_transpose(y)) if needs[0] else None,
        (reshape(back, back.shape[:-1]) if vector else back) if needs[1] else None,
    )


@primitive
def inv(a: Any) -> Any:
    """The inverse of (…, n, n).

    Raises:
        LinAlgError: a is singular or not square.
    """
    return of(a).linalg.inv(a)


def _inv_rule(g: Any, y: Any) -> Any:
    """Ā = −Yᵀ Ȳ Yᵀ."""
    transposed = matrix_transpose(y)
    return -matmul(matmul(transposed, g), transposed)


inv.derivative(a=_inv_rule)


def _as_matrix(g: Any) -> Any:
    return g.reshape((*g.shape, 1, 1))


@primitive
def det(a: Any) -> Any:
    """The determinant of (…, n, n)."""
    return of(a).linalg.det(a)


det.derivative(a=lambda g, a, y: _as_matrix(g * y) * matrix_transpose(inv(a)))


@primitive
def slogdet(a: Any) -> Any:
    """(sign, ln |det|) of (…, n, n): (0, −inf) if a is singular."""
    return tuple(of(a).linalg.slogdet(a))


slogdet.derivative(a=lambda g, a: _as_matrix(g[1]) * matrix_transpose(inv(a)))


@primitive
def cholesky(a: Any) -> Any:
    """The lower triangular L with positive diagonal and A = L Lᵀ, for symmetric (…, n, n).

    Raises:
        LinAlgError: a is not positive definite.
    """
    return of(a).linalg.cholesky(a)


def _cholesky_rule(g: Any, y: Any) -> Any:
    """Ā = (S + Sᵀ)/2 with S = L⁻ᵀ Φ(Lᵀ L̄) L⁻¹; Φ: the lower triangle with half the diagonal."""
    upper = matrix_transpose(y)
    product = matmul(upper, tril(g))
    half = 0.5 * (tril(product) + tril(product, -1))
    s = solve(upper, matrix_transpose(solve(upper, half)))
    return 0.5 * (s + matrix_transpose(s))


cholesky.derivative(a=_cholesky_rule)


@primitive
def qr(a: Any) -> Any:
    """(Q, R) with A = Q R for (…, m, n), m ≥ n: Q (…, m, n) with QᵀQ = 1, R (…, n, n) triangular.

    Raises:
        ValueError: there are more columns than rows, for which Q has no derivative of this form.
    """
    if a.ndim < 2 or a.shape[-2] < a.shape[-1]:
        raise ValueError(f"qr takes (…, m, n) with m ≥ n, got shape {a.shape}")
    return tuple(of(a).linalg.qr(a))


def _qr_rule(g: Any, y: Any) -> Any:
    """Ā = (Q̄ + Q sym(M)) R⁻ᵀ, M = R R̄ᵀ − Q̄ᵀ Q; sym copies the lower triangle to the upper."""
    (q, r), (gq, gr) = y, g
    m = matmul(r, matrix_transpose(triu(gr))) - matmul(matrix_transpose(gq), q)
    symmetric = tril(m) + matrix_transpose(tril(m, -1))
    return matrix_transpose(solve(r, matrix_transpose(gq + matmul(q, symmetric))))


qr.derivative(a=_qr_rule)
