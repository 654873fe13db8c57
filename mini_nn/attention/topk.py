"""Explicit sparse attention: each query keeps its k largest scores.

Zhao, Lin, Zhang, Ren, Su, Sun 2019, "Explicit Sparse Transformer: Concentrated Attention Through
Explicit Selection", arXiv:1912.11637.

==========================================================  ==================
3  P = Q Kᵀ / √d                                            ``topk_attention``
3  M(P, k)ᵢⱼ = Pᵢⱼ where it is among the k largest, −∞ else  ``topk_mask``
3  softmax(M(P, k)) V, and ∂M/∂P = 1 where kept, 0 else     ``topk_attention``
==========================================================  ==================

Which scores are kept is a constant for the gradient, so the scores that were dropped get none.
All n × m scores are computed and sorted: what is saved is attention spent on noise, not time.

Deviations: the paper keeps every score that is at least as large as the k-th, so ties can keep
more than k; here exactly k are kept, of equal ones the first, which every sort that is stable finds
alike on every backend.  float16 is summed in float32.
"""

from __future__ import annotations

from typing import Any

from .. import ops
from ..backend import Array
from ..engine import data_of
from ..ops.elementwise import of
from .arguments import narrow, wide
from .patterns import check_sizes
from .sparse import joined

__all__ = ["topk_attention", "topk_mask"]


def topk_mask(scores: Array, k: int) -> Array:
    """Which scores are among the k largest of their row.

    Args:
        scores: (…, m); −inf for keys that may not be seen, nan counts as the largest.
        k: at least 1; m or more keeps all that are not −inf.

    Returns:
        (…, m) booleans, k of them true in a row, or fewer if fewer are above −inf.  Of equal scores
        the first are kept.

    Raises:
        ValueError: k is below 1.
    """
    check_sizes(k=k)
    scores = data_of(scores)
    m = scores.shape[-1]
    backwards = of(scores).argsort(scores[..., ::-1], axis=-1, kind="stable")
    descending = m - 1 - backwards[..., ::-1]
    rank = of(scores).argsort(descending, axis=-1, kind="stable")
    return (rank < k) & (scores != float("-inf"))


def topk_attention(
    query: Array,
    key: Array,
    value: Array,
    k: int,
    is_causal: bool = False,
    state: Any = None,
    key_mask: Any = None,
) -> Any:
    """Softmax attention to the k keys with the largest scores, of those that may be seen.

    Args:
        query: (…, n, d); the last n of the m positions.
        key: (…, m, d).
        value: (…, m, e).
        k: keys that a query keeps; m or more is softmax attention.
        is_causal: only keys j ≤ i in the m positions; rows with fewer than k of them keep all.
        state: None, ``()`` before the first token, or what the last call returned beside its
            output: all keys and values so far.  Needs is_causal and n = m.
        key_mask: booleans that broadcast to (…, m), true for real tokens and false for pads; with a
            state, of the new tokens.

    Returns:
        (…, n, e), or this and the next state; a query that may look nowhere gets zeros and
        gradient 0.

    Raises:
        ValueError: the shapes or sizes do not fit, or there is a state without is_causal.
        TypeError: ``key_mask`` is not boolean, or the state no tuple.
    """
    check_sizes(k=k)
    past = joined(query, key, value, is_causal, state, key_mask)
    n, m = query.shape[-2], past.key.shape[-2]
    xp = of(data_of(query))
    q, keys = wide(query) * query.shape[-1] ** -0.5, wide(past.key)
    scores = ops.matmul(q, ops.matrix_transpose(keys))
    allowed = past.seen[..., None, :]
    if is_causal:
        allowed = allowed & (xp.arange(m) <= xp.arange(m - n, m)[:, None])
    kept = topk_mask(xp.where(allowed, data_of(scores), float("-inf")), k)
    weights = ops.softmax(ops.where(kept, scores, float("-inf")), axis=-1)
    y = narrow(ops.matmul(weights, wide(past.value)), query)
    return y if state is None else (y, past)
