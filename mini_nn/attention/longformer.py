"""Longformer: a sliding window for every token, and a few global tokens that see and are seen.

Beltagy, Peters, Cohan 2020, "Longformer: The Long-Document Transformer", arXiv:2004.05150.

====================================================================  ============================
3.1  window of w keys around each token, with gaps if dilated         ``window``, ``dilation``
3.1  global tokens attend to all, and all attend to them              ``global_mask``
3.1  Q_s, K_s, V_s for the window, Q_g, K_g, V_g for global tokens    ``LongformerSelfAttention``
3.1  Q_g, K_g, V_g start as copies of Q_s, K_s, V_s                   ``LongformerSelfAttention``
====================================================================  ============================

Row i of the result is, with G the global tokens and d the length of a head,

    i ∉ G:  softmax over the window of i and over G  of  q_i · k_j / √d,    times v_j
    i ∈ G:  softmax over all j  of  q^g_i · k^g_j / √d,                     times v^g_j

so a token outside of G compares its q with the k of a global one, and k^g, v^g are for the rows of
global tokens only, as in the released code.  A global token within the window counts once.
For n tokens and g = |G| this takes time and memory O(n (w + g)).

Deviations: ``window`` counts the keys on one side; the paper's w and the ``attention_window`` of
checkpoints count both sides, and ``LongformerSelfAttention`` takes theirs.  Dilation, which the
paper has on a few heads of its language model, is not in the port in transformers.  With
``is_causal`` global tokens too look at earlier ones only; the paper's language model has none.
There is no ``state``: a decoder passes all keys and the last queries.  n need not be a multiple of
the window.  float16 is summed in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .. import ops
from ..backend import Array
from ..engine import data_of
from ..nn import Linear, Module
from ..ops.elementwise import of
from ..rng import Rng
from .arguments import check_key_mask, narrow, wide
from .sparse import Part, SparseState, attend, for_each, joined, window_part

__all__ = ["LongformerSelfAttention", "longformer_attention"]


def longformer_attention(
    query: Array,
    key: Array,
    value: Array,
    window: int,
    global_mask: Any = None,
    global_query: Array | None = None,
    global_key: Array | None = None,
    global_value: Array | None = None,
    is_causal: bool = False,
    key_mask: Any = None,
    dilation: int | Sequence[int] = 1,
) -> Any:
    """Attention to a window and to global tokens, and of global tokens to all.

    Args:
        query: (…, n, d); the last n of the m positions.
        key: (…, m, d).
        value: (…, m, e).
        window: keys on each side of a token, 0 for the token itself only.
        global_mask: booleans that broadcast to (…, m), true for the global tokens; None for none.
            The host waits for their largest number in a row, which is the length of an axis.
        global_query, global_key, global_value: shaped as query, key and value, for the rows of
            global tokens; None for these themselves.
        is_causal: only keys j ≤ i, in the m positions, for all kinds of tokens.
        key_mask: booleans that broadcast to (…, m), true for real tokens and false for pads, which
            are not seen, nor global.
        dilation: the distance from a key of the window to the next; or a sequence of them, one for
            each head, which are then the axis before the positions.

    Returns:
        (…, n, e); a query that may look nowhere gets zeros and gradient 0.

    Raises:
        ValueError: the shapes or sizes do not fit.
        TypeError: a mask is not boolean.
    """
    if isinstance(dilation, Sequence):
        arrays = (query, key, value, global_query, global_key, global_value)
        return _by_head(arrays, window, (global_mask, key_mask), is_causal, dilation)
    if window < 0 or dilation < 1:
        raise ValueError(f"window ≥ 0 and dilation ≥ 1, got {window} and {dilation}")
    past = joined(query, key, value, is_causal, None, key_mask)
    n, m = query.shape[-2], key.shape[-2]
    if global_mask is None:
        return attend(query, [window_part(n, past, window, is_causal, dilation)])
    check_key_mask(global_mask, key, "global_mask")
    chosen = _with_axes(for_each(global_mask, m), key.ndim - 1) & past.seen
    slots = int(chosen.sum(axis=-1).max()) if chosen.size else 0
    others = past._replace(seen=past.seen & ~chosen)
    parts = [window_part(n, others, window, is_causal, dilation)]
    if not slots or not n:
        return attend(query, parts)
    parts.append(_seen_by_all(n, past, chosen, slots, is_causal))
    y = attend(query, parts)
    mine = chosen[..., m - n :]
    places = _places(mine, min(slots, n))
    global_key = key if global_key is None else global_key
    global_value = value if global_value is None else global_value
    if key_mask is not None:
        real = past.seen[..., None]  # a pad may hold nan
        global_key, global_value = (ops.where(real, x, 0.0) for x in (global_key, global_value))
    xp = of(data_of(key))
    allowed = past.seen[..., None, :]
    if is_causal:
        allowed = allowed & (xp.arange(m) <= places[..., None] + (m - n))
    rows = ops.scaled_dot_product_attention(
        wide(_picked(query if global_query is None else global_query, places)),
        wide(global_key),
        wide(global_value),
        allowed,
    )
    rows = narrow(rows, query)
    number = xp.maximum(xp.cumsum(mine, axis=-1) - 1, 0)  # of the global tokens up to here
    return ops.where(mine[..., None], _picked(rows, number), y)


def _seen_by_all(n: int, past: SparseState, chosen: Any, slots: int, is_causal: bool) -> Part:
    """The global tokens as keys of every query."""
    xp, m, places = of(chosen), chosen.shape[-1], _places(chosen, slots)
    allowed = (xp.arange(slots) < chosen.sum(axis=-1)[..., None])[..., None, :]
    if is_causal:
        allowed = allowed & (places[..., None, :] <= xp.arange(m - n, m)[:, None])
    key, value = (_picked(x, places) for x in past[:2])
    return Part(key, value, allowed, lambda x: x, lambda y: y)


def _places(chosen: Any, slots: int) -> Any:
    """(…, slots): the positions of the chosen tokens in their order, then those of others."""
    xp = of(chosen)
    return xp.argsort(xp.where(chosen, 0, 1), axis=-1, kind="stable")[..., :slots]


def _picked(x: Any, places: Any) -> Any:
    """The rows (…, slots, d) of x (…, n, d)."""
    return ops.take_along_axis(x, _with_axes(places, x.ndim - 1)[..., None], axis=-2)


def _with_axes(mask: Any, ndim: int) -> Any:
    return mask.reshape((1,) * (ndim - mask.ndim) + mask.shape)


def _by_head(
    arrays: Sequence[Any], window: int, masks: Any, is_causal: bool, dilations: Sequence[int]
) -> Any:
    """Each head with a dilation of its own."""
    query, key = arrays[:2]
    if query.ndim < 3 or len(dilations) != query.shape[-3]:
        raise ValueError(
            "a sequence of dilations has one for each head of a query (…, heads, n, d), got "
            f"{len(dilations)} for {query.shape}"
        )
    for name, mask in zip(("global_mask", "key_mask"), masks, strict=True):
        if mask is not None:
            check_key_mask(mask, key, name)
    results = []
    for h, dilation in enumerate(dilations):
        q, k, v, gq, gk, gv = (_of_head(x, h) for x in arrays)
        chosen, real = (_mask_of_head(mask, h) for mask in masks)
        results.append(
            longformer_attention(q, k, v, window, chosen, gq, gk, gv, is_causal, real, dilation)
        )
    return ops.concatenate(results, axis=-3)


def _of_head(x: Any, h: int) -> Any:
    shared = x is None or x.ndim < 3 or x.shape[-3] == 1
    return x if shared else x[..., h : h + 1, :, :]


def _mask_of_head(mask: Any, h: int) -> Any:
    shared = mask is None or mask.ndim == 1 or mask.shape[-2] == 1
    return mask if shared else data_of(mask)[..., h : h + 1, :]


class LongformerSelfAttention(Module):
    """Self-attention of a Longformer, under the names of transformers' checkpoints.

    Args:
        hidden_size: C, divisible by the number of heads.
        num_attention_heads: h.
        attention_window: keys on both sides together, even, as in the checkpoints' config.
        dilation: one for all heads, or one for each.
        rng: what the weights are drawn from (None: ``default_rng()``).

    Attributes:
        query, key, value: Linear (C, C), for windows.
        query_global, key_global, value_global: Linear (C, C), for the rows of global tokens; they
            start as copies of the others.

    Raises:
        ValueError: the heads do not divide C, or the window is not even and positive.
    """

    def __init__(
        self,
        hidden_size: int,
        num_attention_heads: int,
        attention_window: int,
        dilation: int | Sequence[int] = 1,
        *,
        rng: Rng | None = None,
    ) -> None:
        if hidden_size % num_attention_heads:
            raise ValueError(f"{num_attention_heads} heads do not divide {hidden_size} channels")
        if attention_window < 2 or attention_window % 2:
            raise ValueError(f"attention_window is even and positive, got {attention_window}")
        self.num_attention_heads = num_attention_heads
        self.attention_window = attention_window
        self.dilation = dilation
        self.query, self.key, self.value = (
            Linear(hidden_size, hidden_size, rng=rng) for _ in range(3)
        )
        self.query_global, self.key_global, self.value_global = (
            Linear(hidden_size, hidden_size, rng=rng) for _ in range(3)
        )
        for name in ("query", "key", "value"):
            getattr(self, f"{name}_global").load_state_dict(getattr(self, name).state_dict())

    def forward(
        self,
        hidden_states: Array,
        key_mask: Any = None,
        global_mask: Any = None,
        is_causal: bool = False,
    ) -> Any:
        """Mix the tokens of each text.

        Args:
            hidden_states: (b, n, C), any n.
            key_mask: (b, n) booleans, false for pads; None for none.
            global_mask: (b, n) booleans, true for global tokens; None for none.
            is_causal: see ``longformer_attention``.

        Returns:
            (b, n, C), zeros for pads.
        """
        x, (b, n, c) = hidden_states, hidden_states.shape
        count = self.num_attention_heads

        def heads(layer: Any) -> Any:
            y = layer(x).reshape((b, n, count, c // count))
            return y.swapaxes(1, 2)

        query, key, value = (heads(layer) for layer in (self.query, self.key, self.value))
        global_query = global_key = global_value = None
        if global_mask is not None:
            global_mask = data_of(global_mask)[:, None]
            layers = (self.query_global, self.key_global, self.value_global)
            global_query, global_key, global_value = (heads(layer) for layer in layers)
        real = None if key_mask is None else data_of(key_mask)
        y = longformer_attention(
            query,
            key,
            value,
            self.attention_window // 2,
            global_mask,
            global_query,
            global_key,
            global_value,
            is_causal,
            None if real is None else real[:, None],
            self.dilation,
        )
        y = y.swapaxes(1, 2).reshape((b, n, c))
        return y if real is None else ops.where(real[..., None], y, 0.0)

    def extra_repr(self) -> str:
        """Heads and window."""
        return (
            f"num_attention_heads={self.num_attention_heads}, "
            f"attention_window={self.attention_window}"
        )
