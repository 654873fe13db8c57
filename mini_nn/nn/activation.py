"""Activation functions as modules; the functions themselves are in ``nn.functional``."""

from __future__ import annotations

from ..backend import Array
from . import functional as F
from .module import Module


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
