"""Attention with any similarity, and attention to a few places that stand for all.

====================================================  ==============================================
y_i = 1/C Σ_j f(x_i, x_j) g(x_j)                      Wang et al. 2017, "Non-local neural networks",
                                                      arXiv:1711.07971, eq. 1:
                                                      ``generalized_attention``
f = e^(q·k); the same of embedded x; q·k;             eq. 2–5: ``gaussian_similarity``,
ReLU(w · [q, k])                                      ``dot_product_similarity``,
                                                      ``concatenation_similarity``
z = W y + x, W = 0 at first                           eq. 6: ``NonLocal2d``
C = Σ_j f for the first two, the number of            §3.2
places for the others
Z = softmax_k(λ X μᵀ);  μ ← normalised Zᵀ X;          Li et al. 2019, "Expectation-maximization
after T rounds  X̃ = Z μ                               attention networks", arXiv:1907.13426:
                                                      ``em_attention``, ``EMAttention2d``
K, V ← means over the cells of grids of 1, 3, 6       Zhu et al. 2019, "Asymmetric non-local neural
and 8 rows: 110 places                                networks", arXiv:1908.07678: ``pyramid_pool``,
                                                      ``asymmetric_attention``,
                                                      ``AsymmetricNonLocal2d``
====================================================  ==============================================

The last two look at the whole sequence to find the few places, so they cannot be causal.

Deviations: the released EMANet computes Z and μ outside of the graph, so that its first convolution
is never trained; here gradients flow through the rounds.  It updates its bases in the training
loop, and here the layer does it.  ``AsymmetricNonLocal2d`` is APNB without the last convolution of
the context beside the input, which belongs to the network around it.  ``generalized_attention`` and
``em_attention`` sum float16 in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from .. import nn, ops
from ..backend import Array, current
from ..engine import data_of
from ..nn import functional as F
from ..ops.elementwise import of
from ..rng import Rng, default_rng
from .arguments import check_attention, check_key_mask, check_state, matched, narrow, wide
from .sparse import continued

__all__ = [
    "AsymmetricNonLocal2d", "EMAttention2d", "NonLocal2d", "asymmetric_attention",
    "concatenation_similarity", "dot_product_similarity", "em_attention", "gaussian_similarity",
    "generalized_attention", "pyramid_pool",
]  # fmt: skip

Similarity = Callable[[Any, Any], Any]
"""Maps queries (…, n, d) and keys (…, m, d) to (…, n, m)."""

PYRAMID = (1, 3, 6, 8)


def generalized_attention(
    query: Any,
    key: Any,
    value: Any,
    similarity: Similarity,
    normalizer: str = "sum",
    is_causal: bool = False,
    key_mask: Any = None,
    state: Any = None,
) -> Any:
    """Σ_j sim(q_i, k_j) v_j / C_i, with C_i = Σ_j sim(q_i, k_j) or the number of keys.

    Args:
        query: (…, n, d).
        key: (…, m, d).
        value: (…, m, e).
        similarity: maps queries and keys to (…, n, m); for ``"sum"`` nowhere negative.
        normalizer: ``"sum"``, or ``"count"`` of the keys that a query may look at.
        is_causal: query i looks at keys j ≤ i only, both counted from the first also if n ≠ m; with
            a state, at all of the state as well.
        key_mask: booleans that broadcast to (…, m), true for real tokens; with a state for the new
            ones.
        state: None, or ``()`` before the first token, or the ``SparseState`` of the call before:
            all keys and values so far, and which of them are real.

    Returns:
        (…, n, e), zeros where C is 0; with a state also the next one.

    Raises:
        ValueError: the shapes do not fit, an unknown normaliser, or a state without ``is_causal``.
        TypeError: ``key_mask`` is not boolean, or the state no tuple.
    """
    check_attention(query, key, value)
    check_state(state, is_causal)
    if normalizer not in ("sum", "count"):
        raise ValueError(f"the normalizer is 'sum' or 'count', got {normalizer!r}")
    if state is not None and query.shape[-2] != key.shape[-2]:
        raise ValueError(
            "with a state each new token has a query and a key, got "
            f"{query.shape[-2]} and {key.shape[-2]}"
        )
    past = continued(key, value, state, key_mask)
    xp, n, m = of(data_of(query)), query.shape[-2], past.key.shape[-2]
    allowed = past.seen[..., None, :]
    if is_causal:
        allowed = allowed & (xp.arange(n)[:, None] + (m - key.shape[-2]) >= xp.arange(m))
    weights = ops.where(allowed, similarity(wide(query), wide(past.key)), 0.0)
    if normalizer == "sum":
        total = weights.sum(axis=-1, keepdims=True)
    else:
        total = allowed.sum(axis=-1, keepdims=True).astype(data_of(weights).dtype)
    sums = ops.matmul(weights, wide(past.value))
    y = narrow(sums / ops.where(ops.equal(total, 0.0), 1.0, total), query)
    return y if state is None else (y, past)


def dot_product_similarity(query: Any, key: Any) -> Any:
    """q·k, which may be negative: normalise by the count."""
    return ops.matmul(query, ops.matrix_transpose(key))


def gaussian_similarity(query: Any, key: Any) -> Any:
    """e^(q·k), which makes softmax attention of scale 1.

    It is the formula as it stands and overflows for q·k > 88 in float32: to compute with it, use
    ``softmax_attention``.
    """
    return ops.exp(dot_product_similarity(query, key))


def concatenation_similarity(query: Any, key: Any, weight: Any) -> Any:
    """ReLU(w · [q, k]), w (2d,): a sum of a number for each query and one for each key."""
    d = query.shape[-1]
    if weight.shape != (2 * d,):
        raise ValueError(f"the weight of [q, k] has shape {(2 * d,)}, got {weight.shape}")
    weight = matched(weight, query)
    of_query, of_key = ops.matmul(query, weight[:d]), ops.matmul(key, weight[d:])
    return ops.relu(of_query[..., :, None] + of_key[..., None, :])


class NonLocal2d(nn.Module):
    """z = W y + x with y the generalised attention among all pixels.

    Args:
        channels: C of the images (N, C, H, W).
        inner: channels of queries, keys and values; None for C / 2.
        kind: ``"gaussian"`` (of the pixels themselves), ``"embedded_gaussian"``, ``"dot_product"``
            or ``"concatenation"``.
        rng: what the weights are drawn from.

    Attributes:
        theta, phi, g: 1 × 1 convolutions to queries, keys and values (gaussian: ``g`` only).
        out: the one back to C channels; it starts at 0, so the layer starts as the identity.
        weight: of the concatenation.

    Raises:
        ValueError: an unknown kind.
    """

    def __init__(
        self,
        channels: int,
        inner: int | None = None,
        kind: str = "embedded_gaussian",
        rng: Rng | None = None,
    ) -> None:
        kinds = ("gaussian", "embedded_gaussian", "dot_product", "concatenation")
        if kind not in kinds:
            raise ValueError(f"the kind is one of {', '.join(kinds)}, got {kind!r}")
        inner = max(channels // 2, 1) if inner is None else inner
        self.kind = kind
        if kind != "gaussian":
            self.theta = nn.Conv2d(channels, inner, 1, rng=rng)
            self.phi = nn.Conv2d(channels, inner, 1, rng=rng)
        self.g = nn.Conv2d(channels, inner, 1, rng=rng)
        self.out = _silent(nn.Conv2d(inner, channels, 1, rng=rng))
        if kind == "concatenation":
            rng = default_rng() if rng is None else rng
            self.weight = nn.Parameter(rng.normal((2 * inner,), std=(2 * inner) ** -0.5))

    def forward(self, x: Any) -> Any:
        """(N, C, H, W) to (N, C, H, W)."""
        value = _pixels(self.g(x))
        if self.kind == "gaussian":
            query = key = _pixels(x)
        else:
            query, key = _pixels(self.theta(x)), _pixels(self.phi(x))
        if self.kind.endswith("gaussian"):
            y = ops.scaled_dot_product_attention(query, key, value, scale=1.0)
        elif self.kind == "dot_product":
            y = generalized_attention(query, key, value, dot_product_similarity, "count")
        else:
            similarity = functools.partial(concatenation_similarity, weight=self.weight)
            y = generalized_attention(query, key, value, similarity, "count")
        return self.out(_image(y, x.shape[2:])) + x


def em_attention(
    x: Any,
    bases: Any,
    steps: int = 3,
    temperature: float = 1.0,
    is_causal: bool = False,
    key_mask: Any = None,
    eps: float = 1e-6,
) -> tuple[Any, Any]:
    """Each x as a mixture of k bases, which are fitted to all x in a few rounds.

    A round gives each x its responsibilities, softmax over the bases of x·μ / temperature, and each
    basis the mean of the x by responsibility, at length 1.

    Args:
        x: (…, n, c).
        bases: (…, k, c) or (k, c), of length 1.
        steps: rounds, at least 1.
        temperature: 1/λ.
        is_causal: refused, as every x shapes the bases that all are made of.
        key_mask: booleans that broadcast to (…, n), true for real tokens: the others get an output,
            for which nan and infinity count as 0, but shape no basis.
        eps: what is added to sums and lengths before they divide.

    Returns:
        X̃ = Z μ (…, n, c) of the last responsibilities and bases, and the bases (…, k, c).

    Raises:
        ValueError: ``is_causal``, ``steps`` below 1, or shapes that do not fit.
        TypeError: ``key_mask`` is not boolean.
    """
    if is_causal:
        raise ValueError("EM attention fits its bases to the whole sequence: it cannot be causal")
    if steps < 1 or min(x.ndim, bases.ndim) < 2 or x.shape[-1] != bases.shape[-1]:
        raise ValueError(
            "EM attention takes at least one step, x (…, n, c) and bases (…, k, c), got "
            f"steps={steps}, {x.shape} and {bases.shape}"
        )
    like, x = x, wide(x)
    bases = matched(bases, x)
    if key_mask is not None:
        check_key_mask(key_mask, x)
        real = data_of(key_mask)[..., None]
        x = ops.where(real | of(real).isfinite(data_of(x)), x, 0.0)
    temperature, eps = matched(temperature, x), matched(eps, x)
    for _ in range(steps):
        z = ops.softmax(ops.matmul(x, ops.matrix_transpose(bases)) / temperature, axis=-1)
        share = z if key_mask is None else ops.where(real, z, 0.0)
        share = share / (share.sum(axis=-2, keepdims=True) + eps)
        bases = ops.matmul(ops.matrix_transpose(share), x)
        squares = (bases * bases).sum(axis=-1, keepdims=True)
        there = ops.greater(squares, 0.0)  # the length has no slope at 0
        length = ops.where(there, ops.sqrt(ops.where(there, squares, 1.0)), 0.0)
        bases = bases / (length + eps)
    return narrow(ops.matmul(z, bases), like), narrow(bases, like)


class EMAttention2d(nn.Module):
    """The unit of EMANet: convolution, EM attention among pixels, convolution, residual.

    In training the bases from which the rounds start follow those at which they end, averaged over
    the batch: μ ← α μ + (1 − α) mean μ_T.

    Args:
        channels: C of the images (N, C, H, W).
        bases: k.
        steps: rounds.
        momentum: α.
        rng: what weights and bases are drawn from.

    Attributes:
        mu: (1, C, k), a buffer, in the released layout and names, as are ``conv1`` and ``conv2``.
    """

    mu: Array

    def __init__(
        self,
        channels: int,
        bases: int = 64,
        steps: int = 3,
        momentum: float = 0.9,
        rng: Rng | None = None,
    ) -> None:
        self.steps, self.momentum = steps, momentum
        drawn = (default_rng() if rng is None else rng).normal((1, channels, bases))
        length = current().xp.sqrt((drawn * drawn).sum(axis=1, keepdims=True))
        self.register_buffer("mu", drawn / (length + 1e-6))
        self.conv1 = nn.Conv2d(channels, channels, 1, rng=rng)
        self.conv2 = nn.Sequential(
            nn.Conv2d(channels, channels, 1, bias=False, rng=rng), nn.BatchNorm2d(channels)
        )

    def forward(self, x: Any) -> Any:
        """(N, C, H, W) to (N, C, H, W)."""
        start = self.mu.swapaxes(1, 2)
        y, bases = em_attention(_pixels(self.conv1(x)), start, self.steps)
        if self.training:
            found = data_of(bases).mean(axis=0, keepdims=True).swapaxes(1, 2)
            self.mu = self.momentum * self.mu + (1.0 - self.momentum) * found
        return ops.relu(self.conv2(ops.relu(_image(y, x.shape[2:]))) + x)


def pyramid_pool(x: Any, sizes: Sequence[int] = PYRAMID) -> Any:
    """Means over the cells of grids: (N, C, H, W) to (N, Σ s², C), coarse grids first.

    Cells of a grid that does not divide the image overlap; see
    ``nn.functional.adaptive_avg_pool2d``.
    """
    return ops.concatenate([_pixels(F.adaptive_avg_pool2d(x, s)) for s in sizes], axis=1)


def asymmetric_attention(
    query: Any,
    key: Any,
    value: Any,
    sizes: Sequence[int] = PYRAMID,
    scale: float | None = None,
    is_causal: bool = False,
) -> Any:
    """Softmax attention of every pixel to the cells of a pyramid: S = Σ s² keys instead of H W.

    Args:
        query: (N, d, H, W).
        key: (N, d, H', W').
        value: (N, e, H', W').
        sizes: rows and columns of each grid.
        scale: the factor of the scores; None for 1/√d.
        is_causal: refused, as a cell holds pixels that come later.

    Returns:
        (N, e, H, W).

    Raises:
        ValueError: ``is_causal``, or shapes that do not fit.
    """
    if is_causal:
        raise ValueError("the cells of a pyramid hold later pixels: this attention is not causal")
    if {query.ndim, key.ndim, value.ndim} != {4} or key.shape[2:] != value.shape[2:]:
        raise ValueError(
            "asymmetric attention takes query (N, d, H, W), key (N, d, H', W') and value "
            f"(N, e, H', W'), got {query.shape}, {key.shape} and {value.shape}"
        )
    keys, values = pyramid_pool(key, sizes), pyramid_pool(value, sizes)
    scale = matched(scale, query)
    y = ops.scaled_dot_product_attention(_pixels(query), keys, values, scale=scale)
    return _image(y, query.shape[2:])


class AsymmetricNonLocal2d(nn.Module):
    """The context of each pixel from a pyramid of means (APNB); queries and keys are the same map.

    Args:
        channels: C of the images (N, C, H, W).
        key_channels, value_channels: of keys and of values.
        sizes: rows and columns of each grid.
        rng: what the weights are drawn from.

    Attributes:
        f_key: convolution, batch norm and ReLU to queries and keys.
        f_value, W: convolutions to values, and back to C; ``W`` starts at 0, and so does the
            context.
    """

    def __init__(
        self,
        channels: int,
        key_channels: int,
        value_channels: int,
        sizes: Sequence[int] = PYRAMID,
        rng: Rng | None = None,
    ) -> None:
        self.sizes = tuple(sizes)
        self.f_key = nn.Sequential(
            nn.Conv2d(channels, key_channels, 1, rng=rng),
            nn.BatchNorm2d(key_channels),
            nn.ReLU(),
        )
        self.f_value = nn.Conv2d(channels, value_channels, 1, rng=rng)
        self.W = _silent(nn.Conv2d(value_channels, channels, 1, rng=rng))

    def forward(self, x: Any) -> Any:
        """(N, C, H, W) to (N, C, H, W); the input is not added."""
        query = self.f_key(x)
        return self.W(asymmetric_attention(query, query, self.f_value(x), self.sizes))


def _silent(layer: nn.Conv2d) -> nn.Conv2d:
    """The layer with all parameters at 0."""
    for parameter in layer.parameters():
        parameter.data[...] = 0.0
    return layer


def _pixels(x: Array) -> Any:
    """(N, C, H, W) to (N, H W, C)."""
    n, c, h, w = x.shape
    return ops.swapaxes(ops.reshape(x, (n, c, h * w)), 1, 2)


def _image(x: Array, size: Any) -> Any:
    """(N, H W, C) to (N, C, H, W)."""
    n, _, c = x.shape
    return ops.reshape(ops.swapaxes(x, 1, 2), (n, c, *size))
