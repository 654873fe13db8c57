"""A feed-forward part that shortens the sequence: its first matrix is a convolution with a stride.

Su 2020, "线性Attention的探索：Attention必须有个Softmax吗？", kexue.fm/archives/7546, which suggests
among other ways to shorten a sequence that a strided convolution take the place of the dense
layers.  There is no formula; what is here is

    yᵢ = W₂ σ(Σ_t W₁[t] x_{s i + t − p} + b₁) + b₂,     i = 0 … ⌈n/s⌉ − 1,  0 ≤ t < k,

which for k = s = 1 is the feed-forward part of a Transformer, position by position.  For k = s each
token is in one place, for k > s neighbours overlap.

Deviations: that only the first of the two matrices is a convolution is a choice of ours.  Place i
contains tokens up to s i + k − 1 − p, so later layers see the future: it is not causal for s > 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .. import ops
from ..backend import Array
from ..nn import Conv1d, Linear, Module
from ..rng import Rng
from .arguments import check_key_mask

__all__ = ["StridedFeedForward"]


class StridedFeedForward(Module):
    """W₂ σ(conv(x)), ⌈n/s⌉ vectors for n.

    Args:
        d_model: d.
        d_inner: between the two.
        stride: s.
        kernel_size: k, at least s, or tokens would be skipped; None for s.
        activation: σ.
        rng: what the weights are drawn from (None: ``default_rng()``).

    Attributes:
        conv: Conv1d with weight (d_inner, d, k).
        linear: Linear (d_inner → d).

    Raises:
        ValueError: the kernel is smaller than the stride.
    """

    def __init__(
        self,
        d_model: int,
        d_inner: int,
        stride: int = 2,
        kernel_size: int | None = None,
        activation: Callable[[Any], Any] = ops.gelu,
        *,
        rng: Rng | None = None,
    ) -> None:
        size = stride if kernel_size is None else kernel_size
        if stride < 1 or size < stride:
            raise ValueError(
                f"a kernel of at least the stride, which is at least 1: got {kernel_size=} and "
                f"{stride=}"
            )
        self.stride = stride
        self.kernel_size = size
        self.activation = activation
        self.conv = Conv1d(d_model, d_inner, size, stride, rng=rng)
        self.linear = Linear(d_inner, d_model, rng=rng)

    def forward(self, x: Array, key_mask: Array | None = None) -> Any:
        """(b, n, d) to (b, ⌈n/s⌉, d).

        Args:
            x: zeros are put before it, p = ⌊(k − s)/2⌋ of them, and behind it.
            key_mask: booleans that broadcast to (b, n); pads count as zeros, as do the places
                beyond the ends.
        """
        if key_mask is not None:
            check_key_mask(key_mask, x)
            x = ops.where(key_mask[..., None], x, 0.0)
        n, before = x.shape[-2], (self.kernel_size - self.stride) // 2
        places = -(-n // self.stride)
        behind = (places - 1) * self.stride + self.kernel_size - before - n
        x = ops.pad(x.swapaxes(-1, -2), ((0, 0), (0, 0), (before, behind)))
        return self.linear(self.activation(self.conv(x).swapaxes(-1, -2)))
