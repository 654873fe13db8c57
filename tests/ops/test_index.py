"""Indexing of every kind against counted positions; what sorting promises about ties and nan."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mini_nn import Tensor, backend, grad, ops, primitive
from mini_nn.check import check_grads, separated
from mini_nn.ops import index
from tests.support import assert_close, host

SHAPE = (3, 4, 2)
SMALL = st.integers(-2, 1)
"""Numbers that are in range for each axis of SHAPE."""


def placed(xp: Any, key: Any) -> Any:
    """A host index with its arrays on the backend under test."""
    if isinstance(key, tuple):
        return tuple(placed(xp, part) for part in key)
    return xp.asarray(key) if isinstance(key, np.ndarray) else key


@st.composite
def mixtures(draw: Any) -> Any:
    """Numbers, slices, None, Ellipsis, lists and arrays of integers, masks of an axis, together."""
    width = draw(st.integers(1, 3))
    kinds = ["integer", "slice", "list", "array", "mask"]
    parts: list[Any] = []
    for n in SHAPE[: draw(st.integers(0, 3))]:
        kind = draw(st.sampled_from(kinds))
        if kind == "integer":
            parts.append(draw(SMALL))
        elif kind == "slice":
            parts.append(draw(st.slices(n)))
        elif kind == "mask":
            mask = np.zeros(n, bool)
            mask[:width] = True  # as many as the other arrays have, at other places:
            parts.append(np.array(draw(st.permutations(mask.tolist()))) if width <= n else 0)
        else:
            numbers = draw(st.lists(SMALL, min_size=width, max_size=width))
            parts.append(numbers if kind == "list" else np.array(numbers))
    if draw(st.booleans()):
        parts.insert(draw(st.integers(0, len(parts))), draw(st.sampled_from([None, Ellipsis])))
    return tuple(parts)


def fits(key: Any) -> bool:
    try:
        np.zeros(SHAPE)[key]
    except IndexError:  # a mask shorter than the lists beside it
        return False
    return True


INDICES = (
    hnp.basic_indices(SHAPE, allow_newaxis=True)
    | hnp.integer_array_indices((3, 4), result_shape=hnp.array_shapes(max_dims=2, max_side=3))
    | hnp.integer_array_indices(SHAPE, result_shape=hnp.array_shapes(max_dims=2, max_side=3))
    | hnp.arrays("bool", SHAPE)
    | hnp.arrays("bool", SHAPE[:2])
    | mixtures().filter(fits)
)


@given(key=INDICES, many=st.sampled_from([0, 10**9]))
def test_an_element_receives_what_was_read_from_it(xp: Any, key: Any, many: int) -> None:
    """Reading the numbers 0 … n − 1 tells what is read; both ways of adding up agree with it."""
    places = np.arange(24).reshape(SHAPE)[key]
    x = np.linspace(-1, 1, 24).reshape(SHAPE)
    leaf = Tensor(xp.asarray(x), requires_grad=True)
    g = np.random.default_rng(0).standard_normal(places.shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "MANY", many)
        y = leaf[placed(xp, key)]
        assert_close(y, x.ravel()[places])
        weights = Tensor(xp.asarray(g), requires_grad=True)
        (found,) = grad(y, leaf, weights, create_graph=True)
        wanted = np.bincount(np.ravel(places), np.ravel(g), 24).reshape(SHAPE)
        assert_close(found, wanted, atol=1e-12)
        (second,) = grad((found * xp.asarray(x)).sum(), weights, materialize_grads=True)
        assert_close(second, x[key])
        assert_close(ops.scatter(xp.asarray(g), placed(xp, key), SHAPE), wanted, atol=1e-12)
        added = ops.scatter_add(xp.asarray(x), placed(xp, key), xp.asarray(g))
        assert_close(added, x + wanted, atol=1e-12)


def test_assigning_where_adding_is_meant_is_found(xp: Any) -> None:
    @primitive
    def read(x: Any, key: Any) -> Any:
        return x[key]

    @primitive
    def overwrite(g: Any, key: Any, shape: Any) -> Any:
        y = ops.elementwise.of(g).zeros(shape, g.dtype)
        y[key] = g
        return y

    overwrite.derivative(g=lambda h, key: read(h, key))
    read.derivative(x=lambda g, key, like: overwrite(g, key, like.shape))
    x = xp.asarray([1.0, 2.0, 3.0])
    check_grads(lambda t: read(t, xp.asarray([2, 0])), x)
    with pytest.raises((AssertionError, ValueError)):  # the stand-in device refuses such a write
        check_grads(lambda t: read(t, xp.asarray([2, 0, 2])), x)
    check_grads(lambda t: ops.getitem(t, xp.asarray([2, 0, 2])), x)


def test_tensors_are_indices(xp: Any) -> None:
    host_x = np.arange(12.0).reshape(3, 4)
    x = Tensor(xp.asarray(host_x), requires_grad=True)
    i, j = Tensor(xp.asarray([2, 0])), Tensor(xp.asarray([1, 1]))
    assert_close(x[i], host_x[[2, 0]])
    assert_close(x[i, j], host_x[[2, 0], [1, 1]])
    assert_close(x[x > 5.0], host_x[host_x > 5])
    assert_close(x[(..., j)], host_x[..., [1, 1]])
    (g,) = grad(x[i, j].sum(), x)
    assert_close(g, np.eye(12)[[9, 1]].sum(0).reshape(3, 4))
    assert_close(ops.take(x, i, 0), host_x[[2, 0]])
    assert_close(x[Tensor(xp.asarray(1))], host_x[1])


def test_basic_indices_are_views_and_nothing_is_written(xp: Any) -> None:
    x = xp.zeros((3, 4), "float32")
    view = Tensor(x)[1:, ::2]
    x += 1
    assert_close(view, np.ones((2, 2), "float32"))
    added = ops.scatter_add(x, (slice(1, 3), 0), 2.0)
    assert_close(x, np.ones((3, 4), "float32"))
    assert_close(host(added).sum(0), np.array([7, 3, 3, 3], "float32"))


def test_scatter_add_keeps_the_dtype_and_takes_numbers(xp: Any) -> None:
    x = Tensor(xp.zeros(3, "float32"), requires_grad=True)
    values = Tensor(xp.asarray([1.0, 2.0, 4.0]), requires_grad=True)
    y = ops.scatter_add(x, xp.asarray([0, 2, 0]), values)
    assert_close(y, np.array([5, 0, 2], "float32"))
    gx, gv = grad(y, [x, values], xp.asarray([1.0, 10.0, 100.0], "float32"))
    assert (gx.dtype, gv.dtype) == ("float32", "float64")
    assert_close(gv, np.array([1.0, 100.0, 1.0]))
    assert_close(ops.scatter_add(x, xp.asarray([0, 0]), 1.5), np.array([3, 0, 0], "float32"))
    (one,) = grad(ops.scatter_add(x, 1, values[0]), values, xp.ones(3, "float32"))
    assert_close(one, np.array([1.0, 0.0, 0.0]))


def test_many_rows_are_added_up_as_few_are(xp: Any) -> None:
    rng = np.random.default_rng(1)
    for shape, key, size in (
        ((50, 40), lambda i: i, (700,)),
        ((3, 9, 40), lambda i: (slice(None), i), (70,)),
        ((6, 9, 20), lambda i: (i % 6, i), (40, 10)),
    ):
        numbers = rng.integers(-9, 9, size)
        rows = rng.standard_normal(np.zeros(shape)[key(numbers)].shape)
        wanted = np.zeros(shape)
        np.add.at(wanted, key(numbers), rows)
        found = ops.scatter(xp.asarray(rows), placed(xp, key(numbers)), shape)
        assert rows.size >= index.MANY
        assert_close(found, wanted, atol=1e-10)
        leaf = Tensor(xp.zeros(shape, "float32"), requires_grad=True)
        (g,) = grad(leaf[placed(xp, key(numbers))].sum(), leaf)
        assert g.dtype == "float32" and float(host(g).sum()) == rows.size


def test_values_that_broadcast_are_added_everywhere(xp: Any) -> None:
    """One row for two sets of positions, few or many: each position gets it once for each set."""
    for n in (3, index.MANY):
        values = Tensor(xp.linspace(-1.0, 1.0, n), requires_grad=True)
        places = xp.asarray(np.arange(2 * n).reshape(2, n) * 7 % 5)
        y = ops.scatter(values, places, (5,))
        wanted = np.zeros(5)
        np.add.at(wanted, host(places), np.tile(host(values), (2, 1)))
        assert_close(y, wanted, atol=1e-10)
        weights = xp.asarray([1.0, 10.0, 100.0, 1000.0, 10000.0])
        (g,) = grad(y, values, weights)
        assert_close(g, host(weights)[host(places)].sum(axis=0))


def test_numbers_out_of_range_raise_on_numpy(xp: Any) -> None:
    x = Tensor(xp.zeros((3, 4)))
    with pytest.raises(IndexError):
        x[3]
    if xp is np:  # CuPy counts modulo the length rather than wait for the device
        for read in (
            lambda i: x[i],
            lambda i: ops.take(x, i, 0),
            lambda i: ops.gather(x, 0, i.reshape(1, 1)),
            lambda i: ops.scatter_add(x, i, 1.0),
        ):
            with pytest.raises(IndexError, match=r"5 is out of bounds for axis 0 with size 3"):
                read(xp.asarray([5]))


# Along an axis


@given(separated((3, 4)), st.sampled_from([0, 1, -1]))
def test_positions_of_extremes_and_orders_are_read_back(x: Any, axis: int) -> None:
    top = ops.argmax(x, axis, keepdims=True)
    assert_close(ops.take_along_axis(x, top, axis), ops.max(x, axis, keepdims=True))
    assert_close(ops.take_along_axis(x, ops.argsort(x, axis), axis), ops.sort(x, axis))


def test_shapes_that_do_not_fit(xp: Any) -> None:
    x, i = xp.zeros((3, 4)), xp.asarray([0, 1])
    with pytest.raises(ValueError, match=r"use take"):
        ops.take_along_axis(x, i, 0)
    for wrong in (i, xp.zeros((2, 5), "int64")):
        with pytest.raises(ValueError, match=r"gather along axis 0 of \(3, 4\)"):
            ops.gather(x, 0, wrong)
    assert ops.gather(x, -1, xp.zeros((2, 7), "int64")).shape == (2, 7)


def test_one_hot(xp: Any) -> None:
    w = np.arange(12.0).reshape(4, 3)
    numbers = np.array([[2, 0], [3, 3]])
    hot = ops.one_hot(xp.asarray(numbers), 4, "float64")
    assert_close(ops.matmul(hot, xp.asarray(w)), w[numbers])
    outside = ops.one_hot(Tensor(xp.asarray([-1, 4, 1])), 4)
    assert outside.dtype == "float32" and host(outside).sum(1).tolist() == [0, 0, 1]


def test_nonzero_gives_the_key_to_what_is_not_zero(xp: Any) -> None:
    x = Tensor(xp.asarray([[0.0, 2.0], [3.0, 0.0]]), requires_grad=True)
    places = ops.nonzero(x)
    assert isinstance(places, tuple) and all(part.node is None for part in places)
    assert x[places].tolist() == [2.0, 3.0]


# Order


@given(st.lists(st.integers(0, 3), max_size=8), st.integers(0, 8))
def test_ties_keep_their_order(xp: Any, numbers: list[int], k: int) -> None:
    x = xp.asarray(np.array(numbers, "float64"))
    up = sorted(range(len(numbers)), key=lambda i: numbers[i])
    down = sorted(range(len(numbers)), key=lambda i: -numbers[i])
    assert host(ops.argsort(x)).tolist() == up
    k = min(k, len(numbers))
    values, places = ops.topk(x, k)
    assert host(places).tolist() == down[:k]
    assert host(values).tolist() == [numbers[i] for i in down[:k]]
    w = np.arange(1.0, len(numbers) + 1)
    leaf = Tensor(x, requires_grad=True)
    (g,) = grad(ops.sort(leaf), leaf, xp.asarray(w))
    assert_close(g, w[np.argsort(up)])  # each weight goes to where its element came from
    (g,) = grad(ops.topk(leaf, k)[0], leaf, xp.asarray(w[:k]))
    assert_close(g, np.array([w[down.index(i)] if i in down[:k] else 0 for i in range(len(w))]))


@given(separated((3, 5)), st.sampled_from([0, 1, -1]))
def test_all_of_topk_is_sort_from_the_other_end(x: Any, axis: int) -> None:
    values, places = ops.topk(x, x.shape[axis], axis)
    assert_close(values, ops.flip(ops.sort(x, axis), axis))
    assert_close(ops.take_along_axis(x, places, axis), values)
    check_grads(lambda t: ops.topk(t, 2, axis)[0], x, order=1)


def test_topk_of_tensors_unsigned_numbers_and_nan(xp: Any) -> None:
    values, places = ops.topk(Tensor(xp.asarray([1.0, 3.0, 2.0], "float32"), requires_grad=True), 2)
    assert places.node is None and places.dtype == "int64" and values.node is not None
    assert host(ops.topk(xp.asarray([0, 3, 255], "uint8"), 3)[0]).tolist() == [255, 3, 0]
    x = xp.asarray([1.0, math.nan, math.inf, -math.inf])
    assert host(ops.topk(x, 4)[1]).tolist() == [1, 2, 0, 3]
    assert np.isnan(host(ops.sort(x))[-1])


def test_topk_refuses(xp: Any) -> None:
    for k in (-1, 4):
        with pytest.raises(ValueError, match=rf"0 ≤ k ≤ 3.*got {k}"):
            ops.topk(xp.ones(3), k)
    assert ops.topk(xp.ones((2, 0)), 0)[0].shape == (2, 0)


def test_reading_keeps_the_key_and_nothing_else(xp: Any) -> None:
    x = Tensor(xp.ones((3, 4)), requires_grad=True)
    key = xp.asarray([0, 1])
    for y in (x[key], ops.take(x, key, 1), x[1:]):
        kept = [v for v in y.node.kept.values() if isinstance(v, backend.current().array_type)]
        assert all(v is key for v in kept)
