"""By what the logits of softmax attention are multiplied, and what goes wrong otherwise.

===========================================  =======================  ===========================
E (q·k)² = d, so s = q·k/√d has variance 1   Vaswani et al. 2017,     ``dot_product_scale``
                                             arXiv:1706.03762, 3.2.1
½ Σᵢⱼ |∂pᵢ/∂sⱼ| = a (1 − Σ p²), since        Su 2023, kexue.fm 9812   ``sensitivity``
∂pᵢ/∂sⱼ = a (pᵢ δᵢⱼ − pᵢ pⱼ)
log_m n / √d, m the length trained on        Su 2021, kexue.fm 8823;  ``length_scale``
                                             Chiang & Cholak 2022,
                                             arXiv:2202.12172, 5.3
κ ln n / d                                   Su 2021, kexue.fm 8823   ``entropy_invariant_scale``
===========================================  =======================  ===========================

d is the dimension of a head, n the number of keys, a the scale and p the weights of one query.

For T5, which has no scale, the variance of queries and keys is smaller instead: the product of the
variances of their kernels is divided by d (``nn.schemes.t5_stds``).

The two scales by length are different claims.  ``length_scale`` leaves the logits at the trained
length as they are and barely changes how the entropy of random queries and keys grows with n.
``entropy_invariant_scale`` keeps that entropy flat for κ of about 4.

Deviations: the source's maximum of a (1 − Σ p²) at a = 0.84 √(ln n) belongs to an approximation;
the mean over random queries has a plateau from about √(2 ln n) on, where one weight freezes out.
"""

from __future__ import annotations

import math

from .. import ops
from ..backend import Array

__all__ = [
    "dot_product_scale", "entropy", "entropy_invariant_scale", "length_scale", "sensitivity",
]  # fmt: skip


def dot_product_scale(d: int) -> float:
    """1/√d: the ``scale`` under which logits of unit-variance queries and keys have variance 1.

    Raises:
        ValueError: d is below 1.
    """
    if d < 1:
        raise ValueError(f"the dimension of a head is at least 1, got {d}")
    return 1.0 / math.sqrt(d)


def length_scale(n: int, d: int, trained: int = 512) -> float:
    """log_m n / √d: the plain scale at n = m = ``trained`` keys, more of it for longer texts.

    Raises:
        ValueError: n is below 1, or ``trained`` below 2.
    """
    if n < 1 or trained < 2:
        raise ValueError(f"length_scale takes n ≥ 1 keys and trained ≥ 2, got {n} and {trained}")
    return math.log(n) / math.log(trained) * dot_product_scale(d)


def entropy_invariant_scale(n: int, d: int, kappa: float = 1.0 / 0.24) -> float:
    """κ ln n / d: the scale that keeps the entropy of attention about the same for every n.

    Args:
        n: keys.
        d: dimension of a head.
        kappa: κ; 1/0.24 is the source's estimate for random queries and keys.

    Raises:
        ValueError: n or d is below 1.
    """
    if n < 1 or d < 1:
        raise ValueError(f"entropy_invariant_scale takes n ≥ 1 and d ≥ 1, got {n} and {d}")
    return kappa * math.log(n) / d


def entropy(logits: Array) -> Array:
    """−Σ p ln p in nats, p = softmax(logits): from 0 (all on one key) to ln n (all alike).

    Args:
        logits: (…, n); −inf for masked keys, which add 0. A fully masked row has entropy 0.

    Returns:
        (…).
    """
    log_p = ops.log_softmax(logits, axis=-1)
    p = ops.exp(log_p)
    return -ops.sum(p * ops.where(p > 0.0, log_p, 0.0), axis=-1)


def sensitivity(logits: Array, scale: float = 1.0) -> Array:
    """a (1 − Σ p²), p = softmax(a · logits): half the sum of |∂pᵢ/∂sⱼ| over all i and j.

    It goes to 0 with a, and, where one logit is the largest, for large a as well: nothing can be
    learnt then.  Of k equal largest ones a (1 − 1/k) is left.

    Args:
        logits: (…, n).
        scale: a.

    Returns:
        (…).
    """
    p = ops.softmax(scale * logits, axis=-1)
    return scale * (1.0 - ops.sum(p * p, axis=-1))
