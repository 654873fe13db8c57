"""Softmax attention: all at once, token by token with a cache, and in blocks that are not kept.

====================================================  ==============================================
Y = softmax(Q Kᵀ / √d) V                              Vaswani et al. 2017, arXiv:1706.03762, eq. 1:
                                                      ``softmax_attention``
m ← max(m, x),  ℓ ← ℓ e^(m_old − m) + e^(x − m)       Milakov & Gimelshein 2018, "Online normalizer
                                                      calculation for softmax", arXiv:1805.02867,
                                                      alg. 3: the loop of ``partial_attention``
the same in tiles, backward from Y and                Dao et al. 2022, "FlashAttention",
L = m + ln ℓ alone                                    arXiv:2205.14135, alg. 1 and 4; Dao 2023,
                                                      "FlashAttention-2", arXiv:2307.08691, alg. 1
                                                      and 2: ``blockwise_attention`` and its rule
Y = Σ_r e^(L_r − L) Y_r,  L = ln Σ_r e^(L_r)          Kitaev et al. 2020, arXiv:2001.04451, §3 and
                                                      its code; Liu et al. 2023, "Ring attention",
                                                      arXiv:2310.01889: ``combine``
====================================================  ==============================================

The rule sees a tile of S = Q Kᵀ · scale again, has its weights P = e^(S − L) at once, with
δ = Σ Ȳ ∘ Y over each row::

    V̄ += Pᵀ Ȳ      S̄ = P ∘ (Ȳ Vᵀ − δ + L̄)      Q̄ += S̄ K · scale      K̄ += S̄ᵀ Q · scale

L̄ is the gradient of L itself, which ``combine`` needs: ∂L/∂S = P.

Deviations: tiles are not square but long, over the keys on the way forward and over the queries on
the way back, where they need not be added up: what costs here is the number of calls, and not that
of bytes in a GPU's shared memory.  They span all batches and heads.  The backward pass has queries
in the inner loop, as the first of the two papers.  float16 is summed in float32, except in the
parts of ``partial_attention``, which stay in the dtype they are given.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from .. import ops
from ..engine import data_of, primitive
from ..ops.elementwise import of
from ..ops.fused import as_rows
from .arguments import check_attention, check_state, narrow, score_scale, wide

__all__ = [
    "KeyValues", "blockwise_attention", "combine", "extend", "partial_attention",
    "softmax_attention",
]  # fmt: skip

BLOCK = 128
LONG = 8
"""The long side of a tile, in short ones."""
INFINITY = float("inf")


class KeyValues(NamedTuple):
    """All keys (…, m, d) and values (…, m, e) so far: the state of softmax attention."""

    key: Any
    value: Any


def extend(state: Any, key: Any, value: Any) -> KeyValues:
    """The state with the keys and values of the next tokens behind those it has.

    Raises:
        ValueError: the shapes of the new ones are not those of the old but for their number.
    """
    if len(state) == 0:
        return KeyValues(key, value)
    keys, values = state
    for old, new in ((keys, key), (values, value)):
        if (*old.shape[:-2], old.shape[-1]) != (*new.shape[:-2], new.shape[-1]):
            raise ValueError(f"a state of shape {old.shape} cannot go on with {new.shape}")
    return KeyValues(
        ops.concatenate([keys, key], axis=-2), ops.concatenate([values, value], axis=-2)
    )


def softmax_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    is_causal: bool = False,
    scale: float | None = None,
    state: Any = None,
) -> Any:
    """softmax(Q Kᵀ · scale + mask) V; with a state, of the next tokens of a sequence.

    Args:
        query: (…, n, d).
        key: (…, m, d); with a state n = m, the keys of the same tokens as the queries.
        value: (…, m, e).
        attn_mask: as for ``ops.scaled_dot_product_attention``; with a state its last axis counts
            the keys of the state too.
        is_causal: query i looks at keys j ≤ i only, both counted from the first also if n ≠ m; with
            a state, at all of the state as well.
        scale: the factor of the scores; None for 1/√d.
        state: None, or ``()`` before the first token, or the ``KeyValues`` of the call before.

    Returns:
        (…, n, e), zeros for a query that may look nowhere; with a state also the next state, which
        holds the keys and values themselves and so grows with the sequence.

    Raises:
        ValueError: the shapes do not fit; a state without ``is_causal``, or of other shapes.
        TypeError: the state is no tuple.
    """
    check_attention(query, key, value)
    check_state(state, is_causal)

    def attend(keys_values: Any, mask: Any, causal: bool) -> Any:
        q, k, v = (wide(x) for x in (query, *keys_values))
        factor = score_scale(scale, q)
        return narrow(ops.scaled_dot_product_attention(q, k, v, mask, causal, factor), query)

    if state is None:
        return attend((key, value), attn_mask, is_causal)
    offset, state = _continued(query, key, value, state)
    if offset == 0:
        return attend(state, attn_mask, True), state
    if query.shape[-2] == 1:  # the last token may look at everything
        return attend(state, attn_mask, False), state
    allowed = _visible(of(query), query.shape[-2], state.key.shape[-2], offset)
    if attn_mask is None:
        attn_mask = allowed
    elif data_of(attn_mask).dtype.kind == "b":
        attn_mask = data_of(attn_mask) & allowed
    else:
        attn_mask = ops.where(allowed, attn_mask, -INFINITY)
    return attend(state, attn_mask, False), state


def blockwise_attention(
    query: Any,
    key: Any,
    value: Any,
    is_causal: bool = False,
    scale: float | None = None,
    block_size: int = BLOCK,
    state: Any = None,
) -> Any:
    """``softmax_attention`` in memory that grows as n + m: no more than a tile of weights exists.

    Args:
        query: (…, n, d).
        key: (…, m, d).
        value: (…, m, e).
        is_causal, scale, state: as for ``softmax_attention``.
        block_size: the short side of a tile, which is 8 times as long; tiles above the diagonal are
            left out.

    Returns:
        (…, n, e); with a state also the next one.

    Raises:
        ValueError: as ``softmax_attention``; ``block_size`` is below 1.
    """
    check_attention(query, key, value)
    check_state(state, is_causal)
    offset = 0
    if state is not None:
        offset, state = _continued(query, key, value, state)
        key, value = state
    arrays = (wide(x) for x in (query, key, value))
    y, _ = partial_attention(*arrays, is_causal, scale, block_size, offset)
    y = narrow(y, query)
    return y if state is None else (y, state)


def _continued(query: Any, key: Any, value: Any, state: Any) -> tuple[int, KeyValues]:
    """The number of keys before the first query, and the state with the new keys."""
    if query.shape[-2] != key.shape[-2]:
        raise ValueError(
            "with a state each new token has a query and a key, got "
            f"{query.shape[-2]} and {key.shape[-2]}"
        )
    state = extend(state, key, value)
    return state.key.shape[-2] - key.shape[-2], state


def _visible(xp: Any, n: int, m: int, offset: int) -> Any:
    """(n, m): query i looks at keys j ≤ i + offset."""
    return xp.arange(n)[:, None] + offset >= xp.arange(m)


def _definition(
    query: Any,
    key: Any,
    value: Any,
    is_causal: bool = False,
    scale: float | None = None,
    block_size: int = BLOCK,
    offset: int = 0,
) -> tuple[Any, Any]:
    scores = ops.matmul(query * score_scale(scale, query), ops.matrix_transpose(key))
    if is_causal:
        allowed = _visible(of(query), query.shape[-2], key.shape[-2], offset)
        scores = ops.where(allowed, scores, -INFINITY)
    return ops.matmul(ops.softmax.composite(scores), value), ops.logsumexp(scores, axis=-1)


@primitive(composite=_definition)
def partial_attention(
    query: Any,
    key: Any,
    value: Any,
    is_causal: bool = False,
    scale: float | None = None,
    block_size: int = BLOCK,
    offset: int = 0,
) -> Any:
    """Attention to some of the keys, with what ``combine`` needs to join it with the rest.

    Args:
        query: (…, n, d).
        key: (…, m, d).
        value: (…, m, e).
        is_causal: query i looks at keys j ≤ i + ``offset`` only.
        scale: the factor of the scores; None for 1/√d.
        block_size: the short side of a tile on the way back, twice that on the way forward; a tile
            is 8 times as long.
        offset: the place of the first query less that of the first key; may be negative.

    Returns:
        The output (…, n, e) and L = ln Σ e^score (…, n) of the keys looked at.  A query that looks
        nowhere has zeros and L = −inf, with gradient 0.

    Raises:
        ValueError: the shapes do not fit, or ``block_size`` is below 1.
    """
    check_attention(query, key, value)
    if block_size < 1:
        raise ValueError(f"a block has at least one row, got block_size={block_size}")
    size = 2 * block_size  # there is one tile at a time here, and two on the way back
    xp, tiles = of(query), _Tiles(query, key, value, is_causal, size, offset)
    scale = score_scale(scale, query)
    y = xp.zeros((*tiles.lead, tiles.n, value.shape[-1]), query.dtype)
    log_total = xp.full((*tiles.lead, tiles.n), -INFINITY, query.dtype)
    ones = xp.ones(LONG * size, query.dtype)
    for rows in _cut(0, tiles.n, size):
        scaled, out = query[..., rows, :] * scale, y[..., rows, :]
        top = total = None
        for columns in tiles.columns(rows):
            s = scaled @ key[..., columns, :].swapaxes(-1, -2)
            tiles.hide(s, rows, columns)
            new = s.max(axis=-1, keepdims=True)
            if top is not None:
                new = xp.maximum(top, new)
            shift = xp.where(new == -INFINITY, 0.0, new)
            s -= shift
            xp.exp(s, out=s)
            part = (as_rows(s) @ ones[: s.shape[-1]]).reshape(new.shape)
            if top is None:
                total = part
                out[...] = s @ value[..., columns, :]
            else:
                shrink = xp.exp(top - shift)
                total = total * shrink + part
                out *= shrink
                out += s @ value[..., columns, :]
            top = new
            del s  # or the next tile would be made while this one is still there
        if top is not None:
            nothing = total == 0
            total = xp.where(nothing, 1.0, total)
            out /= total
            log_total[..., rows] = xp.where(nothing, -INFINITY, top + xp.log(total))[..., 0]
    return y, log_total


@partial_attention.joint_derivative("query", "key", "value")
def _rule(
    g: Any,
    needs: Any,
    y: Any,
    query: Any,
    key: Any,
    value: Any,
    is_causal: bool,
    scale: float | None,
    block_size: int,
    offset: int,
) -> tuple[Any, ...]:
    xp, tiles = of(query), _Tiles(query, key, value, is_causal, block_size, offset)
    scale = score_scale(scale, query)
    of_q, of_k, of_v = (
        xp.zeros((*tiles.lead, *x.shape[-2:]), x.dtype) if needed else None
        for x, needed in zip((query, key, value), needs, strict=True)
    )
    log_total = xp.where(y[1] == -INFINITY, 0.0, y[1])[..., None]
    delta = (g[0] * y[0]).sum(axis=-1, keepdims=True) - g[1][..., None]
    queries = _beside(xp, query * scale, -log_total, tiles.lead)
    of_ys = _beside(xp, g[0], -delta, tiles.lead)
    for columns in _cut(0, tiles.m, block_size):
        keys, values = (_beside(xp, x[..., columns, :], 1.0, x.shape[:-2]) for x in (key, value))
        for rows in tiles.rows(columns):
            p = queries[..., rows, :] @ keys.swapaxes(-1, -2)
            tiles.hide(p, rows, columns)
            xp.exp(p, out=p)
            if of_v is not None:
                of_v[..., columns, :] += p.swapaxes(-1, -2) @ g[0][..., rows, :]
            if of_q is None and of_k is None:
                continue
            s = of_ys[..., rows, :] @ values.swapaxes(-1, -2)
            s *= p
            if of_q is not None:
                of_q[..., rows, :] += s @ keys[..., :-1]
            if of_k is not None:
                of_k[..., columns, :] += s.swapaxes(-1, -2) @ queries[..., rows, :-1]
            del p, s  # or the next tile would be made while these are still there
    if of_q is not None:
        of_q *= scale
    return of_q, of_k, of_v


def _cut(start: int, stop: int, size: int) -> Iterator[slice]:
    return (slice(a, min(a + size, stop)) for a in range(start, stop, size))


def _beside(xp: Any, x: Any, column: Any, lead: tuple[int, ...]) -> Any:
    """[X c]: the product [X c] [Y 1]ᵀ adds c to the rows of X Yᵀ, which saves a pass over it."""
    both = xp.empty((*lead, x.shape[-2], x.shape[-1] + 1), x.dtype)
    both[..., :-1] = x
    both[..., -1:] = column
    return both


class _Tiles:
    """Which tiles of the (n, m) scores hold something, and what of them is hidden."""

    def __init__(
        self, query: Any, key: Any, value: Any, is_causal: bool, size: int, offset: int
    ) -> None:
        self.xp = of(query)
        self.lead = self.xp.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])
        self.n, self.m, self.long = query.shape[-2], key.shape[-2], LONG * size
        self.is_causal, self.offset = is_causal, offset
        self.masks: dict[tuple[int, int, int], Any] = {}

    def columns(self, rows: slice) -> Iterator[slice]:
        """The keys that one of these queries may look at."""
        stop = min(self.m, rows.stop + self.offset) if self.is_causal else self.m
        return _cut(0, stop, self.long)

    def rows(self, columns: slice) -> Iterator[slice]:
        """The queries that may look at one of these keys."""
        start = max(0, columns.start - self.offset) if self.is_causal else 0
        return _cut(start, self.n, self.long)

    def hide(self, s: Any, rows: slice, columns: slice) -> None:
        """Add −inf in place where a key comes after the query: column j > row i + shift."""
        shift = rows.start + self.offset - columns.start
        height, width = s.shape[-2:]
        if not self.is_causal or shift >= width - 1:
            return
        first, height = max(0, shift + 1), min(height, width - 1 - shift)
        which = height, width - first, shift - first
        if which not in self.masks:
            mask = self.xp.where(_visible(self.xp, *which), 0.0, -INFINITY)
            self.masks[which] = mask.astype(s.dtype)
        s[..., :height, first:] += self.masks[which]


def combine(outputs: Sequence[Any], logsumexps: Sequence[Any]) -> tuple[Any, Any]:
    """Attention to all keys, from the attentions to disjoint parts of them.

    Args:
        outputs: one (…, n, e) for each part, as ``partial_attention`` returns them.
        logsumexps: one (…, n) for each.

    Returns:
        The output (…, n, e) and its L (…, n), which may be combined again: the order and the
        grouping do not matter.  A query that looks nowhere in any part has zeros and −inf.

    Raises:
        ValueError: no part, or not as many of the one as of the other.
    """
    if len(outputs) != len(logsumexps) or not len(outputs):
        raise ValueError(
            "combine takes an output and a logsumexp for each of at least one part, got "
            f"{len(outputs)} and {len(logsumexps)}"
        )
    joined = ops.stack([*logsumexps])
    weights = ops.softmax(joined, axis=0)
    y = (weights[..., None] * ops.stack([*outputs])).sum(axis=0)
    return y, ops.logsumexp(joined, axis=0)
