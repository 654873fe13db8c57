"""PoWER-BERT: layer by layer, the words that nobody looks at are left behind.

Goyal, Choudhury, Raje, Chakaravarthy, Sabharwal, Verma 2020, "PoWER-BERT: Accelerating BERT
Inference via Progressive Word-vector Elimination", arXiv:2001.08950.

=====================================================  =======================================
Sig(w) = Σ_h Σ_w' A_h[w', w]                           ``significance``
extract layer: the l_j words of the largest scores     ``extract``
soft-extract: the k-th largest times r_j[k]            ``SoftExtract``
loss + λ Σ_j j · mass_j, mass_j = Σ_k r_j[k]           ``retention_loss``
l_j = ⌈mass_j⌉                                         ``retention_configuration``
attention, extract, feed-forward                       ``PowerLayer``
=====================================================  =======================================

A score is a column sum of the matrix of attention: how much of itself a word gives to the others.
Training has three steps: find out what to keep with ``SoftExtract`` and its loss, read off the
configuration, and train again with words dropped.  Which words are kept is a constant for the
gradient.  Those kept stay in their order, and the first one, whose vector is the answer of a
classifier, is always among them.

Whether a word stays depends on all the words that look at it, later ones too.  So a model with
these layers is not causal even if all its attention is.

Deviations: ties keep the earlier words.  Pads neither count as words that look nor are kept while
there are others; in the released code they look.  The released code leaves the diagonal out of the
sums, the paper does not say so: ``include_self``.  ⌈mass⌉ that grows from one layer to the next is
cut to what the layer before keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .. import ops
from ..backend import Array, current
from ..engine import data_of
from ..nn import LayerNorm, Linear, Module, Parameter
from ..ops.elementwise import of
from ..rng import Rng
from .arguments import check_key_mask

__all__ = [
    "PowerLayer", "SoftExtract", "extract", "retention_configuration", "retention_loss",
    "significance",
]  # fmt: skip

BELOW_ALL = float("-inf")


def significance(weights: Array, key_mask: Array | None = None, include_self: bool = True) -> Array:
    """Σ over heads and over the words that look: the attention that each word receives.

    Args:
        weights: (…, h, n, n), the rows add up to 1.
        key_mask: (…, n) booleans, true for real tokens; pads do not look, and have score −inf.
        include_self: whether what a word gives to itself counts; False as in the released code.

    Returns:
        (…, n), in [0, h n] for real tokens; they add up to h times the number of words that look.

    Raises:
        ValueError: the matrices are not square, or the mask has another shape.
        TypeError: the mask is not boolean.
    """
    if weights.ndim < 3 or weights.shape[-1] != weights.shape[-2]:
        raise ValueError(f"significance takes weights (…, heads, n, n), got {weights.shape}")
    xp, n = of(data_of(weights)), weights.shape[-1]
    if not include_self:
        weights = ops.where(xp.eye(n, dtype="bool"), 0.0, weights)
    if key_mask is None:
        return ops.sum(weights, axis=(-3, -2))
    received = ops.sum(weights, axis=-3)
    check_key_mask(key_mask, received[..., :1, :].swapaxes(-1, -2))
    received = ops.sum(ops.where(key_mask[..., None], received, 0.0), axis=-2)
    return ops.where(key_mask, received, BELOW_ALL)


def extract(
    x: Array, scores: Array, length: int, keep_first: bool = True, key_mask: Array | None = None
) -> tuple[Array, Array, Array]:
    """The word vectors of the largest scores, in the order of the text.

    Args:
        x: (…, n, d).
        scores: (…, n); of equal ones the earlier words are kept.
        length: l, how many to keep; n or more keeps all.
        keep_first: the first word ([CLS]) stays whatever its score.
        key_mask: (…, n) booleans; pads are kept only for want of real tokens.

    Returns:
        The vectors (…, l, d), their positions (…, l), ascending, and (…, l) booleans, true for
        those that are real tokens.

    Raises:
        ValueError: ``length`` is below 1, or the shapes do not fit.
        TypeError: the mask is not boolean.
    """
    if length < 1 or x.ndim < 2 or scores.shape != x.shape[:-1]:
        raise ValueError(
            f"extract keeps at least 1 of the words x (…, n, d) with scores (…, n), got {length} "
            f"of {x.shape} with {scores.shape}"
        )
    places = _order(scores, keep_first, key_mask)[..., :length]
    places = of(places).sort(places, axis=-1)
    if key_mask is None:
        real = of(places).ones(places.shape, "bool")
    else:
        full = of(places).broadcast_to(data_of(key_mask), scores.shape)
        real = of(places).take_along_axis(full, places, axis=-1)
    return ops.take_along_axis(x, places[..., None], axis=-2), places, real


def _order(scores: Any, keep_first: bool, key_mask: Any = None) -> Any:
    """The positions (…, n) from the largest score to the least."""
    s = data_of(scores)
    xp, n = of(s), s.shape[-1]
    if key_mask is not None:
        check_key_mask(key_mask, s[..., None])
        s = xp.where(data_of(key_mask), s, BELOW_ALL)
    if keep_first:
        s = xp.where(xp.arange(n) == 0, -BELOW_ALL, s)
    return xp.argsort(-s, axis=-1, kind="stable")


class SoftExtract(Module):
    """The k-th word by significance is multiplied by r[k], a number in [0, 1] that is trained.

    After a step of the optimiser ``project()`` puts the r back into [0, 1].

    Args:
        length: of the longest text.

    Attributes:
        retention: r (length,), ones at first, when nothing is changed.
    """

    def __init__(self, length: int) -> None:
        self.retention = Parameter(current().xp.ones(length, "float32"))

    def forward(self, x: Array, scores: Array, keep_first: bool = True) -> Any:
        """(…, n, d) with scores (…, n) to (…, n, d).

        With ``keep_first`` the first word counts as the most significant.

        Raises:
            ValueError: the text is longer than ``length``, or the shapes do not fit.
        """
        n, longest = x.shape[-2], self.retention.shape[0]
        if n > longest or scores.shape != x.shape[:-1]:
            raise ValueError(
                f"SoftExtract({longest}) takes x (…, n, d) and scores (…, n) with n up to "
                f"{longest}, got {x.shape} and {scores.shape}"
            )
        order = _order(scores, keep_first)
        rank = of(order).argsort(order, axis=-1, kind="stable")
        return x * self.retention[rank][..., None]

    def mass(self) -> Any:
        """Σ r: how many words the layer would like to keep."""
        return ops.sum(self.retention)

    def project(self) -> None:
        """Put every r to the nearest number in [0, 1], in place."""
        r = self.retention.data
        r[...] = of(r).clip(r, 0.0, 1.0)

    def extra_repr(self) -> str:
        """The longest text."""
        return f"length={self.retention.shape[0]}"


def retention_loss(masses: Sequence[Array], weight: float) -> Any:
    """λ Σ_j j · mass_j, to be added to the loss: a word costs more in each later layer.

    Args:
        masses: ``SoftExtract.mass()`` of layer 1, 2, ….
        weight: λ.

    Raises:
        ValueError: there are no masses.
    """
    if not masses:
        raise ValueError("retention_loss takes the mass of at least one layer")
    return weight * ops.sum(ops.stack([j * mass for j, mass in enumerate(masses, 1)]))


def retention_configuration(masses: Sequence[Any], length: int) -> list[int]:
    """How many words each layer keeps: ⌈mass⌉, at least 1, and no more than the layer before.

    Args:
        masses: of layer 1, 2, …, numbers or arrays; the host reads them.
        length: of the text.

    Returns:
        A list that never grows.
    """
    kept, before = [], length
    for mass in masses:
        # a sum of float32 that should be 5 may be 5 + 5e-7
        before = min(before, max(1, -int(-(float(mass) - 1e-4) // 1)))
        kept.append(before)
    return kept


class PowerLayer(Module):
    """A layer of BERT that drops words between its two halves.

    y = N₁(x + A(x)), then words of y are scaled or dropped, then N₂(y + W₂ gelu(W₁ y)).

    Args:
        hidden_size: C, divisible by the number of heads.
        num_attention_heads: h.
        intermediate_size: of W₁.
        max_length: of a text, for the soft extraction of the first step of training; None for a
            layer without.
        include_self: see ``significance``.
        rng: what the weights are drawn from (None: ``default_rng()``).

    Attributes:
        query, key, value, dense, intermediate, output: Linear.
        attention_norm, output_norm: LayerNorm with ε = 1e-12.
        soft_extract: SoftExtract or None.

    Raises:
        ValueError: the heads do not divide C.
    """

    def __init__(
        self,
        hidden_size: int,
        num_attention_heads: int,
        intermediate_size: int,
        max_length: int | None = None,
        include_self: bool = True,
        *,
        rng: Rng | None = None,
    ) -> None:
        if hidden_size % num_attention_heads:
            raise ValueError(f"{num_attention_heads} heads do not divide {hidden_size} channels")
        self.num_attention_heads = num_attention_heads
        self.include_self = include_self
        self.query, self.key, self.value, self.dense = (
            Linear(hidden_size, hidden_size, rng=rng) for _ in range(4)
        )
        self.attention_norm = LayerNorm(hidden_size, 1e-12)
        self.soft_extract = None if max_length is None else SoftExtract(max_length)
        self.intermediate = Linear(hidden_size, intermediate_size, rng=rng)
        self.output = Linear(intermediate_size, hidden_size, rng=rng)
        self.output_norm = LayerNorm(hidden_size, 1e-12)

    def forward(
        self, x: Array, length: int | None = None, key_mask: Array | None = None
    ) -> tuple[Any, Any]:
        """The layer, with ``length`` words left of it.

        Args:
            x: (b, n, C).
            length: how many words to keep; None for all, which are scaled if the layer has a
                ``soft_extract``.
            key_mask: (b, n) booleans, false for pads; None for none.

        Returns:
            (b, l, C) and the mask of what is left, (b, l) booleans: the next layer's.
        """
        b, n, c = x.shape
        h = self.num_attention_heads
        query, key, value = (
            layer(x).reshape((b, n, h, c // h)).swapaxes(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        logits = ops.matmul(query * (c // h) ** -0.5, ops.matrix_transpose(key))
        if key_mask is None:
            real = of(data_of(x)).ones((b, n), "bool")
        else:
            real = data_of(key_mask)
            logits = ops.where(real[:, None, None], logits, BELOW_ALL)
        weights = ops.softmax(logits, axis=-1)
        mixed = ops.matmul(weights, value).swapaxes(1, 2).reshape((b, n, c))
        y = self.attention_norm(x + self.dense(mixed))
        if length is not None or self.soft_extract is not None:
            scores = significance(data_of(weights), key_mask, self.include_self)
            if length is not None:
                y, _, real = extract(y, scores, length, key_mask=key_mask)
            elif self.soft_extract is not None:
                y = self.soft_extract(y, scores)
        return self.output_norm(y + self.output(ops.gelu(self.intermediate(y)))), real

    def extra_repr(self) -> str:
        """Heads."""
        return f"num_attention_heads={self.num_attention_heads}"
