"""Linear attention that forgets as its input tells it to: one decay a token, or one a channel.

===============================================  ============================  ====================
S_t = a_t S_{t−1} + k_t v_tᵀ, o_t = S_tᵀ q_t,    Dao & Gu 2024, "Transformers  ``scalar_decay_``
a_t a number                                     are SSMs", arXiv:2405.21060,  ``attention``
                                                 5 (C, B, X for q, k, v)
Δ = softplus(x + b), a = exp(−Δ e^A),            Gu & Dao 2023, "Mamba",       ``mamba_decay``
v = Δ X                                          arXiv:2312.00752, 3.2 and
                                                 3.6; 2405.21060, 7
S_t = diag(α_t) S_{t−1} + k_t v_tᵀ               Yang et al. 2023, "Gated      ``gated_linear_``
                                                 Linear Attention Trans-       ``attention``,
                                                 formers with Hardware-        ``recurrent_gated``
                                                 Efficient Training",
                                                 arXiv:2312.06635, 4.1, 4.3
α = σ(x)^{1/τ}, τ = 16                           the same, 4.4                 ``gla_log_gate``
o_t = (y_{t−1} + e^{u + k_t} v_t) /              Peng et al. 2023, "RWKV",     ``wkv``
(z_{t−1} + e^{u + k_t}), y, z = Σ e^{−(t−j)w     arXiv:2305.13048, WKV
+ k_j} v_j, the same without v_j                 operator
===============================================  ============================  ====================

Decays come as logarithms, 0 at most.  Of the parallel form in the paper on GLA, in its 4.2,

    o_i = Σ_{j ≤ i} (q_i ∘ b_i)·(k_j / b_j) v_j,  b_i = α_1 ∘ … ∘ α_i,

nothing is computed as it stands: 1/b_j is 10³²⁶ after some 2,000 tokens with α between ½ and 0.9.
Here b_i / b_j is the exponential of a sum of logarithms from j + 1 to i, which is never positive.
No matrix product has such a factor for each pair of tokens and each channel in it, so the pairs
inside a chunk are done elementwise (the paper's secondary chunking), and chunks are short.

The rules, for a chunk with the state S before it and S′ after it, E_ij = α_{j+1} … α_i for j ≤ i
and 0 beyond, s_i = α_1 … α_i, a_j = α_{j+1} … α_end (all of them vectors over the channels)::

    o_i = Σ_j (Σ q_i ∘ E_ij ∘ k_j) v_j + Sᵀ (s_i ∘ q_i)          P = Ō Vᵀ
    q̄_i = Σ_j P_ij E_ij ∘ k_j + s_i ∘ S ō_i                      v̄ as in ``chunked``
    k̄_j = Σ_i P_ij E_ij ∘ q_i + a_j ∘ S̄′ v_j
    (log α)̄_t = Σ_{s ≥ t} (q_s ∘ q̄_s − k_s ∘ k̄_s) + Σ_e S′ ∘ S̄′

``wkv`` is a sum of exponentials of any size, so a state carries the largest exponent p so far and
y e^{−p}, z e^{−p}; two stretches of text are joined by the larger of their p, which is associative.

Deviations: neither form scales q by 1/√d, as the authors' code does; multiply q by it.  Mamba's
skip D ∘ X, convolution and output gate belong to its block.  The paper's ``wkv`` runs token by
token; here it is a scan, log n steps deep.  float16 is summed in float32: outputs are float16,
states float32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from .. import ops
from ..backend import Array
from ..engine import data_of, primitive
from ..nn import functional as F
from ..ops.elementwise import of
from ..tape import Kept
from .arguments import as_recurrence, check_lead, narrow, rate_of, wide, without_pads
from .chunked import chunked, state_shape
from .scan import Elements, associative_scan

__all__ = [
    "DecayState", "WKVState", "gated_linear_attention", "gla_log_gate", "mamba_decay",
    "recurrent_gated", "scalar_decay_attention", "wkv",
]  # fmt: skip

CHUNK = 8


class DecayState(NamedTuple):
    """What a decaying attention remembers: S (…, d, e)."""

    memory: Array


def scalar_decay_attention(
    query: Array,
    key: Array,
    value: Array,
    log_decay: Array,
    is_causal: bool = True,
    state: tuple[Array, ...] | None = None,
    key_mask: Array | None = None,
    chunk_size: int = 64,
) -> Any:
    """o_t = S_tᵀ q_t with S_t = a_t S_{t−1} + k_t v_tᵀ: Mamba-2's state space model.

    Args:
        query: (…, n, d).
        key: (…, n, d).
        value: (…, n, e).
        log_decay: log a, a number or broadcastable to (…, n), at most 0; −inf forgets everything.
        is_causal: may be False for one query only, which is the last token.
        state: None; or ``()`` or what the call before returned.
        key_mask: (…, n) booleans, true for real tokens; others are not written, nor is anything
            forgotten at them, whatever they hold.
        chunk_size: see ``chunked``.

    Returns:
        (…, n, e); with a state also the next one, a ``DecayState``.

    Raises:
        ValueError: the shapes do not fit, or there are several queries without ``is_causal``.
        TypeError: ``key_mask`` has no booleans.
    """
    check_lead(query, key, value)
    query, rows = as_recurrence(query, key, value, is_causal, state)
    log_decay = rate_of(log_decay, query)
    if key_mask is not None:
        key, value = without_pads(key_mask, key, value)
        log_decay = ops.where(data_of(key_mask), log_decay, 0.0)
    y, last = chunked(query, key, value, log_decay, state[0] if state else None, chunk_size)
    return rows(y) if state is None else (rows(y), DecayState(last))


def mamba_decay(x: Array, log_rate: Array, bias: Array | float = 0.0) -> tuple[Array, Array]:
    """Mamba-2's step Δ = softplus(x + b) and log a = −Δ e^A.

    The input is scaled by the step as well: the ``value`` of ``scalar_decay_attention`` is Δ X.

    Args:
        x: any shape.
        log_rate: A, a number or broadcastable to it.
        bias: b, likewise.

    Returns:
        Δ, which is positive, and log a, which is negative, of the shape to which all broadcast.
    """
    like, x = x, wide(x)
    step = ops.softplus(x + rate_of(bias, x))
    log_decay = -ops.exp(rate_of(log_rate, x)) * step
    return narrow(step, like), narrow(log_decay, like)


def gla_log_gate(x: Array, temperature: float = 16.0) -> Array:
    """log α = log σ(x) / τ, of any shape: at x = 0, τ = 16 a channel halves in 16 tokens.

    Raises:
        ValueError: the temperature is not positive.
    """
    if temperature <= 0.0:
        raise ValueError(f"the temperature of a gate is positive, got {temperature}")
    wider = wide(x)
    return narrow(F.logsigmoid(wider) * rate_of(1.0 / temperature, wider), x)


def gated_linear_attention(
    query: Array,
    key: Array,
    value: Array,
    log_gate: Array,
    is_causal: bool = True,
    state: tuple[Array, ...] | None = None,
    key_mask: Array | None = None,
    chunk_size: int = CHUNK,
) -> Any:
    """o_t = S_tᵀ q_t with S_t = diag(α_t) S_{t−1} + k_t v_tᵀ, in chunks.

    Time grows as n (c d + d e) for chunks of c tokens, and memory as n (d + e + d e / c).

    Args:
        query: (…, n, d).
        key: (…, n, d).
        value: (…, n, e).
        log_gate: log α, a number or broadcastable to (…, n, d), at most 0; −inf forgets a channel.
        is_causal: may be False for one query only, which is the last token.
        state: None; or ``()`` or what the call before returned.
        key_mask: (…, n) booleans, true for real tokens; others are not written, nor is anything
            forgotten at them, whatever they hold.
        chunk_size: c; it need not divide n.

    Returns:
        (…, n, e); with a state also the next one, a ``DecayState``.

    Raises:
        ValueError: the shapes do not fit, or there are several queries without ``is_causal``.
        TypeError: ``key_mask`` has no booleans.
    """
    check_lead(query, key, value)
    query, rows = as_recurrence(query, key, value, is_causal, state)
    like, (query, key, value) = value, map(wide, (query, key, value))
    log_gate, start = rate_of(log_gate, query), rate_of(state[0] if state else None, query)
    _check(query, key, value, log_gate, start)
    log_gate = ops.broadcast_to(log_gate, key.shape)
    if key_mask is not None:
        key, value = without_pads(key_mask, key, value)
        log_gate = ops.where(data_of(key_mask)[..., None], log_gate, 0.0)
    y, last = _gated(query, key, value, log_gate, start, chunk_size)
    y = narrow(rows(y), like)
    return y if state is None else (y, DecayState(last))


def recurrent_gated(
    query: Array, key: Array, value: Array, log_gate: Array, state: Array | None = None
) -> tuple[Array, Array]:
    """The same token by token: the definition.

    Args:
        query: (…, n, d).
        key: (…, n, d).
        value: (…, n, e).
        log_gate: log α, a number or broadcastable to (…, n, d), at most 0.
        state: S₀, (…, d, e); None for 0.

    Returns:
        The outputs (…, n, e) and the last state (…, d, e).

    Raises:
        ValueError: the shapes do not fit.
    """
    like, (query, key, value) = value, map(wide, (query, key, value))
    log_gate, state = rate_of(log_gate, query), rate_of(state, query)
    _check(query, key, value, log_gate, state)
    xp, n = of(data_of(query)), query.shape[-2]
    if state is None:
        state = xp.zeros(state_shape(key, value), value.dtype)
    if n == 0:
        return xp.zeros(like.shape, like.dtype), state
    gate = ops.exp(ops.broadcast_to(log_gate, key.shape))
    outputs = []
    for q, k, v, alpha in zip(
        *(ops.split(x, n, axis=-2) for x in (query, key, value, gate)), strict=True
    ):
        state = ops.matrix_transpose(alpha) * state + ops.matrix_transpose(k) * v
        outputs.append(ops.matmul(q, state))
    return narrow(ops.concatenate(outputs, axis=-2), like), state


def _definition(
    query: Any, key: Any, value: Any, log_gate: Any, state: Any = None, chunk_size: int = CHUNK
) -> tuple[Any, Any]:
    return recurrent_gated(query, key, value, log_gate, state)


@primitive(composite=_definition)
def _gated(
    query: Any, key: Any, value: Any, log_gate: Any, state: Any = None, chunk_size: int = CHUNK
) -> Any:
    if chunk_size < 1:
        raise ValueError(f"a chunk has at least one token, got chunk_size={chunk_size}")
    xp = of(query)
    y = xp.empty(value.shape, value.dtype)
    if state is None:
        state = xp.zeros(state_shape(key, value), value.dtype)
    states = [state]
    for at in _chunks(query, chunk_size):
        q, k, v = query[at], key[at], value[at]
        between, start, end, whole = _decays(xp, log_gate[at])
        y[at] = _scores(q, k, between) @ v + (q * start) @ state
        state = whole * state + (k * end).swapaxes(-1, -2) @ v
        states.append(state)
    return Kept((y, state), states=states)


@_gated.joint_derivative("query", "key", "value", "log_gate", "state")
def _rule(
    g: Any,
    needs: Any,
    query: Any,
    key: Any,
    value: Any,
    log_gate: Any,
    chunk_size: int,
    states: Any,
) -> tuple[Any, ...]:
    xp = of(query)
    grads = [xp.empty(x.shape, x.dtype) for x in (query, key, value, log_gate)]
    of_state = g[1]
    chunks = _chunks(query, chunk_size)
    for c in reversed(range(len(chunks))):
        at = chunks[c]
        q, k, v, o = query[at], key[at], value[at], g[0][at]
        before, after = states[c], states[c + 1]
        between, start, end, whole = _decays(xp, log_gate[at])
        of_v = _scores(q, k, between).swapaxes(-1, -2) @ o + (k * end) @ of_state
        between *= (o @ v.swapaxes(-1, -2))[..., None]  # P ∘ E
        of_q = (between * k[..., None, :, :]).sum(axis=-2)
        of_q += start * (o @ before.swapaxes(-1, -2))
        of_k = (between * q[..., :, None, :]).sum(axis=-3)
        of_k += end * (v @ of_state.swapaxes(-1, -2))
        later = (q * of_q - k * of_k)[..., ::-1, :].cumsum(axis=-2)[..., ::-1, :]
        of_gate = later + (after * of_state).sum(axis=-1)[..., None, :]
        for grad, part in zip(grads, (of_q, of_k, of_v, of_gate), strict=True):
            grad[at] = part
        of_state = whole * of_state + (q * start).swapaxes(-1, -2) @ o
    return (*grads, of_state)


def _chunks(x: Any, size: int) -> list[Any]:
    n = x.shape[-2]
    return [(..., slice(start, min(start + size, n)), slice(None)) for start in range(0, n, size)]


def _decays(xp: Any, steps: Any) -> tuple[Any, Any, Any, Any]:
    """Of a chunk's log α (…, c, d): E (…, c, c, d), s and a (…, c, d), and s_end (…, d, 1).

    The sums of E start anew for each j, so that no two long ones are subtracted.
    """
    place = xp.arange(steps.shape[-2])
    later = (place[:, None] > place)[..., None]
    between = xp.where(later, steps[..., :, None, :], 0.0).cumsum(axis=-3)
    between = xp.exp(between)
    between *= (place[:, None] >= place)[..., None]
    start = xp.exp(steps.cumsum(axis=-2))
    return between, start, between[..., -1, :, :].copy(), start[..., -1, :, None]


def _scores(q: Any, k: Any, between: Any) -> Any:
    """Σ q_i ∘ E_ij ∘ k_j, (…, c, c)."""
    return ((between * k[..., None, :, :]) @ q[..., None])[..., 0]


def _check(query: Any, key: Any, value: Any, log_gate: Any, state: Any) -> None:
    fits = query.ndim >= 2 and query.shape == key.shape and value.shape[:-1] == key.shape[:-1]
    ends = zip(log_gate.shape[::-1], key.shape[::-1], strict=False)
    if not fits or log_gate.ndim > key.ndim or any(a not in (1, b) for a, b in ends):
        raise ValueError(
            "gated linear attention takes query and key (…, n, d), value (…, n, e) and a log_gate "
            f"that broadcasts to the shape of key, got {query.shape}, {key.shape}, {value.shape} "
            f"and {log_gate.shape}"
        )
    wanted = state_shape(key, value)
    if state is not None and state.shape != wanted:
        raise ValueError(f"the state is (…, d, e) = {wanted} here, got {state.shape}")


# RWKV-4


class WKVState(NamedTuple):
    """Σ e^{…} v and Σ e^{…} up to the last token, both times e^{−p}, and p; each (…, d)."""

    numerator: Array
    denominator: Array
    exponent: Array


def wkv(
    key: Array,
    value: Array,
    decay: Array,
    bonus: Array,
    state: tuple[Array, ...] | None = None,
) -> Any:
    """A mean of the values so far, channel by channel, with weights e^{k_j − (t − 1 − j) w}.

    The token itself has e^{k_t + u}.  There is no query: what it looks for is the same everywhere.

    Args:
        key: (…, n, d), of any size: only differences count.
        value: (…, n, d).
        decay: w (d,), at least 0, for each token.
        bonus: u (d,).
        state: None; or ``()`` or what the call before returned.

    Returns:
        (…, n, d); with a state also the next one, a ``WKVState``.

    Raises:
        ValueError: the shapes do not fit.
    """
    d = key.shape[-1:]
    if key.ndim < 2 or key.shape != value.shape or not decay.shape == bonus.shape == d:
        raise ValueError(
            "wkv takes key and value (…, n, d), decay (d,) and bonus (d,), got "
            f"{key.shape}, {value.shape}, {decay.shape} and {bonus.shape}"
        )
    like, key, value = value, wide(key), wide(value)
    decay, bonus = rate_of(decay, key), rate_of(bonus, key)
    xp, n, dtype = of(data_of(key)), key.shape[-2], key.dtype
    if state:
        y, z, p = state[0], state[1], data_of(state[2])
    else:
        y = z = xp.zeros((*key.shape[:-2], *d), dtype)
        p = z + 0.5 * float(xp.finfo(dtype).min)
    if n:  # where nothing is summed yet p is free, and far above the keys it would leave 0 / 0
        p = xp.where(data_of(z) == 0.0, data_of(key)[..., 0, :], p)
    one = ops.exp(key - data_of(key))  # the exponent is a constant, so the gradient has to be here
    elements = tuple(
        ops.concatenate([first, rest], axis=-2)
        for first, rest in (
            (xp.zeros((1, *d), dtype), ops.broadcast_to(-decay, (n, *d))),
            (p[..., None, :], data_of(key)),
            (ops.expand_dims(y, -2), one * value),
            (ops.expand_dims(z, -2), one),
        )
    )
    _, p, y, z = associative_scan(_join, elements)
    last = WKVState(y[..., n, :], z[..., n, :], p[..., n, :])
    p, y, z = (x[..., :n, :] for x in (p, y, z))
    top = xp.maximum(p, data_of(key) + data_of(bonus))
    old, new = ops.exp(p - top), ops.exp(key + bonus - top)
    o = narrow((old * y + new * value) / (old * z + new), like)
    return o if state is None else (o, last)


def _join(first: Elements, then: Elements) -> Elements:
    """Two stretches (−w · length, p, y, z) as one; what p is does not matter, so it is constant."""
    (s, p, y, z), (next_s, next_p, next_y, next_z) = first, then
    faded = p + next_s
    top = of(p).maximum(data_of(faded), next_p)
    old, new = ops.exp(faded - top), ops.exp(next_p - top)
    return s + next_s, top, old * y + new * next_y, old * z + new * next_z
