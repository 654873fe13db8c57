"""check_grads passes what is right and names what is wrong: each test plants one classic bug."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_nn import Tensor, backend, check, ops, primitive
from mini_nn.check import check_grads
from mini_nn.engine import data_of
from mini_nn.ops.elementwise import of
from tests.support import host


def cube(**rules: Any) -> Any:
    """x³ with the rule that a test plants."""

    @primitive
    def cube(x: Any) -> Any:
        return x * x * x

    cube.derivative(**rules)
    return cube


def numbers(xp: Any, *shape: int) -> Any:
    return xp.asarray(np.random.default_rng(5).standard_normal(shape))


def fails(pattern: str, fn: Any, *args: Any, **options: Any) -> None:
    with pytest.raises(AssertionError, match=pattern):
        check_grads(fn, *args, **options)


def test_right_rules_pass_to_order_3(xp: Any) -> None:
    check_grads(cube(x=lambda g, x: g * (3 * x * x)), numbers(xp, 2, 3), order=3)


def test_tensors_numbers_and_lists_may_be_arguments(xp: Any) -> None:
    check_grads(lambda x, p, axis: ops.sum(x**p, axis=axis[0]), Tensor(numbers(xp, 2, 3)), 3, [1])


def test_several_outputs_some_of_them_not_differentiable(xp: Any) -> None:
    check_grads(lambda x, y: (x * y, x > y, x + 1.0), numbers(xp, 3), numbers(xp, 2, 3))


def test_a_constant_has_derivative_0(xp: Any) -> None:
    check_grads(lambda x: ops.zeros_like(x), numbers(xp, 3))
    fails("order 1, argument 0", cube(x=lambda g, x: 0 * g), numbers(xp, 3))


def test_a_wrong_factor_is_named_with_element_and_values(xp: Any) -> None:
    def rule(g: Any, x: Any) -> Any:
        wrong = np.array([[1.0, 1.0, 1.0], [1.0, 1.0, 2.0]])
        return g * (3 * x * x) * of(x).asarray(wrong.astype(x.dtype))

    with pytest.raises(AssertionError) as caught:
        check_grads(cube(x=rule), numbers(xp, 2, 3))
    found = re.fullmatch(
        r"order 1, argument 0, element \(1, 2\): expected (\S+), got (\S+) \(complex step\)",
        str(caught.value),
    )
    assert found, str(caught.value)
    assert float(found[2]) == pytest.approx(2 * float(found[1]))


def test_the_argument_is_named_by_its_position(xp: Any) -> None:
    @primitive
    def product(x: Any, axis: Any, y: Any) -> Any:
        return x * y

    product.derivative(x=lambda g, y: g * y, y=lambda g, x: -g * x)
    fails("order 1, argument 2", product, numbers(xp, 3), 0, numbers(xp, 2, 3))


def test_a_rule_that_cannot_be_differentiated_again_fails_at_order_2_only(xp: Any) -> None:
    forgets_x = cube(x=lambda g, x: g * (3 * data_of(x) * data_of(x)))
    check_grads(forgets_x, numbers(xp, 3), order=1)
    fails("order 2, argument 0", forgets_x, numbers(xp, 3))
    forgets_g = cube(x=lambda g, x: data_of(g) * (3 * x * x))
    check_grads(forgets_g, numbers(xp, 3), order=1)
    fails("order 2, order-1 cotangent 0", forgets_g, numbers(xp, 3))


def test_cotangents_are_not_uniform(xp: Any) -> None:
    @primitive
    def flip(x: Any) -> Any:
        return x[::-1]

    flip.derivative(x=lambda g: g)  # right for a cotangent of ones
    fails("order 1", flip, numbers(xp, 3))


def test_float32_must_stay_float32(xp: Any) -> None:
    @primitive
    def double(x: Any) -> Any:
        return x * np.float64(2.0)

    double.derivative(x=lambda g: g * 2.0)
    fails("float32 arguments has dtype float64", double, numbers(xp, 3))
    check_grads(double, numbers(xp, 3), dtypes=["float64"])


def test_neither_arguments_nor_cotangents_may_be_changed(xp: Any) -> None:
    @primitive
    def clobber(x: Any) -> Any:
        x *= 2.0
        return x

    clobber.derivative(x=lambda g: g * 2.0)
    fails("changed", clobber, numbers(xp, 3))

    def rule(g: Any, x: Any) -> Any:
        g *= 3 * x * x
        return g

    fails("changed", cube(x=rule), numbers(xp, 3), order=0)


def test_writes_past_the_read_only_flag_are_found_too(xp: Any) -> None:
    original = numbers(xp, 3)

    def fn(x: Any) -> Any:
        base = data_of(x).base
        if base is not None:
            base[0] = 7.0
        return x * 1.0

    if getattr(original.view(), "base", None) is not None:
        fails("argument 0 is changed", fn, original, order=0)


def test_one_tensor_in_two_places_is_not_a_special_case(xp: Any) -> None:
    class ByIdentity:
        """x y, but the square of x is told apart by identity, and its derivative is forgotten."""

        def __call__(self, x: Any, y: Any) -> Any:
            return x * y.detach() if isinstance(x, Tensor) and x is y else x * y

    check_grads(lambda x, y: x * y, numbers(xp, 3), numbers(xp, 3))
    fails("one Tensor as argument 0 and argument 1", ByIdentity(), numbers(xp, 3), numbers(xp, 3))


def test_values_that_both_arguments_cannot_have_are_no_error(xp: Any) -> None:
    singular = xp.zeros((2, 2)) + 1.0
    check_grads(ops.solve, xp.eye(2) * 2.0, numbers(xp, 2, 2))
    check_grads(lambda b, a: ops.solve(a, b), singular, xp.eye(2) * 2.0)


def test_arrays_must_give_what_tensors_give(xp: Any) -> None:
    fails(
        "output 0 differs",
        lambda x: x * (1.0 if isinstance(x, Tensor) else 2.0),
        numbers(xp, 3),
        order=0,
    )
    fails("for Tensors is a", lambda x: data_of(x), numbers(xp, 3))


def test_a_fused_rule_must_agree_with_its_composite_twin(xp: Any) -> None:
    def planted(sign: float) -> Any:
        @primitive(composite=lambda x: x * x * (x * sign))
        def fused(x: Any) -> Any:
            return x * x * x

        fused.derivative(x=lambda g, x: g * (3 * x * x))
        return fused

    check_grads(planted(1.0), numbers(xp, 3))
    fails("create_graph=True", planted(-1.0), numbers(xp, 3), order=1)


def test_the_complex_step_sees_what_differences_cannot(xp: Any) -> None:
    almost = cube(x=lambda g, x: g * (3 * x * x) * (1 + 1e-7))
    fails("complex step", almost, numbers(xp, 3), order=1)
    hidden = lambda x: almost(ops.abs(x))  # noqa: E731
    check_grads(hidden, numbers(xp, 3), order=1)  # not analytic: only differences are left
    with pytest.raises(AssertionError, match="central difference"):
        check_grads(hidden, numbers(xp, 3), order=1, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", ["abs", "softplus", "relu"])
def test_functions_that_take_complex_numbers_but_are_not_analytic(xp: Any, name: str) -> None:
    check_grads(getattr(ops, name), numbers(xp, 4))


def test_functions_that_refuse_complex_numbers_or_drop_the_imaginary_part(xp: Any) -> None:
    def refusing(x: Any) -> Any:
        if x.dtype.kind == "c":
            raise TypeError("no complex numbers, please")
        return x * x

    check_grads(refusing, numbers(xp, 3))
    check_grads(lambda x: ops.astype(x * x, "float64"), numbers(xp, 3), dtypes=["float64"])


def test_nan_is_wrong(xp: Any) -> None:
    fails("got nan", cube(x=lambda g, x: g * math.nan), numbers(xp, 3), order=1)


def test_elements_that_are_not_looked_at_count_along_a_random_direction(xp: Any) -> None:
    size = 5000
    wrong = np.zeros(size)
    wrong[4321] = 1.0  # not among the 64 that the default generator draws

    def rule(g: Any, x: Any) -> Any:
        return g * (3 * x * x + of(x).asarray(wrong.astype(x.dtype)))

    fails("a random direction", cube(x=rule), numbers(xp, size), order=1)


def test_empty_and_0_d_arguments(xp: Any) -> None:
    right = cube(x=lambda g, x: g * (3 * x * x))
    check_grads(right, numbers(xp, 0, 3))
    check_grads(right, xp.asarray(np.array(0.7)))


def test_something_must_be_differentiable() -> None:
    with pytest.raises(TypeError, match="floating-point arrays and found none"):
        check_grads(lambda n: n, 3)


def test_the_caller_keeps_its_arguments(xp: Any) -> None:
    x = numbers(xp, 3)
    before = host(x).copy()
    check_grads(lambda a: a * a, x)
    np.testing.assert_array_equal(host(x), before)
    x[0] = 1.0  # and may still write to them


# strategies


@given(st.data(), st.integers(1, 4))
def test_broadcastable_shapes(data: Any, n: int) -> None:
    shapes = data.draw(check.broadcastable_shapes(n, max_side=3))
    assert len(shapes) == n
    np.broadcast_shapes(*shapes)


@given(check.shapes_with_axis())
def test_shapes_with_axis(pair: Any) -> None:
    shape, axis = pair
    np.empty(shape).sum(axis=axis)


@given(st.data(), st.sampled_from(["float32", "float64"]))
def test_arrays_live_on_the_current_backend(xp: Any, data: Any, dtype: str) -> None:
    x = data.draw(check.arrays((2, 3), dtype, low=-1.0, high=2.0))
    assert isinstance(x, backend.current().array_type)
    assert x.shape == (2, 3) and x.dtype == dtype
    assert host(x).min() >= -1.0 and host(x).max() <= 2.0


@given(check.away_from([0.0, 1.0], margin=0.1))
def test_away_from(xp: Any, x: Any) -> None:
    assert np.abs(host(x)).min() >= 0.1 and np.abs(host(x) - 1.0).min() >= 0.1


@given(check.separated(check.shapes_with_axis(min_side=0).map(lambda pair: pair[0]), margin=0.5))
def test_separated(xp: Any, x: Any) -> None:
    assert np.diff(np.sort(host(x).ravel())).min(initial=0.5) >= 0.5 - 1e-12


def test_only_the_strategies_need_hypothesis() -> None:
    program = (
        "import sys; sys.modules['hypothesis'] = None\n"
        "import numpy, mini_nn\n"
        "mini_nn.check.check_grads(lambda x: x * x, numpy.ones(2))\n"
        "try:\n    mini_nn.check.arrays((2,))\n"
        "except ImportError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "pip install 'mini-nn[test]'" in done.stdout, done.stderr
