"""Attention and what it is made of."""

from .chunked import chunked, recurrent
from .scale import (
    dot_product_scale,
    entropy,
    entropy_invariant_scale,
    length_scale,
    sensitivity,
)

__all__ = [
    "chunked", "dot_product_scale", "entropy", "entropy_invariant_scale", "length_scale",
    "recurrent", "sensitivity",
]  # fmt: skip
