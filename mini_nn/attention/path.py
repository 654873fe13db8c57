"""Softmax attention whose logits, or whose values, go through a delta rule on their way.

====================================================  ========================================
a_ij = q_iᵀ H_i H_{i−1} ⋯ H_{j+1} k_j,                Yang et al. 2025, "PaTH Attention: Position
H_s = I − β_s w_s w_sᵀ                                Encoding via Accumulating Householder
                                                      Transformations", arXiv:2505.16381
A = tril(Q Kᵀ) − tril(Q Wᵀ) T tril(diag(β) W Kᵀ, −1)  there, by the UT transform:
T = (I + tril(diag(β) W Wᵀ, −1))⁻¹                    ``path_logits``
softmax(scale · A + Σ_{j < t ≤ i} log f_t) V          there, with the forget gate of Lin et al.
                                                      2025, arXiv:2503.02130:
                                                      ``path_attention``
u_i = v_i − β_i Σ_{j < i} p_ij u_j, o = softmax(A) U  DeltaFormer, in Zhong et al. 2025,
with p_i the softmax of w_i · k_j over j < i          "Understanding Transformer from the
                                                      Perspective of Associative Memory",
                                                      arXiv:2505.19488: ``deltaformer``
====================================================  ========================================

Where rotary embeddings turn a query and a key by an angle that their distance gives, PaTH applies
the maps of all tokens in between, which these tokens choose themselves.  With W = K and β = 1 the
matrix A is that of DeltaNet (``delta_weights``): PaTH is to softmax attention what the delta rule
is to linear attention.  n² time and memory, like the softmax that follows.

Deviations: the forget gate is added to the logits after they are scaled, as in 2503.02130, so that
it is a factor of the weights whatever the scale; flash-linear-attention's plain form scales it too.
float16 is summed in float32: outputs are float16, states float32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from .. import ops
from ..engine import data_of
from ..ops.elementwise import of
from .arguments import as_recurrence, narrow, rate_of, wide
from .delta import per_token
from .delta_chunks import unit_lower_inverse
from .scale import dot_product_scale

__all__ = ["DeltaFormerState", "PathState", "deltaformer", "path_attention", "path_logits"]


class PathState(NamedTuple):
    """What is handed on: keys, (…, m, d), moved by every H since; values; Σ log f since a key.

    The last is None for a sequence that is read without forgetting.
    """

    key: Any
    value: Any
    log_forget: Any


class DeltaFormerState(NamedTuple):
    """What is handed on: the keys, (…, m, d), and the corrected values u, (…, m, e)."""

    key: Any
    value: Any


def path_logits(query: Any, key: Any, direction: Any, beta: Any = 1.0) -> Any:
    """a_ij = q_iᵀ (∏_{s=j+1..i} H_s) k_j for j ≤ i, H_s = I − β_s w_s w_sᵀ, and 0 above.

    Args:
        query, key: (…, n, d).
        direction: w, (…, n, d), of any length; H is a reflection where β ‖w‖² = 2.
        beta: β, a number or broadcastable to (…, n).

    Returns:
        (…, n, n).

    Raises:
        ValueError: the shapes do not fit.
    """
    if min(query.ndim, key.ndim) < 2 or query.shape[-2:] != key.shape[-2:]:
        raise ValueError(
            f"path_logits takes query and key (…, n, d), got {query.shape} and {key.shape}"
        )
    _check_direction(direction, key)
    like, (query, key, direction) = query, map(wide, (query, key, direction))
    logits, _ = _logits(query, key, direction, per_token(beta, direction))
    return narrow(logits, like)


def _check_direction(direction: Any, key: Any) -> None:
    leads = zip(direction.shape[-3::-1], key.shape[-3::-1], strict=False)
    if direction.shape[-2:] != key.shape[-2:] or any(a != b and 1 not in (a, b) for a, b in leads):
        raise ValueError(
            f"direction is (…, n, d), one for each key: {key.shape} here, got {direction.shape}"
        )


def _logits(query: Any, key: Any, direction: Any, beta: Any) -> tuple[Any, Any]:
    """The logits (…, n, m + n) for m keys that have seen no H of the n tokens, and n of their own;
    and the keys as all n H leave them."""
    m = key.shape[-2] - query.shape[-2]
    steps, directions = beta[..., None] * direction, ops.matrix_transpose(direction)
    inverse = unit_lower_inverse(ops.matmul(steps, directions))
    keys = ops.matrix_transpose(key)
    # key m + j has met H_s where s > j
    moves = ops.matmul(inverse, ops.tril(ops.matmul(steps, keys), m - 1))
    reads = ops.tril(ops.matmul(query, directions))
    logits = ops.tril(ops.matmul(query, keys), m) - ops.matmul(reads, moves)
    return ops.tril(logits, m), key - ops.matmul(ops.matrix_transpose(moves), direction)


def path_attention(
    query: Any,
    key: Any,
    value: Any,
    direction: Any,
    beta: Any = 1.0,
    log_forget: Any = None,
    scale: float | None = None,
    is_causal: bool = True,
    state: Any = None,
) -> Any:
    """softmax(scale · A + Σ_{j < t ≤ i} log f_t) V over j ≤ i, with A of ``path_logits``.

    Args:
        query, key: (…, n, d).
        value: (…, n, e).
        direction: w, (…, n, d).
        beta: β, a number or broadcastable to (…, n).
        log_forget: log f likewise, at most 0 and finite; None for no forgetting.
        scale: the factor of A; None for 1/√d.
        is_causal: False is refused, unless there is one query for the last key.
        state: None for a whole sequence; ``()`` or a ``PathState`` to get the next one, too.  It
            grows with the sequence, and all its keys are moved by every new token.  A sequence
            forgets in all of its parts or in none: ``log_forget=0.0`` where nothing is forgotten.

    Returns:
        (…, n, e); with a state a pair of that and the next ``PathState``.

    Raises:
        ValueError: the shapes do not fit, the future is asked for, or the state comes from tokens
            with ``log_forget`` and these have none, or the other way round.
    """
    query, rows = as_recurrence(query, key, value, is_causal, state)
    _check_direction(direction, key)
    if state and (state[2] is None) != (log_forget is None):
        raise ValueError(
            "the state comes from a call with log_forget and this one has none, or the other way "
            "round: pass it in all calls of a sequence (0.0 forgets nothing) or in none"
        )
    like, (query, key, value, direction) = value, map(wide, (query, key, value, direction))
    scale = rate_of(dot_product_scale(query.shape[-1]) if scale is None else scale, query)
    beta = per_token(beta, key)
    since = None if log_forget is None else per_token(log_forget, key)
    state = state and PathState(*state)
    if state:
        key = ops.concatenate([state.key, key], axis=-2)
        value = ops.concatenate([state.value, value], axis=-2)
    m = key.shape[-2] - query.shape[-2]
    logits, key = _logits(query, key, direction, beta)
    logits = scale * logits
    if since is not None:
        logits, since = _forgetting(logits, since, state.log_forget if state else None)
    y = narrow(rows(ops.matmul(_causal_softmax(logits, m), value)), like)
    return y if state is None else (y, PathState(key, value, since))


def _forgetting(logits: Any, log_forget: Any, earlier: Any) -> tuple[Any, Any]:
    """The logits less what was forgotten since their keys, and that for each key after the last."""
    total = ops.cumsum(log_forget, axis=-1)
    born = total if earlier is None else ops.concatenate([-earlier, total], axis=-1)
    whole = log_forget.sum(axis=-1, keepdims=True)
    return logits + (total[..., :, None] - born[..., None, :]), whole - born


def _causal_softmax(logits: Any, m: int) -> Any:
    """Over the m first keys and those up to the row's own; a row without keys is 0."""
    xp = of(data_of(logits))
    seen = xp.arange(logits.shape[-1]) <= xp.arange(logits.shape[-2])[:, None] + m
    return ops.softmax(ops.where(seen, logits, float("-inf")), axis=-1)


def deltaformer(
    query: Any,
    key: Any,
    value: Any,
    direction: Any = None,
    beta: Any = 1.0,
    scale: float | None = None,
    is_causal: bool = True,
    state: Any = None,
) -> Any:
    """softmax(Q Kᵀ) U, where U are the values less what earlier ones already say.

    u_i = v_i − β_i Σ_{j<i} p_ij u_j, p_i = softmax_j<i(scale · w_i · k_j): the delta rule in the
    space of infinitely many features in which softmax attention is linear.

    Args:
        query, key: (…, n, d).
        value: (…, n, e).
        direction: w, (…, n, d); None for the queries.
        beta: β, a number or broadcastable to (…, n); 0 gives softmax attention.
        scale: the factor of both logits; None for 1/√d.
        is_causal: False is refused, unless there is one query for the last key.
        state: None for a whole sequence; ``()`` or a ``DeltaFormerState`` to get the next one, too.

    Returns:
        (…, n, e); with a state a pair of that and the next ``DeltaFormerState``.

    Raises:
        ValueError: the shapes do not fit, the future is asked for, or w is missing for keys whose
            queries are.
    """
    if direction is None and query.shape[-2] != key.shape[-2]:
        raise ValueError(
            "deltaformer takes the queries of all keys for its directions, got "
            f"{query.shape[-2]} and {key.shape[-2]}: pass direction"
        )
    query, rows = as_recurrence(query, key, value, is_causal, state)
    if direction is None:
        direction = query
    else:
        _check_direction(direction, key)
    like, (query, key, value, direction) = value, map(wide, (query, key, value, direction))
    scale = rate_of(dot_product_scale(query.shape[-1]) if scale is None else scale, query)
    beta = per_token(beta, key)[..., None]
    state = state and DeltaFormerState(*state)
    if state:
        key = ops.concatenate([state.key, key], axis=-2)
    m, keys = key.shape[-2] - query.shape[-2], ops.matrix_transpose(key)
    known = beta * _causal_softmax(scale * ops.matmul(direction, keys), m - 1)
    if state:
        value = value - ops.matmul(known[..., :m], state.value)
    value = ops.matmul(unit_lower_inverse(known[..., m:]), value)
    if state:
        value = ops.concatenate([state.value, value], axis=-2)
    y = ops.matmul(_causal_softmax(scale * ops.matmul(query, keys), m), value)
    y = narrow(rows(y), like)
    return y if state is None else (y, DeltaFormerState(key, value))
