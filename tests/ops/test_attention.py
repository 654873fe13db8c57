"""Attention in blocks: the definition, whatever the length, the mask and what is asked for."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest

from mini_nn import Rng, Tensor, grad, ops
from mini_nn.ops.attention import BLOCK
from tests.support import assert_close, host

attend = ops.scaled_dot_product_attention


def operands(n: int, m: int, dtype: str = "float64") -> list[Any]:
    """Queries (2, n, 3), keys (2, m, 3) and values (2, m, 2)."""
    rng = Rng(n + 1000 * m)
    return [rng.normal(shape, dtype=dtype) for shape in ((2, n, 3), (2, m, 3), (2, m, 2))]


def slopes(fn: Any, arrays: list[Any], which: Any, record: bool = False, **options: Any) -> Any:
    """The result, and the gradients of its sum weighed by cosines, of the arrays asked for only."""
    tensors = [Tensor(x, requires_grad=i in which) for i, x in enumerate(arrays)]
    y = fn(*tensors, **options)
    weights = ops.cos(Tensor(arrays[0]).sum() + Rng(0).normal(y.shape, dtype=y.dtype)).data
    return [y, *grad(y, [tensors[i] for i in which], weights, create_graph=record)]


def future(xp: Any, n: int, m: int) -> Any:
    """−inf where a key comes after the query."""
    return xp.triu(xp.full((n, m), -math.inf), 1)


SQUARE = [(n, n) for n in (1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 1, 1100)]


@pytest.mark.parametrize(("n", "m"), [*SQUARE, (2 * BLOCK, BLOCK + 1), (BLOCK + 1, 2 * BLOCK)])
def test_causal_blocks_are_the_definition(xp: Any, n: int, m: int) -> None:
    """At, before and behind the edges of blocks, also where long rows make the blocks larger."""
    arrays = operands(n, m)
    found = slopes(attend, arrays, [0, 1, 2], is_causal=True)
    wanted = slopes(attend.composite, arrays, [0, 1, 2], is_causal=True)
    for one, other in zip(found, wanted, strict=True):
        assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("n", [3, 2 * BLOCK + 2])
def test_the_past_does_not_see_the_future(xp: Any, n: int) -> None:
    """Outputs up to i do not change by a bit with what comes later, which gets no gradient."""
    arrays, i = operands(n, n), n - 2
    changed = [xp.array(x) for x in arrays]
    for x in changed:
        x[:, i + 1 :] += 100.0
    before, after = (attend(*given, is_causal=True) for given in (arrays, changed))
    np.testing.assert_array_equal(host(before[:, : i + 1]), host(after[:, : i + 1]))
    assert (host(before[:, i + 1]) != host(after[:, i + 1])).all()
    leaves = [Tensor(x, requires_grad=True) for x in arrays]
    for g in grad(attend(*leaves, is_causal=True)[:, : i + 1].sum(), leaves):
        assert not host(g)[:, i + 1 :].any() and host(g)[:, : i + 1].any()


@pytest.mark.parametrize(("n", "m"), [(3, 5), (5, 3), (4, 4), (BLOCK + 2, BLOCK + 2)])
def test_a_mask_and_causality_both_hold(xp: Any, n: int, m: int) -> None:
    """Adding −inf above the diagonal oneself is the same, for numbers and for booleans."""
    arrays = operands(n, m)
    numbers = Rng(3).normal((n, m), dtype="float64")
    look = numbers > -1
    look[:, 0] = True
    for mask in (numbers, look):
        added = mask if mask.dtype.kind == "f" else xp.where(mask, 0.0, -math.inf)
        both = slopes(attend, arrays, [0, 1, 2], attn_mask=mask, is_causal=True)
        sums = slopes(attend, arrays, [0, 1, 2], attn_mask=added + future(xp, n, m))
        for one, other in zip(both, sums, strict=True):
            assert_close(one, other, rtol=1e-9, atol=1e-11)
    alone = attend(*arrays, attn_mask=numbers)
    assert float(host(ops.abs(both[0] - alone)).max()) > 0.1  # neither is dropped
    plain = attend(*arrays, is_causal=True)
    assert float(host(ops.abs(both[0] - plain)).max()) > 0.1


@pytest.mark.parametrize("kind", ["booleans", "numbers", "causal and mask"])
@pytest.mark.parametrize("record", [False, True])
def test_a_query_that_may_look_nowhere(xp: Any, kind: str, record: bool) -> None:
    """It gets zeros and gives nothing back, and the other rows are what they are without it."""
    arrays = operands(4, 4)
    look = xp.ones((4, 4), "bool")
    look[1] = False
    options: dict[str, Any] = {"attn_mask": look}
    if kind == "numbers":
        options = {"attn_mask": xp.where(look, 0.0, -math.inf)}
    if kind == "causal and mask":  # row 0 sees key 0 only, by the one, and all but it, by the other
        look[1], look[0, 0] = True, False
        options["is_causal"] = True
    row = 0 if kind == "causal and mask" else 1
    rest = [i for i in range(4) if i != row]
    y, *gradients = slopes(attend, arrays, [0, 1, 2], record, **options)
    assert not host(y)[:, row].any() and not host(gradients[0])[:, row].any()
    assert all(np.isfinite(host(g)).all() for g in gradients)
    kept = {"attn_mask": options["attn_mask"][rest] + 0.0 if kind == "numbers" else look[rest]}
    if kind == "causal and mask":
        kept["attn_mask"] = look[rest] & (xp.arange(4)[:, None] >= xp.arange(4))[rest]
    assert_close(y[:, rest], attend(arrays[0][:, rest], arrays[1], arrays[2], **kept))


def test_what_is_asked_for_does_not_matter(xp: Any) -> None:
    """Each subset of the four gradients is the same as all four together."""
    for n in (4, BLOCK + 1):
        arrays = [*operands(n, n), Rng(5).normal((n, n), dtype="float64")]
        places = [0, 1, 2, 3]
        for causal, count in ((False, 4), (True, 3)):
            _, *wanted = slopes(attend, arrays[:count], places[:count], is_causal=causal)
            for size in range(1, count):
                for some in itertools.combinations(places[:count], size):
                    _, *found = slopes(attend, arrays[:count], some, is_causal=causal)
                    for i, g in zip(some, found, strict=True):
                        assert_close(g, wanted[i], rtol=1e-12, atol=1e-12)


def test_rows_of_the_masks_gradient_sum_to_zero(xp: Any) -> None:
    """A number added to a whole row of scores changes nothing."""
    arrays = [*operands(3, 5), Rng(5).normal((2, 3, 5), dtype="float64")]
    y, g = slopes(attend, arrays, [3])
    shifted = attend(*arrays[:3], arrays[3] + 1000.0)
    assert_close(shifted, y, rtol=1e-9, atol=1e-11)
    assert_close(g.sum(axis=-1), xp.zeros((2, 3)), atol=1e-12)
    assert float(host(ops.abs(g)).max()) > 0.01


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_limit_of_large_scores_looks_up_the_best_key(xp: Any, dtype: str) -> None:
    query, key, value = operands(4, 6, dtype)
    best = host(query @ key.swapaxes(-1, -2)).argmax(axis=-1)
    y = attend(query, key, value, scale=1e6)
    assert_close(y, np.take_along_axis(host(value), best[..., None], axis=1))


def test_no_keys_and_no_queries(xp: Any) -> None:
    for n, m in ((3, 0), (0, 3), (0, 0)):
        for causal in (False, n == m):
            y, *gradients = slopes(attend, operands(n, m), [0, 1, 2], is_causal=causal)
            assert y.shape == (2, n, 2) and not host(y).any()
            assert not any(host(g).any() for g in gradients)


@pytest.mark.parametrize(
    "shapes",
    [((3,), (3, 3), (3, 3)), ((2, 3), (2, 4), (2, 3)), ((2, 3), (2, 3), (4, 3))],
    ids=["an axis too few", "other widths", "more values than keys"],
)
def test_shapes_that_do_not_fit(xp: Any, shapes: Any) -> None:
    with pytest.raises(ValueError, match=r"attention takes query .* got"):
        attend(*[xp.zeros(shape) for shape in shapes])
