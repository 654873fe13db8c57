"""What every attention asks of its arguments, and what it says where it does not get it.

Attention among tokens is ``f(query, key, value, …)`` with query (…, n, d), key (…, m, d) and value
(…, m, e), and returns (…, n, e).  Beside these there are:

``is_causal``
    False by default, or True where there is no other form.  If n ≠ m, attention with a matrix of
    weights (softmax, Taylor, generalized) counts queries and keys from the first of each, as torch
    does; sparse attention takes the queries for the last n of the m tokens; and sums over the past
    want n = m, or one query without ``is_causal``, which then looks at all keys.
``state``
    Only where a sequence can be continued, which needs ``is_causal``: a tuple, ``()`` before the
    first token, then what the call before returned beside its output::

        y = f(query, key, value, is_causal=True)
        first, state = f(query[:, :5], key[:, :5], value[:, :5], is_causal=True, state=())
        rest, state = f(query[:, 5:], key[:, 5:], value[:, 5:], is_causal=True, state=state)
``key_mask``
    Only where pads could reach the result: booleans that broadcast to (…, m) = ``key.shape[:-1]``,
    true for real tokens; beside a state, of the tokens of this call.  What stands at a pad does not
    matter, not even nan.

Numbers stay in the dtype of the query.  Where many are added up, float16 is summed in float32.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from .. import ops
from ..engine import Tensor, data_of
from ..ops.elementwise import of

__all__ = [
    "as_recurrence", "check_attention", "check_booleans", "check_key_mask", "check_lead",
    "check_state", "matched", "narrow", "rate_of", "real_tokens", "same_lead", "score_scale",
    "wide", "without_pads",
]  # fmt: skip


def check_attention(query: Any, key: Any, value: Any) -> None:
    """Raise ValueError, with the shapes, unless queries, keys and values belong together."""
    fits = min(query.ndim, key.ndim, value.ndim) >= 2 and query.shape[-1] == key.shape[-1]
    axes = itertools.zip_longest(*(x.shape[-3::-1] for x in (query, key, value)), fillvalue=1)
    if not fits or key.shape[-2] != value.shape[-2] or any(len({*a} - {1}) > 1 for a in axes):
        raise ValueError(
            "attention takes query (…, n, d), key (…, m, d) and value (…, m, e), whose leading "
            f"axes broadcast, got {query.shape}, {key.shape} and {value.shape}"
        )


def check_state(state: Any, is_causal: bool) -> None:
    """Raise if a state is given to a call that looks at the whole sequence, or is no tuple."""
    if state is None:
        return
    if not is_causal:
        raise ValueError("a state continues a sequence, so it needs is_causal=True")
    if not isinstance(state, (tuple, list)):
        raise TypeError(
            "a state is a tuple: () before the first token, then what the call before returned; "
            f"got {type(state).__name__}"
        )


def check_booleans(name: str, mask: Any) -> None:
    """Raise TypeError unless the mask of that name has booleans."""
    if data_of(mask).dtype.kind != "b":
        raise TypeError(f"{name} has booleans, got dtype {mask.dtype}: compare with != 0 first")


def check_key_mask(key_mask: Any, key: Any, name: str = "key_mask") -> None:
    """Raise unless the mask has booleans for the keys, in a shape that broadcasts to (…, m)."""
    shape, wanted = key_mask.shape, key.shape[:-1]
    ends = zip(shape[::-1], wanted[::-1], strict=False)
    if not 0 < len(shape) <= len(wanted) or any(a not in (1, b) for a, b in ends):
        raise ValueError(f"{name} has to broadcast to (…, m) = {wanted}, got {shape}")
    check_booleans(name, key_mask)


def without_pads(key_mask: Any, key: Any, *others: Any) -> list[Any]:
    """The key (…, m, d) and others (…, m, x) with zeros at the pads, where nan may stand.

    Zeros alone hide no key: its weight has to be taken away as well.

    Raises:
        ValueError, TypeError: as ``check_key_mask``.
    """
    check_key_mask(key_mask, key)
    real = data_of(key_mask)[..., None]
    return [ops.where(real, x, 0.0) for x in (key, *others)]


def real_tokens(x: Any, key_mask: Any) -> tuple[Any, Any]:
    """x (…, n, d) with zeros at the pads, and which tokens are none: (…, n) booleans.

    Without a mask all are real; the booleans lack the leading axes that the mask does not have.

    Raises:
        ValueError, TypeError: as ``check_key_mask``.
    """
    xp, n = of(data_of(x)), x.shape[-2]
    if key_mask is None:
        return x, xp.ones(n, "bool")
    (x,) = without_pads(key_mask, x)
    return x, xp.broadcast_to(data_of(key_mask), (*key_mask.shape[:-1], n))


def same_lead(query: Any, key: Any, value: Any) -> list[Any]:
    """The three with the same leading axes: a head of keys may serve several of queries."""
    arrays = (query, key, value)
    lead = of(data_of(query)).broadcast_shapes(*(x.shape[:-2] for x in arrays))
    return [
        x if x.shape[:-2] == lead else ops.broadcast_to(x, (*lead, *x.shape[-2:])) for x in arrays
    ]


def check_lead(query: Any, key: Any, value: Any) -> None:
    """Raise ValueError unless there is one state for all three, so the same leading axes."""
    if not query.shape[:-2] == key.shape[:-2] == value.shape[:-2]:
        raise ValueError(
            "this recurrence takes query, key and value with the same leading axes, got "
            f"{query.shape}, {key.shape} and {value.shape}: broadcast them first"
        )


def as_recurrence(
    query: Any, key: Any, value: Any, is_causal: bool, state: Any = None
) -> tuple[Any, Callable[[Any], Any]]:
    """One query for each key, for an attention that is a recurrence and has no other form.

    The last of m tokens alone may be asked about without ``is_causal``, as a decoder with a cache
    of keys and values does: then the result is its row.

    Returns:
        The queries, (…, m, d), and a function that takes from (…, m, e) the rows asked for.

    Raises:
        ValueError: the shapes do not fit, or a bidirectional form is asked for.
        TypeError: the state is no tuple.
    """
    check_attention(query, key, value)
    check_state(state, is_causal)
    n, m = query.shape[-2], key.shape[-2]
    if n == m and (is_causal or n == 1):
        return query, _all
    if is_causal or n != 1 or m == 0:
        wanted = "is_causal=True"
        if is_causal or m == 0:
            wanted = f"as many queries as keys, got {n} and {m}"
        if is_causal and n == 1 < m:
            wanted += ", or is_causal=False for the last token alone"
        raise ValueError(
            f"this attention is a recurrence from the first token to the last: it takes {wanted}"
        )
    earlier = of(data_of(query)).zeros((*query.shape[:-2], m - 1, query.shape[-1]), query.dtype)
    return ops.concatenate([earlier, query], axis=-2), _last


def _all(y: Any) -> Any:
    return y


def _last(y: Any) -> Any:
    return y[..., -1:, :]


def wide(x: Any) -> Any:
    """float16 as float32; anything else as it is."""
    return ops.astype(x, "float32") if x.dtype.itemsize == 2 else x


def narrow(y: Any, like: Any) -> Any:
    """Back to float16, if that is what came in."""
    return ops.astype(y, like.dtype) if like.dtype.itemsize == 2 else y


def matched(x: Any, like: Any) -> Any:
    """A number or an array in the dtype of ``like``: NumPy's float64 would widen float32."""
    return ops.astype(x, like.dtype) if hasattr(x, "dtype") else x


def rate_of(x: Any, query: Any) -> Any:
    """A gate, a decay or a parameter, also a number, in the dtype that these queries are summed in.

    A float64 number of NumPy, or an array, would otherwise make float64 of float32 queries.
    """
    if x is None:
        return None
    dtype = query.dtype if query.dtype.kind == "f" else None
    if dtype is not None and dtype.itemsize == 2:
        dtype = "float32"
    if isinstance(x, Tensor):
        return x if dtype is None else ops.astype(x, dtype)
    return of(data_of(query)).asarray(x, dtype=dtype)


def score_scale(scale: Any, query: Any) -> Any:
    """The factor of the scores, 1/√d for None, in the dtype of the query."""
    return query.shape[-1] ** -0.5 if scale is None else matched(scale, query)
