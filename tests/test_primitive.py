"""Primitives of one's own: forwards, tables of derivatives, twins, and mistakes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from mini_nn import Tensor, grad, ops, primitive
from mini_nn.check import check_grads
from mini_nn.engine import Kept, data_of
from mini_nn.ops.elementwise import of
from tests.support import assert_close, host


def leaf(xp: Any, values: Any, dtype: str = "float64") -> Tensor:
    return Tensor(xp.asarray(np.array(values, dtype)), requires_grad=True)


@primitive
def hypotenuse(x: Any, y: Any, scale: float = 1.0) -> Any:
    return of(x).sqrt(x * x + y * y) * scale


hypotenuse.derivative(
    x=lambda g, x, y, scale: g * scale * x / hypotenuse(x, y),
    y=lambda g, x, y, scale: g * scale * y / hypotenuse(x, y),
)


def test_a_primitive_of_ones_own(xp: Any) -> None:
    a, b = np.array([3.0, 5.0]), np.array([4.0, 12.0])
    x, y = xp.asarray(a), xp.asarray(b)
    assert_close(hypotenuse(x, y), [5.0, 13.0])
    assert isinstance(hypotenuse(x, y), type(x)) and isinstance(hypotenuse(Tensor(x), y), Tensor)
    assert hypotenuse.__name__ == "hypotenuse"
    check_grads(hypotenuse, x, y, 2.0)
    assert_close(hypotenuse(y=y, x=Tensor(x), scale=2.0), [10.0, 26.0])


def test_a_joint_rule_and_a_primitive_of_many_operands(xp: Any) -> None:
    @primitive
    def weighted(*xs: Any, power: int = 1) -> Any:
        return sum(x * (i + 1) ** power for i, x in enumerate(xs))

    calls = []

    def rule(g: Any, needs: Any, xs: Any, power: int) -> Any:
        calls.append(needs)
        return tuple(g * (i + 1) ** power if need else None for i, need in enumerate(needs))

    weighted.derivative(xs=rule)
    x, y, z = (xp.asarray(np.array([float(i)])) for i in range(3))
    check_grads(lambda *xs: weighted(*xs, power=2), x, y, z)
    t, u = Tensor(x, requires_grad=True), Tensor(z, requires_grad=True)
    calls.clear()
    grad(weighted(t, y, u), [t, u])
    assert [*calls[0]] == [True, False, True]
    grad(weighted(t, y, u), u)
    assert [*calls[1]] == [False, False, True]

    @primitive
    def product(*xs: Any) -> Any:
        return math.prod(xs)

    product.derivative(
        xs=lambda g, xs: tuple(g * math.prod(xs[:i] + xs[i + 1 :]) for i in range(len(xs)))
    )
    check_grads(product, *(xp.asarray(np.array([i + 0.5, 2.0 - i])) for i in range(3)), order=3)

    @primitive
    def divided(x: Any, y: Any) -> Any:
        return x / y

    @divided.joint_derivative("x", "y")
    def _(g: Any, needs: Any, y: Any, x: Any) -> Any:
        shared = g / y
        return shared if needs[0] else None, -shared * x / y if needs[1] else None

    check_grads(divided, xp.ones(2) * 3.0, xp.asarray(np.array([[2.0], [0.5]])))


def test_outputs_that_are_not_used_give_zeros(xp: Any) -> None:
    seen = []

    @primitive
    def both(x: Any) -> Any:
        return x * 2.0, x[:1] * 3.0, x > 0

    def rule(g: Any, like: Any) -> Any:
        seen.append([host(part) for part in g[:2]])
        padded = ops.concatenate([g[1], of(g[1]).zeros(like.shape[0] - 1, like.dtype)])
        return g[0] * 2.0 + padded * 3.0

    both.derivative(x=rule)
    x = leaf(xp, [1.0, 2.0])
    first, second, third = both(x)
    assert third.node is None
    assert_close(grad(second.sum(), x, retain_graph=True)[0], [3.0, 0.0])
    assert [part.tolist() for part in seen[0]] == [[0.0, 0.0], [1.0]]
    assert_close(grad([first.sum(), second.sum()], x)[0], [5.0, 2.0])
    check_grads(lambda x: both(x)[:2], x)
    seen.clear()
    single = leaf(xp, [1.0, 2.0], "float32")
    grad(both(single)[1], single)
    assert [part.dtype for part in seen[0]] == ["float32", "float32"]


def test_several_outputs_whose_rule_asks_for_them(xp: Any) -> None:
    @primitive
    def sin_and_cos(x: Any) -> Any:
        return of(x).sin(x), of(x).cos(x)

    sin_and_cos.derivative(x=lambda g, y: g[0] * y[1] - g[1] * y[0])
    check_grads(sin_and_cos, xp.asarray(np.array([0.3, -1.2])), order=3)
    x = leaf(xp, [0.3, -1.2])
    s, c = sin_and_cos(x)
    assert_close(grad((s * s + c * c).sum(), x)[0], [0.0, 0.0], atol=1e-12)


def test_values_handed_over_by_kept(xp: Any) -> None:
    def composite(x: Any) -> Any:
        return ops.exp(x) * ops.exp(x)

    @primitive(composite=composite)
    def square_of_exp(x: Any) -> Any:
        e = of(x).exp(x)
        return Kept(e * e, e=e)

    def rule(g: Any, e: Any) -> Any:
        d = g * e  # in place on arrays of its own: allowed with a composite
        d *= e
        d *= 2.0
        return d

    square_of_exp.derivative(x=rule)
    check_grads(square_of_exp, xp.asarray(np.array([0.1, -0.4])), order=3)
    without = primitive(square_of_exp.forward)
    without.derivative(x=lambda g, e: g * 2.0 * e * e)
    x = leaf(xp, [0.1])
    assert_close(grad(without(x), x)[0], 2 * np.exp([0.2]))
    with pytest.raises(TypeError, match="keeps 'e'"):
        grad(without(x), x, create_graph=True)


def test_several_outputs_with_a_twin(xp: Any) -> None:
    """Each output may be used or not, at every order."""

    def definition(x: Any) -> Any:
        return ops.sin(x), ops.cos(x)

    @primitive(composite=definition)
    def sin_and_cos(x: Any) -> Any:
        s = of(x).sin(x)
        return Kept((s, of(x).cos(x)), sine=s)

    def rule(g: Any, y: Any, sine: Any) -> Any:
        return g[0] * y[1] - g[1] * sine

    sin_and_cos.derivative(x=rule)
    x = xp.asarray(np.array([0.3, -1.2]))
    check_grads(sin_and_cos, x, order=3)
    check_grads(lambda x: sin_and_cos(x)[0], x, order=3)
    check_grads(lambda x: sin_and_cos(x)[1], x, order=3)


def test_gradients_are_reduced_and_cast_by_the_engine(xp: Any) -> None:
    @primitive
    def plus(x: Any, y: Any) -> Any:
        return x + y

    plus.derivative(x=lambda g: g, y=lambda g: g)  # of the output's shape and dtype
    x, y = leaf(xp, [[1.0], [2.0]], "float32"), leaf(xp, [1.0, 2.0, 3.0])
    gx, gy = grad(plus(x, y).sum(), [x, y])
    assert (gx.shape, gx.dtype) == ((2, 1), "float32") and (gy.shape, gy.dtype) == ((3,), "float64")
    assert_close(gx, [[3.0], [3.0]])
    assert_close(gy, [2.0, 2.0, 2.0])


def test_an_input_may_be_called_y(xp: Any) -> None:
    """Then y is that input and not the output, at every order: see hypotenuse above."""
    x, y = leaf(xp, [3.0]), leaf(xp, [4.0])
    gx, gy = grad(hypotenuse(x, y), [x, y], create_graph=True)
    assert_close([gx, gy], [[0.6], [0.8]])
    assert_close(grad(gx, [x, y], retain_graph=True)[0], [16 / 125])
    assert_close(grad(gy, [x, y])[0], [-12 / 125])


def test_mistakes_in_defining_a_primitive(xp: Any) -> None:
    @primitive
    def twice(x: Any, axis: Any = None) -> Any:
        return x * 2

    with pytest.raises(TypeError, match=r"twice has no input 'y': its inputs are \['x', 'axis'\]"):
        twice.derivative(y=lambda g: g)
    with pytest.raises(TypeError, match="no input 'z'"):
        twice.joint_derivative("x", "z")(lambda g: (g, g))
    twice.derivative(x=lambda g, nonsense: g)
    with pytest.raises((KeyError, TypeError), match="nonsense"):
        twice(leaf(xp, [1.0]))


def test_mistakes_in_calling_a_primitive(xp: Any) -> None:
    x = leaf(xp, [1.0])
    with pytest.raises(TypeError, match=r"hypotenuse\(x, y, scale\) misses an argument"):
        hypotenuse(x)
    with pytest.raises(TypeError, match=r"does not take \['scales'\]"):
        hypotenuse(x, x, scales=2.0)
    with pytest.raises(TypeError, match="does not take 4 arguments"):
        hypotenuse(x, x, 1.0, 2.0)
    with pytest.raises(TypeError, match=r"does not take \['x'\]"):
        hypotenuse(x, x, x=x)


def test_a_rule_may_use_data_of_tensors(xp: Any) -> None:
    x = leaf(xp, [1.0])
    assert data_of(x) is x.data and data_of(3) == 3
