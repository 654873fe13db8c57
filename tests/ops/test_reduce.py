"""Reductions and scans where the catalogue does not look: kinks, zeros, infinities, nothing."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_nn import Tensor, grad, ops, primitive
from mini_nn.check import arrays, check_grads, separated, shapes_with_axis
from tests.support import assert_close, host

REDUCTIONS = ("sum", "mean", "var", "std", "max", "min", "prod", "logsumexp")


def slope(fn: Any, x: Any, g: Any = None, order: int = 1) -> Any:
    """The gradient of Σ ⟨g, fn(x)⟩; of order 2: the gradient of the sum of that."""
    leaf = Tensor(x, requires_grad=True)
    (found,) = grad(fn(leaf), leaf, g, create_graph=order > 1)
    if order > 1:
        (found,) = grad(found.sum(), leaf, materialize_grads=True)
    return host(found)


def drawn(data: st.DataObject, shape: Any, *numbers: float) -> Any:
    """A host array of a few numbers, which therefore repeat."""
    n = math.prod(shape)
    chosen = st.lists(st.sampled_from(numbers), min_size=n, max_size=n)
    return np.array(data.draw(chosen), "float64").reshape(shape)


# Products and zeros


@given(st.data(), st.integers(0, 6))
def test_derivatives_of_a_product_are_products_of_the_others(xp: Any, data: Any, n: int) -> None:
    x = drawn(data, (n,), 0.0, 0.0, -1.5, 2.0, 0.5, -0.25)
    first = [np.prod(np.delete(x, i)) for i in range(n)]
    assert_close(slope(ops.prod, xp.asarray(x)), np.array(first, dtype="float64"))
    second = [sum(np.prod(np.delete(x, [i, j])) for j in range(n) if j != i) for i in range(n)]
    if n:
        assert_close(slope(ops.prod, xp.asarray(x), order=2), np.array(second, dtype="float64"))


@given(st.data(), st.integers(1, 9))
def test_derivatives_of_cumprod_are_products_of_the_others(xp: Any, data: Any, n: int) -> None:
    x = drawn(data, (n,), 0.0, 0.0, -1.5, 2.0, 0.5, -0.25)
    g = np.arange(1.0, n + 1)
    others = np.zeros((n, n))
    for i, k in zip(*np.triu_indices(n), strict=True):
        others[i, k] = np.prod(np.delete(x[: k + 1], i))
    assert_close(slope(ops.cumprod, xp.asarray(x), xp.asarray(g)), others @ g)
    check_grads(ops.cumprod, xp.asarray(x))


def test_the_product_is_right_to_the_third_order(xp: Any) -> None:
    check_grads(ops.prod, xp.asarray([0.0, 2.0, 0.0, -3.0]), order=3)
    check_grads(lambda x: ops.prod(x, (0, 2)), xp.asarray([[[0.0, 1.0]], [[0.0, 3.0]]]), order=3)


def test_dividing_by_the_element_is_not_the_derivative_of_a_product(xp: Any) -> None:
    @primitive
    def product(x: Any) -> Any:
        return ops.elementwise.of(x).prod(x)

    product.derivative(x=lambda g, y, x: g * y / x)
    check_grads(product, xp.asarray([1.0, 2.0, -3.0]))
    with np.errstate(invalid="ignore"), pytest.raises(AssertionError, match="got nan"):
        check_grads(product, xp.asarray([1.0, 0.0, -3.0]))


# Extremes and ties


@given(st.data(), shapes_with_axis(max_side=4))
def test_ties_share_the_gradient(xp: Any, data: Any, shaped: Any) -> None:
    shape, axis = shaped
    x = drawn(data, shape, 1.0, 2.0, 3.0)
    for name, fn in (("max", ops.max), ("min", ops.min)):
        winners = x == getattr(np, name)(x, axis, keepdims=True)
        shares = winners / winners.sum(axis, keepdims=True)
        ones = np.ones(shares.sum(axis).shape)
        assert_close(slope(lambda t, f=fn: f(t, axis), xp.asarray(x), xp.asarray(ones)), shares)


@given(separated((2, 4)))
def test_max_is_the_limit_of_logsumexp(x: Any) -> None:
    """max x = lim ln Σ e^(βx) / β, and its gradient is the limit of softmax(βx)."""
    beta = 400.0

    def soft(t: Any) -> Any:
        return ops.logsumexp(beta * t, 1) * (1 / beta)

    assert_close(soft(x), ops.max(x, 1), atol=1e-6)
    g = ops.ones_like(ops.max(x, 1))
    assert_close(slope(soft, x, g), slope(lambda t: ops.max(t, 1), x, g), atol=1e-6)


def test_that_limit_shares_ties_as_max_does(xp: Any) -> None:
    x = xp.asarray([1.0, 3.0, 3.0, 2.0, 3.0])
    shares = np.array([0, 1, 1, 0, 1]) / 3
    assert_close(slope(ops.max, x), shares)
    assert_close(slope(lambda t: ops.logsumexp(400.0 * t) * (1 / 400.0), x), shares)

    @primitive
    def greedy(x: Any) -> Any:  # every tie takes all
        return ops.elementwise.of(x).max(x)

    greedy.derivative(x=lambda g, x, y: g * ops.astype(ops.equal(x, y), g.dtype))
    assert slope(greedy, x).sum() == 3.0 != slope(ops.max, x).sum()


def test_nan_is_the_largest_and_the_smallest(xp: Any) -> None:
    x = xp.asarray([[1.0, math.nan], [2.0, 1.0]])
    for fn in (ops.max, ops.min):
        assert np.isnan(host(fn(x, 1))).tolist() == [True, False]
        found = slope(lambda t, f=fn: f(t, 1), x, xp.asarray([1.0, 1.0]))
        assert found[0].tolist() == [0.5, 0.5]
        assert found[1].sum() == 1.0


def test_positions_are_those_of_the_first(xp: Any) -> None:
    x = xp.asarray([[3.0, 1.0, 3.0], [1.0, 1.0, 2.0]])
    assert host(ops.argmax(x, 1)).tolist() == [0, 2]
    assert host(ops.argmin(x, 1)).tolist() == [1, 0]
    assert int(ops.argmax(x)) == 0 and int(ops.argmin(x)) == 1
    assert Tensor(x, requires_grad=True).argmax().node is None


def test_an_extreme_of_nothing_raises(xp: Any) -> None:
    for fn in (ops.max, ops.min):
        with pytest.raises(ValueError):
            fn(xp.zeros((0, 3)), 0)
        assert fn(xp.zeros((0, 3)), 1).shape == (0,)


# Mean and deviation


@given(arrays((3, 4)), st.floats(-5, 5), st.floats(0.1, 3))
def test_laws_of_variance(x: Any, shift: float, factor: float) -> None:
    assert_close(ops.var(x + shift, 1), ops.var(x, 1), rtol=1e-7, atol=1e-9)
    assert_close(ops.var(factor * x, 1), factor**2 * host(ops.var(x, 1)), rtol=1e-9, atol=1e-12)
    assert_close(ops.var(x, 1), host(ops.mean(x * x, 1)) - host(ops.mean(x, 1)) ** 2, atol=1e-9)
    g = ops.ones_like(ops.var(x, 1))
    assert_close(slope(lambda t: ops.var(t, 1), x, g).sum(1), 0.0, atol=1e-12)  # of a shift


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_std_of_equal_numbers_has_derivatives_0(xp: Any, dtype: str) -> None:
    """std(x + td) = |t| std(d) there: it has a kink, and 0 is the symmetric choice."""
    for x in (xp.full((3,), 2.0, dtype), xp.asarray(1.5, dtype)):
        leaf = Tensor(x, requires_grad=True)
        (first,) = grad(ops.std(leaf), leaf, create_graph=True)
        (second,) = grad((first * first).sum(), leaf)
        assert_close(first, 0.0)
        assert_close(second, 0.0)
        assert first.dtype == second.dtype == dtype
    mixed = xp.asarray([[2.0, 2.0], [1.0, 3.0]], dtype)  # a row at its kink, one away from it
    assert_close(slope(lambda t: ops.std(t, 1), mixed, xp.ones(2, dtype)), [[0, 0], [-0.5, 0.5]])


def test_too_few_numbers_for_a_variance(xp: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NumPy warns, CuPy does not
        for fn in (ops.var, ops.std):
            assert np.isnan(host(fn(xp.asarray([1.0]), ddof=1)))
            assert np.isnan(slope(lambda t, f=fn: f(t, ddof=1), xp.asarray([1.0]))).all()
            assert np.isnan(slope(lambda t, f=fn: f(t, ddof=3), xp.asarray([1.0, 2.0]))).all()


def test_the_gradient_of_a_mean_of_nothing_is_empty(xp: Any) -> None:
    """Only the mean itself divides by 0: no warning comes from the backward pass."""
    for shape, axis, wanted in (((0,), None, ()), ((2, 0), 1, (2,)), ((0, 2), 0, (2,))):
        leaf = Tensor(xp.zeros(shape), requires_grad=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            y = ops.mean(leaf, axis)
        assert y.shape == wanted and np.isnan(host(y)).all()
        (g,) = grad(y, leaf, xp.ones(wanted))
        assert g.shape == shape


# ln Σ exp


@given(arrays((3, 4)), st.floats(-700, 700))
def test_laws_of_logsumexp(x: Any, shift: float) -> None:
    y = host(ops.logsumexp(x, 1))
    largest = host(ops.max(x, 1))
    assert (y >= largest).all() and (y <= largest + math.log(4) + 1e-12).all()
    assert_close(ops.logsumexp(x + shift, 1), y + shift, rtol=1e-12, atol=1e-12)
    weights = slope(lambda t: ops.logsumexp(t, 1), x + shift, ops.ones_like(ops.max(x, 1)))
    assert_close(weights.sum(1), 1.0, rtol=1e-9)
    assert (weights >= 0).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_logsumexp_of_infinities(xp: Any, dtype: str) -> None:
    inf = math.inf
    rows = [[-inf, -inf], [-inf, 1.0], [inf, 1.0], [inf, -inf], [1000.0, 1000.0]]
    x, g = xp.asarray(rows, dtype), xp.ones(5, dtype)
    values = np.array([-inf, 1.0, inf, inf, 1000 + math.log(2)])
    assert_close(ops.logsumexp(x, 1), values, rtol=1e-6)
    first = [[0, 0], [0, 1], [1, 0], [1, 0], [0.5, 0.5]]
    found = slope(lambda t: ops.logsumexp(t, -1), x, g)
    assert_close(found, np.array(first, dtype), rtol=1e-4)  # ln 2 has 4 digits left beside 1000
    second = slope(lambda t: ops.logsumexp(t, 1, True), x, g.reshape(5, 1), order=2)
    assert_close(second, 0.0, atol=1e-4)
    assert_close(ops.logsumexp(xp.asarray([math.nan, 1.0], dtype)), np.array(math.nan, dtype))


def test_without_the_shift_logsumexp_overflows(xp: Any) -> None:
    x = xp.asarray([1000.0, 999.0])
    with np.errstate(over="ignore"):
        naive = ops.log(ops.sum(ops.exp(x)))
    assert np.isinf(host(naive)) and np.isfinite(host(ops.logsumexp(x)))
    low = xp.asarray([-1000.0, -999.0])
    with np.errstate(divide="ignore"):
        naive = ops.log(ops.sum(ops.exp(low)))
    assert np.isinf(host(naive)) and np.isfinite(host(ops.logsumexp(low)))


def test_logsumexp_takes_floats(xp: Any) -> None:
    with pytest.raises(TypeError, match="int64"):
        ops.logsumexp(xp.asarray([1, 2]))


# What holds for all


def test_reductions_of_nothing(xp: Any) -> None:
    x = xp.zeros((2, 0), "float32")
    for name, value in (("sum", 0.0), ("prod", 1.0), ("logsumexp", -math.inf)):
        for axis, shape in ((None, ()), (1, (2,)), (0, (0,))):
            y = getattr(ops, name)(Tensor(x), axis)
            assert (y.shape, y.dtype) == (shape, "float32")
            assert_close(y, np.full(shape, value, "float32"))
    for name in ("sum", "prod", "logsumexp", "cumsum", "cumprod"):
        leaf = Tensor(x, requires_grad=True)
        getattr(ops, name)(leaf).sum().backward()
        assert (leaf.grad.shape, leaf.grad.dtype) == ((2, 0), "float32")


@pytest.mark.parametrize("name", REDUCTIONS)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_reductions_keep_the_dtype(xp: Any, name: str, dtype: str) -> None:
    for shape, axis in (((), None), ((2, 3), None), ((2, 3), 1)):
        leaf = Tensor(xp.ones(shape, dtype), requires_grad=True)
        y = getattr(ops, name)(leaf, axis)
        (g,) = grad(y, leaf, xp.ones(y.shape, dtype), create_graph=True)
        assert y.dtype == g.dtype == dtype and g.shape == shape


@given(arrays((2, 3, 2)), st.sampled_from([None, 0, -1, (0, 2), (-2,), (0, 1, 2)]))
def test_keepdims_changes_only_the_shape(x: Any, axis: Any) -> None:
    for name in REDUCTIONS:
        y, kept = getattr(ops, name)(x, axis), getattr(ops, name)(x, axis, keepdims=True)
        axes = range(3) if axis is None else axis if isinstance(axis, tuple) else (axis,)
        shape = [1 if i in [a % 3 for a in axes] else n for i, n in enumerate(x.shape)]
        assert kept.shape == tuple(shape)
        assert_close(y, kept.reshape(y.shape))


@pytest.mark.parametrize("name", ["sum", "mean", "cumsum"])
def test_linear_reductions_keep_no_array(xp: Any, name: str) -> None:
    y = getattr(ops, name)(Tensor(xp.ones(3), requires_grad=True))
    assert not any(hasattr(value, "dtype") for value in y.node.kept.values())


def test_truth_and_counting(xp: Any) -> None:
    x = Tensor(xp.asarray([[0.0, 2.0], [math.nan, -1.0], [0.0, 0.0]]))
    assert ops.any(x, 1).tolist() == [True, True, False]
    assert ops.all(x, 1).tolist() == [False, True, False]
    assert ops.count_nonzero(x, 0).tolist() == [1, 2]
    nothing = Tensor(xp.zeros((0,)))
    assert not ops.any(nothing) and bool(ops.all(nothing)) and int(ops.count_nonzero(nothing)) == 0
