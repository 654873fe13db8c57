"""Linear, Embedding, and the layers without parameters: Dropout, Flatten, Identity."""

from __future__ import annotations

import math
from typing import Any

from ..backend import Array
from ..rng import Rng, default_rng
from . import functional as F
from .functional.layers import row_number
from .module import Module, Parameter


def uniform_parameter(shape: tuple[int, ...], fan_in: int, rng: Rng | None) -> Parameter:
    """Drawn from U(−1/√fan_in, 1/√fan_in), torch's law for the weights and biases of layers.

    torch writes it as kaiming_uniform_ with a = √5, whose bound √(6 / ((1 + a²) fan_in)) is this.
    It has variance 1 / (3 fan_in), a sixth of He's: what is right is the subject of ``nn.init``.
    """
    bound = 1.0 / math.sqrt(fan_in) if fan_in else 0.0
    return Parameter((default_rng() if rng is None else rng).uniform(shape, -bound, bound))


class Linear(Module):
    """y = x Wᵀ + b.

    Args:
        in_features: the length of the last axis of x.
        out_features: the length of the last axis of y.
        bias: whether there is a b.
        rng: what the weights are drawn from, U(−1/√in, 1/√in) (None: ``default_rng()``).

    Attributes:
        weight: W (out, in).
        bias: b (out,) or None.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, rng: Rng | None = None
    ) -> None:
        self.in_features = in_features
        self.out_features = out_features
        self.weight = uniform_parameter((out_features, in_features), in_features, rng)
        self.bias = uniform_parameter((out_features,), in_features, rng) if bias else None

    def forward(self, input: Array) -> Array:
        """(…, in) → (…, out)."""
        return F.linear(input, self.weight, self.bias)


class Embedding(Module):
    """A table of vectors, read by number.

    Args:
        num_embeddings: the number of rows.
        embedding_dim: their length.
        padding_idx: a row that starts as zeros and gets no gradient.
        rng: what the other rows are drawn from, N(0, 1) (None: ``default_rng()``).

    Attributes:
        weight: (num_embeddings, embedding_dim).

    Raises:
        IndexError: there is no row ``padding_idx``.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        rng: Rng | None = None,
    ) -> None:
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        rows = (default_rng() if rng is None else rng).normal((num_embeddings, embedding_dim))
        if padding_idx is not None:
            padding_idx = row_number(padding_idx, num_embeddings)
            rows[padding_idx] = 0.0
        self.padding_idx = padding_idx
        self.weight = Parameter(rows)

    def forward(self, input: Any) -> Array:
        """Integers (…) → (…, embedding_dim); a Tensor, an array or a list."""
        return F.embedding(input, self.weight, self.padding_idx)


class Dropout(Module):
    """In training, zero each element with probability ``p`` and divide the others by 1 − p.

    Args:
        p: in [0, 1].
        rng: what is drawn from, at each call (None: ``default_rng()``).

    Raises:
        ValueError: ``p`` is not a probability.
    """

    def __init__(self, p: float = 0.5, *, rng: Rng | None = None) -> None:
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"{type(self).__name__} takes a probability p in [0, 1], got {p}")
        self.p = p
        self.rng = rng

    def forward(self, input: Array) -> Array:
        """Any shape."""
        return F.dropout(input, self.p, self.training, self.rng)

    def extra_repr(self) -> str:
        """The probability."""
        return f"p={self.p}"


class Flatten(Module):
    """Make the axes from ``start_dim`` to ``end_dim`` one."""

    def __init__(self, start_dim: int = 1, end_dim: int = -1) -> None:
        self.start_dim = start_dim
        self.end_dim = end_dim

    def forward(self, input: Array) -> Array:
        """(…, n₁, …, nₖ, …) → (…, n₁ ⋯ nₖ, …)."""
        start, end = self.start_dim % input.ndim, self.end_dim % input.ndim
        shape = input.shape
        return input.reshape(*shape[:start], math.prod(shape[start : end + 1]), *shape[end + 1 :])


class Identity(Module):
    """Its input, unchanged."""

    def forward(self, input: Any) -> Any:
        """Anything."""
        return input
