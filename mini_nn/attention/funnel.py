"""Funnel-Transformer: the sequence is halved from block to block, and stretched again at the end.

Dai, Lai, Yang, Le 2020, "Funnel-Transformer: Filtering out Sequential Redundancy for Efficient
Language Processing", arXiv:2006.03236.

=====================================================  =======================================
h' = pooling(h), stride and window 2                   ``pool_sequence``
h ← N(h' + A(Q = h', K = V = h))                       ``FunnelLayer`` with a ``source``
[CLS] is not pooled, the end is cut                    ``separate_cls``, ``truncate``
h_up = repeat(h) + h of block 1                        ``upsample``, ``Funnel``
=====================================================  =======================================

Only the queries are pooled: a pooled place still looks at every token of the block before, so
pooling is done by attention, and what the mean loses is not lost.  That is the first layer of each
block after the first; all others are plain.  With a stride of 1 all of them are, and the encoder is
a Transformer.  Halving with [CLS] apart leaves a sequence of odd length; with ``truncate`` it is
cut by one token, so that lengths that are a power of 2 stay one.

A pooled place is a mixture of ``stride`` neighbours, so the model is not causal even if all its
attention is.

Deviations: positions are the caller's, added to the input; the paper's are relative, in the scores
of each layer.  Pads do not take part in the mean or the maximum, and a place is real if one of its
tokens is; in transformers they take part, and a place with one pad is a pad.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from .. import ops
from ..backend import Array
from ..engine import data_of
from ..nn import LayerNorm, Linear, Module, ModuleList
from ..ops.elementwise import of
from ..rng import Rng
from .arguments import real_tokens

__all__ = ["Funnel", "FunnelLayer", "pool_sequence", "pooled_length", "upsample"]

Mode = Literal["mean", "max"]


def pooled_length(n: int, stride: int = 2, separate_cls: bool = True, truncate: bool = True) -> int:
    """How many places ``pool_sequence`` leaves of n tokens."""
    if not separate_cls:
        return -(-n // stride)
    rest = max(n - 1 - (stride - 1 if truncate else 0), 0)
    return min(n, 1) + -(-rest // stride)


def pool_sequence(
    x: Array,
    stride: int = 2,
    mode: Mode = "mean",
    separate_cls: bool = True,
    truncate: bool = True,
    key_mask: Array | None = None,
) -> tuple[Array, Array]:
    """Runs of ``stride`` tokens as one; the last run may be shorter.

    Args:
        x: (…, n, d).
        stride: 1 leaves everything as it is.
        mode: ``"mean"`` or ``"max"``.
        separate_cls: the first token is a place of its own.
        truncate: with ``separate_cls``, the last stride − 1 tokens are left out.
        key_mask: booleans that broadcast to (…, n), true for real tokens, which alone are pooled.

    Returns:
        (…, n', d) with n' = ``pooled_length(n, …)``, zeros where no token is real, and (…, n')
        booleans, true where one is, without the leading axes that the mask does not have.

    Raises:
        ValueError: the stride is below 1, another mode, or the mask has another shape.
        TypeError: the mask is not boolean.
    """
    if stride < 1 or mode not in ("mean", "max"):
        raise ValueError(
            f"pool_sequence takes a stride of at least 1 and mode 'mean' or 'max', got {stride} "
            f"and {mode!r}"
        )
    xp, n = of(data_of(x)), x.shape[-2]
    x, real = real_tokens(x, key_mask)
    if stride == 1:
        return x, real
    first = min(n, 1) if separate_cls else 0
    stop = max(n - stride + 1, first) if separate_cls and truncate else n
    runs = _runs(x[..., first:stop, :], stride, -2)
    inside = _runs(real[..., first:stop], stride, -1)
    some = inside.any(axis=-1)
    if mode == "mean":
        count = xp.maximum(inside.sum(axis=-1), 1).astype(x.dtype)
        pooled = ops.sum(runs, axis=-2) / count[..., None]
    else:
        pooled = ops.max(ops.where(inside[..., None], runs, float("-inf")), axis=-2)
        pooled = ops.where(some[..., None], pooled, 0.0)
    if not first:
        return pooled, some
    joined = ops.concatenate([x[..., :1, :], pooled], axis=-2)
    return joined, xp.concatenate([real[..., :1], some], axis=-1)


def _runs(x: Any, stride: int, axis: int) -> Any:
    """The axis of length n as two, (⌈n / stride⌉, stride), zeros or False behind the end."""
    axis += x.ndim
    lead, n, rest = x.shape[:axis], x.shape[axis], x.shape[axis + 1 :]
    if -n % stride:
        more = of(data_of(x)).zeros((*lead, -n % stride, *rest), x.dtype)
        x = ops.concatenate([x, more], axis=axis)
    return x.reshape((*lead, -(-n // stride), stride, *rest))


def upsample(
    x: Array, stride: int, length: int, separate_cls: bool = True, truncate: bool = True
) -> Array:
    """Each place ``stride`` times in a row, back to ``length``; the first once if it is apart.

    Args:
        x: (…, n', d).
        stride: of all poolings together.
        length: n.
        separate_cls, truncate: as when it was pooled.  Where tokens were cut off, and where the
            repetition ends before ``length``, there are zeros.

    Returns:
        (…, n, d).

    Raises:
        ValueError: the stride is below 1 or the length negative.
    """
    if stride < 1 or length < 0:
        raise ValueError(f"upsample takes stride ≥ 1 and length ≥ 0, got {stride} and {length}")
    if stride == 1 and x.shape[-2] == length:
        return x
    first = 1 if separate_cls and x.shape[-2] else 0
    parts = [x[..., :first, :], ops.repeat(x[..., first:, :], stride, axis=-2)]
    missing = length - sum(part.shape[-2] for part in parts)
    if missing > 0:
        parts.append(of(data_of(x)).zeros((*x.shape[:-2], missing, x.shape[-1]), x.dtype))
    return ops.concatenate(parts, axis=-2)[..., :length, :]


class FunnelAttention(Module):
    """Multi-head attention with its residual connection and norm, under transformers' names."""

    def __init__(self, d_model: int, n_head: int, rng: Rng | None) -> None:
        self.n_head = n_head
        self.q_head = Linear(d_model, d_model, bias=False, rng=rng)
        self.k_head, self.v_head, self.post_proj = (
            Linear(d_model, d_model, rng=rng) for _ in range(3)
        )
        self.layer_norm = LayerNorm(d_model, 1e-9)

    def forward(self, x: Array, source: Array, key_mask: Any = None) -> Any:
        """N(x + A(Q = x, K = V = source)): (b, n, d) and (b, m, d) to (b, n, d)."""

        def heads(y: Any) -> Any:
            return y.reshape((*y.shape[:-1], self.n_head, -1)).swapaxes(-2, -3)

        query, key, value = (
            heads(layer(y))
            for layer, y in ((self.q_head, x), (self.k_head, source), (self.v_head, source))
        )
        allowed = None
        if key_mask is not None:
            real = data_of(key_mask)
            allowed = real[None, :] if real.ndim == 1 else real[:, None, None, :]
        y = ops.scaled_dot_product_attention(query, key, value, allowed)
        return self.layer_norm(x + self.post_proj(y.swapaxes(-2, -3).reshape(x.shape)))


class FunnelFeedForward(Module):
    """N(x + W₂ gelu(W₁ x)), under transformers' names."""

    def __init__(self, d_model: int, d_inner: int, rng: Rng | None) -> None:
        self.linear_1 = Linear(d_model, d_inner, rng=rng)
        self.linear_2 = Linear(d_inner, d_model, rng=rng)
        self.layer_norm = LayerNorm(d_model, 1e-9)

    def forward(self, x: Array) -> Any:
        """(…, d) to (…, d)."""
        return self.layer_norm(x + self.linear_2(ops.gelu(self.linear_1(x), approximate="tanh")))


class FunnelLayer(Module):
    """A layer of a Transformer, N₂(y + F(y)) with y = N₁(x + A(x)), whose keys may come elsewhere.

    Args:
        d_model: d, divisible by the number of heads.
        n_head: h.
        d_inner: width of the feed-forward part.
        rng: what the weights are drawn from (None: ``default_rng()``).

    Attributes:
        attention: with q_head (no bias), k_head, v_head, post_proj and layer_norm.
        ffn: with linear_1, linear_2 and layer_norm.

    Raises:
        ValueError: the heads do not divide d.
    """

    def __init__(self, d_model: int, n_head: int, d_inner: int, *, rng: Rng | None = None) -> None:
        if d_model % n_head:
            raise ValueError(f"{n_head} heads do not divide {d_model} channels")
        self.attention = FunnelAttention(d_model, n_head, rng)
        self.ffn = FunnelFeedForward(d_model, d_inner, rng)

    def forward(self, x: Array, source: Array | None = None, key_mask: Any = None) -> Any:
        """The layer.

        Args:
            x: (b, n, d), what asks and what is added to the answer.
            source: (b, m, d), what is looked at; None for x itself.
            key_mask: (b, m) or (m,) booleans, true for real tokens of the source.

        Returns:
            (b, n, d).
        """
        return self.ffn(self.attention(x, x if source is None else source, key_mask))


class Funnel(Module):
    """An encoder whose blocks get shorter, and a decoder that gives every token a vector again.

    Args:
        d_model, n_head, d_inner: of every layer.
        block_sizes: layers of each block; the sequence is pooled before every block but the first.
        num_decoder_layers: 0 for no more than repetition and the residual from block 1.
        stride: of each pooling; 1 makes a Transformer.
        mode: of pooling.
        rng: what the weights are drawn from (None: ``default_rng()``).

    Attributes:
        blocks: ModuleList of ModuleLists of FunnelLayer.
        layers: ModuleList of the decoder's.
        separate_cls, truncate: see ``pool_sequence``; both True, to be set before use.

    Raises:
        ValueError: there is no block.
    """

    separate_cls = True
    truncate = True

    def __init__(
        self,
        d_model: int,
        n_head: int,
        d_inner: int,
        block_sizes: Sequence[int],
        num_decoder_layers: int = 2,
        stride: int = 2,
        mode: Mode = "mean",
        *,
        rng: Rng | None = None,
    ) -> None:
        if not block_sizes or min(block_sizes) < 1:
            raise ValueError(f"Funnel takes blocks of at least one layer, got {block_sizes}")
        self.stride = stride
        self.mode: Mode = mode

        def layers(count: int) -> ModuleList:
            return ModuleList(FunnelLayer(d_model, n_head, d_inner, rng=rng) for _ in range(count))

        self.blocks = ModuleList(layers(size) for size in block_sizes)
        self.layers = layers(num_decoder_layers)

    def encode(self, x: Array, key_mask: Any = None) -> tuple[Any, Any]:
        """The last hidden states of the first block and of the last one.

        Args:
            x: (b, n, d).
            key_mask: (b, n) or (n,) booleans, true for real tokens; None for no pads.

        Returns:
            (b, n, d) and (b, n', d).
        """
        first = None
        block: Any
        for block in self.blocks:
            query, mask = x, key_mask
            if first is not None:
                query, mask = pool_sequence(
                    x, self.stride, self.mode, self.separate_cls, self.truncate, key_mask
                )
            mask = None if key_mask is None else mask
            head, *rest = block
            x = head(query, x, key_mask)
            for layer in rest:
                x = layer(x, None, mask)
            key_mask = mask
            first = x if first is None else first
        return first, x

    def forward(self, x: Array, key_mask: Any = None) -> Any:
        """(b, n, d) to (b, n, d); the arguments are those of ``encode``."""
        first, last = self.encode(x, key_mask)
        stride = self.stride ** (len(self.blocks) - 1)
        x = first + upsample(last, stride, x.shape[-2], self.separate_cls, self.truncate)
        for layer in self.layers:
            x = layer(x, None, key_mask)
        return x
