"""The sum that every causal linear attention is: token by token, and in chunks.

====================================================  =========================================
S_t = γ_t S_{t−1} + k_t v_tᵀ,  o_t = S_tᵀ q_t          Katharopoulos et al. 2020, "Transformers
                                                      are RNNs", arXiv:2006.16236, eq. 16–20
                                                      (γ = 1): ``recurrent``
O = ((Q Kᵀ) ∘ D) V + (Q ∘ e) S₀,  Dᵢⱼ = γ_{j+1} … γᵢ  Sun et al. 2023, arXiv:2307.08621, eq. 7
inside a chunk, with e_i = γ_1 … γ_i                  (γ constant); Dao & Gu 2024,
                                                      arXiv:2405.21060, §6 (γ_t): ``chunked``
====================================================  =========================================

γ is given as its logarithm.  Products of decays are sums of logarithms, and D is built from sums
over j < t ≤ i that start anew for each j: neither a quotient of two products, which overflows, nor
a difference of two sums, which cancels.  So γ_t = 0 (a logarithm of −inf) is allowed.

Deviations: float16 is summed in float32: the outputs are float16 again, the states stay float32.

The rules of ``chunked``, with Ā for the gradient of A, c for a chunk, S and S′ for its state before
and after, a_j = γ_{j+1} … γ_end and P = Ō Vᵀ ∘ D::

    V̄ = ((Q Kᵀ) ∘ D)ᵀ Ō + (K ∘ a) S̄′       Q̄ = P K + (Ō Sᵀ) ∘ e
    S̄ = γ_1 … γ_end S̄′ + (Q ∘ e)ᵀ Ō        K̄ = Pᵀ Q + (V S̄′ᵀ) ∘ a
    (log γ)̄_t = Σ_{s ≥ t} (q_s · q̄_s − k_s · k̄_s) + ⟨S′, S̄′⟩

The last line says that log γ_t scales q of all later tokens and divides k of them; it is summed to
the end of the chunk only, whose state S′ stands for all that follows.
"""

from __future__ import annotations

from typing import Any

from .. import ops
from ..engine import data_of, primitive
from ..ops.elementwise import of
from ..tape import Kept
from .arguments import narrow, rate_of, wide

__all__ = ["chunked", "recurrent"]

CHUNK = 64


def recurrent(
    query: Any, key: Any, value: Any, log_decay: Any = None, state: Any = None
) -> tuple[Any, Any]:
    """o_t = S_tᵀ q_t with S_t = γ_t S_{t−1} + k_t v_tᵀ, token by token.

    Args:
        query: (…, n, d).
        key: (…, n, d).
        value: (…, n, e).
        log_decay: log γ, a number or broadcastable to (…, n), at most 0; None for γ = 1.
        state: S₀, (…, d, e); None for 0.

    Returns:
        The outputs (…, n, e) and the last state (…, d, e).

    Raises:
        ValueError: the shapes do not fit.
    """
    like, (query, key, value) = value, map(wide, (query, key, value))
    log_decay, state = rate_of(log_decay, query), rate_of(state, query)
    _check(query, key, value, log_decay, state)
    xp, n = of(data_of(query)), query.shape[-2]
    if state is None:
        state = xp.zeros(state_shape(key, value), value.dtype)
    if n == 0:
        return xp.zeros(like.shape, like.dtype), state
    queries, keys, values = (ops.split(x, n, axis=-2) for x in (query, key, value))
    if log_decay is not None:
        decays = ops.split(ops.exp(ops.broadcast_to(log_decay, query.shape[:-1])), n, axis=-1)
    outputs = []
    for t in range(n):
        if log_decay is not None:
            state = state * decays[t][..., None]
        state = state + ops.matrix_transpose(keys[t]) * values[t]
        outputs.append(ops.matmul(queries[t], state))
    return narrow(ops.concatenate(outputs, axis=-2), like), state


def _definition(
    query: Any,
    key: Any,
    value: Any,
    log_decay: Any = None,
    state: Any = None,
    chunk_size: int = CHUNK,
) -> tuple[Any, Any]:
    return recurrent(query, key, value, log_decay, state)


def chunked(
    query: Any,
    key: Any,
    value: Any,
    log_decay: Any = None,
    state: Any = None,
    chunk_size: int = CHUNK,
) -> tuple[Any, Any]:
    """``recurrent``, by matrix products over chunks: time and memory grow as n.

    Args:
        query: (…, n, d).
        key: (…, n, d).
        value: (…, n, e).
        log_decay: log γ, a number or broadcastable to (…, n), at most 0; None for γ = 1.
        state: S₀, (…, d, e); None for 0.
        chunk_size: tokens in a chunk; need not divide n.  Inside a chunk the work grows as its
            square, and there is one step of Python for each chunk.

    Returns:
        The outputs (…, n, e) and the last state (…, d, e).

    Raises:
        ValueError: the shapes do not fit, or ``chunk_size`` is below 1.
    """
    like, (query, key, value) = value, map(wide, (query, key, value))
    log_decay, state = rate_of(log_decay, query), rate_of(state, query)
    _check(query, key, value, log_decay, state)
    if chunk_size < 1:
        raise ValueError(f"a chunk has at least one token, got chunk_size={chunk_size}")
    y, last = _chunked(query, key, value, log_decay, state, chunk_size)
    return narrow(y, like), last


@primitive(composite=_definition)
def _chunked(query: Any, key: Any, value: Any, log_decay: Any, state: Any, chunk_size: int) -> Any:
    xp, n = of(query), query.shape[-2]
    size = max(1, min(chunk_size, n))
    q, k, v = (in_chunks(xp, x, size) for x in (query, key, value))
    decay = Decay(xp, log_decay, n, size, query.dtype)
    first = xp.zeros(state_shape(key, value), value.dtype) if state is None else state
    added = decay.to_end(k).swapaxes(-1, -2) @ v
    states, last = _scan(xp, first, added, decay, range(added.shape[-3]))
    y = decay.hide(q @ k.swapaxes(-1, -2)) @ v
    y += decay.from_start(q) @ states
    return Kept((in_a_row(y, n), last), states=states)


@_chunked.joint_derivative("query", "key", "value", "log_decay", "state")
def _rule(
    g: Any,
    needs: Any,
    y: Any,
    query: Any,
    key: Any,
    value: Any,
    log_decay: Any,
    chunk_size: int,
    states: Any,
) -> tuple[Any, ...]:
    xp, n = of(query), query.shape[-2]
    size = max(1, min(chunk_size, n))
    q, k, v, o = (in_chunks(xp, x, size) for x in (query, key, value, g[0]))
    decay = Decay(xp, log_decay, n, size, query.dtype)
    seen = decay.from_start(q).swapaxes(-1, -2) @ o
    after, first = _scan(xp, g[1], seen, decay, reversed(range(seen.shape[-3])))
    of_q = of_k = of_v = of_decay = None
    if needs[2]:
        of_v = decay.hide(q @ k.swapaxes(-1, -2)).swapaxes(-1, -2) @ o
        of_v += decay.to_end(k) @ after
    if needs[0] or needs[1] or needs[3]:
        p = decay.hide(o @ v.swapaxes(-1, -2))
        of_q = p @ k
        of_q += decay.from_start(o @ states.swapaxes(-1, -2))
        of_k = p.swapaxes(-1, -2) @ q
        of_k += decay.to_end(v @ after.swapaxes(-1, -2))
    if needs[3]:
        ends = xp.concatenate([states[..., 1:, :, :], y[1][..., None, :, :]], axis=-3)
        later = ((q * of_q).sum(axis=-1) - (k * of_k).sum(axis=-1))[..., ::-1]
        of_decay = later.cumsum(axis=-1)[..., ::-1] + (ends * after).sum(axis=(-1, -2))[..., None]
        of_decay = of_decay.reshape(*of_decay.shape[:-2], -1)[..., :n]
    rows = [None if x is None else in_a_row(x, n) for x in (of_q, of_k, of_v)]
    return (*rows, of_decay, first)


class Decay:
    """The decays between any two tokens of a chunk, and those from its start and to its end.

    Without decay all of them are 1, so only the mask of D is left.
    """

    def __init__(self, xp: Any, log_decay: Any, n: int, size: int, dtype: Any) -> None:
        later = xp.arange(size)[:, None] > xp.arange(size)
        self.between = (xp.arange(size)[:, None] >= xp.arange(size)).astype(dtype)
        self.start = self.end = self.whole = None
        if log_decay is not None:
            spread = xp.broadcast_to(log_decay, (*log_decay.shape[:-1], n))
            steps = in_chunks(xp, spread[..., None], size)  # (…, chunks, size, 1)
            self.between = self.between * xp.exp(xp.where(later, steps, 0.0).cumsum(axis=-2))
            self.start = xp.exp(steps.cumsum(axis=-2))
            self.end = self.between[..., -1, :, None]
            self.whole = self.start[..., -1:, :]

    def hide(self, a: Any) -> Any:
        """a ∘ D, in place: nothing for what is later, and less of what is long ago."""
        a *= self.between
        return a

    def from_start(self, x: Any) -> Any:
        """Each row of a chunk times what is left in it of the state before the chunk."""
        return x if self.start is None else x * self.start

    def to_end(self, x: Any) -> Any:
        """Each row of a chunk times what is left of it after the chunk."""
        return x if self.end is None else x * self.end

    def state(self, x: Any, chunk: int) -> Any:
        """What a whole chunk leaves of a state."""
        return x if self.whole is None else x * self.whole[..., chunk, :, :]


def _scan(xp: Any, first: Any, added: Any, decay: Decay, order: Any) -> tuple[Any, Any]:
    """The states that the chunks of this order find, and what is there after the last."""
    found, state = xp.empty_like(added), first
    for chunk in order:
        found[..., chunk, :, :] = state
        state = decay.state(state, chunk) + added[..., chunk, :, :]
    return found, state


def in_chunks(xp: Any, x: Any, size: int, fill: float = 0.0) -> Any:
    """(…, n, d) as (…, chunks, size, d), with ``fill`` after the last token."""
    *lead, n, d = x.shape
    missing = -n % size
    if missing:
        x = ops.concatenate([x, xp.full((*lead, missing, d), fill, x.dtype)], axis=-2)
    return x.reshape(*lead, (n + missing) // size, size, d)


def in_a_row(x: Any, n: int) -> Any:
    """(…, chunks, size, d) as (…, n, d)."""
    *lead, chunks, size, d = x.shape
    return x.reshape(*lead, chunks * size, d)[..., :n, :]


def state_shape(key: Any, value: Any) -> tuple[int, ...]:
    """(…, d, e) for keys (…, n, d) and values (…, n, e)."""
    return (*key.shape[:-2], key.shape[-1], value.shape[-1])


def _check(query: Any, key: Any, value: Any, log_decay: Any, state: Any) -> None:
    fits = query.shape == key.shape and query.ndim >= 2
    if not fits or value.shape[:-1] != key.shape[:-1]:
        raise ValueError(
            "a causal linear attention takes query and key (…, n, d) and value (…, n, e), got "
            f"{query.shape}, {key.shape} and {value.shape}"
        )
    if log_decay is not None:
        shape, wanted = log_decay.shape, query.shape[:-1]
        ends = zip(shape[::-1], wanted[::-1], strict=False)
        if len(shape) > len(wanted) or any(a not in (1, b) for a, b in ends):
            raise ValueError(f"log_decay has to broadcast to (…, n) = {wanted}, got {shape}")
    if state is not None and state.shape != state_shape(key, value):
        raise ValueError(
            f"the state is (…, d, e) = {state_shape(key, value)} here, got {state.shape}"
        )
