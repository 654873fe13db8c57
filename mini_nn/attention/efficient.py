"""Two softmaxes instead of one: queries over their features, keys over the sequence.

======================================================  =========================================
softmax_d(Q) (softmax_n(K)ᵀ V)                          Shen, Zhang, Zhao, Yi, Li 2018,
                                                        "Efficient Attention", arXiv:1812.01243,
                                                        3.2: ``efficient_attention``
gather G = Vᵀ softmax_n(K), distribute G softmax_d(Q)ᵀ  Chen, Kalantidis, Li, Yan, Feng 2018,
                                                        "A²-Nets", arXiv:1810.11579, 3.1–3.3:
                                                        ``gather_features``,
                                                        ``distribute_features``,
                                                        ``double_attention``
oᵢ = Σ_d p_id (Σ_{j≤i} e^{k_jd} v_j) / Z_id,            the same with sums up to i:
Z_id = Σ_{j≤i} e^{k_jd}, p = softmax_d(q)               ``causal_efficient_attention``
======================================================  =========================================

The rows of softmax_d(Q) softmax_n(K)ᵀ add up to 1, so no denominator is needed: each feature is a
weighted mean over the sequence, and each query a mean of features.  (AB)ᵀ = Bᵀ Aᵀ makes the two
papers' formulas one.  Both look at the whole sequence through the sums over n.

The causal form has a normaliser Z for each token and feature.  With Lᵢ = ln Zᵢ all weights are
e^{kⱼ − Lᵢ} ≤ 1, but as a matrix product they have to be split into e^{kⱼ − c} e^{c − Lᵢ}, one of
which overflows for almost any c.  For a block of keys and a block of later queries the value of L
at the seam is safe, since kⱼ ≤ c ≤ Lᵢ.  So a chunk is halved, and its halves again, down to single
tokens: log₂ of its length products, all chunks at once.  Between chunks the means go on as a state.

Deviations: one head, without the 1 × 1 convolutions and the residual connection of the papers'
blocks.  float16 is summed in float32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from .. import ops
from ..backend import Array
from ..engine import data_of
from ..ops.elementwise import of
from .arguments import as_recurrence, check_attention, narrow, same_lead, wide, without_pads
from .chunked import in_chunks

__all__ = [
    "EfficientState", "causal_efficient_attention", "distribute_features", "double_attention",
    "efficient_attention", "gather_features",
]  # fmt: skip

CHUNK = 64
NOTHING = -1e30
"""ln of no weight at all: finite, so that it can be subtracted from itself."""


class EfficientState(NamedTuple):
    """What ``causal_efficient_attention`` keeps of all tokens so far."""

    means: Array
    """Σ e^{k_d} v / Z_d for each feature, (…, d, e)."""
    log_normalizer: Array
    """L = ln Z, (…, d)."""


def efficient_attention(
    query: Array,
    key: Array,
    value: Array,
    key_mask: Array | None = None,
    is_causal: bool = False,
) -> Array:
    """softmax_d(Q) (softmax_n(K)ᵀ V): a mean over features of means over the whole sequence.

    Args:
        query: (…, n, d).
        key: (…, m, d).
        value: (…, m, e).
        key_mask: booleans that broadcast to (…, m), true for real tokens; without any the result is
            0.
        is_causal: refused.

    Returns:
        (…, n, e), in the convex hull of the values.

    Raises:
        ValueError: the shapes do not fit, or ``is_causal``: softmax_n(K) has later keys in its
            denominator.
        TypeError: ``key_mask`` is not boolean.
    """
    return distribute_features(
        query, _gathered("efficient_attention", query, key, value, key_mask, is_causal)
    )


def gather_features(key: Array, value: Array, key_mask: Array | None = None) -> Array:
    """softmax_n(K)ᵀ V: for each feature, the mean of the values at the places that have it.

    Args:
        key: (…, m, d).
        value: (…, m, e).
        key_mask: booleans that broadcast to (…, m), true for real tokens.

    Returns:
        (…, d, e), the transpose of the paper's G.
    """
    k, v = wide(key), wide(value)
    if key_mask is not None:
        k, v = without_pads(key_mask, k, v)
        k = ops.where(data_of(key_mask)[..., None], k, float("-inf"))
    return narrow(ops.matmul(ops.matrix_transpose(ops.softmax(k, axis=-2)), v), value)


def distribute_features(query: Array, gathered: Array) -> Array:
    """softmax_d(Q) G: for each query, the mean of what was gathered, by its share of the features.

    Args:
        query: (…, n, d).
        gathered: (…, d, e).

    Returns:
        (…, n, e).
    """
    shares = ops.softmax(wide(query), axis=-1)
    return narrow(ops.matmul(shares, wide(gathered)), gathered)


def double_attention(
    query: Array,
    key: Array,
    value: Array,
    key_mask: Array | None = None,
    is_causal: bool = False,
) -> Array:
    """(G softmax_d(Q)ᵀ)ᵀ with G = Vᵀ softmax_n(K), features in rows as A²-Nets writes it.

    Equal to ``efficient_attention``, which see for arguments and errors; "key" is the paper's B,
    from which it gathers, and "query" its V, by which it distributes.
    """
    g = ops.matrix_transpose(_gathered("double_attention", query, key, value, key_mask, is_causal))
    vectors = ops.softmax(ops.matrix_transpose(wide(query)), axis=-2)
    return ops.matrix_transpose(narrow(ops.matmul(wide(g), vectors), g))


def _gathered(name: str, query: Any, key: Any, value: Any, mask: Any, is_causal: bool) -> Any:
    check_attention(query, key, value)
    if is_causal:
        raise ValueError(
            f"{name} is not causal: its softmax over the sequence divides by later keys. "
            "causal_efficient_attention normalises over the keys so far"
        )
    return gather_features(key, value, mask)


# The causal form


def causal_efficient_attention(
    query: Array,
    key: Array,
    value: Array,
    key_mask: Array | None = None,
    is_causal: bool = True,
    state: Any = None,
) -> Any:
    """Efficient attention in which token i takes its means over the tokens up to i.

    At the last token it is ``efficient_attention``.  Time and memory grow as n.

    Args:
        query: (…, n, d); or the last one only, (…, 1, d), with ``is_causal=False``.
        key: (…, n, d), of any size: no exponential overflows, and the weights have a relative
            error of |key| times the dtype's precision, as those of any softmax.
        value: (…, n, e).
        key_mask: booleans that broadcast to (…, n), true for real tokens; before the first of them
            the result is 0.  With a state, of the new tokens.
        is_causal: must be true unless there is one query.
        state: continues a sequence: ``()`` before its first token, then the ``EfficientState`` of
            the call before.  Its leading axes are those of query, key and value together.

    Returns:
        (…, n, e), and the next state if one was given.

    Raises:
        ValueError: the shapes do not fit, or a bidirectional form is asked for.
        TypeError: ``key_mask`` is not boolean, or the state no tuple.
    """
    query, rows = as_recurrence(query, key, value, is_causal, state)
    k, v = wide(key), wide(value)
    if key_mask is not None:
        k, v = without_pads(key_mask, k, v)
        k = ops.where(data_of(key_mask)[..., None], k, NOTHING)
    p, k, v = same_lead(ops.softmax(wide(query), axis=-1), k, v)
    xp, n, d, e = of(data_of(v)), k.shape[-2], k.shape[-1], v.shape[-1]
    lead = k.shape[:-2]
    means, log_z = state or (
        xp.zeros((*lead, d, e), v.dtype),
        xp.full((*lead, d), NOTHING, v.dtype),
    )
    if (means.shape, log_z.shape) != ((*lead, d, e), (*lead, d)):
        raise ValueError(
            f"the state is (…, d, e) and (…, d), {(*lead, d, e)} and {(*lead, d)} here, got "
            f"{means.shape} and {log_z.shape}"
        )
    if n:
        size = min(CHUNK, 1 << (n - 1).bit_length())
        p, k, v = (in_chunks(xp, x, size, fill) for x, fill in ((p, 0.0), (k, NOTHING), (v, 0.0)))
        inside = _running_log_sum(k)
        upto = _running_log_sum(_after(log_z, inside[..., -1, :]))  # L where each chunk ends
        before, end = upto[..., :-1, None, :], upto[..., 1:, None, :]
        normal = _log_add(before, inside)
        y = _within(p, k, v, normal)
        means = _means(means, before, end, k, v)
        y = y + ops.matmul(p * ops.exp(before - normal), means[..., :-1, :, :])
        output = y.reshape(*lead, y.shape[-3] * size, e)[..., :n, :]
        means, log_z = means[..., -1, :, :], upto[..., -1, :]
    else:
        output = v
    output = rows(narrow(output, value))
    return output if state is None else (output, EfficientState(means, log_z))


def _within(p: Any, k: Any, v: Any, normal: Any) -> Any:
    """Σ_{j ≤ i} Σ_d p_id e^{k_jd − L_id} v_j inside each chunk (…, size, d), size a power of 2."""
    y = ops.sum(p * ops.exp(k - normal), axis=-1, keepdims=True) * v  # token i of itself
    half = 1
    while half < k.shape[-2]:
        later_p, later_normal = (_halves(x, half)[..., 1, :, :] for x in (p, normal))
        earlier_k, earlier_v = (_halves(x, half)[..., 0, :, :] for x in (k, v))
        seam = _halves(normal, half)[..., 0, -1:, :]
        weights = ops.matmul(
            later_p * ops.exp(seam - later_normal),
            ops.matrix_transpose(ops.exp(earlier_k - seam)),
        )
        part = ops.matmul(weights, earlier_v)
        part = ops.stack([ops.zeros_like(part), part], axis=-3)
        y = y + part.reshape(y.shape)
        half *= 2
    return y


def _means(first: Any, before: Any, end: Any, k: Any, v: Any) -> Any:
    """The means before each chunk and after the last, (…, chunks + 1, d, e)."""
    added = ops.matmul(ops.matrix_transpose(ops.exp(k - end)), v)
    stays = ops.matrix_transpose(ops.exp(before - end))
    found = [first]
    for chunk in range(k.shape[-3]):
        found.append(stays[..., chunk, :, :] * found[-1] + added[..., chunk, :, :])
    return ops.stack(found, axis=-3)


def _running_log_sum(x: Any) -> Any:
    """ln Σ_{j ≤ i} e^{x_j} along the last axis but one, in log₂ n steps (Hillis & Steele 1986)."""
    step = 1
    while step < x.shape[-2]:
        later = _log_add(x[..., step:, :], x[..., :-step, :])
        x = ops.concatenate([x[..., :step, :], later], axis=-2)
        step *= 2
    return x


def _log_add(a: Any, b: Any) -> Any:
    """ln(eᵃ + eᵇ)."""
    top = ops.maximum(data_of(a), data_of(b))
    return top + ops.log(ops.exp(a - top) + ops.exp(b - top))


def _after(first: Any, x: Any) -> Any:
    return ops.concatenate([first[..., None, :], x], axis=-2)


def _halves(x: Any, half: int) -> Any:
    """(…, size, d) as (…, blocks, 2, half, d)."""
    *lead, size, d = x.shape
    return x.reshape(*lead, size // (2 * half), 2, half, d)
