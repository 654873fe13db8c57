"""The sum that every delta rule is: token by token, and in chunks.

With the error of what the state holds for a key, the state moves by β of it towards the value::

    S_t = γ_t S_{t−1} + k_t u_tᵀ      u_t = β_t (v_t − ε_t S_{t−1}ᵀ p_t)      o_t = S_tᵀ q_t

p is k unless another erasing key is given.  ε_t = γ_t forgets before the error is taken (the gated
delta rule), ε_t = 1 takes the error first (Comba); without decay both are the delta rule.

====================================================  ========================================
the recurrence, γ = 1                                 Schlag, Irie & Schmidhuber 2021,
                                                      arXiv:2102.11174: ``recurrent_delta``
U = T diag(β) (V − (P ∘ e′) S₀) inside a chunk,       the WY form of Yang et al. 2024,
T = (I + A)⁻¹, A = tril(diag(β) (P Kᵀ ∘ D′), −1)      arXiv:2406.06484 (γ = 1) and
                                                      arXiv:2412.06464: ``chunked_delta``
X⁻¹ of a unit lower triangle, by halves               ``unit_lower_inverse``
====================================================  ========================================

Inside a chunk with state S₀ before and S′ after it, with e_i = γ_1 … γ_i, D_ij = γ_{j+1} … γ_i,
a_j = γ_{j+1} … γ_end, and e′, D′ the same with ε_i in place of the last factor γ_i::

    O = (Q ∘ e) S₀ + (Q Kᵀ ∘ D) U          S′ = γ_1 … γ_end S₀ + (K ∘ a)ᵀ U

All chunks have their T, T diag(β) V and T diag(β) (P ∘ e′) at once; the only loop carries the
state, backwards the gradient of it.  With Ā for the gradient of A and W = Q Kᵀ ∘ D::

    Ū = Wᵀ Ō + (K ∘ a) S̄′                  S̄₀ = γ_1 … γ_end S̄′ + (Q ∘ e)ᵀ Ō − (P ∘ e′)ᵀ Z
    Y = Tᵀ Ū,  Z = diag(β) Y = V̄           β̄_i = ⟨y_i, the error u_i/β_i⟩
    Q̄ = (Ō Uᵀ ∘ D) K + (Ō S₀ᵀ) ∘ e         P̄ = −(Z Uᵀ ∘ D′) K − (Z S₀ᵀ) ∘ e′
    K̄ = (Ō Uᵀ ∘ D)ᵀ Q − (Z Uᵀ ∘ D′)ᵀ P + (U S̄′ᵀ) ∘ a
    (log γ)̄_t = Σ_{s ≥ t} (q_s · q̄_s + p_s · p̄_s − k_s · k̄_s) + ⟨S′, S̄′⟩

where the sum of p_s · p̄_s is over s > t if the error comes first, and every sum ends with the
chunk.

Deviations: the inverse is taken by halves, in log₂ steps of matrix products, instead of row by row.
float16 is summed in float32: outputs are float16, states float32.
"""

from __future__ import annotations

from typing import Any

from .. import ops
from ..engine import data_of, primitive
from ..ops.elementwise import of
from ..tape import Kept
from .arguments import narrow, rate_of, wide
from .chunked import Decay, in_a_row, in_chunks, state_shape

__all__ = ["chunked_delta", "recurrent_delta", "unit_lower_inverse"]

CHUNK = 32


def recurrent_delta(
    query: Any,
    key: Any,
    value: Any,
    beta: Any,
    log_decay: Any = None,
    state: Any = None,
    erase: Any = None,
    error_first: bool = False,
) -> tuple[Any, Any]:
    """The recurrence, token by token, in plain primitives.

    Args:
        query, key: (…, n, d).
        value: (…, n, e).
        beta: (…, n), how much of the error is corrected.
        log_decay: log γ, (…, n), at most 0; None for γ = 1.
        state: S₀, (…, d, e); None for 0.
        erase: p, (…, n, d); None for the keys.
        error_first: the error is that of the state before it is decayed.

    Returns:
        The outputs (…, n, e) and the last state (…, d, e).

    Raises:
        ValueError: the shapes do not fit.
    """
    like = value
    query, key, value, *rest = _prepared(query, key, value, beta, log_decay, state, erase)
    beta, log_decay, state, erase = rest
    xp, n = of(data_of(query)), query.shape[-2]
    if state is None:
        state = xp.zeros(state_shape(key, value), value.dtype)
    if n == 0:
        return xp.zeros(like.shape, like.dtype), state
    rows = [query, key, value, key if erase is None else erase, beta[..., None]]
    decays: Any = [None] * n
    if log_decay is not None:
        decays = ops.split(ops.exp(log_decay)[..., None], n, axis=-2)
    outputs = []
    steps = zip(*[ops.split(x, n, axis=-2) for x in rows], decays, strict=True)
    for q, k, v, p, b, decay in steps:
        kept = state if decay is None else state * decay
        error = v - ops.matmul(p, state if error_first else kept)
        state = kept + ops.matrix_transpose(k) * (b * error)
        outputs.append(ops.matmul(q, state))
    return narrow(ops.concatenate(outputs, axis=-2), like), state


def _inverse_rule(g: Any, y: Any) -> Any:
    """Ā = −Yᵀ Ȳ Yᵀ below the diagonal, the only part that is read."""
    transposed = ops.matrix_transpose(y)
    return -ops.tril(ops.matmul(ops.matmul(transposed, g), transposed), -1)


@primitive
def unit_lower_inverse(a: Any) -> Any:
    """(I + tril(A, −1))⁻¹ for (…, c, c), in log₂ c steps of matrix products.

    Of two neighbouring blocks on the diagonal with inverses X and Y, and C below the first, the
    inverse is [[X, 0], [−Y C X, Y]].

    Raises:
        ValueError: the matrices are not square.
    """
    if a.ndim < 2 or a.shape[-1] != a.shape[-2]:
        raise ValueError(f"unit_lower_inverse takes (…, c, c), got {a.shape}")
    xp, c, lead = of(a), a.shape[-1], a.shape[:-2]
    full = 1
    while full < c:
        full *= 2
    if full != c:  # the missing rows are those of the unit matrix
        square = xp.zeros((*lead, full, full), a.dtype)
        square[..., :c, :c] = a
        a = square
    y, s = xp.ones((*lead, full, 1, 1), a.dtype), 1
    while s < full:
        half = full // (2 * s)
        pairs = a.reshape(*lead, half, 2, s, half, 2, s)[..., :, 1, :, :, 0, :]
        below = xp.moveaxis(xp.diagonal(pairs, axis1=-4, axis2=-2), -1, -3)
        first, second = y[..., 0::2, :, :], y[..., 1::2, :, :]
        y = xp.zeros((*lead, half, 2 * s, 2 * s), a.dtype)
        y[..., :s, :s] = first
        y[..., s:, s:] = second
        y[..., s:, :s] = -below if s == 1 else -(second @ below @ first)
        s *= 2
    return y[..., 0, :c, :c]


unit_lower_inverse.derivative(a=_inverse_rule)


def _definition(
    query: Any,
    key: Any,
    value: Any,
    beta: Any,
    log_decay: Any = None,
    state: Any = None,
    erase: Any = None,
    error_first: bool = False,
    chunk_size: int = CHUNK,
) -> tuple[Any, Any]:
    return recurrent_delta(query, key, value, beta, log_decay, state, erase, error_first)


def chunked_delta(
    query: Any,
    key: Any,
    value: Any,
    beta: Any,
    log_decay: Any = None,
    state: Any = None,
    erase: Any = None,
    error_first: bool = False,
    chunk_size: int = CHUNK,
) -> tuple[Any, Any]:
    """``recurrent_delta``, by matrix products over chunks: time and memory grow as n.

    Args:
        query, key: (…, n, d).
        value: (…, n, e).
        beta: (…, n).
        log_decay: log γ, (…, n), at most 0; None for γ = 1.
        state: S₀, (…, d, e); None for 0.
        erase: p, (…, n, d); None for the keys.
        error_first: the error is that of the state before it is decayed.
        chunk_size: tokens in a chunk; need not divide n.

    Returns:
        The outputs (…, n, e) and the last state (…, d, e).

    Raises:
        ValueError: the shapes do not fit, or ``chunk_size`` is below 1.
    """
    prepared = _prepared(query, key, value, beta, log_decay, state, erase)
    if chunk_size < 1:
        raise ValueError(f"a chunk has at least one token, got chunk_size={chunk_size}")
    y, last = _chunked_delta(*prepared, error_first, chunk_size)
    return narrow(y, value), last


@primitive(composite=_definition)
def _chunked_delta(
    query: Any,
    key: Any,
    value: Any,
    beta: Any,
    log_decay: Any,
    state: Any,
    erase: Any,
    error_first: bool,
    chunk_size: int,
) -> Any:
    xp, n = of(query), query.shape[-2]
    size = max(1, min(chunk_size, n))
    q, k, v, b = (in_chunks(xp, x, size) for x in (query, key, value, beta[..., None]))
    p = k if erase is None else in_chunks(xp, erase, size)
    decay = _Decay(xp, log_decay, error_first, n, size, query.dtype)
    keys = k.swapaxes(-1, -2)
    errors = p @ keys  # of one write, for each later token of the chunk
    errors *= decay.before
    inverse = unit_lower_inverse(b * errors)
    written = inverse @ (b * v)
    erased = inverse @ (b * decay.to_error(p))
    to_end = decay.to_end(k).swapaxes(-1, -2)
    s = xp.zeros(state_shape(key, value), value.dtype) if state is None else state
    states = xp.empty((*v.shape[:-2], *s.shape[-2:]), s.dtype)
    for i in range(v.shape[-3]):
        states[..., i, :, :] = s
        written[..., i, :, :] -= erased[..., i, :, :] @ s
        added = to_end[..., i, :, :] @ written[..., i, :, :]
        s = added + decay.state(s, i)
    weights = q @ keys
    weights *= decay.between
    y = weights @ written
    y += decay.from_start(q) @ states
    return Kept(
        (in_a_row(y, n), s),
        chunks=(q, k, v, p, b),
        decay=decay,
        solved=(errors, inverse, erased, written, weights, states),
    )


@_chunked_delta.joint_derivative("query", "key", "value", "beta", "log_decay", "state", "erase")
def _rule(
    g: Any, needs: Any, y: Any, erase: Any, error_first: bool, chunks: Any, decay: Any, solved: Any
) -> tuple[Any, ...]:
    q, k, v, p, b = chunks
    errors, inverse, erased, written, weights, states = solved
    xp, n = of(q), g[0].shape[-2]
    o, after = in_chunks(xp, g[0], q.shape[-2]), xp.empty_like(states)
    of_u = weights.swapaxes(-1, -2) @ o
    seen = decay.from_start(q).swapaxes(-1, -2) @ o
    to_end, erasing = decay.to_end(k), erased.swapaxes(-1, -2)
    s = g[1]
    for i in reversed(range(o.shape[-3])):
        after[..., i, :, :] = s
        of_u[..., i, :, :] += to_end[..., i, :, :] @ s
        seen[..., i, :, :] -= erasing[..., i, :, :] @ of_u[..., i, :, :]
        s = seen[..., i, :, :] + decay.state(s, i)
    of_r = inverse.swapaxes(-1, -2) @ of_u
    of_v = b * of_r
    of_beta = of_q = of_k = of_p = of_decay = None
    if needs[3]:
        error = v - decay.to_error(p) @ states
        error -= errors @ written
        of_beta = in_a_row((of_r * error).sum(axis=-1, keepdims=True), n)[..., 0]
    if needs[0] or needs[1] or needs[4] or needs[6]:
        later = written.swapaxes(-1, -2)
        of_weights, of_errors = o @ later, of_v @ later
        of_weights *= decay.between
        of_errors *= decay.before
        held = states.swapaxes(-1, -2)
        of_q = of_weights @ k
        of_q += decay.from_start(o @ held)
        of_p = of_errors @ k
        of_p += decay.to_error(of_v @ held)
        of_p *= -1.0
        of_k = of_weights.swapaxes(-1, -2) @ q
        of_k -= of_errors.swapaxes(-1, -2) @ p
        of_k += decay.to_end(written @ after.swapaxes(-1, -2))
    if needs[4]:
        ends = xp.concatenate([states[..., 1:, :, :], y[1][..., None, :, :]], axis=-3)
        erasures = (p * of_p).sum(axis=-1)
        of_decay = (q * of_q).sum(axis=-1) - (k * of_k).sum(axis=-1) + erasures
        of_decay = of_decay[..., ::-1].cumsum(axis=-1)[..., ::-1]
        if error_first:
            of_decay -= erasures
        of_decay = of_decay + (ends * after).sum(axis=(-1, -2))[..., None]
        of_decay = in_a_row(of_decay[..., None], n)[..., 0]
    if of_k is not None and erase is None:
        of_k += of_p
    rows = [None if x is None else in_a_row(x, n) for x in (of_q, of_k, of_v, of_p)]
    return (*rows[:3], of_beta, of_decay, s, rows[3])


class _Decay(Decay):
    """The decays inside the chunks, and those that the state has undergone when the error is taken.

    Attributes:
        before: D′, and 0 for what is not earlier.
        start_of_error: e′, (…, chunks, size, 1), or None for 1.
    """

    def __init__(
        self, xp: Any, log_decay: Any, error_first: bool, n: int, size: int, dtype: Any
    ) -> None:
        super().__init__(xp, log_decay, n, size, dtype)
        if error_first and self.start is not None:
            self.before = xp.zeros_like(self.between)
            self.before[..., 1:, :] = self.between[..., :-1, :]
            self.start_of_error = xp.ones_like(self.start)
            self.start_of_error[..., 1:, :] = self.start[..., :-1, :]
        else:
            later = xp.arange(size)[:, None] > xp.arange(size)
            self.before = self.between * later.astype(dtype)
            self.start_of_error = self.start

    def to_error(self, x: Any) -> Any:
        """Each row of a chunk times what its error sees of the state before the chunk."""
        return x if self.start_of_error is None else x * self.start_of_error


def _prepared(
    query: Any, key: Any, value: Any, beta: Any, log_decay: Any, state: Any, erase: Any
) -> tuple[Any, ...]:
    """The same in the dtype that is summed in; ValueError unless their shapes fit."""
    query, key, value = map(wide, (query, key, value))
    beta, log_decay, state, erase = (rate_of(x, query) for x in (beta, log_decay, state, erase))
    fits = query.shape == key.shape and query.ndim >= 2 and value.shape[:-1] == key.shape[:-1]
    if not fits or (erase is not None and erase.shape != key.shape):
        raise ValueError(
            "a delta rule takes query, key and erasing key (…, n, d) and value (…, n, e), got "
            f"{query.shape}, {key.shape}, {None if erase is None else erase.shape} and "
            f"{value.shape}"
        )
    for name, rate in (("beta", beta), ("log_decay", log_decay)):
        if rate is not None and rate.shape != key.shape[:-1]:
            raise ValueError(f"{name} is (…, n) = {key.shape[:-1]} here, got {rate.shape}")
    if state is not None and state.shape != state_shape(key, value):
        raise ValueError(
            f"the state is (…, d, e) = {state_shape(key, value)} here, got {state.shape}"
        )
    return query, key, value, beta, log_decay, state, erase
