"""One projection for queries, keys and values of all heads, taken apart."""

from __future__ import annotations

from typing import Any

from .. import ops
from ..engine import primitive

__all__ = ["split_heads"]


@primitive
def split_heads(x: Any, heads: int) -> Any:
    """Queries, keys and values side by side, (b, t, 3d), as three views (b, heads, t, d/heads).

    One entry on the tape and one copy in the backward pass, where split, reshape and swapaxes make
    seven and three.
    """
    b, t, width = x.shape
    return tuple(x.reshape(b, t, 3, heads, width // (3 * heads)).transpose(2, 0, 3, 1, 4))


def _split_heads_rule(g: Any, like: Any) -> Any:
    return ops.stack([part.swapaxes(1, 2) for part in g], axis=2).reshape(like.shape)


split_heads.derivative(x=_split_heads_rule)
