"""Attention and what it is made of."""

from .scale import (
    dot_product_scale,
    entropy,
    entropy_invariant_scale,
    length_scale,
    sensitivity,
)

__all__ = [
    "dot_product_scale", "entropy", "entropy_invariant_scale", "length_scale", "sensitivity",
]  # fmt: skip
