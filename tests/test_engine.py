"""Tensor, primitive, grad and backward: the semantics of torch.autograd, and errors that teach."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_nn import Tensor, grad, no_grad, ops, tensor
from mini_nn.check import arrays
from tests.support import assert_close, host


def leaf(xp: Any, values: Any, dtype: str = "float64") -> Tensor:
    return Tensor(xp.asarray(np.array(values, dtype)), requires_grad=True)


# grad


def test_the_result_is_a_tuple_even_for_one_input(xp: Any) -> None:
    x = leaf(xp, [1.0, 2.0])
    gradients = grad((x * x).sum(), x)
    assert isinstance(gradients, tuple) and len(gradients) == 1
    assert_close(gradients[0], [2.0, 4.0])
    assert gradients[0].node is None and x.grad is None


def test_several_outputs_are_summed(xp: Any) -> None:
    x, y = leaf(xp, 3.0), leaf(xp, 5.0)
    gx, gy = grad([x * y, x * x], [x, y])
    assert_close(gx, 5.0 + 6.0)
    assert_close(gy, 3.0)


def test_cotangents_weigh_the_outputs(xp: Any) -> None:
    x = leaf(xp, [1.0, 2.0])
    v = xp.asarray(np.array([10.0, 100.0]))
    for given_as in (v, Tensor(v), [v], (Tensor(v),)):
        assert_close(grad(x * x, x, given_as)[0], [20.0, 400.0])
    one = grad([x * x, x.sum()], x, [v, None])[0]
    assert_close(one, [21.0, 401.0])


def test_an_intermediate_result_may_be_an_input(xp: Any) -> None:
    x = leaf(xp, [1.0, 2.0])
    y = x * x
    z = (y * y).sum()
    gx, gy = grad(z, [x, y])
    assert_close(gy, [2.0, 8.0])
    assert_close(gx, [4.0, 32.0])


def test_an_output_is_its_own_input(xp: Any) -> None:
    x = leaf(xp, 2.0)
    y = x * x
    assert [host(g).item() for g in grad(y, [y, x, x])] == [1.0, 4.0, 4.0]


def test_the_path_through_a_cut_input_does_not_count_twice(xp: Any) -> None:
    """z = y + x with y = 2x: dz/dy is the partial derivative, dz/dx the total one."""
    x = leaf(xp, 1.0)
    y = x * 2.0
    assert [host(g).item() for g in grad(y + x, [x, y])] == [3.0, 1.0]


def test_operands_are_told_apart_by_position(xp: Any) -> None:
    x = leaf(xp, [3.0, -2.0])
    for fn, wanted in (
        (lambda x: x - x, [0.0, 0.0]),
        (lambda x: x / x, [0.0, 0.0]),
        (lambda x: x * x, [6.0, -4.0]),
        (lambda x: x + x, [2.0, 2.0]),
        (lambda x: ops.maximum(x, x), [1.0, 1.0]),
        (lambda x: ops.concatenate([x, x]), [2.0, 2.0]),
        (lambda x: ops.where(x > 0, x, x), [1.0, 1.0]),
    ):
        assert_close(grad(fn(x).sum(), x)[0], wanted)


def test_diamonds(xp: Any) -> None:
    """f = a b with a = x², b = sin(a) x: three paths from f to x."""
    x = leaf(xp, [0.7, -1.3])
    v = host(x)
    a = x * x
    wanted = 3 * v**2 * np.sin(v**2) + v**3 * np.cos(v**2) * 2 * v
    assert_close(grad((a * (ops.sin(a) * x)).sum(), x)[0], wanted)


def test_derivatives_of_any_order(xp: Any) -> None:
    x = leaf(xp, [0.3, -0.8])
    v = host(x)
    for fn, derivative in (
        (ops.sin, lambda k: np.sin(v + k * np.pi / 2)),
        (ops.exp, lambda k: np.exp(v)),
        (lambda x: x**4.0, lambda k: math.perm(4, k) * v ** (4 - k)),
        (lambda x: 1 / (x + 2), lambda k: (-1) ** k * math.factorial(k) / (v + 2) ** (k + 1)),
    ):
        y = fn(x)
        for k in (1, 2, 3, 4):
            (y,) = grad(y.sum(), x, create_graph=True)
            assert_close(y, derivative(k))


def test_create_graph_records_the_dependence_on_the_cotangent(xp: Any) -> None:
    x, v = leaf(xp, [1.0, 2.0]), leaf(xp, [3.0, 5.0])
    (g,) = grad(x * x, x, v, create_graph=True)
    assert_close(grad(g.sum(), [x, v])[1], [2.0, 4.0])


def test_without_create_graph_the_gradient_has_no_history(xp: Any) -> None:
    x, v = leaf(xp, [1.0, 2.0]), leaf(xp, [3.0, 5.0])
    assert grad(x * x, x, v)[0].node is None
    y = x * x
    with no_grad():  # create_graph decides, as in torch
        (g,) = grad(y, x, v, create_graph=True)
    assert g.node is not None


def test_unused_inputs(xp: Any) -> None:
    x, unused = leaf(xp, [1.0, 2.0]), leaf(xp, [[3.0]], "float32")
    with pytest.raises(RuntimeError, match=r"input 1, of shape \(1, 1\).*allow_unused"):
        grad(x.sum(), [x, unused])
    assert grad(x.sum(), [x, unused], allow_unused=True)[1] is None
    zero = grad(x.sum(), [x, unused], materialize_grads=True)[1]
    assert (zero.shape, zero.dtype, host(zero).item()) == ((1, 1), "float32", 0.0)


def test_a_graph_is_released_by_use(xp: Any) -> None:
    x = leaf(xp, [1.0, 2.0])
    y = (x * x).sum()
    grad(y, x)
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        grad(y, x)
    with pytest.raises(RuntimeError, match="released"):
        (y * 2.0).backward()
    y = (x * x).sum()
    for _ in range(2):
        assert_close(grad(y, x, retain_graph=True)[0], [2.0, 4.0])
    assert_close(grad(y, x, create_graph=True)[0], [2.0, 4.0])  # retains, too
    y.backward()
    with pytest.raises(RuntimeError, match="released"):
        y.backward()


def test_a_released_trunk_is_noticed_from_another_branch(xp: Any) -> None:
    x = leaf(xp, [1.0, 2.0])
    trunk = x * x
    first, second = trunk.sum(), (trunk * 3.0).sum()
    first.backward()
    with pytest.raises(RuntimeError, match="released"):
        second.backward()


def test_wrong_calls_of_grad(xp: Any) -> None:
    x = leaf(xp, [1.0, 2.0])
    y = x * x
    with pytest.raises(RuntimeError, match=r"one number.*\(2,\)"):
        grad(y, x)
    with pytest.raises(RuntimeError, match=r"\.sum\(\)"):
        y.backward()
    with pytest.raises(ValueError, match=r"\(2,\).*\(3,\)"):
        grad(y, x, xp.ones(3))
    with pytest.raises(ValueError, match="2 outputs"):
        grad([y, y], x, [xp.ones(2)])
    with pytest.raises(RuntimeError, match=r"input 0, of shape \(2,\), does not require"):
        grad(y.sum(), Tensor(x.data))
    with pytest.raises(RuntimeError, match="no history"):
        grad(Tensor(x.data).sum(), x)
    with no_grad():
        silent = (x * x).sum()
    with pytest.raises(RuntimeError, match=r"no_grad\(\)"):
        silent.backward()


@given(st.data())
def test_gradients_are_linear_in_the_cotangent(xp: Any, data: Any) -> None:
    x = Tensor(data.draw(arrays((2, 3))), requires_grad=True)
    u, v = (data.draw(arrays((2, 2))) for _ in range(2))
    y = ops.tanh(x @ ops.transpose(x))
    gu, gv, both = (grad(y, x, w, retain_graph=True)[0] for w in (u, v, 2.0 * u - 3.0 * v))
    assert_close(both, 2.0 * host(gu) - 3.0 * host(gv), atol=1e-9, rtol=1e-9)


# backward


def test_backward_adds_up(xp: Any) -> None:
    x, y = leaf(xp, [1.0, 2.0]), leaf(xp, [3.0, 4.0])
    for times in (1, 2, 3):
        (x * y).sum().backward()
        assert isinstance(x.grad, type(x.data))
        assert_close(x.grad, times * host(y))
        assert_close(y.grad, times * host(x))
    x.grad = None
    assert x.grad is None
    x.grad = Tensor(xp.ones(2))
    (x * y).backward(xp.asarray(np.array([0.0, 1.0])))
    assert_close(x.grad, [1.0, 5.0])


def test_0_d_gradients_stay_arrays(xp: Any) -> None:
    x = leaf(xp, 2.0, "float32")
    for _ in range(2):
        (x * x).backward()
        assert isinstance(x.grad, type(x.data)) and x.grad.dtype == "float32"
    assert_close(x.grad, 8.0)


def test_intermediate_results_keep_no_grad(xp: Any) -> None:
    x = leaf(xp, [1.0, 2.0])
    y = x * x
    y.sum().backward()
    assert y.grad is None and x.grad is not None


@pytest.mark.parametrize(
    "fn",
    [
        lambda a, b: a + b,
        lambda a, b: ops.concatenate([a, b]),
        lambda a, b: ops.stack([a, b]),
        lambda a, b: ops.where(a > b, a, b) + ops.where(a > b, b, a),
        lambda a, b: (a + b).reshape(3, 1) + a,
        lambda a, b: ops.add(a.reshape(1, 3), b).sum(axis=0),
    ],
)
def test_gradients_never_share_memory(xp: Any, fn: Any) -> None:
    """Scaling one in place, as an optimiser or clipping does, leaves everything else alone."""
    a, b = leaf(xp, [1.0, 2.0, 3.0]), leaf(xp, [4.0, 5.0, 6.0])
    y = fn(a, b)
    v = xp.ones(y.shape)
    y.backward(v)
    before = host(b.grad).copy()
    a.grad[...] *= 100.0
    assert_close(b.grad, before)
    assert_close(v, host(xp.ones(y.shape)))
    assert_close(a, [1.0, 2.0, 3.0])


# Tensor


def test_a_tensor_shares_its_array_and_tensor_copies(xp: Any) -> None:
    array = xp.ones(3)
    assert Tensor(array).data is array and Tensor(Tensor(array)).data is array
    copied = tensor(array, requires_grad=True)
    copied.data[0] = 7.0
    assert_close(array, [1.0, 1.0, 1.0])
    assert copied.requires_grad


def test_dtypes_of_what_is_not_an_array(xp: Any) -> None:
    for data, dtype in (
        (1.5, "float32"),
        ([1.0, 2.0], "float32"),
        ([[1, 2]], "int64"),
        (3, "int64"),
        ([True, False], "bool"),
        (True, "bool"),
        (np.float64(1.5), "float64"),
        (xp.ones(2), "float64"),
    ):
        assert Tensor(data).dtype == dtype
    assert Tensor([1.5], dtype="float64").dtype == "float64"
    assert Tensor(xp.ones(2), dtype="float32").dtype == "float32"


def test_only_floating_point_numbers_can_require_a_gradient(xp: Any) -> None:
    for data in ([1, 2], [True]):
        with pytest.raises(TypeError, match=r"floating-point.*astype\('float32'\)"):
            Tensor(data, requires_grad=True)
    with pytest.raises(TypeError, match="floating-point"):
        Tensor(xp.arange(3)).requires_grad = True


def test_arrays_of_unknown_libraries_are_refused() -> None:
    class Foreign:
        pass

    with pytest.raises(TypeError, match=r"known backend.*Foreign.*from_dlpack"):
        Tensor(Foreign())


def test_requires_grad_can_be_switched_on_leaves_only(xp: Any) -> None:
    x = leaf(xp, [1.0, 2.0])
    x.requires_grad = False
    assert x.node is None and (x * x).node is None
    x.requires_grad = True
    y = x * x
    y.requires_grad = True  # it does already
    with pytest.raises(RuntimeError, match=r"detach\(\)"):
        y.requires_grad = False
    with pytest.raises(RuntimeError, match="only a leaf"):
        y.grad = xp.ones(2)
    with pytest.raises(ValueError, match=r"shape \(2,\), got \(3,\)"):
        x.grad = xp.ones(3)


def test_detach_shares_the_array_and_cuts_the_tape(xp: Any) -> None:
    x = leaf(xp, [1.0, 2.0])
    y = (x * x).detach()
    assert y.node is None
    assert_close(grad((x * y).sum(), x)[0], [1.0, 4.0])
    assert x.detach().data is x.data


def test_assignment_in_place_names_the_alternatives(xp: Any) -> None:
    x = leaf(xp, [1.0, 2.0])
    with pytest.raises(TypeError, match=r"ops\.where.*ops\.scatter_add.*x\.data\[\.\.\.\]"):
        x[0] = 3.0
    y = x
    y += 1.0  # makes a new Tensor
    assert y is not x
    assert_close(x, [1.0, 2.0])


def test_no_grad_as_block_and_as_decorator(xp: Any) -> None:
    x = leaf(xp, [1.0, 2.0])

    @no_grad()
    def double(x: Tensor) -> Tensor:
        return x * 2.0

    for _ in range(2):
        assert double(x).node is None
    with no_grad():
        assert (x * x).node is None
        with no_grad():
            pass
        assert (x * x).node is None
    assert (x * x).node is not None
    with pytest.raises(KeyError), no_grad():
        raise KeyError
    assert (x * x).node is not None
