"""What a layer of attention costs, and from which length on the part that is quadratic matters.

====================================================  ==============================================
projections 4 n h² d², scores and sums 2 n² h d,      Su 2021, kexue.fm 8610:
feed-forward 8 n h² d²                                ``projection_cost``, ``softmax_core_cost``,
                                                      ``feed_forward_cost``
attention > feed-forward        iff  n > 2 h d        ``length_of_attention``
2 n² h d > all that is linear   iff  n > 6 h d        ``length_of_quadratic``
linear attention is cheaper     iff  n > 16 d         ``length_of_linear``
with heads of 4 d
====================================================  ==============================================

The unit is one multiplication with the addition that follows it; n tokens, h heads of d, so the
width of the model is h d and that of the feed-forward layer 4 h d.  Softmax, norms, biases and the
causal half are not counted.

Deviations: the source's 16 d lets keys *and* values grow to 4 d.  With features of the keys alone,
the sums cost 2 n h · 4 d · d and linear attention is cheaper from 4 d on; ``length_of_linear``
takes both widths.
"""

from __future__ import annotations

__all__ = [
    "attention_cost", "feed_forward_cost", "length_of_attention", "length_of_linear",
    "length_of_quadratic", "linear_core_cost", "projection_cost", "softmax_core_cost",
]  # fmt: skip


def projection_cost(n: int, heads: int, d: int) -> int:
    """4 n h² d²: queries, keys, values and the output, each from h d to h d."""
    return 4 * n * _width(heads, d) ** 2


def softmax_core_cost(n: int, heads: int, d: int) -> int:
    """2 n² h d: Q Kᵀ and P V, over all pairs."""
    return 2 * n * n * _width(heads, d)


def linear_core_cost(n: int, heads: int, key_width: int, value_width: int) -> int:
    """2 n h D e: φ(K)ᵀ V and φ(Q) times that; the normaliser's n h D are not counted.

    Args:
        n: tokens.
        heads: h.
        key_width: D, the number of features of a key.
        value_width: e.
    """
    return 2 * n * _width(heads, key_width) * value_width


def attention_cost(n: int, heads: int, d: int) -> int:
    """4 n h² d² + 2 n² h d: a layer of softmax attention."""
    return projection_cost(n, heads, d) + softmax_core_cost(n, heads, d)


def feed_forward_cost(n: int, heads: int, d: int, expansion: int = 4) -> int:
    """8 n h² d²: from h d to 4 h d and back."""
    return 2 * expansion * n * _width(heads, d) ** 2


def length_of_attention(heads: int, d: int) -> int:
    """2 h d: at more tokens attention costs more than the feed-forward layer, at fewer less."""
    return 2 * _width(heads, d)


def length_of_quadratic(heads: int, d: int) -> int:
    """6 h d: at more tokens the pairs cost more than everything else in the layer."""
    return 6 * _width(heads, d)


def length_of_linear(d: int, key_width: int | None = None, value_width: int | None = None) -> float:
    """D e / d: at more tokens linear attention is cheaper than softmax attention.

    Args:
        d: the heads of softmax attention.
        key_width: D of linear attention; None for the source's 4 d.
        value_width: e of linear attention; None for the source's 4 d.

    Raises:
        ValueError: a width is below 1.
    """
    key_width = 4 * d if key_width is None else key_width
    value_width = 4 * d if value_width is None else value_width
    return _width(key_width, value_width) / _width(1, d)


def _width(heads: int, d: int) -> int:
    if heads < 1 or d < 1:
        raise ValueError(f"heads and widths are at least 1, got {heads} and {d}")
    return heads * d
