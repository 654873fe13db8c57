"""The delta rule: a linear attention that overwrites instead of adding up.

Linear attention adds k vᵀ to its state for each token, so what is read back for a key is polluted
by all keys that are not orthogonal to it.  The delta rule (Widrow & Hoff 1960) first reads what the
state holds for the key, and writes only the difference:

====================================================  ========================================
S_t = S_{t−1} + β_t k_t (v_t − S_{t−1}ᵀ k_t)ᵀ,        Schlag, Irie & Schmidhuber 2021, "Linear
o_t = S_tᵀ q_t                                        Transformers Are Secretly Fast Weight
                                                      Programmers", arXiv:2102.11174:
                                                      ``delta_rule_recurrent``
the same in chunks, by the WY form of I − β k kᵀ      Yang, Wang, Zhang, Shen & Kim 2024,
                                                      "Parallelizing Linear Transformers with the
                                                      Delta Rule over Sequence Length",
                                                      arXiv:2406.06484: ``delta_rule``
O = (Q Kᵀ ∘ M)(I + tril(diag(β) K Kᵀ, −1))⁻¹          there, its fully parallel form:
    diag(β) V                                         ``delta_weights`` (all but V)
k / ‖k‖                                               there, in its layer: ``unit_length``
β = 2 σ(x), so that I − β k kᵀ may reflect            Grazzi et al. 2024, "Unlocking
                                                      State-Tracking in Linear RNNs Through
                                                      Negative Eigenvalues", arXiv:2411.12537:
                                                      ``reflecting_step``
β = (1 − e^(−η ‖k‖²)) / ‖k‖²                          Lei, Zhang & Poria 2025, "Error-Free
                                                      Linear Attention is a Free Lunch",
                                                      arXiv:2512.12602: ``exact_step``
====================================================  ========================================

I − β k kᵀ has the eigenvalue 1 − β ‖k‖² along k and 1 elsewhere.  So what the state holds is never
amplified if and only if 0 ≤ β ‖k‖² ≤ 2: **bring the keys to length 1** (``unit_length``) or take
``exact_step``.  Keys as a linear map leaves them, of ‖k‖² ≈ d, multiply what is held along them by
1 − d.  That is not a bound on the state, to which each token still adds: keys of length 1 that are
orthogonal to all that is held make its norm grow as √t.

Deviations: no feature map on keys and queries and no division by their sums, which 2102.11174 has
and 2406.06484 replaced by a SiLU and ``unit_length``, both the caller's; queries are not divided by
√d.  float16 is summed in float32: outputs are float16, states float32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from .. import ops
from ..engine import data_of
from ..ops.elementwise import of
from .arguments import as_recurrence, check_lead, narrow, rate_of, wide
from .delta_chunks import CHUNK, chunked_delta, recurrent_delta

__all__ = [
    "DeltaState", "delta_rule", "delta_rule_recurrent", "delta_weights", "exact_step",
    "reflecting_step", "unit_length",
]  # fmt: skip


class DeltaState(NamedTuple):
    """What a delta rule hands on: ``matrix`` S, (…, d, e)."""

    matrix: Any


def delta_rule(
    query: Any,
    key: Any,
    value: Any,
    beta: Any = 1.0,
    is_causal: bool = True,
    state: Any = None,
    chunk_size: int = CHUNK,
) -> Any:
    """o_t = S_tᵀ q_t with S_t = (I − β_t k_t k_tᵀ) S_{t−1} + β_t k_t v_tᵀ, in time linear in n.

    Args:
        query, key: (…, n, d); keys of length 1, or β ‖k‖² at most 2 otherwise.
        value: (…, n, e).
        beta: β, a number or broadcastable to (…, n): 0 writes nothing, which is what a pad has to
            have; 1 with a key of length 1 makes S_tᵀ k_t = v_t.
        is_causal: the rule is a recurrence, so False is refused, unless there is one query for the
            last of the keys.
        state: None for a whole sequence; ``()`` or a ``DeltaState`` to get the next one, too.
        chunk_size: tokens in a chunk; changes the speed only.

    Returns:
        (…, n, e); with a state a pair of that and the next ``DeltaState``.

    Raises:
        ValueError: the shapes do not fit, or the rule is asked to look ahead.
    """
    check_lead(query, key, value)
    query, rows = as_recurrence(query, key, value, is_causal, state)
    beta = per_token(beta, key)
    y, last = chunked_delta(query, key, value, beta, None, matrix_of(state), chunk_size=chunk_size)
    return rows(y) if state is None else (y, DeltaState(last))


def delta_rule_recurrent(
    query: Any, key: Any, value: Any, beta: Any = 1.0, is_causal: bool = True, state: Any = None
) -> Any:
    """``delta_rule`` as it is defined, token by token; the arguments are the same."""
    check_lead(query, key, value)
    query, rows = as_recurrence(query, key, value, is_causal, state)
    y, last = recurrent_delta(query, key, value, per_token(beta, key), None, matrix_of(state))
    return rows(y) if state is None else (y, DeltaState(last))


def delta_weights(query: Any, key: Any, beta: Any = 1.0) -> Any:
    """The matrix A with O = A V: (Q Kᵀ ∘ M)(I + tril(diag(β) K Kᵀ, −1))⁻¹ diag(β), M with diagonal.

    To be looked at: it costs n² memory and n³ time.

    Args:
        query, key: (…, n, d).
        beta: β, a number or broadcastable to (…, n).

    Returns:
        (…, n, n), 0 above the diagonal; rows need not be positive nor sum to 1.
    """
    like, query, key = query, wide(query), wide(key)
    beta, keys = per_token(beta, key), ops.matrix_transpose(key)
    reads = ops.tril(ops.matmul(query, keys))
    return narrow(solved_weights(reads, ops.matmul(beta[..., None] * key, keys), beta), like)


def solved_weights(reads: Any, erasures: Any, beta: Any) -> Any:
    """R (I + tril(E, −1))⁻¹ diag(β) for R and E (…, n, n) and β (…, n)."""
    unit = of(data_of(reads)).eye(reads.shape[-1], dtype=reads.dtype)
    system = ops.matrix_transpose(unit + ops.tril(erasures, -1))
    solved = ops.solve(system, ops.matrix_transpose(reads))  # of Xᵀ Yᵀ = Rᵀ
    return ops.matrix_transpose(solved) * beta[..., None, :]


def unit_length(x: Any, eps: float = 1e-6) -> Any:
    """x / √(‖x‖² + ε) over the last axis; a vector of zeros stays one, with a finite gradient."""
    # the fused norm divides by √(‖x‖²/d + ε/d), and its weight takes √d out again
    d = x.shape[-1]
    weight = of(data_of(x)).full((d,), d**-0.5, x.dtype)
    return ops.rms_norm(x, weight, float(eps) / d)


def reflecting_step(x: Any) -> Any:
    """β = 2 σ(x), in (0, 2).

    With a key of length 1 the eigenvalue 1 − β of I − β k kᵀ is in (−1, 1): beyond β = 1 the state
    is reflected, which lets one layer count modulo 2.
    """
    return 2.0 * ops.sigmoid(x)


def exact_step(eta: Any, key: Any) -> Any:
    """β = (1 − e^(−η ‖k‖²)) / ‖k‖², with which the rule is stable for keys of any length.

    The delta rule is one Euler step of length η of dS/dt = −k (kᵀ S − vᵀ); this β makes it the
    solution of that equation after the time η, whose eigenvalue along k is e^(−η ‖k‖²).

    Args:
        eta: η ≥ 0, a number or broadcastable to (…, n).
        key: (…, n, d).

    Returns:
        β, (…, n); η where the key is 0, the limit.
    """
    like, key = key, wide(key)
    eta = per_token(eta, key)
    squares = (key * key).sum(axis=-1)
    exponent = eta * squares
    still = ops.equal(exponent, 0.0)
    safe = ops.where(still, 1.0, exponent)
    # near 0 the quotient is 1 − x/2: its derivative has to be there as well
    ratio = ops.where(still, 1.0 - 0.5 * exponent, -ops.expm1(-safe) / safe)
    return narrow(eta * ratio, like)


def per_token(rate: Any, key: Any) -> Any:
    """A number, or an array that broadcasts to (…, n), as one (…, n) for keys (…, n, d)."""
    rate = rate_of(rate, key)
    if rate.shape == key.shape[:-1]:
        return rate
    ends = zip(rate.shape[::-1], key.shape[-2::-1], strict=False)
    if rate.ndim >= key.ndim or any(a not in (1, b) for a, b in ends):
        raise ValueError(
            f"a rate for each token broadcasts to (…, n) = {key.shape[:-1]}, got {rate.shape}"
        )
    return ops.broadcast_to(rate, key.shape[:-1])


def matrix_of(state: Any) -> Any:
    """S of a state; None, which stands for zeros, for the one before the first token."""
    return state[0] if state else None
