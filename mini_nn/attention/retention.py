"""Retention: linear attention that forgets at one fixed rate a head.

Sun, Dong, Huang, Ma, Xia, Xue, Wang, Wei 2023, "Retentive Network: A Successor to Transformer for
Large Language Models", arXiv:2307.08621; Qin, Han, Sun, Li, Kong, Barnes, Zhong 2022, "The Devil in
Linear Transformer", arXiv:2210.10340 (the last row).

==========================================================  =======  ============================
O = (Q Kᵀ ∘ D) V, D_ij = γ^{i−j} for j ≤ i, else 0          eq. 5    ``parallel_retention``
S_t = γ S_{t−1} + k_t v_tᵀ, o_t = S_tᵀ q_t                  eq. 6    ``recurrent_retention``
the first within chunks, the second between them            eq. 7    ``retention``
q_n e^{inθ}, k_m e^{−imθ}: turned as pairs of channels      2.1      ``retention_angles``,
                                                                     ``rotate_pairs``
γ_h = 1 − 2^{−5−h}, h = 0, 1, …                             eq. 8    ``retention_log_decays``
Q Kᵀ/√d; D_nm / √(Σ_i D_ni); R_nm / max(|Σ_i R_ni|, 1)      2.2      ``retention_scores(…,
                                                                     normalize=True)``
(swish(X W_G) ∘ GroupNorm_h(heads)) W_O                     eq. 8    ``MultiScaleRetention``
O = RMSNorm((Q Kᵀ ∘ M) V), M = 1 for j ≤ i                  –        ``norm_attention``
==========================================================  =======  ============================

D is the exponential of (i − j) ln γ.  As γ^i γ^{−j}, which is how the equation of the paper begins,
the second factor overflows.

The three normalisations multiply a whole row of O by a positive number.  GroupNorm takes it out
again, so that they only keep half precision in range, and the recurrent form does without them.

A rotation by nθ for each token is a rotation by θ a step of the state: γ e^{iθ} is the eigenvalue
of the recurrence that the paper starts from (its 2.1).  So a state that is turned by −nθ after n
tokens lets the next call count from 0 again, and no position has to be remembered.

Deviations: the angles are θ_j = 10000^{−j/(d/2 − 1)} from 1 to 10⁻⁴, as in the authors' code; the
paper cites xPos, whose exponent is 2j/d as in RoPE.  Their code normalises heads by RMSNorm
(``norm=``), the paper by GroupNorm, which is the default here, without weights.  The score
normalisation of the code takes Σ|R|, the paper |Σ R|.  ``norm_attention`` expects query and key
behind their feature map.  float16 is summed in float32: outputs are float16, states float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from .. import nn, ops
from ..backend import Array
from ..engine import data_of
from ..nn import Module, init
from ..ops.elementwise import of
from ..rng import Rng
from .arguments import (
    as_recurrence,
    check_attention,
    check_key_mask,
    check_lead,
    check_state,
    narrow,
    rate_of,
    wide,
    without_pads,
)
from .chunked import chunked, recurrent

__all__ = [
    "MultiScaleRetention", "RetentionState", "norm_attention", "parallel_retention",
    "recurrent_retention", "retention", "retention_angles", "retention_log_decays",
    "retention_scores", "rotate_pairs",
]  # fmt: skip

Decay = Array | float | Sequence[float] | None


class RetentionState(NamedTuple):
    """What retention remembers: S (…, d, e), whatever the number of tokens."""

    memory: Array


def retention_log_decays(heads: int) -> list[float]:
    """ln γ_h = ln(1 − 2^{−5−h}) for h = 0 … heads − 1: half is left after 22, 44, 89, … tokens.

    Raises:
        ValueError: there is no head.
    """
    if heads < 1:
        raise ValueError(f"retention has at least one head, got {heads}")
    return [math.log1p(-(2.0 ** (-5 - h))) for h in range(heads)]


def _log_decay(query: Any, decay: Decay) -> Any:
    """ln γ as an array (heads, 1) or (1,), which broadcasts to (…, heads, n)."""
    if decay is None:
        logs = retention_log_decays(query.shape[-3] if query.ndim > 2 else 1)
    elif isinstance(decay, (int, float, list, tuple)):
        rates = [decay] if isinstance(decay, (int, float)) else [*decay]
        if not rates or not all(0.0 < rate <= 1.0 for rate in rates):
            raise ValueError(f"a decay is above 0 and at most 1, got {decay}")
        logs = [math.log(rate) for rate in rates]
    else:
        logs = ops.log(decay)  # in its own dtype: float32 has no digits for γ near 1
    return _per_head(query, rate_of(logs, query).reshape(-1))


def _per_head(query: Any, logs: Any) -> Any:
    heads = query.shape[-3] if query.ndim > 2 else 1
    if logs.shape[0] not in (1, heads):
        raise ValueError(
            f"retention takes one decay or one for each of {heads} heads (…, h, n, d), got "
            f"{logs.shape[0]} for a query {query.shape}"
        )
    return logs.reshape((-1, 1)) if query.ndim > 2 else logs


# Three forms of one function


def retention(
    query: Array,
    key: Array,
    value: Array,
    decay: Decay = None,
    is_causal: bool = True,
    state: tuple[Array, ...] | None = None,
    key_mask: Array | None = None,
    chunk_size: int = 64,
) -> Any:
    """O = (Q Kᵀ ∘ D) V in chunks: time and memory grow as n.  Nothing is scaled or rotated here.

    Args:
        query: (…, h, n, d), or (n, d) for one head.
        key: likewise.
        value: (…, h, n, e).
        decay: γ in (0, 1]: a number, one for each head (an array is not checked), or None for
            the paper's.
        is_causal: may be False for one query only, which is the last token.
        state: None; or ``()`` or what the call before returned.
        key_mask: broadcastable to (…, h, n), booleans that are true for real tokens; at the others
            nothing is written and nothing forgotten, whatever their keys and values hold.
        chunk_size: see ``chunked``.

    Returns:
        (…, h, n, e); with a state also the next one, a ``RetentionState``.

    Raises:
        ValueError: the shapes do not fit, a decay is not in (0, 1], or there are several queries
            without ``is_causal``.
        TypeError: ``key_mask`` has no booleans.
    """
    form = partial(chunked, chunk_size=chunk_size)
    return _retained(form, query, key, value, decay, is_causal, state, key_mask)


def recurrent_retention(
    query: Array,
    key: Array,
    value: Array,
    decay: Decay = None,
    is_causal: bool = True,
    state: tuple[Array, ...] | None = None,
    key_mask: Array | None = None,
) -> Any:
    """``retention`` token by token, as a decoder computes it; the arguments are the same."""
    return _retained(recurrent, query, key, value, decay, is_causal, state, key_mask)


def _retained(
    form: Callable[..., Any],
    query: Any,
    key: Any,
    value: Any,
    decay: Decay,
    is_causal: bool,
    state: Any,
    key_mask: Any,
) -> Any:
    check_lead(query, key, value)
    query, rows = as_recurrence(query, key, value, is_causal, state)
    log_decay = _log_decay(query, decay)
    if key_mask is not None:
        key, value = without_pads(key_mask, key, value)
        log_decay = ops.where(data_of(key_mask), log_decay, 0.0)
    y, last = form(query, key, value, log_decay, state[0] if state else None)
    return rows(y) if state is None else (rows(y), RetentionState(last))


def parallel_retention(
    query: Array,
    key: Array,
    value: Array,
    decay: Decay = None,
    is_causal: bool = True,
    normalize: bool = False,
) -> Array:
    """``retention`` by its (n, n) matrix; with ``normalize`` each row times a positive number."""
    check_lead(query, key, value)
    query, rows = as_recurrence(query, key, value, is_causal)
    scores = retention_scores(wide(query), wide(key), decay, normalize)
    return rows(narrow(ops.matmul(scores, wide(value)), value))


def retention_scores(
    query: Array, key: Array, decay: Decay = None, normalize: bool = False
) -> Array:
    """R = Q Kᵀ ∘ D, D_ij = γ^{i−j} for j ≤ i.

    Args:
        query, key: (…, h, n, d), or (n, d).
        decay: as for ``retention``.
        normalize: apply the paper's three normalisations, of Q Kᵀ, of D and of R.

    Returns:
        (…, h, n, n).

    Raises:
        ValueError: the shapes do not fit, or a decay is not in (0, 1].
    """
    check_attention(query, key, key)
    if query.shape != key.shape:
        raise ValueError(f"retention takes a query for each key, got {query.shape} and {key.shape}")
    like, query, key = query, wide(query), wide(key)
    xp, n = of(data_of(query)), query.shape[-2]
    past = xp.arange(n)[:, None] - xp.arange(n)
    steps = xp.where(past < 0, 0, past).astype(query.dtype)
    d = ops.exp(steps * _log_decay(query, decay)[..., None]) * (past >= 0).astype(query.dtype)
    scores = ops.matmul(query, ops.matrix_transpose(key))
    if not normalize:
        return narrow(scores * d, like)
    scores = scores * (1.0 / math.sqrt(query.shape[-1]))
    r = scores * (d * ops.rsqrt(ops.sum(d, axis=-1, keepdims=True)))
    return narrow(r / ops.maximum(ops.abs(ops.sum(r, axis=-1, keepdims=True)), 1.0), like)


# Rotation


def retention_angles(d: int) -> list[float]:
    """θ_j = 10000^{−j/(d/2 − 1)}, j = 0 … d/2 − 1, in radians a token: from 1 to 10⁻⁴.

    Not RoPE's 10000^{−2j/d}, which ends before.  For d = 2 it is 1 alone.

    Raises:
        ValueError: d is not a positive even number.
    """
    if d < 2 or d % 2:
        raise ValueError(f"rotation turns pairs of channels, so their number is even, got {d}")
    return [10000.0 ** (-j / max(d // 2 - 1, 1)) for j in range(d // 2)]


def rotate_pairs(x: Array, start: int = 0, step: int = 1) -> Array:
    """Token n of x turned by (start + step · n) θ, each pair of channels (2j, 2j + 1) by its θ_j.

    A scalar product of two tokens that are so turned depends on the distance between them only.

    Args:
        x: (…, n, d), d even.
        start: the position of the first token.
        step: from a token to the next one; 0 turns all alike.

    Returns:
        The shape of x.

    Raises:
        ValueError: d is odd.
    """
    # float32 has no digits for large angles
    return _turned(x, start + step * of(data_of(x)).arange(x.shape[-2], dtype="float64"))


def _turned(x: Any, places: Any) -> Any:
    """Each token of x (…, n, d) turned by its place times θ; places broadcast to (…, n)."""
    *lead, n, d = x.shape
    xp = of(data_of(x))
    angles = places[..., None] * xp.asarray(retention_angles(d), "float64")
    cos, sin = xp.cos(angles).astype(x.dtype), xp.sin(angles).astype(x.dtype)
    pairs = x.reshape((*lead, n, d // 2, 2))
    re, im = pairs[..., 0], pairs[..., 1]
    turned = ops.stack([re * cos - im * sin, re * sin + im * cos], axis=-1)
    return turned.reshape(x.shape)


# Layers


class MultiScaleRetention(Module):
    """Retention in several heads, each with its own memory span, behind a gate.

    Args:
        embed_dim: of the input and the output; the heads' queries and keys are its equal parts.
        value_dim: of all heads' values together (the paper: ``embed_dim``, later twice that).
        num_heads: h.
        norm: a Module that normalises each head of each token, (…, n, h, e); None for the paper's
            GroupNorm with h groups: LayerNorm over e, without weights.
        rng: what the weights are drawn from (None: ``default_rng()``).

    Attributes:
        q_proj, k_proj, v_proj, g_proj, out_proj: linear maps without bias, drawn from Xavier's
            uniform law with gain 2^{−5/2} (the last one: 2^{−1}), as in the authors' code.

    Raises:
        ValueError: the heads do not divide the dimensions, or a head's queries have no pairs.
    """

    def __init__(
        self,
        embed_dim: int,
        value_dim: int,
        num_heads: int,
        norm: Module | None = None,
        *,
        rng: Rng | None = None,
    ) -> None:
        if num_heads < 1 or embed_dim % (2 * num_heads) or value_dim % num_heads:
            raise ValueError(
                "MultiScaleRetention splits value_dim into num_heads parts and embed_dim into "
                f"parts of even length, got {value_dim} and {embed_dim} for {num_heads} heads"
            )
        self.embed_dim = embed_dim
        self.value_dim = value_dim
        self.num_heads = num_heads
        self.q_proj = nn.Linear(embed_dim, embed_dim, False, rng=rng)
        self.k_proj = nn.Linear(embed_dim, embed_dim, False, rng=rng)
        self.v_proj = nn.Linear(embed_dim, value_dim, False, rng=rng)
        self.g_proj = nn.Linear(embed_dim, value_dim, False, rng=rng)
        self.out_proj = nn.Linear(value_dim, embed_dim, False, rng=rng)
        for layer in (self.q_proj, self.k_proj, self.v_proj, self.g_proj):
            init.xavier_uniform_(layer.weight, 2.0**-2.5, rng=rng)
        init.xavier_uniform_(self.out_proj.weight, 0.5, rng=rng)
        head = value_dim // num_heads
        self.norm = nn.LayerNorm(head, elementwise_affine=False) if norm is None else norm

    def forward(
        self, input: Array, state: tuple[Array, ...] | None = None, key_mask: Array | None = None
    ) -> Any:
        """(…, n, embed_dim) to the same shape.

        Args:
            input: the tokens.
            state: None; or ``()`` or what the call before returned, a ``RetentionState`` of
                (…, h, d, e), which is turned as the next token sees it.
            key_mask: broadcastable to (…, n), booleans that are true for real tokens.  The others
                have no position: wherever they stand, what comes out at real tokens is as
                without them.

        Returns:
            The output; with a state also the next one.
        """
        query, key, value = (
            self._heads(layer(input)) for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        places, count, real = _places(input, key_mask)
        query, key = _turned(query, places), _turned(key * query.shape[-1] ** -0.5, places)
        y = retention(query, key, value, key_mask=real, state=state)
        if state is not None:
            y, (memory,) = y
            turned = _turned(ops.matrix_transpose(memory), -count)
            state = RetentionState(ops.matrix_transpose(turned))
        y = self.norm(ops.swapaxes(y, -2, -3)).reshape((*input.shape[:-1], self.value_dim))
        y = self.out_proj(ops.silu(self.g_proj(input)) * y)
        return y if state is None else (y, state)

    def _heads(self, x: Array) -> Array:
        """(…, n, h d) as (…, h, n, d)."""
        *lead, d = x.shape
        return ops.swapaxes(x.reshape((*lead, self.num_heads, d // self.num_heads)), -2, -3)


def _places(input: Any, key_mask: Any) -> tuple[Any, Any, Any]:
    """For all heads: the places (…, 1, n) of real tokens among themselves, their number, a mask."""
    xp, n = of(data_of(input)), input.shape[-2]
    if key_mask is None:
        return xp.arange(n, dtype="float64"), xp.full((1,), float(n), "float64"), None
    check_key_mask(key_mask, input)
    real = xp.broadcast_to(data_of(key_mask), input.shape[:-1])[..., None, :]
    ones = real.astype("float64")
    return ones.cumsum(axis=-1) - 1.0, ones.sum(axis=-1, keepdims=True), real


def norm_attention(
    query: Array,
    key: Array,
    value: Array,
    weight: Array | None = None,
    eps: float = 1e-6,
    is_causal: bool = False,
    state: tuple[Array, ...] | None = None,
) -> Any:
    """RMSNorm((Q Kᵀ ∘ M) V): linear attention that is normalised behind the sum, not by it.

    There is no denominator that could come near 0, so the gradient is bounded and the features
    need not be positive (Qin et al. 2022, arXiv:2210.10340).

    Args:
        query: (…, n, d), behind the feature map.
        key: (…, m, d), likewise.
        value: (…, m, e).
        weight: of the norm, (e,), or None for 1.
        eps: of the norm.
        is_causal: token i looks at tokens j ≤ i only, and n = m; otherwise at all m.
        state: None; or ``()`` or what the call before returned.

    Returns:
        (…, n, e); with a state also the next one, a ``RetentionState``.

    Raises:
        ValueError: the shapes do not fit, or a state is given without ``is_causal``.
    """
    check_attention(query, key, value)
    check_state(state, is_causal)
    like, (query, key, value) = value, map(wide, (query, key, value))
    weight, eps = rate_of(weight, query), float(eps)
    if not is_causal:
        memory = ops.matmul(ops.matrix_transpose(key), value)
        return narrow(ops.rms_norm(ops.matmul(query, memory), weight, eps), like)
    y, last = chunked(query, key, value, None, state[0] if state else None)
    y = narrow(ops.rms_norm(y, weight, eps), like)
    return y if state is None else (y, RetentionState(last))
