"""Linear attention: a similarity that is an inner product of features needs no n × n matrix.

===================================================  ============================================
Q (Kᵀ V) instead of (Q Kᵀ) V                         J. Su 2020, "Exploring linear attention",
                                                     kexue.fm 7546: ``unnormalized_attention``
oᵢ = φ(qᵢ)ᵀ Σⱼ ϕ(kⱼ) vⱼᵀ / φ(qᵢ)ᵀ Σⱼ ϕ(kⱼ)           Katharopoulos, Vyas, Pappas, Fleuret 2020,
                                                     "Transformers are RNNs", arXiv:2006.16236,
                                                     eq. 5: ``linear_attention``
the sums over j ≤ i as running states S, z           eq. 16–20: ``linear_attention_recurrent``
the same as a cumulative sum of outer products       kexue.fm 7546: ``linear_attention_cumulative``
the same as φ(Q) ϕ(K)ᵀ under a mask, times V         eq. 8: ``linear_attention_parallel``
the same in chunks                                   ``chunked.chunked``
===================================================  ============================================

S (…, D, e) = Σ ϕ(k) vᵀ and z (…, D) = Σ ϕ(k) are all that is ever kept of the past.  A column of
ones beside the values makes z a column of S: both sums are one.

The weights φ(qᵢ)ᵀ ϕ(kⱼ) / Σ are not negative where the features are not, and add up to 1.  So a
factor of φ(qᵢ), or one of all ϕ(kⱼ), changes nothing.

Deviations: a query whose normaliser is exactly 0 gets zeros instead of 0/0.  ε is 0 by default
(the authors' code adds 1e-6 to the normaliser, which pulls the result towards 0 where features are
small).  float16 is summed in float32, because the sum over some thousand tokens is beyond it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from .. import ops
from ..backend import Array
from ..engine import data_of
from ..ops.elementwise import of
from .arguments import (
    check_attention,
    check_key_mask,
    check_state,
    matched,
    narrow,
    same_lead,
    wide,
    without_pads,
)
from .chunked import chunked
from .feature_maps import FeatureMap, elu_plus_one, map_pair

__all__ = [
    "LinearState", "OuterState", "linear_attention", "linear_attention_cumulative",
    "linear_attention_parallel", "linear_attention_recurrent", "linear_attention_weights",
    "unnormalized_attention",
]  # fmt: skip


class LinearState(NamedTuple):
    """What normalised linear attention keeps of all tokens so far."""

    kv: Array
    """S = Σ ϕ(k) vᵀ, (…, D, e)."""
    normalizer: Array
    """z = Σ ϕ(k), (…, D)."""


class OuterState(NamedTuple):
    """What ``unnormalized_attention`` keeps of all tokens so far."""

    kv: Array
    """S = Σ k vᵀ, (…, d, e)."""


def linear_attention(
    query: Array,
    key: Array,
    value: Array,
    feature_map: FeatureMap = elu_plus_one,
    key_mask: Array | None = None,
    is_causal: bool = False,
    state: Any = None,
    eps: float = 0.0,
) -> Any:
    """oᵢ = φ(qᵢ)ᵀ S / (φ(qᵢ)ᵀ z + ε), with S and z over all keys, or over those up to i.

    Time and memory grow as n + m.

    Args:
        query: (…, n, d).
        key: (…, m, d).
        value: (…, m, e).
        feature_map: (…, d) → (…, D), or a pair for queries and keys: see ``feature_maps``.
        key_mask: booleans that broadcast to (…, m), true for real tokens; with a state, of the new
            ones.  It is applied to the features too, because the features of a zero vector are not
            0: masking keys and values alone would leave the pads in the normaliser.
        is_causal: token i looks at tokens j ≤ i only; n = m.
        state: continues a sequence: ``()`` before its first token, then the ``LinearState`` of
            the call before.  Its leading axes are those of query, key and value together.
        eps: ε, added to the normaliser.

    Returns:
        (…, n, e), and the next state if one was given.  A query whose normaliser is 0 gets zeros:
        one that sees no key, or of which all features vanish.

    Raises:
        ValueError: the shapes do not fit, or a state without ``is_causal``.
        TypeError: ``key_mask`` is not boolean, or the state no tuple.
    """
    _check(query, key, value, key_mask, is_causal, state)
    q, k, v = _features(query, key, value, feature_map, key_mask)
    if is_causal:
        q, k, v = same_lead(q, k, v)
    widened = ops.concatenate([v, _ones_column(v)], axis=-1)
    if not is_causal:
        sums = ops.matmul(q, ops.matmul(ops.matrix_transpose(k), widened))
        return _quotient(sums, eps, value)
    start = None
    if state:
        kv, z = _start(state, k, v)
        start = ops.concatenate([kv, z[..., None]], axis=-1)
    sums, last = chunked(q, k, widened, None, start)
    output = _quotient(sums, eps, value)
    return output if state is None else (output, LinearState(last[..., :-1], last[..., -1]))


def unnormalized_attention(
    query: Array,
    key: Array,
    value: Array,
    key_mask: Array | None = None,
    is_causal: bool = False,
    state: Any = None,
) -> Any:
    """Q (Kᵀ V), or oᵢ = Σ_{j ≤ i} (qᵢ·kⱼ) vⱼ: attention without softmax, features or normaliser.

    Args:
        query: (…, n, d).
        key: (…, m, d).
        value: (…, m, e).
        key_mask: booleans that broadcast to (…, m), true for real tokens.
        is_causal: token i looks at tokens j ≤ i only; n = m.
        state: as in ``linear_attention``, an ``OuterState``.

    Returns:
        (…, n, e), and the next state if one was given.  It is not divided by √d, nor by n.

    Raises:
        ValueError: the shapes do not fit, or a state without ``is_causal``.
        TypeError: ``key_mask`` is not boolean, or the state no tuple.
    """
    _check(query, key, value, key_mask, is_causal, state)
    q, k, v = _features(query, key, value, _identity, key_mask)
    if not is_causal:
        return narrow(ops.matmul(q, ops.matmul(ops.matrix_transpose(k), v)), value)
    q, k, v = same_lead(q, k, v)
    sums, last = chunked(q, k, v, None, state[0] if state else None)
    output = narrow(sums, value)
    return output if state is None else (output, OuterState(last))


# The readable twins: the same function, each as one of the equations says it


def linear_attention_recurrent(
    query: Array,
    key: Array,
    value: Array,
    feature_map: FeatureMap = elu_plus_one,
    key_mask: Array | None = None,
    state: Any = None,
    eps: float = 0.0,
) -> Any:
    """Causal ``linear_attention`` token by token: a recurrent network with the state (S, z).

    Arguments, results and errors are those of ``linear_attention``; n steps of Python.
    """
    _check(query, key, value, key_mask, True, state)
    q, k, v = same_lead(*_features(query, key, value, feature_map, key_mask))
    s, z = _start(state, k, v)
    xp = of(data_of(v))
    outputs = [xp.zeros((*v.shape[:-2], 0, v.shape[-1]), value.dtype)]
    for t in range(query.shape[-2]):
        s = s + k[..., t, :, None] * v[..., t, None, :]
        z = z + k[..., t, :]
        weighed = ops.matmul(q[..., t, None, :], s)
        total = ops.matmul(q[..., t, None, :], z[..., None])
        outputs.append(_quotient(ops.concatenate([weighed, total], axis=-1), eps, value))
    output = ops.concatenate(outputs, axis=-2)
    return output if state is None else (output, LinearState(s, z))


def linear_attention_cumulative(
    query: Array,
    key: Array,
    value: Array,
    feature_map: FeatureMap = elu_plus_one,
    key_mask: Array | None = None,
    eps: float = 0.0,
) -> Array:
    """Causal ``linear_attention`` by cumulative sums of all outer products ϕ(k) vᵀ.

    One line of algebra, at the price of n D e numbers in memory.  Arguments, result and errors are
    those of ``linear_attention``.
    """
    _check(query, key, value, key_mask, True, None)
    q, k, v = same_lead(*_features(query, key, value, feature_map, key_mask))
    s = ops.cumsum(k[..., :, None] * v[..., None, :], axis=-3)
    z = ops.cumsum(k, axis=-2)
    weighed = ops.matmul(q[..., None, :], s)[..., 0, :]
    total = ops.sum(q * z, axis=-1, keepdims=True)
    return _quotient(ops.concatenate([weighed, total], axis=-1), eps, value)


def linear_attention_parallel(
    query: Array,
    key: Array,
    value: Array,
    feature_map: FeatureMap = elu_plus_one,
    key_mask: Array | None = None,
    is_causal: bool = False,
    eps: float = 0.0,
) -> Array:
    """``linear_attention`` as a matrix of weights times the values: n × m numbers.

    Arguments, result and errors are those of ``linear_attention``.
    """
    _check(query, key, value, key_mask, is_causal, None)
    weights = linear_attention_weights(query, key, feature_map, key_mask, is_causal, eps)
    if key_mask is not None:
        _, value = without_pads(key_mask, key, value)
    return narrow(ops.matmul(wide(weights), wide(value)), value)


def linear_attention_weights(
    query: Array,
    key: Array,
    feature_map: FeatureMap = elu_plus_one,
    key_mask: Array | None = None,
    is_causal: bool = False,
    eps: float = 0.0,
) -> Array:
    """The weights φ(qᵢ)ᵀ ϕ(kⱼ) / (Σⱼ φ(qᵢ)ᵀ ϕ(kⱼ) + ε), whose rank is at most D (not causal).

    Arguments and errors are those of ``linear_attention``.

    Returns:
        (…, n, m); a row whose normaliser is 0 is 0.
    """
    _check(query, key, key, key_mask, is_causal, None)
    q, k, _ = _features(query, key, key, feature_map, key_mask)
    scores = ops.matmul(q, ops.matrix_transpose(k))
    if is_causal:
        scores = ops.tril(scores)
    total = ops.sum(scores, axis=-1, keepdims=True)
    return _quotient(ops.concatenate([scores, total], axis=-1), eps, query)


# Parts


def _check(query: Any, key: Any, value: Any, key_mask: Any, is_causal: bool, state: Any) -> None:
    check_attention(query, key, value)
    check_state(state, is_causal)
    n, m = query.shape[-2], key.shape[-2]
    if is_causal and n != m:
        raise ValueError(
            f"causal linear attention takes one query for each key, got {n} and {m}: hand the "
            "earlier tokens over as a state, or leave out is_causal for the last token alone"
        )
    if key_mask is not None:
        check_key_mask(key_mask, key)


def _features(
    query: Any, key: Any, value: Any, feature_map: FeatureMap, key_mask: Any
) -> tuple[Any, Any, Any]:
    """φ(q), ϕ(k) without the pads, and v, in a dtype that can be summed."""
    phi, varphi = map_pair(feature_map)
    if key_mask is None:
        return wide(phi(query)), wide(varphi(key)), wide(value)
    key, value = without_pads(key_mask, key, value)
    k = ops.where(data_of(key_mask)[..., None], varphi(key), 0.0)
    return wide(phi(query)), wide(k), wide(value)


def _start(state: Any, k: Any, v: Any) -> tuple[Any, Any]:
    """S and z before the first token of this call."""
    xp, lead = of(data_of(v)), k.shape[:-1]
    shapes = [(*lead[:-1], k.shape[-1], v.shape[-1]), (*lead[:-1], k.shape[-1])]
    if not state:
        return xp.zeros(shapes[0], v.dtype), xp.zeros(shapes[1], v.dtype)
    if [x.shape for x in state] != shapes:
        raise ValueError(
            f"the state is S (…, D, e) and z (…, D), {shapes[0]} and {shapes[1]} here, got "
            f"{' and '.join(str(x.shape) for x in state)}"
        )
    return state[0], state[1]


def _identity(x: Any) -> Any:
    return x


def _ones_column(v: Any) -> Any:
    return of(data_of(v)).ones((*v.shape[:-1], 1), v.dtype)


def _quotient(sums: Any, eps: float, like: Any) -> Any:
    """The sums over their last column, and 0 where that is 0."""
    total = sums[..., -1:] + matched(eps, sums) if eps else sums[..., -1:]
    total = ops.where(data_of(total) == 0, float("inf"), total)
    return narrow(sums[..., :-1] / total, like)
