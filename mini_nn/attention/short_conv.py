"""A causal depthwise convolution over a few tokens, which a linear attention needs before it.

====================================================  ========================================
y_t,c = Σ_{j < w} W_c,j x_{t−w+1+j,c}                 Gu & Dao 2023, "Mamba", arXiv:2312.00752;
                                                      Yang et al. 2024, arXiv:2406.06484, on
                                                      queries, keys and values; Su 2025,
                                                      kexue.fm 11320, on why:
                                                      ``short_conv``, ``ShortConvolution``
====================================================  ========================================

A layer that stores the pair (k_t, v_t) of the same token can only learn to answer x_t with x_t.
With the convolution on k the pair is (what came before, x_t), which is what predicting needs: a
single layer then completes "… a b … a" to b.

Deviations: none; the bias that Mamba has is an option.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from .. import ops
from ..backend import Array
from ..engine import data_of, primitive
from ..nn.module import Module, Parameter
from ..ops.elementwise import of
from ..ops.fused import as_rows
from ..rng import Rng, default_rng
from ..tape import Kept

__all__ = ["ConvolutionState", "ShortConvolution", "short_conv"]


class ConvolutionState(NamedTuple):
    """What is handed on: the last w − 1 inputs, (b, w − 1, d)."""

    inputs: Any


def _definition(x: Any, weight: Any) -> Any:
    width, t = weight.shape[1], x.shape[-2] - weight.shape[1] + 1
    y = x[..., :t, :] * weight[:, 0]
    for j in range(1, width):
        y = y + x[..., j : j + t, :] * weight[:, j]
    return y


@primitive(composite=_definition)
def _windows(x: Any, weight: Any) -> Any:
    """Every full window of (…, w − 1 + t, d): (…, t, d)."""
    t, rows = x.shape[-2] - weight.shape[1] + 1, of(x).ascontiguousarray(weight.T)
    y = x[..., :t, :] * rows[0]
    part = of(x).empty_like(y)  # memory that is new each time costs more than the arithmetic
    for j in range(1, len(rows)):
        y += of(x).multiply(x[..., j : j + t, :], rows[j], out=part)
    return Kept(y, rows=rows)


@_windows.joint_derivative("x", "weight")
def _windows_rule(g: Any, needs: Any, x: Any, rows: Any) -> tuple[Any, Any]:
    xp, t = of(x), g.shape[-2]
    of_x = of_weight = None
    part = xp.empty_like(g)
    if needs[0]:
        of_x = xp.zeros(x.shape, g.dtype)
        for j in range(len(rows)):
            of_x[..., j : j + t, :] += xp.multiply(g, rows[j], out=part)
    if needs[1]:
        sums = []
        for j in range(len(rows)):
            products = as_rows(xp.multiply(g, x[..., j : j + t, :], out=part))
            sums.append(xp.ones(len(products), g.dtype) @ products)
        of_weight = xp.stack(sums, axis=-1)
    return of_x, of_weight


def short_conv(x: Any, weight: Any, bias: Any = None, state: Any = None) -> Any:
    """y_t = Σ_{j < w} W_j ∘ x_{t−w+1+j} + b, with zeros before the first token.

    Args:
        x: (…, t, d).
        weight: (d, w), the newest token's last.
        bias: (d,) or None.
        state: None for a whole sequence; ``()`` or a ``ConvolutionState`` to get the next one, too.

    Returns:
        (…, t, d); with a state a pair of that and the next ``ConvolutionState``.

    Raises:
        ValueError: the shapes do not fit.
    """
    if x.ndim < 2 or weight.ndim != 2 or weight.shape[1] < 1 or x.shape[-1] != weight.shape[0]:
        raise ValueError(
            f"short_conv takes (…, t, d) and a weight (d, w), got {x.shape} and {weight.shape}"
        )
    if bias is not None and bias.shape != x.shape[-1:]:
        raise ValueError(f"the bias is (d,) = {x.shape[-1:]} here, got {bias.shape}")
    width = weight.shape[1]
    shape = (*x.shape[:-2], width - 1, x.shape[-1])
    before = state[0] if state else of(data_of(x)).zeros(shape, x.dtype)
    if before.shape != shape:
        raise ValueError(f"the state is (…, w − 1, d) = {shape} here, got {before.shape}")
    seen = ops.concatenate([before, x], axis=-2)
    y = _windows(seen, weight)
    y = y if bias is None else y + bias
    return y if state is None else (y, ConvolutionState(seen[..., seen.shape[-2] - width + 1 :, :]))


class ShortConvolution(Module):
    """``short_conv`` with weights of its own.

    Args:
        channels: d.
        width: w, the number of tokens that are seen: 2 to 4 as a rule.
        bias: whether there is a b.
        rng: what the weights are drawn from, U(−1/√w, 1/√w) (None: ``default_rng()``).

    Attributes:
        weight: (d, w).
        bias: zeros (d,), or None.

    Raises:
        ValueError: ``width`` is below 1.
    """

    def __init__(
        self, channels: int, width: int = 4, bias: bool = False, *, rng: Rng | None = None
    ) -> None:
        if width < 1:
            raise ValueError(f"a convolution sees at least one token, got width={width}")
        self.channels, self.width = channels, width
        bound, rng = 1.0 / math.sqrt(width), default_rng() if rng is None else rng
        self.weight = Parameter(rng.uniform((channels, width), -bound, bound))
        self.bias = Parameter(0.0 * self.weight.data[:, 0]) if bias else None

    def forward(self, input: Array, state: Any = None) -> Any:
        """(…, t, d) → (…, t, d); with a state a pair of that and the next one."""
        return short_conv(input, self.weight, self.bias, state)
