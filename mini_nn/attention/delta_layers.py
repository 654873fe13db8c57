"""DeltaNet and gated DeltaNet: the layers around the two rules.

====================================================  ========================================
q, k = unit(silu(conv(W x))), v = silu(conv(W x)),    Yang et al. 2024, arXiv:2406.06484:
β = σ(w · x), y = W (RMS norm of each head)           ``DeltaNet``
the same with γ = e^(−a softplus(w · x + b)) and      Yang, Kautz & Hatamizadeh 2024,
y = W (RMS norm of each head ∘ silu(W x))             arXiv:2412.06464: ``GatedDeltaNet``
a in [1, 16], softplus(b) in [0.001, 0.1] at start    as Mamba-2 (Dao & Gu 2024,
                                                      arXiv:2405.21060)
====================================================  ========================================

Both map (b, t, d) to (b, t, d) and are causal.  Before anything is learned a head of
``GatedDeltaNet`` remembers some 1 / (a softplus(b)) tokens.

Deviations: one linear map makes queries, keys and values, and one convolution, which is depthwise,
follows: the same as three of each.  Heads are d / heads wide in keys and values (the second paper
takes values twice as wide as keys).  No 1/√d on queries, which the norm takes out again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from .. import ops
from ..backend import Array
from ..nn.heads import split_heads
from ..nn.layers import Linear
from ..nn.module import Module, Parameter
from ..nn.norm import RMSNorm
from ..rng import Rng, default_rng
from .delta import delta_rule, unit_length
from .gated_delta import gated_delta_rule, log_gate
from .short_conv import ShortConvolution

__all__ = ["DeltaLayerState", "DeltaNet", "GatedDeltaNet"]


class DeltaLayerState(NamedTuple):
    """What a layer hands on: the state of its convolution and that of its rule."""

    conv: Any
    rule: Any


class DeltaNet(Module):
    """Queries, keys and values through a short convolution and SiLU into the delta rule.

    Args:
        dim: d.
        heads: heads, each d / heads wide.
        width: tokens that the convolution sees.
        norm_eps: ε of the RMS norm.
        rng: for the initial weights (None: ``default_rng()``).

    Attributes:
        qkv: Linear (d → 3d); conv: ShortConvolution (3d); rates: Linear (d → heads);
        norm: RMSNorm (d / heads); out: Linear (d → d).  No biases.

    Raises:
        ValueError: the heads do not divide d, or there is no channel.
    """

    RATES = 1

    def __init__(
        self,
        dim: int,
        heads: int,
        width: int = 4,
        norm_eps: float = 1e-5,
        *,
        rng: Rng | None = None,
    ) -> None:
        if dim < 1 or heads < 1 or dim % heads:
            raise ValueError(f"{dim} channels do not split into {heads} equal heads")
        rng = default_rng() if rng is None else rng
        self.dim, self.heads = dim, heads
        self.qkv = Linear(dim, 3 * dim, bias=False, rng=rng)
        self.conv = ShortConvolution(3 * dim, width, rng=rng)
        self.rates = Linear(dim, self.RATES * heads, bias=False, rng=rng)
        self.norm = RMSNorm(dim // heads, norm_eps)
        self.out = Linear(dim, dim, bias=False, rng=rng)

    def forward(self, x: Array, state: Any = None) -> Any:
        """(b, t, d) → (b, t, d); with a state (``()`` at first) a pair of that and the next one."""
        if x.ndim != 3 or x.shape[-1] != self.dim:
            raise ValueError(f"{type(self).__name__} takes (b, t, {self.dim}), got {x.shape}")
        b, t, _ = x.shape
        mixed = self.qkv(x)
        if state is None:
            mixed, conv, rule = self.conv(mixed), None, None
        else:
            earlier = state or DeltaLayerState((), ())
            mixed, conv = self.conv(mixed, earlier.conv)
            rule = earlier.rule
        query, key, value = split_heads(ops.silu(mixed), self.heads)
        rates = self.rates(x).swapaxes(1, 2)  # (b, rates, t)
        y = self.attend(unit_length(query), unit_length(key), value, rates, rule)
        if state is not None:
            y, rule = y
        y = self.gated(self.norm(y.swapaxes(1, 2)).reshape(b, t, self.dim), x)
        y = self.out(y)
        return y if state is None else (y, DeltaLayerState(conv, rule))

    def attend(self, query: Array, key: Array, value: Array, rates: Array, state: Any) -> Any:
        """The rule, for (b, heads, t, d / heads) and what ``rates`` made of x, (b, heads, t)."""
        return delta_rule(query, key, value, ops.sigmoid(rates), True, state)

    def gated(self, y: Array, x: Array) -> Array:
        """What is left of the normed output, (b, t, d)."""
        return y


class GatedDeltaNet(DeltaNet):
    """``DeltaNet`` that forgets, and whose output passes a gate.

    Args:
        dim, heads, width, norm_eps, rng: as for ``DeltaNet``.

    Attributes:
        log_a, rate_bias: log a and b, (heads,).
        gate: Linear (d → d); the others are those of ``DeltaNet``, with ``rates`` to 2 · heads: β's
            and γ's.

    Raises:
        ValueError: the heads do not divide d.
    """

    RATES = 2

    def __init__(
        self,
        dim: int,
        heads: int,
        width: int = 4,
        norm_eps: float = 1e-5,
        *,
        rng: Rng | None = None,
    ) -> None:
        rng = default_rng() if rng is None else rng
        super().__init__(dim, heads, width, norm_eps, rng=rng)
        self.gate = Linear(dim, dim, bias=False, rng=rng)
        self.log_a = Parameter(ops.log(rng.uniform((heads,), 1.0, 16.0)))
        step = ops.exp(rng.uniform((heads,), -6.907755, -2.302585))  # log 0.001 to log 0.1
        self.rate_bias = Parameter(step + ops.log(-ops.expm1(-step)))  # softplus⁻¹

    def attend(self, query: Array, key: Array, value: Array, rates: Array, state: Any) -> Any:
        """The rule, for (b, heads, t, d / heads) and what ``rates`` made of x, (b, 2 heads, t)."""
        beta, decay = ops.split(rates, 2, axis=1)
        gates = log_gate(decay, self.log_a[:, None], self.rate_bias[:, None])
        return gated_delta_rule(query, key, value, ops.sigmoid(beta), gates, True, state)

    def gated(self, y: Array, x: Array) -> Array:
        """The normed output times silu(W x)."""
        return y * ops.silu(self.gate(x))
