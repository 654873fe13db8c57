"""Activation functions, fused: few passes over memory, with a readable twin where rules need one.

``f.composite`` is the definition in plain primitives.  It is what is differentiated at second
order, and the tests hold the two equal to order 2.
"""

from __future__ import annotations

from typing import Any

from ..engine import primitive
from ..tape import Kept
from .elementwise import abs as absolute
from .elementwise import erf, exp, log1p, maximum, of, sigmoid, tanh

__all__ = ["gelu", "relu", "silu", "softplus"]

SQRT_HALF = 0.7071067811865476
SQRT_TWO_OVER_PI = 0.7978845608028654
CUBIC = 0.044715
NORMAL_DENSITY_AT_0 = 0.3989422804014327


@primitive
def relu(x: Any) -> Any:
    """max(x, 0), elementwise; the derivative at 0 is 0."""
    return of(x).clip(x, 0.0, float("inf"))  # three times as fast as a one-sided maximum


relu.derivative(x=lambda g, y: g * (y > 0))


def _gelu_definition(x: Any, approximate: str = "none") -> Any:
    if approximate == "none":
        return 0.5 * x * (1 + erf(x * SQRT_HALF))
    return 0.5 * x * (1 + tanh(SQRT_TWO_OVER_PI * (x + CUBIC * (x * x * x))))


@primitive(composite=_gelu_definition)
def gelu(x: Any, approximate: str = "none") -> Any:
    """x Φ(x) with the normal distribution function Φ (Hendrycks & Gimpel 2016, arXiv:1606.08415).

    Args:
        x: any shape.
        approximate: ``"none"`` for Φ by the error function, ``"tanh"`` for the approximation
            x/2 (1 + tanh(√(2/π) (x + 0.044715 x³))) that GPT-2 uses.

    Raises:
        ValueError: another ``approximate``.
    """
    if approximate == "tanh":  # (1 + tanh u) / 2 = σ(2u), and exp is faster than tanh
        inner = x * x
        inner *= 2 * CUBIC * SQRT_TWO_OVER_PI
        inner += 2 * SQRT_TWO_OVER_PI
        inner *= x
        s = sigmoid(inner)
        return Kept(x * s, inner=s)
    if approximate != "none":
        raise ValueError(f"approximate is 'none' or 'tanh', got {approximate!r}")
    cdf = 0.5 * (1 + erf(x * SQRT_HALF))
    return Kept(x * cdf, inner=cdf)


@gelu.joint_derivative("x")
def _gelu_rule(g: Any, x: Any, approximate: str, inner: Any) -> tuple[Any]:
    if approximate == "none":  # d/dx x Φ(x) = Φ(x) + x φ(x)
        return (g * (inner + x * (NORMAL_DENSITY_AT_0 * exp(-0.5 * (x * x)))),)
    slope = x * x  # d/dx x s = s (1 + x (1 − s) 2u'), u' = √(2/π) (1 + 3 · 0.044715 x²)
    slope *= 6 * CUBIC * SQRT_TWO_OVER_PI
    slope += 2 * SQRT_TWO_OVER_PI
    slope *= x
    slope *= 1 - inner
    slope += 1
    slope *= inner
    slope *= g
    return (slope,)


def _silu_definition(x: Any) -> Any:
    return x * sigmoid(x)


@primitive(composite=_silu_definition)
def silu(x: Any) -> Any:
    """x σ(x), also called swish (Elfwing et al. 2017, arXiv:1702.03118)."""
    s = sigmoid(x)
    return Kept(x * s, inner=s)


silu.derivative(x=lambda g, x, inner: g * (inner * (1 + x * (1 - inner))))


@primitive
def softplus(x: Any) -> Any:
    """ln(1 + eˣ) = max(x, 0) + ln(1 + e^(−|x|)), which overflows nowhere."""
    return maximum(x, 0.0) + log1p(exp(-absolute(x)))


softplus.derivative(x=lambda g, x: g * sigmoid(x))
