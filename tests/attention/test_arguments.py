"""What all attentions ask of their arguments: shapes, states, masks of pads, dtypes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_nn import Rng, Tensor, grad, ops
from mini_nn.attention.arguments import (
    as_recurrence,
    check_attention,
    check_key_mask,
    check_state,
    matched,
    narrow,
    same_lead,
    score_scale,
    wide,
    without_pads,
)
from mini_nn.attention.chunked import recurrent
from mini_nn.check import check_grads
from tests.support import assert_close, host


def drawn(seed: int, *shapes: tuple[int, ...], dtype: str = "float64") -> list[Any]:
    rng = Rng(seed)
    return [rng.normal(shape, dtype=dtype) for shape in shapes]


def test_what_attention_asks_of_its_arguments(xp: Any) -> None:
    q, k, v = drawn(15, (2, 5, 3), (2, 6, 3), (2, 6, 4))
    check_attention(q, k, v)
    for wrong in ((q[..., :2], k, v), (q, k[:, 1:], v), (q[0, 0], k, v)):
        with pytest.raises(ValueError, match="attention takes query"):
            check_attention(*wrong)
    check_state((), True)
    check_state(None, False)
    with pytest.raises(ValueError, match="is_causal=True"):
        check_state((), False)
    with pytest.raises(TypeError, match=r"a state is a tuple.*got ndarray"):
        check_state(np.zeros((3, 4)), True)
    with pytest.raises(ValueError, match="as many queries as keys, got 5 and 6"):
        as_recurrence(q, k, v, True)
    with pytest.raises(ValueError, match="got 1 and 6, or is_causal=False for the last token"):
        as_recurrence(q[:, :1], k, v, True)
    with pytest.raises(ValueError, match="is_causal=True"):
        as_recurrence(q[:, :5], k[:, :5], v[:, :5], False)
    with pytest.raises(ValueError, match="a state continues a sequence"):
        as_recurrence(q[:, :1], k, v, False, ())


@given(st.data())
def test_leading_axes_have_to_broadcast(xp: Any, data: Any) -> None:
    """As NumPy has it, for any three shapes."""
    shape = st.lists(st.sampled_from([0, 1, 2, 3]), max_size=3).map(tuple)
    leads = [data.draw(shape) for _ in range(3)]
    ends = ((5, 3), (6, 3), (6, 4))
    arrays = [xp.zeros((*lead, *end)) for lead, end in zip(leads, ends, strict=True)]
    try:
        lead = np.broadcast_shapes(*leads)
    except ValueError:
        with pytest.raises(ValueError, match="leading axes broadcast, got"):
            check_attention(*arrays)
    else:
        check_attention(*arrays)
        assert [x.shape[:-2] for x in same_lead(*arrays)] == [lead] * 3


def test_one_query_is_the_last_token(xp: Any) -> None:
    q, k, v = drawn(16, (2, 6, 3), (2, 6, 3), (2, 6, 4))
    query, rows = as_recurrence(q, k, v, True)
    whole = rows(recurrent(query, k, v)[0])
    query, rows = as_recurrence(q[:, -1:], k, v, False)
    assert_close(rows(recurrent(query, k, v)[0]), whole[:, -1:])
    check_grads(lambda x: rows(ops.sin(as_recurrence(x, k, v, False)[0])), q[:, -1:], order=1)


def test_one_query_needs_a_last_token(xp: Any) -> None:
    for is_causal in (False, True):
        with pytest.raises(ValueError, match="as many queries as keys, got 1 and 0"):
            as_recurrence(xp.ones((1, 3)), xp.ones((0, 3)), xp.ones((0, 2)), is_causal)


@pytest.mark.parametrize("shape", [(5,), (1,), (1, 1), (3, 1), (3, 5), (2, 1, 5), (2, 3, 5)])
def test_masks_of_pads(xp: Any, shape: tuple[int, ...]) -> None:
    """Whatever broadcasts to (…, m) hides as if it were written out; nan does not get through."""
    mask = Rng(1).bernoulli(0.5, shape)
    real = np.broadcast_to(host(mask), (2, 3, 5))[..., None]
    k, v = drawn(2, (2, 3, 5, 3), (2, 3, 5, 2))
    dirty = [xp.where(xp.asarray(real), x, float("nan")) for x in (k, v)]
    leaves = [Tensor(x, requires_grad=True) for x in dirty]
    for clean, plain in zip(without_pads(mask, *leaves), (k, v), strict=True):
        assert_close(clean, np.where(real, host(plain), 0.0), rtol=0.0)
        (g,) = grad(clean.sum(), leaves[0 if plain is k else 1])
        assert_close(g, np.broadcast_to(np.where(real, 1.0, 0.0), plain.shape), rtol=0.0)


def test_masks_that_are_refused(xp: Any) -> None:
    key = xp.ones((2, 3, 5, 4))
    for shape in ((), (4,), (2, 5), (1, 2, 3, 5), (5, 1, 1, 5)):
        with pytest.raises(ValueError, match=r"broadcast to \(…, m\) = \(2, 3, 5\), got"):
            check_key_mask(xp.ones(shape, "bool"), key)
    for dtype in ("int64", "float32"):
        with pytest.raises(TypeError, match=f"key_mask has booleans, got dtype {dtype}"):
            check_key_mask(xp.ones(5, dtype), key)
    with pytest.raises(TypeError, match="global_mask has booleans"):
        check_key_mask(xp.ones(5), key, "global_mask")


def test_dtypes(xp: Any) -> None:
    """float16 is widened and comes back; NumPy's float64 numbers widen nothing."""
    for dtype, inside in (("float16", "float32"), ("float32", "float32"), ("float64", "float64")):
        x = xp.ones((2, 4), dtype)
        assert wide(x).dtype == inside and narrow(wide(x), x).dtype == dtype
        for scale in (None, 0.5, np.float64(0.5), xp.asarray(0.5, dtype="float64")):
            y = x * score_scale(scale, x)
            assert y.dtype == dtype
            assert_close(y, xp.full((2, 4), 0.5, dtype), rtol=0.0)
    leaf = Tensor(xp.asarray(2.0, dtype="float64"), requires_grad=True)
    (g,) = grad(matched(leaf, xp.ones(3, "float32")) * 3.0, leaf)
    assert g.dtype == "float64" and float(host(g)) == 3.0
