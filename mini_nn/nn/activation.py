"""Activation functions as modules; the functions themselves are in ``nn.functional``.

What each does to a standard normal number z (``nn.gaussian``), and F′(1), the factor by which an
error of the second moment changes in a wide layer of the corrected function f / √(E f²):

=============  ==========  ==========  ==========  ================
f              E f(z)      E f(z)²     (E f²)^−½   F′(1)
=============  ==========  ==========  ==========  ================
relu           0.3989423   0.5         1.4142136   1 (neutral)
sigmoid        0.5         0.2933790   1.8462285   0.1063
tanh           0           0.3942945   1.5925374   0.4611
erf            0           0.4645591   1.4671670   0.4086
elu            0.1605206   0.6449454   1.2451983   0.8910
selu           0           1           1           0.7826
softplus       0.8060592   0.9212459   1.0418668   0.4921
gelu           0.2820948   0.4252215   1.5335304   1.1441 (unstable)
gelu, tanh     0.2820386   0.4251937   1.5335805   1.1443 (unstable)
silu           0.2066210   0.3557755   1.6765325   1.1726 (unstable)
mish           0.2404039   0.4523422   1.4868476   1.0763 (unstable)
=============  ==========  ==========  ==========  ================
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from .. import ops
from ..backend import Array
from . import functional as F
from .gaussian import gaussian_moments
from .layers import Dropout
from .module import Module

__all__ = [
    "ELU", "GELU", "SELU", "AlphaDropout", "Corrected", "Erf", "LeakyReLU", "LogSoftmax", "Mish",
    "ReLU", "SiLU", "Sigmoid", "Softmax", "Softplus", "Tanh",
]  # fmt: skip


class ReLU(Module):
    """max(x, 0)."""

    def forward(self, input: Array) -> Array:
        """Any shape."""
        return F.relu(input)


class GELU(Module):
    """x Φ(x), or its tanh approximation; see ``functional.gelu``."""

    def __init__(self, approximate: str = "none") -> None:
        self.approximate = approximate

    def forward(self, input: Array) -> Array:
        """Any shape."""
        return F.gelu(input, self.approximate)


class SiLU(Module):
    """x σ(x)."""

    def forward(self, input: Array) -> Array:
        """Any shape."""
        return F.silu(input)


class Tanh(Module):
    """tanh x."""

    def forward(self, input: Array) -> Array:
        """Any shape."""
        return F.tanh(input)


class Sigmoid(Module):
    """1 / (1 + e⁻ˣ)."""

    def forward(self, input: Array) -> Array:
        """Any shape."""
        return F.sigmoid(input)


class ELU(Module):
    """x above 0, α (eˣ − 1) below; see ``functional.elu``."""

    def __init__(self, alpha: float = 1.0) -> None:
        self.alpha = alpha

    def forward(self, input: Array) -> Array:
        """Any shape."""
        return F.elu(input, self.alpha)


class SELU(Module):
    """λ times ELU with the constants that fix mean 0 and variance 1; see ``functional.selu``."""

    def forward(self, input: Array) -> Array:
        """Any shape."""
        return F.selu(input)


class LeakyReLU(Module):
    """x above 0, a fraction of it below; see ``functional.leaky_relu``."""

    def __init__(self, negative_slope: float = 0.01) -> None:
        self.negative_slope = negative_slope

    def forward(self, input: Array) -> Array:
        """Any shape."""
        return F.leaky_relu(input, self.negative_slope)


class Softplus(Module):
    """ln(1 + e^(βx)) / β; see ``functional.softplus``."""

    def __init__(self, beta: float = 1.0, threshold: float = 20.0) -> None:
        self.beta = beta
        self.threshold = threshold

    def forward(self, input: Array) -> Array:
        """Any shape."""
        return F.softplus(input, self.beta, self.threshold)


class Softmax(Module):
    """exp(x) / Σ exp(x) along the axis ``dim``; see ``functional.softmax``."""

    def __init__(self, dim: int) -> None:
        self.dim = dim

    def forward(self, input: Array) -> Array:
        """Any shape."""
        return F.softmax(input, self.dim)


class LogSoftmax(Module):
    """ln softmax(x) along the axis ``dim``; see ``functional.log_softmax``."""

    def __init__(self, dim: int) -> None:
        self.dim = dim

    def forward(self, input: Array) -> Array:
        """Any shape."""
        return F.log_softmax(input, self.dim)


class Mish(Module):
    """x tanh(ln(1 + eˣ)); see ``functional.mish``."""

    def forward(self, input: Array) -> Array:
        """Any shape."""
        return F.mish(input)


class Erf(Module):
    """The error function 2/√π ∫₀ˣ e^(−t²) dt."""

    def forward(self, input: Array) -> Array:
        """Any shape."""
        return ops.erf(input)


class Corrected(Module):
    """f / √(E f²), or (f − E f) / √(Var f): second moment 1 under N(0, 1) (Su 2021, kexue.fm 8620).

    After it, weights of variance 1/fan_in keep the second moment of any f in the mean.  Whether
    small errors die out is another matter: for GELU, SiLU and Mish they grow from layer to layer.

    Args:
        f: a function of one array, elementwise, or a Module that is one.
        centre: subtract the mean as well.

    Attributes:
        shift, scale: E f or 0, and the divisor; computed here, once, and not part of the state.

    Raises:
        ValueError: nothing is left to divide by: f is 0, or constant and ``centre`` is true.
    """

    def __init__(self, f: Callable[[Any], Any], centre: bool = False) -> None:
        self.f = f
        mean, square = gaussian_moments(f)
        self.shift = mean if centre else 0.0
        variance = square - self.shift * self.shift
        if variance <= 1e-12 * square:
            raise ValueError(
                f"E f² = {square:.3g} and E f = {mean:.3g} leave nothing to divide by: correct an "
                "f that varies"
            )
        self.scale = math.sqrt(variance)

    def forward(self, input: Array) -> Array:
        """Any shape."""
        y = self.f(input)
        return (y - self.shift if self.shift else y) * (1.0 / self.scale)

    def extra_repr(self) -> str:
        """The constants."""
        return f"shift={self.shift:.6g}, scale={self.scale:.6g}"


class AlphaDropout(Dropout):
    """Dropout for SELU, which keeps mean 0 and variance 1; see ``functional.alpha_dropout``.

    Args and errors are those of ``Dropout``.
    """

    def forward(self, input: Array) -> Array:
        """Any shape."""
        return F.alpha_dropout(input, self.p, self.training, self.rng)
