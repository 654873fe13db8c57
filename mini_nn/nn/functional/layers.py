"""Linear maps, look-up in tables and attention under torch's names."""

from __future__ import annotations

from typing import Any

from ... import ops
from ...backend import Array, as_array
from ...engine import Tensor, data_of
from ...ops.elementwise import of
from ...ops.fused import out_of_range as outside
from ...rng import Rng
from .activation import dropout


def linear(input: Array, weight: Array, bias: Array | None = None) -> Array:
    """x Wᵀ + b for input (…, in), weight (out, in) and bias (out,): (…, out)."""
    return ops.linear(input, weight, bias)


def embedding(input: Any, weight: Array, padding_idx: int | None = None) -> Array:
    """The rows of ``weight`` (n, d) with the numbers ``input`` (…): (…, d).

    Args:
        input: integers in [0, n), as a Tensor, an array or a list.
        weight: the table.
        padding_idx: the row that gets no gradient; a negative number counts from the end.

    Raises:
        TypeError: the numbers are not integers.
        IndexError: a number or ``padding_idx`` is out of range (a number on a GPU: a row of nan).
    """
    indices = of(weight).asarray(data_of(input))
    rows = ops.embedding(indices, weight)
    if padding_idx is None:
        return rows
    padding = indices == row_number(padding_idx, weight.shape[0])
    return ops.where(padding[..., None], data_of(rows), rows)


def row_number(padding_idx: int, count: int) -> int:
    """``padding_idx`` counted from the first row; IndexError if there is no such row."""
    if not -count <= padding_idx < count:
        raise IndexError(f"padding_idx is in [{-count}, {count}), got {padding_idx}")
    return padding_idx % count


def one_hot(tensor: Any, num_classes: int = -1) -> Array:
    """A 1 at the given place in a row of 0: integers (…) to int64 (…, num_classes).

    Args:
        tensor: integers of any shape.
        num_classes: −1 for the largest number plus 1 (on a GPU this waits for the device).

    Raises:
        TypeError: the numbers are not integers.
        IndexError: a number is out of range (on a GPU: a row of zeros).
        ValueError: no numbers, and ``num_classes`` left out.
    """
    numbers = as_array(data_of(tensor))
    if num_classes < 0:
        if not numbers.size:
            raise ValueError("one_hot of nothing needs num_classes")
        num_classes = int(numbers.max()) + 1
    outside(numbers, num_classes, "one_hot")
    hot = ops.one_hot(numbers, num_classes, "int64")
    return Tensor(hot) if isinstance(tensor, Tensor) else hot


def scaled_dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    attn_mask: Array | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    rng: Rng | None = None,
) -> Array:
    """softmax(Q Kᵀ · scale + mask) V; ``ops.scaled_dot_product_attention`` states the shapes.

    Args:
        query: (…, n, d).
        key: (…, m, d).
        value: (…, m, e).
        attn_mask: true where a query may look, or numbers added to the scores.
        dropout_p: the weights are dropped with this probability (0 in evaluation), which needs
            them all in memory at once.
        is_causal: query i looks at keys j ≤ i only.
        scale: None for 1/√d.
        enable_gqa: the axis before the last two may be shorter in key and value by a whole factor:
            consecutive query heads share one (Ainslie et al. 2023, arXiv:2305.13245).
        rng: what dropout draws from (None: ``default_rng()``).

    Returns:
        (…, n, e).

    Raises:
        ValueError: the shapes do not fit.
    """
    if enable_gqa:
        heads, shared = query.shape[-3], key.shape[-3]
        if heads % shared:
            raise ValueError(f"{heads} query heads cannot share {shared} heads of keys equally")
        key, value = (ops.repeat(x, heads // shared, axis=x.ndim - 3) for x in (key, value))
    if not dropout_p:
        return ops.scaled_dot_product_attention(query, key, value, attn_mask, is_causal, scale)
    m = key.shape[-2]
    eye = of(key).eye(m, dtype=key.dtype)
    weights = ops.scaled_dot_product_attention(query, key, eye, attn_mask, is_causal, scale)
    return ops.matmul(dropout(weights, dropout_p, rng=rng), value)
