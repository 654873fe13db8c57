"""The Performer: softmax attention by random features, in linear time and without its matrix.

Choromanski, Likhosherstov, Dohan, Song, Gane, Sarlos, Hawkins, Davis, Mohiuddin, Kaiser, Belanger,
Colwell, Weller 2021, "Rethinking Attention with Performers", arXiv:2009.14794; Likhosherstov,
Choromanski, Dubey, Liu, Sarlos, Weller 2022, "Chefs' Random Tables", arXiv:2205.15317; Su 2021,
kexue.fm 8338.

===================================================  ==========================================
e^(q·k/√d) ≈ φ(q)·φ(k), of q d^(−¼) and k d^(−¼)     2009.14794, §2.3: ``favor_attention``
o_i = φ(q_i)ᵀ Σⱼ φ(kⱼ) vⱼᵀ / φ(q_i)ᵀ Σⱼ φ(kⱼ)         the same, §2.1 and 2.2: all functions, over
                                                     all j, or j ≤ i under ``is_causal``
φ(x) = f(W x)/√m + ε for any f                       §2.2: ``generalized_kernel_attention``
φ(x) = D exp(A‖w‖² + B w·x − ‖x‖²/2)                 2205.15317, FAVOR++: ``oprf_attention``
φ(x) = exp(W x) with a W that is trained             kexue.fm 8338: ``exponential_attention``
exp(… − max over all keys) + ε                       the authors' code:
                                                     ``released_favor_attention``
===================================================  ==========================================

Exponentials overflow, and what keeps them small must not look ahead.  With l the logarithms of a
key's features, a_j = max l_j its own largest and M_i = max of a_j over j ≤ i::

    S_i = e^(M_{i−1} − M_i) S_{i−1} + e^(l_i − a_i) (e^(a_i − M_i) v_i)ᵀ

is the sum of φ(k) vᵀ divided by e^(M_i): every exponent is at most 0, M_i is of the past, and it
divides out of the quotient exactly, as does the largest feature of a query.  It is a linear
attention with a decay, so ``chunked`` computes it.  Without causality there is a form in which
nothing can be lost: with L_f = ln Σⱼ e^(l_jf) for each feature f::

    o_i = Σ_f softmax_f(l(q_i)_f + L_f) Σⱼ softmaxⱼ(l_jf) vⱼ

Deviations: the released code subtracts one maximum of all keys, which lies in the future of most
queries, and adds ε to the features, after which it does not divide out: perturbing the last key
moves all outputs.  Ours has no ε.  Where the normaliser of a causal row underflows all the same,
that is where every feature in which the query is large has come to nothing in the keys beside the
largest one, the row is 0 (below 8e-25 in float32, 5e-277 in float64) and so is its gradient.
Trigonometric features are stabilised by their factor e^(‖k‖²/2) in the same way, so they do not
overflow; but their signs differ, so that a normaliser may vanish or be negative, against which
nothing is done.  No logits exist to which a bias of relative positions could be added.  float16 is
summed in float32, and a state of it is float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from .. import ops
from ..backend import Array
from ..engine import data_of
from ..ops.elementwise import of
from .arguments import (
    check_attention,
    check_state,
    matched,
    narrow,
    same_lead,
    wide,
    without_pads,
)
from .chunked import chunked
from .random_features import (
    exponential_log_features,
    generalized_features,
    hyperbolic_log_features,
    oprf_log_features,
    positive_log_features,
)

__all__ = [
    "FavorState", "check_feature", "exponential_attention", "favor_attention",
    "generalized_kernel_attention", "oprf_attention", "released_favor_attention",
]  # fmt: skip


class FavorState(NamedTuple):
    """What is left of the tokens before: the sums, and by the exponential of what they are divided.

    ``memory`` (…, D, e + 1) is Σ φ(k) [v, 1]ᵀ e^(−maximum), ``maximum`` (…) a constant.
    """

    memory: Any
    maximum: Array


def favor_attention(
    query: Any,
    key: Any,
    value: Any,
    projection: Any,
    feature: str = "positive",
    is_causal: bool = False,
    state: Any = None,
    key_mask: Any = None,
) -> Any:
    """FAVOR+: an estimate of softmax attention with logits q·k/√d.

    Args:
        query: (…, n, d).
        key: (…, m, d).
        value: (…, m, e).
        projection: W (features, d), rows of law N(0, I): see ``random_matrix``.
        feature: ``"positive"``, e^(w·x − ‖x‖²/2); ``"hyperbolic"``, those of w and −w, which have
            half of its variance or less; ``"trigonometric"``, cos and sin of w·x.
        is_causal: query i sees the keys up to i only; then n = m.
        state: see ``arguments``; a ``FavorState``.
        key_mask: booleans that broadcast to (…, m), true for the keys that exist: a pad may hold
            anything, even nan.  A row without any key is 0.

    Returns:
        (…, n, e), and the next state if one was given.  For features that are positive each row is
        a mean of values.

    Raises:
        ValueError: the shapes do not fit, another feature, or a state without ``is_causal``.
        TypeError: ``key_mask`` is not of booleans, or the state is no tuple.
    """
    check_feature(feature)
    query, key, value = _checked(query, key, value, projection, is_causal, state, key_mask)
    query, key = (x * x.shape[-1] ** -0.25 for x in (query, key))
    if feature == "trigonometric":
        half_square = 0.5 * ops.sum(key * key, axis=-1)
        query, key = (_waves(x, projection) for x in (query, key))
        return _from_features(query, key, half_square, value, is_causal, state, key_mask)
    query, key = (LOG_FEATURES[feature](x, projection) for x in (query, key))
    return _from_logarithms(query, key, value, is_causal, state, key_mask)


def oprf_attention(
    query: Any,
    key: Any,
    value: Any,
    projection: Any,
    mean_square: Any = None,
    is_causal: bool = False,
    state: Any = None,
    key_mask: Any = None,
) -> Any:
    """FAVOR++: positive features whose exponent has the ‖w‖² that makes their variance least.

    Args:
        query, key, value, projection, is_causal, state, key_mask: as ``favor_attention``.
        mean_square: S, the mean of ‖qᵢ + kⱼ‖² over all pairs, queries and keys divided by d^(1/4):
            a number, or (…, 1, 1).  None takes that of the arguments, which has no gradient, and
            to which every query counts, a pad too.

    Returns:
        As ``favor_attention``.  At S = 0 it is the same estimate.

    Raises:
        ValueError: as there, or ``mean_square`` is a number below 0, or missing although the call
            is causal: the mean over a whole sequence tells every token of those to come.
    """
    query, key, value = _checked(query, key, value, projection, is_causal, state, key_mask)
    if is_causal and mean_square is None:
        raise ValueError(
            "the mean of ‖q + k‖² looks at the whole sequence, which would leak into earlier "
            "tokens: a causal call needs mean_square, measured elsewhere"
        )
    query, key = (x * x.shape[-1] ** -0.25 for x in (query, key))
    if mean_square is None:
        mean_square = _mean_square_of_sums(data_of(query), data_of(key), key_mask)
    query, key = (oprf_log_features(x, projection, mean_square) for x in (query, key))
    return _from_logarithms(query, key, value, is_causal, state, key_mask)


def exponential_attention(
    query: Any,
    key: Any,
    value: Any,
    projection: Any = None,
    is_causal: bool = False,
    state: Any = None,
    key_mask: Any = None,
) -> Any:
    """Linear attention with φ(x) = exp(W x): what is left of FAVOR+ if W is trained.

    The factor e^(−‖q‖²/2) divides out and a layer can learn the one of the keys, so queries and
    keys that are projections of the tokens need neither: the features are an activation.

    Args:
        query, key, value, is_causal, state, key_mask: as ``favor_attention``.
        projection: W (features, d), a Tensor; None for the unit matrix, where W has been absorbed
            into what makes the queries and keys.

    Returns:
        As ``favor_attention``; without ``projection`` and causality that is softmax over features
        times softmax over positions, weighted by what the features hold.

    Raises:
        ValueError: as ``favor_attention``.
    """
    query, key, value = _checked(query, key, value, projection, is_causal, state, key_mask)
    if projection is not None:
        query, key = (exponential_log_features(x, projection) for x in (query, key))
    return _from_logarithms(query, key, value, is_causal, state, key_mask)


def generalized_kernel_attention(
    query: Any,
    key: Any,
    value: Any,
    projection: Any = None,
    f: Callable[[Any], Any] = ops.relu,
    eps: float = 1e-3,
    is_causal: bool = False,
    state: Any = None,
    key_mask: Any = None,
) -> Any:
    """Linear attention with φ(x) = f(W x)/√m + ε.

    Args:
        query, key, value, is_causal, state, key_mask: as ``favor_attention``.
        projection: W (m, d); None for the unit matrix.
        f: of each element; ReLU is what the paper found best.
        eps: keeps the normaliser from 0.  With 0, a row whose normaliser is 0 gives 0.

    Returns:
        As ``favor_attention``.  Nothing is stabilised: for an f that grows like an exponential
        take ``exponential_attention``.

    Raises:
        ValueError: as ``favor_attention``.
    """
    query, key, value = _checked(query, key, value, projection, is_causal, state, key_mask)
    query, key = (
        generalized_features(x * x.shape[-1] ** -0.25, projection, f, eps) for x in (query, key)
    )
    unscaled = ops.zeros_like(data_of(key)[..., 0])
    return _from_features(query, key, unscaled, value, is_causal, state, key_mask)


def released_favor_attention(
    query: Any,
    key: Any,
    value: Any,
    projection: Any,
    eps: float = 1e-4,
    is_causal: bool = False,
    state: Any = None,
    key_mask: Any = None,
) -> Any:
    """FAVOR+ as the authors' code and its ports stabilise it, for weights that were trained so.

    φ(q) = exp(… − max over the features of q) + ε and φ(k) = exp(… − max over features and keys)
    + ε.  The maximum is over the whole sequence, and because of ε it does not divide out: where one
    key is far above the rest, the rest is ε and attention is nearly uniform.

    Args:
        query, key, value, projection, key_mask: as ``favor_attention``.
        eps: ε; with 0 the result is that of ``favor_attention``.
        is_causal, state: there for the one signature of all; neither is possible.

    Returns:
        (…, n, e).

    Raises:
        ValueError: the shapes do not fit, or ``is_causal``: tokens would see those to come.
    """
    if is_causal or state is not None:
        raise ValueError(
            "the released stabiliser takes the maximum of the whole sequence, so it cannot be "
            "causal: use favor_attention"
        )
    query, key, value = _checked(query, key, value, projection, False, None, key_mask)
    query, key = (x * x.shape[-1] ** -0.25 for x in (query, key))
    logs = [positive_log_features(x, projection) for x in (query, key)]
    # the maxima are those of w·x, before ‖x‖²/2 is taken off: this matters, because of ε
    heights = [data_of(ops.linear(x, projection.astype(x.dtype))) for x in (query, key)]
    top = heights[0].max(axis=-1, keepdims=True)
    weighed = _with_ones(wide(value))
    if key_mask is not None:
        real = key_mask[..., None]
        heights[1] = of(heights[1]).where(real, heights[1], float("-inf"))
        weighed = ops.where(real, weighed, 0.0)
    exponents = logs[1] - heights[1].max(axis=(-1, -2), keepdims=True)
    if key_mask is not None:
        exponents = ops.where(real, exponents, 0.0)
    count = projection.shape[-2] ** 0.5  # φ below is √m times the one of these logarithms
    eps = matched(eps, query)
    rows = ops.exp(logs[0] - top) * count + eps
    columns = ops.exp(exponents) * count + eps
    sums = ops.matmul(rows, ops.matmul(ops.matrix_transpose(columns), weighed))
    return narrow(_quotient(sums), value)


# Features


LOG_FEATURES: dict[str, Callable[[Any, Any], Any]] = {
    "positive": positive_log_features,
    "hyperbolic": hyperbolic_log_features,
}


def check_feature(feature: str) -> None:
    """Raise ValueError, with those there are, unless ``favor_attention`` has this feature."""
    known = [*LOG_FEATURES, "trigonometric"]
    if feature not in known:
        raise ValueError(f"feature is one of {', '.join(known)}, got {feature!r}")


def _waves(x: Any, projection: Any) -> Any:
    """Trigonometric features without their factor e^(‖x‖²/2): bounded."""
    angles = ops.linear(x, projection.astype(x.dtype))
    return ops.concatenate([ops.cos(angles), ops.sin(angles)], axis=-1)


def _mean_square_of_sums(query: Any, key: Any, key_mask: Any) -> Any:
    """The mean of ‖qᵢ + kⱼ‖² as (…, 1, 1), without the pairs: E‖q‖² + E‖k‖² + 2 E q · E k."""
    weights = ops.ones_like(key[..., :1])
    if key_mask is not None:
        weights = weights * key_mask[..., None]
    keys = ops.maximum(weights.sum(axis=-2, keepdims=True), 1.0)
    middle = (key * weights).sum(axis=-2, keepdims=True) / keys
    squares = (key * key * weights).sum(axis=(-1, -2), keepdims=True) / keys
    squares = squares + (query * query).sum(axis=-1, keepdims=True).mean(axis=-2, keepdims=True)
    across = query.mean(axis=-2, keepdims=True) * middle
    return squares + 2.0 * across.sum(axis=-1, keepdims=True)


# Attention from features


def _from_logarithms(
    log_query: Any, log_key: Any, value: Any, is_causal: bool, state: Any, key_mask: Any
) -> Any:
    """Attention with positive features, given by their logarithms (…, n, D) and (…, m, D)."""
    if is_causal:
        top = data_of(log_key).max(axis=-1)
        below = log_query - data_of(log_query).max(axis=-1, keepdims=True)
        features = ops.exp(below), ops.exp(log_key - top[..., None])
        return _from_features(*features, top, value, True, state, key_mask)
    if key_mask is not None:
        log_key = ops.where(key_mask[..., None], log_key, float("-inf"))
    held = ops.logsumexp(log_key, axis=-2, keepdims=True)
    means = ops.matmul(ops.matrix_transpose(ops.softmax(log_key, axis=-2)), wide(value))
    return narrow(ops.matmul(ops.softmax(log_query + held, axis=-1), means), value)


def _from_features(
    query: Any,
    key: Any,
    log_scale: Any,
    value: Any,
    is_causal: bool,
    state: Any,
    key_mask: Any,
) -> Any:
    """Attention with features ``query`` (…, n, D) and e^log_scale ``key`` (…, m, D).

    Args:
        log_scale: (…, m); the features themselves are of moderate size.
        value: of the dtype that came in, and of the result.
    """
    xp = of(data_of(key))
    low = float("-inf")
    heights = data_of(log_scale)
    if key_mask is not None:
        heights = xp.where(key_mask, heights, low)
    memory = decay = maximum = None
    if is_causal:
        if state:
            memory, maximum = state
        else:
            maximum = xp.full((*heights.shape[:-1],), low, heights.dtype)
        track = _running_maximum(xp.concatenate([maximum[..., None], heights], axis=-1))
        maximum = track[..., -1]
        some = track != low  # before the first key there is nothing to be scaled
        frame = xp.where(some, track, 0.0)
        decay = xp.where(some[..., :-1], frame[..., :-1] - frame[..., 1:], 0.0)
        frame = frame[..., 1:]
    elif heights.shape[-1]:
        frame = heights.max(axis=-1, keepdims=True)  # −inf only where there is no key
    else:
        frame = heights
    exponents = log_scale - frame
    if key_mask is not None:
        exponents = ops.where(key_mask, exponents, low)
    columns = _with_ones(wide(value)) * ops.exp(exponents)[..., None]
    if not is_causal:
        sums = ops.matmul(query, ops.matmul(ops.matrix_transpose(key), columns))
        return narrow(_quotient(sums), value)
    sums, memory = chunked(query, key, columns, decay, memory)
    y = narrow(_quotient(sums), value)
    return y if state is None else (y, FavorState(memory, maximum))


def _running_maximum(x: Array) -> Array:
    """The largest of x[…, 0 … i] for every i: after each step, of twice as many."""
    xp, step = of(x), 1
    while step < x.shape[-1]:
        later = xp.maximum(x[..., step:], x[..., :-step])
        x = xp.concatenate([x[..., :step], later], axis=-1)
        step *= 2
    return x


def _with_ones(value: Any) -> Any:
    """(…, m, e) to (…, m, e + 1): the last column will be the sum of the weights."""
    data = data_of(value)
    return ops.concatenate([value, of(data).ones((*data.shape[:-1], 1), data.dtype)], axis=-1)


def _quotient(sums: Any) -> Any:
    """The first columns over the last one; 0 where that is too small to be divided by, not nan."""
    numbers = of(data_of(sums)).finfo(sums.dtype)
    least = float(numbers.tiny) / float(numbers.eps) ** 2
    total = sums[..., -1:]
    enough = ~(abs(data_of(total)) < least)  # true for nan, which has to stay
    return ops.where(enough, sums[..., :-1] / ops.where(enough, total, 1.0), 0.0)


def _checked(
    query: Any,
    key: Any,
    value: Any,
    projection: Any,
    is_causal: bool,
    state: Any,
    key_mask: Any,
) -> tuple[Any, Any, Any]:
    """Queries and keys to work with, at least float32, and values; pads are 0 in the last two."""
    check_attention(query, key, value)
    check_state(state, is_causal)
    if is_causal and query.shape[-2] != key.shape[-2]:
        raise ValueError(
            "a causal Performer takes as many queries as keys, got "
            f"{query.shape[-2]} and {key.shape[-2]}: with a cache, hand on the state instead"
        )
    if projection is not None and (projection.ndim != 2 or projection.shape[-1] != query.shape[-1]):
        raise ValueError(
            f"the projection is (features, d) with d = {query.shape[-1]} as in the queries, got "
            f"{projection.shape}"
        )
    if key_mask is not None:
        key, value = without_pads(key_mask, key, value)
    if is_causal:
        query, key, value = same_lead(query, key, value)
    if state and state[1].shape != key.shape[:-2]:
        raise ValueError(
            f"this state is of tokens with leading axes {state[1].shape}, not {key.shape[:-2]}"
        )
    return wide(query), wide(key), value
