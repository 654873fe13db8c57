"""A layer that works on each position by itself, applied to a few positions at a time.

Kitaev, Kaiser, Levskaya 2020, "Reformer", arXiv:2001.04451, section 3, "Chunking": the hidden layer
of a feed-forward network is several times as wide as the stream, and need not exist for all
positions at once.

========================================================  =============
Y = [G(x⁽¹⁾); …; G(x⁽ᶜ⁾)], each x⁽ⁱ⁾ some positions of x  ``by_chunks``
========================================================  =============

Deviations: a chunk runs under ``checkpoint``, once more in the backward pass, since the tape would
otherwise keep the hidden layer of every chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .. import ops
from ..transforms import checkpoint
from .module import Module

__all__ = ["ChunkedFeedForward", "by_chunks"]


def by_chunks(fn: Callable[[Any], Any], x: Any, chunk_size: int, axis: int = -2) -> Any:
    """``fn(x)`` for an ``fn`` that treats positions alike and apart, some positions at a time.

    Args:
        fn: (…, m, d) → (…, m, e) for any m, with no other effect than its result.  What it draws
            (dropout) follows the same law as in one call, but comes in another order.
        x: (…, n, d).
        chunk_size: positions at a time, at least 1; the last chunk may be smaller.
        axis: of the positions.

    Returns:
        (…, n, e).

    Raises:
        ValueError: ``chunk_size`` is below 1.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size is at least 1, got {chunk_size}")
    n = x.shape[axis]
    if n <= chunk_size:
        return checkpoint(fn, x)
    parts = ops.split(x, [*range(chunk_size, n, chunk_size)], axis=axis)
    return ops.concatenate([checkpoint(fn, part) for part in parts], axis=axis)


class ChunkedFeedForward(Module):
    """``by_chunks`` of a module.

    Args:
        module: (…, m, d) → (…, m, e), each position by itself: feed-forward layers, norms over the
            last axis, but neither attention nor batch norm.
        chunk_size: positions at a time.

    Raises:
        ValueError: ``chunk_size`` is below 1.
    """

    def __init__(self, module: Module, chunk_size: int) -> None:
        if chunk_size < 1:
            raise ValueError(f"chunk_size is at least 1, got {chunk_size}")
        self.module = module
        self.chunk_size = chunk_size

    def forward(self, input: Any) -> Any:
        """(…, n, d) → (…, n, e)."""
        return by_chunks(self.module, input, self.chunk_size)
