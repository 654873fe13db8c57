"""Tensor has the methods and operators of an ndarray, with the same results."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import pytest

from mini_nn import Tensor, backend, grad, ops
from mini_nn.check import check_grads
from tests.support import assert_close, host

VALUES = np.array([[0.5, -1.5, 2.5], [3.0, 0.25, -0.75]])


def leaf(xp: Any, values: Any = VALUES, dtype: str = "float64") -> Tensor:
    return Tensor(xp.asarray(np.array(values, dtype)), requires_grad=True)


METHODS: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    ("sum", (), {}),
    ("sum", (), {"axis": 1, "keepdims": True}),
    ("mean", (0,), {}),
    ("var", (), {"axis": -1, "ddof": 1}),
    ("std", (1,), {}),
    ("prod", (), {"axis": (0, 1)}),
    ("max", (), {"axis": 0}),
    ("min", (1,), {}),
    ("argmax", (1,), {}),
    ("argmin", (), {}),
    ("any", (), {}),
    ("all", (), {"axis": 0}),
    ("cumsum", (1,), {}),
    ("cumprod", (), {"axis": 0}),
    ("reshape", (3, 2), {}),
    ("reshape", ((3, 2),), {}),
    ("reshape", (-1,), {}),
    ("transpose", (), {}),
    ("transpose", (1, 0), {}),
    ("transpose", ((1, 0),), {}),
    ("swapaxes", (0, 1), {}),
    ("squeeze", (), {}),
    ("ravel", (), {}),
    ("flatten", (), {}),
    ("repeat", (2,), {"axis": 1}),
    ("repeat", (2,), {}),
    ("take", ([0, 2, 0],), {"axis": 1}),
    ("clip", (-1.0, 1.0), {}),
    ("astype", ("float32",), {}),
    ("trace", (), {}),
    ("tolist", (), {}),
]


@pytest.mark.parametrize(
    ("name", "args", "options"), METHODS, ids=[f"{n}-{a}-{o}" for n, a, o in METHODS]
)
def test_methods(xp: Any, name: str, args: Any, options: Any) -> None:
    if name == "take":
        args = (xp.asarray(np.array(args[0])),)
        wanted = VALUES.take(host(args[0]), **options)
    else:
        wanted = getattr(VALUES, name)(*args, **options)
    got = getattr(leaf(xp), name)(*args, **options)
    if name == "tolist":
        assert got == wanted
        return
    assert isinstance(got, Tensor) and got.dtype == wanted.dtype
    assert_close(got, wanted)
    assert (got.node is not None) == (got.dtype.kind == "f")


def test_attributes(xp: Any) -> None:
    x = leaf(xp, VALUES, "float32")
    assert (x.shape, x.ndim, x.size, x.dtype, len(x)) == ((2, 3), 2, 6, "float32", 2)
    assert_close(x.T, VALUES.T)
    y = leaf(xp, np.arange(12.0).reshape(2, 2, 3))
    assert_close(y.mT, host(y).swapaxes(1, 2))
    assert_close(y.T, host(y).T)
    assert_close(y.trace(), np.trace(host(y)))
    with pytest.raises(ValueError, match=r"\(3,\)"):
        leaf(xp, [1.0, 2.0, 3.0]).mT  # noqa: B018


def test_dot(xp: Any) -> None:
    x = leaf(xp)
    assert_close(x.dot(x.T), VALUES @ VALUES.T)
    assert_close(x.dot(2.0), VALUES * 2.0)


UNARY = [operator.neg, operator.abs]
BINARY = [operator.add, operator.sub, operator.mul, operator.truediv, operator.pow]


@pytest.mark.parametrize("operation", UNARY)
def test_unary_operators(xp: Any, operation: Any) -> None:
    assert_close(operation(leaf(xp)), operation(VALUES))
    check_grads(operation, leaf(xp))


@pytest.mark.parametrize("operation", BINARY)
def test_binary_operators_of_two_tensors(xp: Any, operation: Any) -> None:
    x, y = leaf(xp, np.abs(VALUES)), leaf(xp, VALUES[0])
    assert_close(operation(x, y), operation(np.abs(VALUES), VALUES[0]))
    check_grads(operation, x, y)


def test_matmul_operator(xp: Any) -> None:
    x = leaf(xp)
    assert_close(x @ x.T, VALUES @ VALUES.T)
    check_grads(operator.matmul, x, leaf(xp, VALUES.T))


def test_boolean_operators(xp: Any) -> None:
    a, b = VALUES > 0, VALUES > 1
    x, y = leaf(xp) > 0, leaf(xp) > 1
    array = xp.asarray(b)
    assert host(~x).tolist() == (~a).tolist()
    for got, wanted in (
        (x & y, a & b),
        (x | y, a | b),
        (x & array, a & b),
        (array & x, a & b),
        (array | x, a | b),
        (x & True, a),
    ):
        assert isinstance(got, Tensor) and host(got).tolist() == wanted.tolist()


KEYS = [
    0,
    -1,
    slice(None),
    (slice(None), 1),
    (..., 0),
    None,
    (0, slice(None, None, -1)),
    [1, 0],
    (slice(None), [0, 2, 0]),
]


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_indexing(xp: Any, key: Any) -> None:
    assert_close(leaf(xp)[key], VALUES[key])
    weights = np.cos(np.arange(VALUES[key].size)).reshape(VALUES[key].shape)
    x = leaf(xp)
    (g,) = grad(x[key], x, xp.asarray(weights))
    wanted = np.zeros_like(VALUES)
    np.add.at(wanted, key, weights)
    assert_close(g, wanted)


def test_indexing_by_tensors(xp: Any) -> None:
    x = leaf(xp)
    rows, columns = Tensor([1, 0, 1]), Tensor([0, 2, 0])
    assert_close(x[rows], VALUES[[1, 0, 1]])
    assert_close(x[rows, columns], VALUES[[1, 0, 1], [0, 2, 0]])
    assert_close(x[x > 0], VALUES[VALUES > 0])
    (g,) = grad(x[rows, columns].sum(), x)
    assert_close(g, [[0.0, 0.0, 1.0], [2.0, 0.0, 0.0]])
    with pytest.raises(IndexError):
        x[2]


def test_iteration(xp: Any) -> None:
    x = leaf(xp)
    first, second = x
    assert_close(first, VALUES[0])
    assert_close(grad(second.sum(), x)[0], [[0.0] * 3, [1.0] * 3])
    assert [host(row).tolist() for row in x] == VALUES.tolist()
    assert list(leaf(xp, np.zeros((0, 3)))) == []
    for call in (len, list):
        with pytest.raises(TypeError, match="0-d"):
            call(leaf(xp, 1.0))


def test_python_numbers(xp: Any) -> None:
    x = leaf(xp, 2.5)
    assert (float(x), int(x), x.item(), bool(x), x.tolist()) == (2.5, 2, 2.5, True, 2.5)
    assert type(x.item()) is float and not bool(leaf(xp, [0.0]))
    assert f"{x.item():.1f}" == "2.5"
    n = Tensor(xp.asarray(np.array(3)))
    assert [*range(n)] == [0, 1, 2] and [10, 20, 30, 40][n] == 40
    with pytest.raises(TypeError, match="only an integer tensor can be an index, got float64"):
        range(x)  # type: ignore[call-overload]
    for call in (float, Tensor.item):
        with pytest.raises((ValueError, TypeError)):
            call(leaf(xp))
    with pytest.raises(ValueError):
        bool(leaf(xp))


def test_equality_is_by_element_and_hash_by_identity(xp: Any) -> None:
    x, y = leaf(xp), leaf(xp)
    assert isinstance(x == y, Tensor) and bool((x == y).all())
    assert len({x, y, x}) == 2 and {x: "x", y: "y"}[y] == "y"
    assert not bool((x != y).any())


def test_repr(xp: Any) -> None:
    assert repr(Tensor([1.0, 2.0])) == "tensor(array([1., 2.], dtype=float32))"
    assert repr(Tensor([1.0], requires_grad=True)).endswith("dtype=float32), requires_grad=True)")
    assert repr(leaf(xp, 2.0) * 2.0) == "tensor(array(4.), requires_grad=True)"


def test_numpy_refuses_to_drop_a_history(xp: Any) -> None:
    x = leaf(xp)
    for call in (np.asarray, np.linalg.norm, np.median, lambda x: np.concatenate([x, x])):
        with pytest.raises(TypeError, match=r"drop this tensor's gradient.*mini_nn\.ops"):
            call(x)
    for call in (np.exp, lambda x: np.add(x, 1.0)):
        with pytest.raises(TypeError):
            call(x)


def test_numpy_takes_tensors_without_history(xp: Any, backend_name: str) -> None:
    x = leaf(xp).detach()
    if backend_name != "numpy":
        with pytest.raises(TypeError, match="device"):
            np.asarray(x)
        return
    assert np.shares_memory(np.asarray(x), x.data)
    assert np.asarray(x, "float32").dtype == "float32"
    assert not np.shares_memory(np.array(x), x.data)
    assert_close(np.linalg.norm(x), np.linalg.norm(VALUES))


def test_numpy_method_takes_the_numbers_out_of_the_tape(xp: Any, backend_name: str) -> None:
    x = leaf(xp)
    assert type(x.numpy()) is np.ndarray
    np.testing.assert_array_equal(x.numpy(), VALUES)
    if backend_name == "numpy":
        assert np.shares_memory(x.numpy(), x.data)


def test_to_another_backend_and_back(xp: Any, backend_name: str) -> None:
    """Gradients come back to where the tensor lives."""
    x = leaf(xp)
    there = x.to("numpy")
    assert type(there.data) is np.ndarray
    back = (there * there).to(backend_name)
    assert type(back.data) is backend.get(backend_name).array_type
    (g,) = grad(back.sum(), x)
    assert type(g.data) is backend.get(backend_name).array_type
    assert_close(g, 2 * VALUES)


NOT_METHODS = {
    "memory": "base byteswap ctypes data device dump dumps flags flat getfield itemsize nbytes "
    "setfield setflags strides to_device tobytes tofile view",
    "in place": "fill partition put resize sort",
    "complex numbers": "conj conjugate imag real",
    "functions of mini_nn.ops": "argsort diagonal nonzero round",
    "of no use to a model": "argpartition choose compress copy searchsorted",
}


def test_no_other_method_of_ndarray_is_missing() -> None:
    left_out = {name for names in NOT_METHODS.values() for name in names.split()}
    public = {name for name in dir(np.ndarray) if not name.startswith("_")}
    assert public - {*dir(Tensor)} <= left_out
    assert all(hasattr(ops, n) for n in NOT_METHODS["functions of mini_nn.ops"].split())
