"""Who may look at whom: the patterns of sparse attention as boolean matrices, by definition.

Row i is a query and column j a key; true where i may look at j.

===========================================  ============================  =======================
|i − j| ≤ w                                  Su 2019, kexue.fm 6853        ``local_mask``
(i − j) mod s = 0                            Su 2019, kexue.fm 6853        ``atrous_mask``
|i − j| ≤ w or (i − j) mod s = 0             Child, Gray, Radford,         ``strided_mask``
                                             Sutskever 2019,
                                             arXiv:1904.10509, 4.3
⌊i/l⌋ = ⌊j/l⌋ or j mod l ≥ l − c             Child et al. 2019, 4.3        ``fixed_mask``
|i − j| ≤ w a and (i − j) mod a = 0, or      Beltagy, Peters, Cohan 2020,  ``sliding_window_mask``
i or j is a global token                     arXiv:2004.05150, 3.1
|i − j| ≤ w or i < g or j < g, or j is one   Zaheer et al. 2020,           ``big_bird_mask``
of r more, drawn for i                       arXiv:2007.14062, 2
Aₗ ⋯ A₂ A₁ > 0                               Child et al. 2019, 4.2        ``reachable``
===========================================  ============================  =======================

With ``is_causal`` also j ≤ i.  The n queries are the last n of the m positions, as in a decoder
with a cache of keys: the first of them is number m − n.

These matrices are for small n, for tests and for pictures; ``sparse`` and ``longformer`` compute
the same attention without them.

Deviations: Child et al. state their patterns for causal attention, and the strided one as two sets
for two kinds of heads; here both directions are possible and the sets are united, which is their
merged head.  Their window is the stride, and counts i itself in the released code: 1 more than w.
Big Bird's released code draws blocks of keys, not single ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..backend import Array, current
from ..engine import data_of
from ..ops.elementwise import of
from ..rng import Rng, default_rng
from .arguments import check_booleans

__all__ = [
    "atrous_mask", "big_bird_mask", "causal_mask", "fixed_mask", "local_mask", "reachable",
    "sliding_window_mask", "strided_mask",
]  # fmt: skip


def check_lengths(n: int, m: int) -> None:
    """Raise ValueError unless n queries can be the last of m positions."""
    if not 0 <= n <= m:
        raise ValueError(
            f"the queries are the last n of m positions, so 0 ≤ n ≤ m; got n = {n} and m = {m}"
        )


def check_sizes(**sizes: int) -> None:
    """Raise ValueError unless a window is at least 0 and every other size at least 1."""
    for name, size in sizes.items():
        least = 0 if name == "window" else 1
        if size < least:
            raise ValueError(f"{name} is at least {least}, got {size}")


def check_fixed(block: int, summary: int) -> None:
    """Raise ValueError unless a block has that many last positions."""
    if not 1 <= summary <= block:
        raise ValueError(
            f"the fixed pattern takes 1 ≤ summary ≤ block, got summary = {summary} and "
            f"block = {block}"
        )


def _positions(n: int, m: int | None) -> tuple[Any, Any]:
    """The numbers of the queries as a column and of the keys as a row."""
    m = n if m is None else m
    check_lengths(n, m)
    keys = current().xp.arange(m)
    return keys[m - n :, None], keys


def _directed(mask: Array, i: Any, j: Any, is_causal: bool) -> Array:
    return mask & (j <= i) if is_causal else mask


def causal_mask(n: int, m: int | None = None) -> Array:
    """j ≤ i.

    Args:
        n: queries, the last n of the positions.
        m: keys; None for n.

    Returns:
        (n, m) booleans on the current backend.

    Raises:
        ValueError: n > m.
    """
    i, j = _positions(n, m)
    return j <= i


def local_mask(n: int, window: int, is_causal: bool = False, m: int | None = None) -> Array:
    """|i − j| ≤ window: 2 window + 1 keys a row, fewer at the ends; window + 1 if causal.

    Args:
        n: queries, the last n of the positions.
        window: keys on each side, 0 for the token itself only.
        is_causal: also j ≤ i.
        m: keys; None for n.

    Returns:
        (n, m) booleans on the current backend.

    Raises:
        ValueError: n > m, or the window is negative.
    """
    check_sizes(window=window)
    i, j = _positions(n, m)
    return _directed(abs(i - j) <= window, i, j, is_causal)


def atrous_mask(n: int, dilation: int, is_causal: bool = False, m: int | None = None) -> Array:
    """(i − j) mod dilation = 0: every dilation-th key, the token itself among them.

    Args:
        n, is_causal, m: see ``local_mask``.
        dilation: 1 for all keys.

    Returns:
        (n, m) booleans on the current backend.

    Raises:
        ValueError: n > m, or the dilation is below 1.
    """
    check_sizes(dilation=dilation)
    i, j = _positions(n, m)
    return _directed((i - j) % dilation == 0, i, j, is_causal)


def strided_mask(
    n: int, window: int, stride: int, is_causal: bool = False, m: int | None = None
) -> Array:
    """|i − j| ≤ window or (i − j) mod stride = 0.

    Args:
        n, window, is_causal, m: see ``local_mask``.
        stride: see ``atrous_mask``; about √n makes a row's number of keys grow with √n.

    Returns:
        (n, m) booleans on the current backend.

    Raises:
        ValueError: n > m, the window is negative or the stride below 1.
    """
    check_sizes(window=window, stride=stride)
    return local_mask(n, window, is_causal, m) | atrous_mask(n, stride, is_causal, m)


def fixed_mask(
    n: int, block: int, summary: int = 1, is_causal: bool = False, m: int | None = None
) -> Array:
    """⌊i / block⌋ = ⌊j / block⌋ or j mod block ≥ block − summary.

    The last ``summary`` positions of a block speak for it to all other blocks.

    Args:
        n, is_causal, m: see ``local_mask``.
        block: l, counted from the first key; the last block may be cut off.
        summary: c.

    Returns:
        (n, m) booleans on the current backend.

    Raises:
        ValueError: n > m, or not 1 ≤ summary ≤ block.
    """
    check_fixed(block, summary)
    i, j = _positions(n, m)
    mask = (i // block == j // block) | (j % block >= block - summary)
    return _directed(mask, i, j, is_causal)


def sliding_window_mask(
    n: int,
    window: int,
    dilation: int = 1,
    global_mask: Any = None,
    is_causal: bool = False,
    m: int | None = None,
) -> Array:
    """A window with gaps, and global tokens which see all and are seen by all.

    Args:
        n, is_causal, m: see ``local_mask``.
        window: keys on each side, ``dilation`` apart.
        dilation: 1 for a window without gaps.
        global_mask: (…, m) booleans, true for the global tokens; None for none.

    Returns:
        (…, n, m) booleans on the backend of ``global_mask``, if given, or on the current one.

    Raises:
        ValueError: n > m, a size is out of range, or ``global_mask`` is not (…, m).
        TypeError: ``global_mask`` is not boolean.
    """
    check_sizes(window=window, dilation=dilation)
    i, j = _positions(n, m)
    near = (abs(i - j) <= window * dilation) & ((i - j) % dilation == 0)
    if global_mask is not None:
        chosen, keys = data_of(global_mask), j.shape[-1]
        if chosen.shape[-1:] != (keys,):
            raise ValueError(f"global_mask is (…, {keys}), got {chosen.shape}")
        check_booleans("global_mask", chosen)
        first = keys - n
        near = near | chosen[..., None, :] | chosen[..., first:, None]
    return _directed(near, i, j, is_causal)


def big_bird_mask(
    n: int,
    window: int,
    n_global: int,
    n_random: int,
    is_causal: bool = False,
    *,
    rng: Rng | None = None,
) -> Array:
    """A window, the first tokens as global ones, and some random keys more for each query.

    Args:
        n: positions.
        window: keys on each side.
        n_global: how many of the first tokens see all and are seen by all.
        n_random: how many of the keys that a query does not see yet are added, or all if there are
            fewer; if causal, of the earlier ones.
        is_causal: also j ≤ i.
        rng: what the keys are drawn from (None: ``default_rng()``).

    Returns:
        (n, n) booleans on the current backend.

    Raises:
        ValueError: a number is negative.
    """
    if min(n, window, n_global, n_random) < 0:
        raise ValueError(
            "big_bird_mask takes numbers of at least 0, got n, window, n_global, n_random = "
            f"{n}, {window}, {n_global}, {n_random}"
        )
    i, j = _positions(n, n)
    near = (abs(i - j) <= window) | (i < n_global) | (j < n_global)
    open_ = _directed(~near, i, j, is_causal)
    lots = (default_rng() if rng is None else rng).uniform((n, n), dtype="float64")
    xp = of(lots)
    order = xp.argsort(xp.where(open_, lots, 2.0), axis=-1)  # every lot is below 1
    rank = xp.argsort(order, axis=-1)
    return _directed(near, i, j, is_causal) | (open_ & (rank < n_random))


def reachable(masks: Sequence[Array]) -> Array:
    """Which input a position depends on behind several layers: their boolean product.

    Args:
        masks: (n, n) booleans of each layer, the first layer first.

    Returns:
        (n, n) booleans: true at (i, j) if layer by layer there is a path from input j to output i.
        Residual connections are in it as far as the patterns have their diagonal.

    Raises:
        ValueError: there is no mask, or they are not square and alike.
        TypeError: a mask is not boolean.
    """
    shapes = [mask.shape for mask in masks]
    if not shapes or any(s != (shapes[0][0], shapes[0][0]) for s in shapes):
        raise ValueError(f"reachable takes masks (n, n) of one n, at least one; got {shapes}")
    for mask in masks:
        check_booleans("each mask", mask)
    paths = data_of(masks[0])
    for mask in masks[1:]:  # counts up to n are exact in float32
        paths = data_of(mask).astype("float32") @ paths.astype("float32") > 0.0
    return paths
