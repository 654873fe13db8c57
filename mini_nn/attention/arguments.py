"""What every attention asks of its arguments, and what it says where it does not get it.

All of them are ``f(query, key, value, …, is_causal=False, state=None)`` with query (…, n, d), key
(…, m, d) and value (…, m, e), and return (…, n, e).  Those that can continue a sequence also take
a ``state``: ``()`` before its first token, then what the call before returned beside its output::

    y = f(query, key, value, is_causal=True)
    first, state = f(query[:, :5], key[:, :5], value[:, :5], is_causal=True, state=())
    rest, state = f(query[:, 5:], key[:, 5:], value[:, 5:], is_causal=True, state=state)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .. import ops
from ..engine import data_of
from ..ops.elementwise import of

__all__ = [
    "as_recurrence", "check_attention", "check_key_mask", "check_state", "narrow", "wide",
]  # fmt: skip


def check_attention(query: Any, key: Any, value: Any) -> None:
    """Raise ValueError, with the shapes, unless queries, keys and values belong together."""
    fits = min(query.ndim, key.ndim, value.ndim) >= 2 and query.shape[-1] == key.shape[-1]
    if not fits or key.shape[-2] != value.shape[-2]:
        raise ValueError(
            "attention takes query (…, n, d), key (…, m, d) and value (…, m, e), got "
            f"{query.shape}, {key.shape} and {value.shape}"
        )


def check_state(state: Any, is_causal: bool) -> None:
    """Raise ValueError if a state is given to a call that looks at the whole sequence."""
    if state is not None and not is_causal:
        raise ValueError("a state continues a sequence, so it needs is_causal=True")


def check_key_mask(key_mask: Any, key: Any) -> None:
    """Raise unless the mask has booleans for the keys, in a shape that broadcasts to (…, m)."""
    shape, wanted = key_mask.shape, key.shape[:-1]
    ends = zip(shape[::-1], wanted[::-1], strict=False)
    if not 0 < len(shape) <= len(wanted) or any(a not in (1, b) for a, b in ends):
        raise ValueError(f"key_mask has to broadcast to (…, m) = {wanted}, got {shape}")
    if data_of(key_mask).dtype.kind != "b":
        raise TypeError(
            f"key_mask has booleans, true for real tokens, got dtype {key_mask.dtype}: compare "
            "with != 0 first"
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
    """
    check_attention(query, key, value)
    check_state(state, is_causal)
    n, m = query.shape[-2], key.shape[-2]
    if n == m and (is_causal or n == 1):
        return query, _all
    if is_causal or n != 1:
        wanted = f"as many queries as keys, got {n} and {m}" if is_causal else "is_causal=True"
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
