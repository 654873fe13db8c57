"""Scaled dot-product attention as one primitive.

Vaswani et al. 2017, arXiv:1706.03762, eq. 1::

    Y = softmax(Q Kᵀ / √d + M) V

With E = exp(S − max) and row sums l the weights are P = E / l.  The division by l is applied to the
rows of the (n, d) operands, never to the (n, n) weights::

    Y  = (E V) / l                 Ḡ = Ȳ / l
    V̄  = Eᵀ Ḡ                      δ = Σ Ḡ ∘ Y  (row sums)
    S̄  = E ∘ (Ḡ Vᵀ − δ)            Q̄ = S̄ K / √d      K̄ = S̄ᵀ Q / √d

Causal attention over more than 64 positions is done in blocks of rows, each against the keys up to
its own end, which leaves out most of the half of the work that the mask would throw away.
"""

from __future__ import annotations

from typing import Any

from ..engine import data_of, primitive
from ..tape import Kept
from .elementwise import of, where
from .fused import as_rows, softmax
from .products import matmul
from .shape import matrix_transpose

__all__ = ["scaled_dot_product_attention"]

BLOCK = 64


def _lower_triangle(xp: Any, rows: int, columns: int) -> Any:
    return xp.arange(rows)[:, None] >= xp.arange(columns)


def _definition(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Any:
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = matmul(query * scale, matrix_transpose(key))
    if is_causal:
        allowed = _lower_triangle(of(query), query.shape[-2], key.shape[-2])
        scores = where(allowed, scores, float("-inf"))
    if attn_mask is not None and data_of(attn_mask).dtype.kind == "b":
        scores = where(attn_mask, scores, float("-inf"))
    elif attn_mask is not None:
        scores = scores + attn_mask
    return matmul(softmax.composite(scores), value)


@primitive(composite=_definition)
def scaled_dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Any:
    """softmax(Q Kᵀ · scale + mask) V, as torch.nn.functional.scaled_dot_product_attention.

    Args:
        query: (…, n, d).
        key: (…, m, d).
        value: (…, m, e).
        attn_mask: broadcastable to (…, n, m); booleans that are true where a query may look, or
            numbers that are added to the scores (−inf forbids).
        is_causal: query i looks at keys j ≤ i only, counted from the first of each.
        scale: the factor of the scores; None for 1/√d.

    Returns:
        (…, n, e); a query that may look nowhere gets zeros and gradient 0, as in torch since 2.5.

    Raises:
        ValueError: the shapes do not fit.
    """
    xp = of(query)
    fits = min(query.ndim, key.ndim, value.ndim) >= 2 and query.shape[-1] == key.shape[-1]
    if not fits or key.shape[-2] != value.shape[-2]:
        raise ValueError(
            "attention takes query (…, n, d), key (…, m, d) and value (…, m, e), got "
            f"{query.shape}, {key.shape} and {value.shape}"
        )
    n, m = query.shape[-2], key.shape[-2]
    scaled = query * (query.shape[-1] ** -0.5 if scale is None else scale)
    keys = key.swapaxes(-1, -2)
    sees = attn_mask is None and m > 0  # each query looks at one key at least
    y = None
    weights, norms = [], []
    for start, stop, end in _blocks(n, m, is_causal and attn_mask is None):
        e = scaled[..., start:stop, :] @ keys[..., :end]
        if is_causal:
            e[..., start:] += _forbid(xp, _lower_triangle(xp, stop - start, end - start), e.dtype)
        if attn_mask is not None:
            e += _forbid(xp, attn_mask, e.dtype) if attn_mask.dtype.kind == "b" else attn_mask
        if e.size:
            top = e.max(axis=-1, keepdims=True)
            e -= top if sees else xp.where(top == float("-inf"), 0.0, top)
        xp.exp(e, out=e)
        total = (as_rows(e) @ xp.ones(end, e.dtype)).reshape(*e.shape[:-1], 1)
        norm = 1 / (total if sees else xp.where(total == 0, 1.0, total))
        weights.append(e)
        norms.append(norm)
        if n == 1:  # decoding: few numbers, so what counts are calls
            return Kept(e @ value * norm, weights=weights, norms=norms)
        part = e @ value[..., :end, :]
        if y is None:
            y = _heads_inside(xp, (*part.shape[:-2], n, value.shape[-1]), query.dtype)
        xp.multiply(part, norm, out=y[..., start:stop, :])
    return Kept(y, weights=weights, norms=norms)


@scaled_dot_product_attention.joint_derivative("query", "key", "value", "attn_mask")
def _rule(
    g: Any,
    needs: Any,
    y: Any,
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any,
    scale: float | None,
    weights: Any,
    norms: Any,
) -> tuple[Any, ...]:
    xp = of(query)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    lead, n, m = y.shape[:-2], query.shape[-2], key.shape[-2]
    grads: list[Any] = [None, None, None, None]
    for place, operand in enumerate((query, key, value)):
        if needs[place]:
            grads[place] = _heads_inside(xp, (*lead, *operand.shape[-2:]), operand.dtype)
    blocks = list(zip(_blocks(n, m, len(norms) > 1), weights, norms, strict=True))
    for (start, stop, end), e, norm in reversed(blocks):  # the first one sees every key
        rows = (..., slice(start, stop), slice(None))
        keys = (..., slice(0, end), slice(None))
        scaled_g = g[rows] * norm
        if needs[2]:
            _put(grads[2], keys, e.swapaxes(-1, -2) @ scaled_g, end == m)
        if not (needs[0] or needs[1] or needs[3]):
            continue
        s = scaled_g @ value[keys].swapaxes(-1, -2)
        s -= (scaled_g * y[rows]).sum(axis=-1, keepdims=True)
        s *= e
        if needs[0]:
            xp.multiply(s @ key[keys], scale, out=grads[0][rows])
        if needs[1]:
            _put(grads[1], keys, s.swapaxes(-1, -2) @ (query[rows] * scale), end == m)
        if needs[3]:
            grads[3] = s
    return tuple(grads)


def _blocks(n: int, m: int, split: bool) -> list[tuple[int, int, int]]:
    """Start and stop of each block of queries, and the end of the keys that it may look at."""
    if not split or n != m or n <= BLOCK:
        return [(0, n, m)]
    size = max(BLOCK, n // 16)
    return [(start, min(start + size, n), min(start + size, n)) for start in range(0, n, size)]


def _forbid(xp: Any, allowed: Any, dtype: Any) -> Any:
    """0 where looking is allowed and −inf where it is not."""
    return xp.where(allowed, 0.0, float("-inf")).astype(dtype)


def _heads_inside(xp: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """An empty (b, h, n, d) that lies in memory as (b, n, h, d): merging the heads is then free."""
    if len(shape) != 4:
        return xp.empty(shape, dtype)
    b, h, n, d = shape
    return xp.empty((b, n, h, d), dtype).swapaxes(1, 2)


def _put(target: Any, place: Any, part: Any, first: bool) -> None:
    if first:
        target[place] = part
    else:
        target[place] += part
