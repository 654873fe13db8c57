"""The delta rule with a decay: forget before the error is taken, or after.

====================================================  ========================================
S_t = γ_t (I − β_t k_t k_tᵀ) S_{t−1} + β_t k_t v_tᵀ   Yang, Kautz & Hatamizadeh 2024, "Gated
                                                      Delta Networks", arXiv:2412.06464:
                                                      ``gated_delta_rule``, ``…_recurrent``
O = (Q Kᵀ ∘ D)(I + tril(diag(β) K Kᵀ ∘ D, −1))⁻¹      there, as one chunk:
    diag(β) V,  D_ij = γ_{j+1} … γ_i for j ≤ i        ``gated_delta_weights``
S_t = γ_t S_{t−1} + β_t k_t (v_t − S_{t−1}ᵀ p_t)ᵀ     Hu et al. 2025, "Comba: Improving Bilinear
                                                      RNNs with Closed-loop Control",
                                                      arXiv:2506.02475: ``comba``,
                                                      ``comba_recurrent``
the same as for the gated rule with D_{i−1,j} in      ``comba_weights``
place of D_ij in the inverse, P Kᵀ of K Kᵀ
γ = e^(−a softplus(x + b))                            Dao & Gu 2024, arXiv:2405.21060, taken
                                                      over by 2412.06464: ``log_gate``
====================================================  ========================================

The two are one family: a gated delta rule (γ, β, v) is the Comba form (γ, γ β, v / γ), as
``as_comba`` says.  They are *not* equal with the same letters: the first compares v with the state
that has already forgotten, the second with the state as it was.

γ is given as its logarithm, and D comes from sums of logarithms.

Deviations: the output correction of Comba, o = S (q − d k), is a change of the query and left to
the caller; p = b k, with b a number, is ``erase=b * key``.  float16 is summed in float32: outputs
are float16, states float32.
"""

from __future__ import annotations

from typing import Any

from .. import ops
from ..engine import data_of
from ..ops.elementwise import of
from .arguments import as_recurrence, check_lead, narrow, rate_of, wide
from .delta import DeltaState, matrix_of, per_token, solved_weights
from .delta_chunks import CHUNK, chunked_delta, recurrent_delta

__all__ = [
    "as_comba", "comba", "comba_recurrent", "comba_weights", "gated_delta_rule",
    "gated_delta_rule_recurrent", "gated_delta_weights", "log_gate",
]  # fmt: skip


def gated_delta_rule(
    query: Any,
    key: Any,
    value: Any,
    beta: Any = 1.0,
    log_decay: Any = 0.0,
    is_causal: bool = True,
    state: Any = None,
    chunk_size: int = CHUNK,
) -> Any:
    """S_t = γ_t (I − β_t k_t k_tᵀ) S_{t−1} + β_t k_t v_tᵀ, o_t = S_tᵀ q_t, in time linear in n.

    Args:
        query, key: (…, n, d); keys of length 1, see ``unit_length``.
        value: (…, n, e).
        beta: β, a number or broadcastable to (…, n).
        log_decay: log γ likewise, at most 0; −inf forgets everything.  A pad has to have β = 0
            and log γ = 0.
        is_causal: False is refused, unless there is one query for the last key.
        state: None for a whole sequence; ``()`` or a ``DeltaState`` to get the next one, too.
        chunk_size: tokens in a chunk; changes the speed only.

    Returns:
        (…, n, e); with a state a pair of that and the next ``DeltaState``.

    Raises:
        ValueError: the shapes do not fit, or the rule is asked to look ahead.
    """
    check_lead(query, key, value)
    query, rows = as_recurrence(query, key, value, is_causal, state)
    rates = per_token(beta, key), per_token(log_decay, key)
    y, last = chunked_delta(query, key, value, *rates, matrix_of(state), chunk_size=chunk_size)
    return rows(y) if state is None else (y, DeltaState(last))


def gated_delta_rule_recurrent(
    query: Any,
    key: Any,
    value: Any,
    beta: Any = 1.0,
    log_decay: Any = 0.0,
    is_causal: bool = True,
    state: Any = None,
) -> Any:
    """``gated_delta_rule`` as it is defined, token by token; the arguments are the same."""
    check_lead(query, key, value)
    query, rows = as_recurrence(query, key, value, is_causal, state)
    rates = per_token(beta, key), per_token(log_decay, key)
    y, last = recurrent_delta(query, key, value, *rates, matrix_of(state))
    return rows(y) if state is None else (y, DeltaState(last))


def gated_delta_weights(query: Any, key: Any, beta: Any = 1.0, log_decay: Any = 0.0) -> Any:
    """The matrix A with O = A V, to be looked at: (…, n, d) twice to (…, n, n)."""
    like, query, key = query, wide(query), wide(key)
    between = _between(per_token(log_decay, key))
    return narrow(_weights(query, key, key, per_token(beta, key), between, between), like)


def comba(
    query: Any,
    key: Any,
    value: Any,
    beta: Any = 1.0,
    log_decay: Any = 0.0,
    erase: Any = None,
    is_causal: bool = True,
    state: Any = None,
    chunk_size: int = CHUNK,
) -> Any:
    """S_t = γ_t S_{t−1} + β_t k_t (v_t − S_{t−1}ᵀ p_t)ᵀ, o_t = S_tᵀ q_t, in time linear in n.

    Args:
        query, key: (…, n, d).
        value: (…, n, e).
        beta: β, a number or broadcastable to (…, n).
        log_decay: log γ likewise, at most 0.
        erase: p, (…, n, d); None for the keys.  With p = k of length 1 the eigenvalue along k is
            γ − β.
        is_causal, state, chunk_size: as for ``gated_delta_rule``.

    Returns:
        (…, n, e); with a state a pair of that and the next ``DeltaState``.

    Raises:
        ValueError: the shapes do not fit, or the rule is asked to look ahead.
    """
    check_lead(query, key, value)
    query, rows = as_recurrence(query, key, value, is_causal, state)
    rates = per_token(beta, key), per_token(log_decay, key)
    y, last = chunked_delta(query, key, value, *rates, matrix_of(state), erase, True, chunk_size)
    return rows(y) if state is None else (y, DeltaState(last))


def comba_recurrent(
    query: Any,
    key: Any,
    value: Any,
    beta: Any = 1.0,
    log_decay: Any = 0.0,
    erase: Any = None,
    is_causal: bool = True,
    state: Any = None,
) -> Any:
    """``comba`` as it is defined, token by token; the arguments are the same."""
    check_lead(query, key, value)
    query, rows = as_recurrence(query, key, value, is_causal, state)
    rates = per_token(beta, key), per_token(log_decay, key)
    y, last = recurrent_delta(query, key, value, *rates, matrix_of(state), erase, True)
    return rows(y) if state is None else (y, DeltaState(last))


def comba_weights(
    query: Any, key: Any, beta: Any = 1.0, log_decay: Any = 0.0, erase: Any = None
) -> Any:
    """The matrix A with O = A V, to be looked at: (…, n, d) twice to (…, n, n)."""
    like, query, key = query, wide(query), wide(key)
    between = _between(per_token(log_decay, key))
    above = of(data_of(between)).zeros((*between.shape[:-2], 1, between.shape[-1]), key.dtype)
    before = ops.concatenate([above, between[..., :-1, :]], axis=-2)
    erase = key if erase is None else wide(erase)
    return narrow(_weights(query, key, erase, per_token(beta, key), between, before), like)


def as_comba(value: Any, beta: Any, log_decay: Any) -> tuple[Any, Any]:
    """The value and β with which ``comba`` does what ``gated_delta_rule`` does with these.

    Args:
        value: v, (…, n, e).
        beta: β, a number or broadcastable to (…, n).
        log_decay: log γ likewise, finite.

    Returns:
        v / γ and γ β, (…, n).
    """
    like, value = value, wide(value)
    beta, log_decay = per_token(beta, value), per_token(log_decay, value)
    return narrow(value * ops.exp(-log_decay)[..., None], like), ops.exp(log_decay) * beta


def log_gate(x: Any, log_a: Any, bias: Any) -> Any:
    """log γ = −e^(log a) softplus(x + b): at most 0, and γ is that of a step softplus(x + b) in
    time of a process that decays at the rate a.

    Args:
        x: (…, h).
        log_a, bias: (h,), one of each for a head.
    """
    like, x = x, wide(x)
    return narrow(-ops.exp(rate_of(log_a, x)) * ops.softplus(x + rate_of(bias, x)), like)


def _between(log_decay: Any) -> Any:
    """D_ij = γ_{j+1} … γ_i for j ≤ i and 0 above, by sums that start anew for each j."""
    n = log_decay.shape[-1]
    places = of(data_of(log_decay)).arange(n)
    steps = ops.where(places[:, None] > places, log_decay[..., None], 0.0)
    return ops.tril(ops.exp(ops.cumsum(steps, axis=-2)))


def _weights(query: Any, key: Any, erase: Any, beta: Any, between: Any, before: Any) -> Any:
    keys = ops.matrix_transpose(key)
    erasures = ops.matmul(beta[..., None] * erase, keys) * before
    return solved_weights(ops.matmul(query, keys) * between, erasures, beta)
