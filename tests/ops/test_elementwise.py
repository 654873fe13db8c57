"""The conventions of elementwise.py: kinks, masks, powers, dtypes, and mixed operands."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_nn import Tensor, grad, ops
from mini_nn.check import arrays, away_from, broadcastable_shapes, check_grads
from tests.support import assert_close, host


def leaf(xp: Any, values: Any, dtype: str = "float64") -> Tensor:
    return Tensor(xp.asarray(np.array(values, dtype)), requires_grad=True)


def slope(fn: Any, *inputs: Tensor) -> list[Any]:
    """The gradients of the sum of fn's elements."""
    return [host(g) for g in grad(fn(*inputs).sum(), inputs)]


# kinks


@pytest.mark.parametrize("name", ["maximum", "minimum"])
def test_a_tie_shares_the_gradient_equally(xp: Any, name: str) -> None:
    function = getattr(ops, name)
    first, second = slope(function, leaf(xp, [1.0, 2.0, 5.0]), leaf(xp, [1.0, 5.0, 2.0]))
    larger = first if name == "maximum" else second
    assert_close(larger, [0.5, 0.0, 1.0])
    assert_close(first + second, [1.0, 1.0, 1.0])


@pytest.mark.parametrize("name", ["maximum", "minimum"])
def test_a_tie_with_a_number_counts_too(xp: Any, name: str) -> None:
    assert_close(slope(lambda x: getattr(ops, name)(x, 2.0), leaf(xp, [2.0]))[0], [0.5])
    assert_close(slope(lambda x: getattr(ops, name)(2.0, x), leaf(xp, [2.0]))[0], [0.5])


def test_nan_goes_through_maximum_and_minimum(xp: Any) -> None:
    x = leaf(xp, [np.nan, 1.0])
    assert np.isnan(host(ops.maximum(x, 0.0))[0]) and np.isnan(host(ops.minimum(x, 0.0))[0])


@pytest.mark.parametrize("name", ["abs", "sign", "relu"])
def test_the_slope_at_0_is_0(xp: Any, name: str) -> None:
    left, at, right = slope(getattr(ops, name), leaf(xp, [-1.0, 0.0, 1.0]))[0]
    assert at == 0.0
    assert (left, right) == {"abs": (-1, 1), "sign": (0, 0), "relu": (0, 1)}[name]


def test_clip_has_slope_1_at_both_bounds(xp: Any) -> None:
    x = leaf(xp, [-2.0, -1.0, 0.0, 1.0, 2.0])
    assert_close(slope(lambda x: ops.clip(x, -1.0, 1.0), x)[0], [0.0, 1.0, 1.0, 1.0, 0.0])
    assert_close(slope(lambda x: ops.clip(x, None, 1.0), x)[0], [1.0, 1.0, 1.0, 1.0, 0.0])
    assert_close(slope(lambda x: ops.clip(x), x)[0], [1.0] * 5)


def test_steps_have_slope_0_everywhere(xp: Any) -> None:
    x = leaf(xp, [-1.5, -1.0, 0.0, 0.5, 2.5])
    for step in (ops.sign, ops.floor, ops.round):
        assert_close(slope(step, x)[0], [0.0] * 5)
    assert_close(ops.round(x), [-2.0, -1.0, 0.0, 0.0, 2.0])


def test_sqrt_and_log_are_infinitely_steep_at_0(xp: Any) -> None:
    with np.errstate(divide="ignore"):
        assert slope(ops.sqrt, leaf(xp, [0.0, 4.0]))[0].tolist() == [np.inf, 0.25]
        assert slope(ops.log, leaf(xp, [0.0, 4.0]))[0].tolist() == [np.inf, 0.25]


# masks


@pytest.mark.parametrize("name", ["sqrt", "log", "rsqrt"])
@pytest.mark.parametrize("bad", [0.0, -1.0])
def test_a_value_masked_before_the_function_has_slope_0(xp: Any, name: str, bad: float) -> None:
    """To order 2 and without a warning."""

    def masked(x: Any) -> Any:
        fine = x > 0
        return ops.where(fine, getattr(ops, name)(ops.where(fine, x, 1.0)), 0.0)

    x = leaf(xp, [bad, 4.0])
    (first,) = grad(masked(x).sum(), x, create_graph=True)
    (second,) = grad(first.sum(), x)
    for found, order in ((first, 1), (second, 2)):
        wanted = {"sqrt": [0.25, -1 / 32], "log": [0.25, -1 / 16], "rsqrt": [-1 / 16, 3 / 128]}
        assert host(found).tolist() == [0.0, wanted[name][order - 1]]


def test_masking_after_the_function_is_too_late(xp: Any) -> None:
    """The negative twin: 0 · inf is nan, which is why the convention says before."""
    x = leaf(xp, [0.0, 4.0])
    with np.errstate(all="ignore"):
        late = slope(lambda x: ops.where(x > 0, ops.sqrt(x), 0.0), x)[0]
    assert np.isnan(late[0]) and late[1] == 0.25


def test_the_branch_not_taken_may_hold_anything(xp: Any) -> None:
    fine, bad = leaf(xp, [1.0, 2.0]), leaf(xp, [np.nan, np.inf])
    mask = xp.asarray(np.array([True, True]))
    y = ops.where(mask, fine, bad)
    assert_close(y, [1.0, 2.0])
    first, second = grad(y.sum(), [fine, bad])
    assert_close(first, [1.0, 1.0])
    assert_close(second, [0.0, 0.0])


# powers


@pytest.mark.parametrize("kind", ["number", "array"])
def test_powers_of_0(xp: Any, kind: str) -> None:
    """0⁰ = 1 with slope 0; 0¹ has slope 1; 0ⁿ has slope 0: never nan."""
    for exponent, value, first, second in ((0, 1, 0, 0), (1, 0, 1, 0), (2, 0, 0, 2), (3, 0, 0, 0)):
        x = leaf(xp, [0.0])
        p = float(exponent) if kind == "number" else xp.asarray(np.array([float(exponent)]))
        y = x**p
        (slope1,) = grad(y.sum(), x, create_graph=True)
        assert (host(y).item(), host(slope1).item()) == (value, first)
        (slope2,) = grad(slope1.sum(), x, materialize_grads=True) if slope1.node else (slope1,)
        assert host(slope2).item() == second or exponent == 0


def test_the_exponent_has_slope_0_where_the_base_is_0(xp: Any) -> None:
    base, exponent = leaf(xp, [0.0, 0.0, 2.0]), leaf(xp, [2.0, 0.0, 3.0])
    assert_close(slope(operator.pow, base, exponent)[1], [0.0, 0.0, 8 * np.log(2)])
    assert_close(slope(lambda p: ops.power(0.0, p), leaf(xp, [2.0]))[0], [0.0])


@pytest.mark.parametrize("exponent", [-2, -1, 1, 2, 3, 4])
def test_integer_powers_of_negative_numbers(xp: Any, exponent: int) -> None:
    for p in (exponent, float(exponent)):
        x = leaf(xp, [-2.0, 0.5])
        assert_close(x**p, host(x) ** float(p))
        assert_close(slope(lambda x, p=p: x**p, x)[0], exponent * host(x) ** float(exponent - 1))
        check_grads(lambda x, p=p: x**p, x)
    assert_close(
        slope(lambda x: x ** xp.asarray(np.array([float(exponent)] * 2)), x)[0],
        exponent * host(x) ** float(exponent - 1),
    )


def test_the_exponent_of_a_negative_base_has_no_slope(xp: Any) -> None:
    first, second = slope(operator.pow, leaf(xp, [-2.0]), leaf(xp, [2.0]))
    assert first.item() == -4.0 and np.isnan(second.item())


# accuracy where the naive formula fails


def test_sigmoid_overflows_nowhere(xp: Any) -> None:
    low, *rest = host(ops.sigmoid(leaf(xp, [-1000.0, 0.0, 1000.0]))).tolist()
    assert 0 <= low < 1e-307 and rest == [0.5, 1.0]


def test_sigmoid_is_accurate_in_the_left_tail(xp: Any) -> None:
    x = leaf(xp, [-30.0, -80.0, -700.0])
    assert_close(ops.sigmoid(x), np.exp([-30.0, -80.0, -700.0]), rtol=1e-12)
    assert np.tanh(-15.0) / 2 + 0.5 == pytest.approx(0, abs=1e-13)  # by tanh nothing is left of it


def test_expm1_and_log1p_are_accurate_near_0(xp: Any) -> None:
    x = leaf(xp, [1e-12, -1e-12])
    assert_close(ops.expm1(x), [1e-12, -1e-12], rtol=1e-11)
    assert_close(ops.log1p(x), [1e-12, -1e-12], rtol=1e-11)
    assert np.abs(np.exp(1e-12) - 1 - 1e-12) > 1e-17  # what they are for


# dtypes

BINARY = [operator.add, operator.sub, operator.mul, operator.truediv, operator.pow]


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("operation", BINARY)
@pytest.mark.parametrize("number", [2, 0.5])
@pytest.mark.parametrize("shape", [(), (0,), (3,)])
def test_python_numbers_change_no_dtype(
    xp: Any, dtype: str, operation: Any, number: Any, shape: Any
) -> None:
    x = leaf(xp, np.full(shape, 1.5), dtype)
    for y in (operation(x, number), operation(number, x)):
        assert y.dtype == dtype and y.shape == shape
        (g,) = grad(y, x, Tensor(xp.ones(shape, dtype)))
        assert g.dtype == dtype and g.shape == shape


@pytest.mark.parametrize("operation", BINARY)
def test_a_wider_operand_widens_the_output_and_not_the_gradient(xp: Any, operation: Any) -> None:
    x, w = leaf(xp, [1.5, 2.0], "float32"), leaf(xp, [1.5, 2.0], "float64")
    y = operation(x, w)
    assert y.dtype == "float64"
    gx, gw = grad(y.sum(), [x, w])
    assert (gx.dtype, gw.dtype) == ("float32", "float64")


def test_integers_become_floats_where_numpy_says_so(xp: Any) -> None:
    n = Tensor(xp.arange(3))
    assert (n + 1).dtype.kind == (n * n).dtype.kind == (n**2).dtype.kind == "i"
    assert (n / 2).dtype == "float64"
    assert (n + 1).node is None


def test_astype_gives_the_gradient_back_in_the_inputs_dtype(xp: Any) -> None:
    x = leaf(xp, [1.0, 2.0], "float32")
    y = ops.astype(x, "float64")
    assert y.dtype == "float64" and grad(y.sum(), x)[0].dtype == "float32"
    assert ops.astype(x, "float32").data is x.data
    assert ops.astype(x, "float32", copy=True).data is not x.data


def test_a_cast_to_integers_cuts_the_tape(xp: Any) -> None:
    """Its gradient would have to be an integer: 0.3 would come back as 0."""
    x = leaf(xp, [1.5, 2.5])
    n = ops.astype(x, "int64")
    assert n.node is None
    assert_close(slope(lambda x: x * n * 0.3, x)[0], [0.3, 0.6])


# operands of every kind


@given(st.sampled_from(BINARY), st.data())
def test_numbers_may_stand_first(xp: Any, operation: Any, data: Any) -> None:
    x = data.draw(away_from([0.0], (3,), low=0.1))
    assert_close(operation(2.0, Tensor(x)), operation(2.0, host(x)))
    check_grads(lambda t: operation(2.0, t), x)
    check_grads(lambda t: operation(2, t), x)


@given(st.sampled_from([ops.add, ops.subtract, ops.multiply, ops.divide, ops.power]), st.data())
def test_operands_broadcast(xp: Any, function: Any, data: Any) -> None:
    shapes = data.draw(broadcastable_shapes(2, max_side=3))
    pair = [data.draw(arrays(shape, low=0.5, high=2.0)) for shape in shapes]
    y = function(*map(Tensor, pair))
    assert y.shape == np.broadcast_shapes(*shapes)
    check_grads(function, *pair)


ALL = [*BINARY, operator.matmul]


@pytest.mark.parametrize("operation", ALL)
def test_an_array_may_stand_on_either_side(xp: Any, operation: Any) -> None:
    """The Tensor's operator runs in both cases, and the array is a constant."""
    a = np.array([[1.5, 2.0], [0.5, 3.0]])
    x, w = leaf(xp, a), xp.asarray(a.T.copy())
    for y, wanted, fn in (
        (operation(x, w), operation(a, a.T), lambda x: operation(x, w)),
        (operation(w, x), operation(a.T, a), lambda x: operation(w, x)),
    ):
        assert isinstance(y, Tensor) and y.node is not None
        assert_close(y, wanted)
        check_grads(fn, x, dtypes=["float64"])


@pytest.mark.parametrize("operation", BINARY)
def test_numpy_scalars_may_stand_on_either_side(xp: Any, operation: Any) -> None:
    x = leaf(xp, [1.5, 2.0], "float32")
    for number in (np.float32(2.0), np.int32(2)):
        for y in (operation(number, x), operation(x, number)):
            assert isinstance(y, Tensor) and y.node is not None
            assert y.dtype == (np.ones(1, "float32") * number).dtype


COMPARISONS = [operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge]


@pytest.mark.parametrize("operation", COMPARISONS)
def test_comparisons_are_element_by_element(xp: Any, operation: Any) -> None:
    a = np.array([1.0, 2.0, 3.0])
    x, w = leaf(xp, a), xp.asarray(a[::-1].copy())
    for y, wanted in (
        (operation(x, w), operation(a, a[::-1])),
        (operation(w, x), operation(a[::-1], a)),
        (operation(x, 2.0), operation(a, 2.0)),
        (operation(2.0, x), operation(2.0, a)),
        (operation(x, x), operation(a, a)),
    ):
        assert isinstance(y, Tensor) and y.node is None
        assert host(y).dtype == bool and host(y).tolist() == wanted.tolist()


def test_the_exponent_of_a_negative_number_has_no_slope(xp: Any) -> None:
    """As of a negative array: (−2)ˣ is real at whole x only."""
    x = Tensor(xp.asarray([2.0, 3.0]), requires_grad=True)
    y = ops.power(-2.0, x)
    assert_close(y, [4.0, -8.0])
    assert np.isnan(host(grad(y.sum(), x)[0])).all()


@pytest.mark.parametrize(("dtype", "least"), [("float32", -87.0), ("float64", -700.0)])
def test_the_left_tail_of_sigmoid_is_exp(xp: Any, dtype: str, least: float) -> None:
    x = xp.linspace(least, -40.0, 50).astype(dtype)
    assert_close(ops.sigmoid(x), np.exp(host(x)), rtol=1e-5)
