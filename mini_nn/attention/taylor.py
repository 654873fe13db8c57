"""The exponential of softmax cut off after an even power.

====================================================  ==============================================
f_n(x) = Σ_{k ≤ n} xᵏ / k!                            de Brébisson & Vincent 2015, arXiv:1511.05042
                                                      (n = 2); Banerjee et al. 2020, "Exploring
                                                      alternatives to softmax function",
                                                      arXiv:2011.11538: ``taylor_exp``,
                                                      ``taylor_softmax``
f_n > 0 for even n;  f_n′ = f_{n−1};  its only        Su 2020, kexue.fm 7919: ``taylor_minimum``,
minimum x*ₙ is the zero of f_{n−1}, left of which     ``clipped``
f_n rises again: f_n(max(x, x*ₙ)) is monotone
attention with sim = f_n(q·k / √d)                    the same: ``taylor_attention``
====================================================  ==============================================

At its minimum f_n = f_{n−1} + xⁿ/n! is x*ⁿ/n!, and never 0.

Deviations: none.  ``taylor_attention`` sums float16 in float32.
"""

from __future__ import annotations

from typing import Any

from .. import ops
from .arguments import check_attention, score_scale, wide
from .generalized import dot_product_similarity, generalized_attention

__all__ = ["taylor_attention", "taylor_exp", "taylor_minimum", "taylor_softmax"]


def taylor_exp(x: Any, order: int, clipped: bool = False) -> Any:
    """f_n(x) = 1 + x + … + xⁿ/n!.

    Args:
        x: any shape.
        order: n ≥ 0; for odd n the result is negative left of ``taylor_minimum(n + 1)``.
        clipped: raise x to ``taylor_minimum(n)`` where it is below, for even n ≥ 2.

    Raises:
        ValueError: n is below 0, or odd (or 0) and to be clipped.
    """
    if order < 0:
        raise ValueError(f"a polynomial has an order of 0 or more, got {order}")
    if clipped:
        x = ops.maximum(x, taylor_minimum(order))
    return _horner(x, order) if order else ops.ones_like(x)


def _horner(x: Any, order: int) -> Any:
    """1 + x (1 + x/2 (1 + … x/n)), for order ≥ 1."""
    y = 1.0 + x * (1.0 / order)
    for k in range(order - 1, 0, -1):
        y = 1.0 + x * (1.0 / k) * y
    return y


def taylor_minimum(order: int) -> float:
    """x*ₙ, where f_n is smallest: −1 for n = 2, −1.596… for n = 4.

    Newton's steps x − f_{n−1}/f_{n−2} from −n: left of its zero f_{n−1} is concave and rises, so
    they come closer from the left without ever passing it, until rounding stops them.

    Raises:
        ValueError: n is odd or below 2.
    """
    if order < 2 or order % 2:
        raise ValueError(f"only even orders from 2 on have a smallest value, got {order}")
    if order == 2:
        return -1.0
    x, better = -float(order) - 1.0, -float(order)
    while better > x:
        x = better
        better = x - _horner(x, order - 1) / _horner(x, order - 2)
    return x


def taylor_softmax(x: Any, order: int = 2, clipped: bool = False, axis: int = -1) -> Any:
    """f_n(x) / Σ f_n(x) along an axis: positive, sums to 1, approaches softmax as n grows.

    Unlike softmax it changes if a number is added to all x, and −inf hides nothing (clipped, it
    counts like x*ₙ; otherwise it gives nan): set weights to 0 instead.  It overflows where xⁿ/n!
    does.

    Args:
        x: any shape with at least one axis.
        order: n, even and at least 2.
        clipped: let it be monotone in each x; otherwise very negative x count like positive ones.
        axis: what it sums over.

    Raises:
        ValueError: n is odd or below 2.
    """
    _check_even(order)
    weights = taylor_exp(x, order, clipped)
    return weights / weights.sum(axis=axis, keepdims=True)


def taylor_attention(
    query: Any,
    key: Any,
    value: Any,
    order: int = 2,
    clipped: bool = False,
    is_causal: bool = False,
    scale: float | None = None,
    state: Any = None,
) -> Any:
    """Σ_j f_n(s_ij) v_j / Σ_j f_n(s_ij), s = Q Kᵀ · scale, by its (n, m) weights.

    Args:
        query: (…, n, d).
        key: (…, m, d).
        value: (…, m, e).
        order, clipped: as for ``taylor_softmax``.
        is_causal, state: as for ``generalized_attention``.
        scale: the factor of the scores; None for 1/√d.

    Returns:
        (…, n, e); with a state also the next one, the keys and values so far.

    Raises:
        ValueError: n is odd or below 2, the shapes do not fit, or a state without ``is_causal``.
        TypeError: the state is no tuple.
    """
    _check_even(order)
    check_attention(query, key, value)
    factor = score_scale(scale, wide(query))

    def similarity(q: Any, k: Any) -> Any:
        return taylor_exp(dot_product_similarity(q * factor, k), order, clipped)

    return generalized_attention(query, key, value, similarity, is_causal=is_causal, state=state)


def _check_even(order: int) -> None:
    if order < 2 or order % 2:
        raise ValueError(
            f"weights have to be positive, which takes an even order from 2 on, got {order}"
        )
