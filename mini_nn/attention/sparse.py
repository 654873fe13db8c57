"""Sparse attention without the n × n matrix: local, atrous, strided and fixed.

==============================================  ==========================  =====================
softmax over |i − j| ≤ w                        Su 2019, kexue.fm 6853      ``local_attention``
softmax over (i − j) mod s = 0                  Su 2019, kexue.fm 6853      ``atrous_attention``
softmax over the union of the two               Child, Gray, Radford,       ``strided_attention``
                                                Sutskever 2019,
                                                arXiv:1904.10509, 4.3
softmax over the own block of l and the last c  Child et al. 2019, 4.3      ``fixed_attention``
positions of each other block
==============================================  ==========================  =====================

``patterns`` has the same patterns as matrices.  Each is a sum of dense products, of which a
``Part`` is one: queries and keys are put in another order, in which those that see each other stand
in blocks.

=============  ===================================================================  ===============
part           blocks                                                               numbers kept
=============  ===================================================================  ===============
window         runs of queries, each with its own keys and w more on either side    3 w n or less
residue class  positions with the same remainder by s                               n² / s
own block      positions with the same quotient by l                                l n
summary        all queries, and the last c keys of each block                       c n² / l
=============  ===================================================================  ===============

Two parts share one softmax: with the largest score m of a row over all parts,

    o = Σ_parts Σ_j exp(s_j − m) v_j  /  Σ_parts Σ_j exp(s_j − m),

and so a key that two parts could claim belongs to one of them only.

The n queries are the last n of the m positions, as in a decoder with a cache of keys.  A query that
may look nowhere gets zeros and gradient 0.

Deviations: as in ``patterns``.  The state of ``local_attention`` is its window; the others, which
look back to the beginning, keep all keys and values.  float16 is summed in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from .. import ops
from ..backend import Array
from ..engine import data_of
from ..ops.elementwise import of
from .arguments import check_attention, check_state, narrow, wide, without_pads
from .patterns import check_fixed, check_lengths, check_sizes
from .softmax import extend

__all__ = [
    "SparseState", "atrous_attention", "fixed_attention", "local_attention", "strided_attention",
]  # fmt: skip

SMALLEST_BLOCK = 32
"""Of the queries of a narrow window: shorter products cost more than the numbers they spare."""


class SparseState(NamedTuple):
    """What a call hands on to the next: the keys and values that later tokens may look at."""

    key: Any
    """(…, m, d)."""
    value: Any
    """(…, m, e)."""
    seen: Any
    """(…, m) booleans, false for pads."""


class Part(NamedTuple):
    """One dense product of an attention.

    ``fold`` brings (…, n, x), which belongs to the queries, into blocks (…, blocks, rows, x);
    ``unfold`` brings it back.
    """

    key: Any
    """(…, blocks, columns, d)."""
    value: Any
    """(…, blocks, columns, e)."""
    allowed: Any
    """Booleans broadcastable to (…, blocks, rows, columns)."""
    fold: Callable[[Any], Any]
    unfold: Callable[[Any], Any]


# Four kinds of attention


def local_attention(
    query: Array,
    key: Array,
    value: Array,
    window: int,
    is_causal: bool = False,
    state: Any = None,
    key_mask: Any = None,
    dilation: int = 1,
) -> Any:
    """Softmax attention to the keys at most ``window`` away: time and memory O(n · window).

    Args:
        query: (…, n, d); the last n of the m positions.
        key: (…, m, d).
        value: (…, m, e).
        window: keys on each side, 0 for the token itself only.
        is_causal: the keys before and the token itself only, in the m positions.
        state: None, ``()`` before the first token, or what the last call returned beside its
            output: the last ``window · dilation`` keys and values.  Needs is_causal and n = m.
        key_mask: booleans that broadcast to (…, m), true for real tokens and false for pads; with a
            state, of the new tokens.
        dilation: the distance from a key of the window to the next (Beltagy et al. 2020,
            arXiv:2004.05150, 3.1).

    Returns:
        (…, n, e), or this and the next state.

    Raises:
        ValueError: the shapes or sizes do not fit, or there is a state without is_causal.
        TypeError: ``key_mask`` is not boolean, or the state no tuple.
    """
    check_sizes(window=window, dilation=dilation)
    past = joined(query, key, value, is_causal, state, key_mask)
    y = attend(query, [window_part(query.shape[-2], past, window, is_causal, dilation)])
    return y if state is None else (y, _last(past, window * dilation))


def atrous_attention(
    query: Array,
    key: Array,
    value: Array,
    dilation: int,
    is_causal: bool = False,
    state: Any = None,
    key_mask: Any = None,
) -> Any:
    """Softmax attention to every ``dilation``-th key: time and memory O(n² / dilation).

    Args:
        query, key, value, is_causal, key_mask: see ``local_attention``.
        dilation: 1 for full attention.
        state: as there, but with all keys and values so far.

    Returns:
        (…, n, e), or this and the next state.

    Raises:
        ValueError, TypeError: as ``local_attention``.
    """
    check_sizes(dilation=dilation)
    past = joined(query, key, value, is_causal, state, key_mask)
    y = attend(query, [_class_part(query.shape[-2], past, dilation, is_causal)])
    return y if state is None else (y, past)


def strided_attention(
    query: Array,
    key: Array,
    value: Array,
    window: int,
    stride: int,
    is_causal: bool = False,
    state: Any = None,
    key_mask: Any = None,
) -> Any:
    """One softmax over the keys at most ``window`` away and every ``stride``-th one.

    Time and memory O(n · window + n² / stride).

    Args:
        query, key, value, window, is_causal, key_mask: see ``local_attention``.
        stride: see ``atrous_attention``.  Two layers connect all pairs of positions if
            window ≥ stride − 1 (``patterns.reachable``).
        state: as there, but with all keys and values so far.

    Returns:
        (…, n, e), or this and the next state.

    Raises:
        ValueError, TypeError: as ``local_attention``.
    """
    check_sizes(window=window, stride=stride)
    past, n = joined(query, key, value, is_causal, state, key_mask), query.shape[-2]
    near = window_part(n, past, window, is_causal)
    far = _class_part(n, past, stride, is_causal, beyond=window // stride)
    y = attend(query, [near, far])
    return y if state is None else (y, past)


def fixed_attention(
    query: Array,
    key: Array,
    value: Array,
    block: int,
    summary: int = 1,
    is_causal: bool = False,
    state: Any = None,
    key_mask: Any = None,
) -> Any:
    """One softmax over the own block of keys and the last ``summary`` keys of every other one.

    Time and memory O(n · block + n² · summary / block).

    Args:
        query, key, value, is_causal, key_mask: see ``local_attention``.
        block: counted from the first key; the last block may be cut off.
        summary: how many positions at the end of a block all others look at.
        state: as there, but with all keys and values so far.

    Returns:
        (…, n, e), or this and the next state.

    Raises:
        ValueError, TypeError: as ``local_attention``, or not 1 ≤ summary ≤ block.
    """
    check_fixed(block, summary)
    past = joined(query, key, value, is_causal, state, key_mask)
    y = attend(query, _fixed_parts(query.shape[-2], past, block, summary, is_causal))
    return y if state is None else (y, past)


# What they share


def joined(
    query: Any, key: Any, value: Any, is_causal: bool, state: Any, key_mask: Any
) -> SparseState:
    """``continued`` for queries that are the last n of the m positions.

    Raises:
        ValueError: the shapes do not fit, or there is a state without is_causal.
        TypeError: ``key_mask`` is not boolean, or the state no tuple.
    """
    check_attention(query, key, value)
    check_state(state, is_causal)
    n, m = query.shape[-2], key.shape[-2]
    check_lengths(n, m)
    if state is not None and n != m:
        raise ValueError(
            f"with a state come as many queries as keys, those of the new tokens: got {n} and {m}"
        )
    return continued(key, value, state, key_mask)


def continued(key: Any, value: Any, state: Any, key_mask: Any) -> SparseState:
    """The keys and values of the state and of this call, 0 at its pads, and which of them are real.

    Raises:
        ValueError: the shapes of the mask or of the state do not fit.
        TypeError: ``key_mask`` is not boolean.
    """
    xp = of(data_of(key))
    seen = xp.ones(key.shape[-2], "bool")
    if key_mask is not None:
        key, value = without_pads(key_mask, key, value)
        seen = for_each(key_mask, key.shape[-2])
    if state is None:
        return SparseState(key, value, seen)
    seen = xp.broadcast_to(seen, key.shape[:-1])
    if not state:
        return SparseState(key, value, seen)
    if len(state) != 3:
        raise ValueError(f"the state is (key, value, seen), got {len(state)} arrays")
    before = SparseState(*state)
    both = extend((before.key, before.value), key, value)
    return SparseState(*both, xp.concatenate([before.seen, seen], axis=-1))


def for_each(mask: Any, m: int) -> Any:
    """The array of a mask (…, m) or (…, 1) as (…, m)."""
    mask = data_of(mask)
    return of(mask).broadcast_to(mask, (*mask.shape[:-1], m))


def _last(past: SparseState, count: int) -> SparseState:
    start = max(past.key.shape[-2] - count, 0)
    return SparseState(past.key[..., start:, :], past.value[..., start:, :], past.seen[..., start:])


def attend(query: Any, parts: Sequence[Part]) -> Any:
    """One softmax over the keys of all parts: (…, n, e).

    The scores of a row are shifted by their maximum, a constant: the result does not depend on it.
    """
    like, query = query, wide(query)
    parts = [part._replace(key=wide(part.key), value=wide(part.value)) for part in parts]
    if len(parts) == 1 or not query.shape[-2]:
        key, value, allowed, fold, unfold = parts[0]
        y = ops.scaled_dot_product_attention(fold(query), key, value, allowed)
        return narrow(unfold(y), like)
    query = query * query.shape[-1] ** -0.5
    xp = of(data_of(query))
    scores, top = [], float("-inf")
    for part in parts:
        products = ops.matmul(part.fold(query), ops.matrix_transpose(part.key))
        scores.append(ops.where(part.allowed, products, float("-inf")))
        largest = data_of(scores[-1]).max(axis=-1, keepdims=True)
        top = xp.maximum(top, part.unfold(largest))
    top = xp.where(top == float("-inf"), 0.0, top)
    numerator, total = 0.0, 0.0
    for part, s in zip(parts, scores, strict=True):
        e = ops.exp(s - part.fold(top))
        numerator = numerator + part.unfold(ops.matmul(e, part.value))
        total = total + part.unfold(ops.sum(e, axis=-1, keepdims=True))
    return narrow(numerator / ops.where(ops.equal(total, 0.0), 1.0, total), like)


# The parts


def _padded(x: Any, before: int, after: int) -> Any:
    """(…, n, d) → (…, before + n + after, d); the new rows are 0 or False."""
    if not before and not after:
        return x
    return ops.pad(x, [*[(0, 0)] * (x.ndim - 2), (before, after), (0, 0)])


def _as_blocks(x: Any, size: int) -> Any:
    """(…, blocks · size, d) → (…, blocks, size, d)."""
    return x.reshape((*x.shape[:-2], x.shape[-2] // size, size, x.shape[-1]))


def _as_run(x: Any) -> Any:
    """(…, blocks, size, d) → (…, blocks · size, d)."""
    return x.reshape((*x.shape[:-3], x.shape[-3] * x.shape[-2], x.shape[-1]))


def window_part(n: int, past: SparseState, window: int, is_causal: bool, dilation: int = 1) -> Part:
    """Runs of queries, each with its own keys and ``window`` more before and (or not) behind."""
    if dilation > 1:
        folds, table, rows = _classes(n, dilation)
        inner = window_part(rows, table(past), window, is_causal)
        return inner._replace(
            fold=lambda x: inner.fold(folds[0](x)), unfold=lambda y: folds[1](inner.unfold(y))
        )
    m = past.key.shape[-2]
    window = min(window, m)
    reach = window if is_causal else 2 * window
    size = max(min(max(window, SMALLEST_BLOCK), n), 1)
    count, pieces = -(-n // size), 1 + -(-reach // size)
    earlier = m - n - window

    def windows(x: Any) -> Any:
        """Block t has the rows from t · size on that its queries may look at, size + reach."""
        x = x[..., max(earlier, 0) :, :]
        x = _padded(x, max(-earlier, 0), (count + pieces - 1) * size - window - n)
        found = []
        for piece in range(pieces):
            part = _as_blocks(x[..., piece * size : (piece + count) * size, :], size)
            found.append(part[..., : size + reach - piece * size, :])
        return ops.concatenate(found, axis=-2)

    xp = of(data_of(past.key))
    steps = xp.arange(size + reach) - xp.arange(size)[:, None]  # from the window's first key
    seen = windows(past.seen[..., None]).swapaxes(-1, -2)
    return Part(
        windows(past.key),
        windows(past.value),
        (steps >= 0) & (steps <= reach) & seen,
        lambda x: _as_blocks(_padded(x, 0, count * size - n), size),
        lambda y: _as_run(y)[..., :n, :],
    )


def _classes(n: int, dilation: int) -> tuple[Any, Any, int]:
    """Sorting by residue class: fold and unfold for queries, the same for a state, and the rows.

    The end of the sequence is aligned: what is missing to whole rows is padded in front.  Classes
    that no query belongs to are left out.
    """
    width = min(n, dilation) or 1
    missing = -n % width

    def sort(x: Any, step: int) -> Any:
        x = _as_blocks(_padded(x, -x.shape[-2] % step, 0), step)
        return x[..., step - width :, :].swapaxes(-2, -3)

    def table(past: SparseState) -> SparseState:
        key, value, seen = past
        seen = sort(seen[..., None], dilation)[..., 0]
        return SparseState(sort(key, dilation), sort(value, dilation), seen)

    def fold(x: Any) -> Any:
        return sort(x, width)

    def unfold(y: Any) -> Any:
        return _as_run(y.swapaxes(-2, -3))[..., missing:, :]

    return (fold, unfold), table, (n + missing) // width


def _class_part(
    n: int, past: SparseState, dilation: int, is_causal: bool, beyond: int = -1
) -> Part:
    """Positions with the same remainder, more than ``beyond`` places of the class apart."""
    (fold, unfold), table, rows = _classes(n, dilation)
    key, value, seen = table(past)
    xp, columns = of(data_of(key)), key.shape[-2]
    back = xp.arange(columns - rows, columns)[:, None] - xp.arange(columns)
    allowed = abs(back) > beyond
    if is_causal:
        allowed = allowed & (back >= 0)
    return Part(key, value, allowed & seen[..., None, :], fold, unfold)


def _fixed_parts(
    n: int, past: SparseState, block: int, summary: int, is_causal: bool
) -> list[Part]:
    m = past.key.shape[-2]
    xp, first, before, after = of(data_of(past.key)), m - n, (m - n) % block, -m % block
    whole = [_as_blocks(_padded(x, 0, after), block) for x in (*past[:2], past.seen[..., None])]
    key, value, seen = (x[..., first // block :, :, :] for x in whole)
    i = xp.arange(block)
    allowed = i <= i[:, None] if is_causal else xp.ones((block, block), "bool")
    own = Part(
        key,
        value,
        allowed & seen.swapaxes(-1, -2),
        lambda x: _as_blocks(_padded(x, before, after), block),
        lambda y: _as_run(y)[..., before : before + n, :],
    )
    key, value, seen = (_as_run(x[..., block - summary :, :]) for x in whole)
    mine = xp.arange(first, m)[:, None] // block
    theirs = xp.arange(key.shape[-2]) // summary
    allowed = (theirs < mine) if is_causal else (theirs != mine)
    rest = Part(key, value, allowed & seen.swapaxes(-1, -2), lambda x: x, lambda y: y)
    return [own, rest]
