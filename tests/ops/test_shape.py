"""Functions that move elements: one oracle for all of their derivatives, and what they refuse."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_nn import Tensor, backend, grad, no_grad, ops, primitive
from mini_nn.check import arrays, check_grads
from tests import device
from tests.support import assert_close, host

SIDES = st.tuples(st.integers(0, 3), st.integers(0, 3))
AXIS = st.integers(-3, 2)
MODES = st.sampled_from(["constant", "edge", "reflect", "wrap"])
MOVES: dict[str, Any] = {
    "reshape": lambda d: lambda x: ops.reshape(x, d(st.sampled_from([(-1,), (4, -1), (3, 2, 4)]))),
    "transpose": lambda d: lambda x: ops.transpose(x, d(st.permutations([0, 1, -1]))),
    "swapaxes": lambda d: lambda x: ops.swapaxes(x, d(AXIS), d(AXIS)),
    "moveaxis": lambda d: lambda x: ops.moveaxis(x, d(AXIS), d(AXIS)),
    "expand_dims": lambda d: lambda x: ops.expand_dims(x, d(st.sampled_from([0, -1, (1, 3)]))),
    "broadcast_to": lambda d: lambda x: ops.broadcast_to(x[:, :1], (3, 2, d(SIDES)[0], 4)),
    "flip": lambda d: lambda x: ops.flip(x, d(st.sampled_from([None, 1, (0, -1)]))),
    "roll": lambda d: lambda x: ops.roll(x, d(SIDES), (d(AXIS), 1)),
    "roll flat": lambda d: lambda x: ops.roll(x, d(st.integers(-30, 30))),
    "repeat": lambda d: lambda x: ops.repeat(x, d(st.integers(0, 3)), d(st.none() | AXIS)),
    "repeat each": lambda d: lambda x: ops.repeat(x, [*d(SIDES), 1], 1),
    "tile": lambda d: lambda x: ops.tile(x, d(st.lists(st.integers(0, 2), max_size=4))),
    "split": lambda d: lambda x: ops.split(x, sorted(d(SIDES)), d(AXIS))[d(st.integers(0, 2))],
    "tril": lambda d: lambda x: ops.tril(x, d(AXIS)),
    "triu": lambda d: lambda x: ops.triu(x, d(AXIS)),
    "pad": lambda d: lambda x: ops.pad(x, [d(SIDES) for _ in x.shape], d(MODES)),
}


@pytest.mark.parametrize("name", MOVES)
@given(data=st.data())
def test_an_element_receives_what_its_copies_receive(xp: Any, name: str, data: Any) -> None:
    """The oracle: moving the numbers 1 … n shows where each element went; 0 stands for none."""
    drawn: list[Any] = []
    replayed: list[Any] = []

    def draw(strategy: Any) -> Any:
        if replayed:
            return replayed.pop(0)
        drawn.append(data.draw(strategy))
        return drawn[-1]

    move = MOVES[name](draw)
    places = host(move(xp.arange(1, 25).reshape(2, 3, 4)))
    replayed = [*drawn]
    x = np.linspace(-1, 1, 24).reshape(2, 3, 4)
    leaf = Tensor(xp.asarray(x), requires_grad=True)
    y = move(leaf)
    assert_close(y, np.concatenate([[0.0], x.ravel()])[places])
    g = np.random.default_rng(0).standard_normal(places.shape)
    (found,) = grad(y, leaf, xp.asarray(g), create_graph=True)
    wanted = np.bincount(places.ravel(), g.ravel(), 25)[1:]
    assert_close(found, wanted.reshape(2, 3, 4), atol=1e-12)


def test_rules_that_forget_copies_are_found(xp: Any) -> None:
    @primitive
    def doubled(x: Any) -> Any:
        return ops.elementwise.of(x).repeat(x, 2)

    doubled.derivative(x=lambda g: g[::2])  # the first copy only
    with pytest.raises(AssertionError):
        check_grads(doubled, xp.asarray([1.0, 2.0]))

    @primitive
    def mirrored(x: Any) -> Any:
        return ops.elementwise.of(x).pad(x, (1, 1), "reflect")

    mirrored.derivative(x=lambda g: g[1:-1])  # the border's share is lost
    with pytest.raises(AssertionError):
        check_grads(mirrored, xp.asarray([1.0, 2.0, 3.0]))
    check_grads(lambda x: ops.pad(x, 1, "reflect"), xp.asarray([1.0, 2.0, 3.0]))


# Laws


@given(arrays((2, 5)), st.lists(st.integers(0, 5), max_size=3), st.sampled_from([0, 1, -1]))
def test_concatenating_what_was_split_gives_it_back(x: Any, cuts: Any, axis: int) -> None:
    parts = ops.split(x, sorted(cuts), axis)
    assert isinstance(parts, tuple) and len(parts) == len(cuts) + 1
    assert_close(ops.concatenate(parts, axis), x)
    assert_close(ops.concatenate(ops.split(x, x.shape[axis], axis), axis), x)


@given(arrays((2, 3, 4)), st.permutations(range(3)), st.integers(-9, 9), AXIS)
def test_inverse_movements(x: Any, axes: Any, shift: int, axis: int) -> None:
    inverse = np.argsort(axes).tolist()
    assert_close(ops.transpose(ops.transpose(x, axes), inverse), x)
    assert_close(ops.moveaxis(ops.moveaxis(x, axis, 0), 0, axis), x)
    assert_close(ops.roll(ops.roll(x, shift, axis), -shift, axis), x)
    assert_close(ops.flip(ops.flip(x, axis), axis), x)
    assert_close(ops.squeeze(ops.expand_dims(x, axis), axis), x)
    assert_close(ops.tril(x) + ops.triu(x, 1), x)


@given(arrays((2, 3)), arrays((2, 3)), st.sampled_from([0, 1, 2, -1]))
def test_stack_is_concatenate_along_a_new_axis(a: Any, b: Any, axis: int) -> None:
    wide = [ops.expand_dims(a, axis), ops.expand_dims(b, axis)]
    assert_close(ops.stack([a, b], axis), ops.concatenate(wide, axis))


def test_an_unused_part_gets_zeros(xp: Any) -> None:
    x = Tensor(xp.ones(4, "float32"), requires_grad=True)
    first, _, last = ops.split(x, [1, 2])
    (2 * last.sum() + (first * first).sum()).backward()
    assert_close(x.grad, np.array([2, 0, 2, 2], "float32"))


def test_constants_among_joined_arrays_cost_nothing(xp: Any) -> None:
    x = Tensor(xp.ones((1, 2)), requires_grad=True)
    constant = xp.zeros((3, 2))
    for y in (ops.concatenate([constant, x, constant]), ops.stack([constant[:1], x])):
        assert [parent is not None for parent in y.node.parents].count(True) == 1
        assert not any(hasattr(value, "dtype") for value in y.node.kept.values())
        (g,) = grad(y, x, xp.ones(y.shape))
        assert_close(g, np.ones((1, 2)))


def test_movements_keep_no_array(xp: Any) -> None:
    x = Tensor(xp.ones((2, 3, 4)), requires_grad=True)
    for fn in (
        lambda t: ops.reshape(t, -1),
        ops.transpose,
        ops.flip,
        lambda t: ops.split(t, 2)[0],
        lambda t: ops.pad(t, 1),
        ops.tril,
    ):
        assert not any(hasattr(value, "dtype") for value in fn(x).node.kept.values())


def test_views_where_numpy_has_views(xp: Any) -> None:
    x = xp.zeros((2, 3, 4), "float32")
    for fn in (
        lambda t: ops.reshape(t, (6, 4)),
        ops.transpose,
        ops.matrix_transpose,
        lambda t: ops.moveaxis(t, 0, 2),
        lambda t: ops.expand_dims(t, 1)[:, 0],
        lambda t: ops.split(t, 3, 1)[0],
        lambda t: ops.flip(t, 1),
    ):
        view = fn(Tensor(x)).data
        before = float(host(view).sum())
        x += 1
        assert float(host(view).sum()) == before + view.size


# Padding


@pytest.mark.parametrize("mode", ["edge", "reflect", "wrap"])
def test_borders_longer_than_the_array(xp: Any, mode: str) -> None:
    x = np.array([[1.0, 2.0, 4.0]])
    for sides in (((0, 0), (5, 7)), ((2, 3), (1, 1))):
        assert_close(ops.pad(xp.asarray(x), sides, mode), np.pad(x, sides, mode))
        check_grads(lambda t, s=sides: ops.pad(t, s, mode), xp.asarray(x))


def test_forms_of_pad_width(xp: Any) -> None:
    x = np.arange(6.0).reshape(2, 3)
    for width in (2, (1, 2), ((1, 2),), ((0, 1), (2, 0)), [[0, 1], [2, 0]]):
        assert_close(ops.pad(xp.asarray(x), width), np.pad(x, width))
    for width in (-1, (1, -1), (1, 2, 3), ((1, 2), (3, 4), (5, 6))):
        with pytest.raises(ValueError, match="pad_width"):
            ops.pad(xp.asarray(x), width)


def test_what_pad_refuses(xp: Any) -> None:
    with pytest.raises(ValueError, match="'mirror'"):
        ops.pad(xp.ones(3), 1, "mirror")
    with pytest.raises(ValueError):
        ops.pad(xp.ones(0), 1, "edge")


# Refusals that say what was seen


def test_joining_refuses(xp: Any) -> None:
    with pytest.raises(ValueError, match="0 arrays"):
        ops.concatenate([])
    with pytest.raises(ValueError, match="use stack"):
        ops.concatenate([xp.asarray(1.0), xp.asarray(2.0)])
    with pytest.raises(ValueError, match=r"\(2,\).*\(3,\)"):
        ops.stack([xp.ones(2), xp.ones(3)])
    with pytest.raises(ValueError):
        ops.concatenate([xp.ones((2, 3)), xp.ones((2, 4))])
    with pytest.raises(ValueError):
        ops.split(xp.ones(5), 2)
    with pytest.raises(ValueError, match="ascending"):  # NumPy would hand out overlapping parts
        ops.split(xp.ones(5), [3, 1])
    assert [part.shape for part in ops.split(xp.ones(5), [2, -1, 9])] == [(2,), (2,), (1,), (0,)]
    with pytest.raises(ValueError, match=r"\(3,\)"):
        ops.matrix_transpose(xp.ones(3))


# Making arrays


def test_created_dtypes_and_values(xp: Any) -> None:
    made = [ops.zeros((2, 3)), ops.ones(2), ops.full((2,), 7), ops.eye(2, 3, 1), ops.linspace(0, 1)]
    assert [t.dtype for t in made] == ["float32"] * 5
    assert all(type(t.data) is backend.current().array_type for t in made)
    assert ops.arange(5).dtype == ops.arange(1, 9, 2).dtype == "int64"
    assert ops.arange(0.5, 3).dtype == ops.arange(0, 1, 0.25).dtype == "float32"
    assert ops.arange(3, dtype="float64").dtype == "float64"
    assert ops.arange(4, 0, -2).tolist() == [4, 2]
    assert ops.linspace(0, 1, 4, endpoint=False).tolist() == [0, 0.25, 0.5, 0.75]
    assert ops.full((2,), 7, "int64").tolist() == [7, 7]


def test_like_functions_follow_their_argument(xp: Any) -> None:
    x = xp.ones((2, 3), "float64")
    leaf = Tensor(x, requires_grad=True)
    for made, number in (
        (ops.zeros_like(leaf), 0.0),
        (ops.ones_like(leaf), 1.0),
        (ops.full_like(leaf, 2.5), 2.5),
    ):
        assert made.node is None and made.dtype == "float64"
        assert_close(made, np.full((2, 3), number))
    assert not isinstance(ops.zeros_like(x), Tensor)
    assert ops.ones_like(x, dtype="int64").dtype == "int64"


def test_gradients_travel_back_to_where_they_came_from(xp: Any) -> None:
    device.register()
    here = backend.current().name
    x = Tensor(xp.asarray([1.0, 2.0], "float32"), requires_grad=True)
    there = ops.to_backend(x, here, "strict")
    assert backend.backend_of(there.data).name == "strict"
    back = ops.to_backend(there * there, "strict", "numpy")
    assert type(back.data) is np.ndarray
    weights = Tensor(np.array([1.0, 10.0], "float32"))
    (g,) = grad((back * weights).sum(), x, create_graph=True)
    assert backend.backend_of(g.data).name == here
    assert_close(g, np.array([2.0, 40.0], "float32"))
    (second,) = grad(g.sum(), x)
    assert_close(second, np.array([2.0, 20.0], "float32"))
    with no_grad():
        assert ops.to_backend(x, here, here).data is x.data


def test_sizes_are_counted_not_guessed(xp: Any) -> None:
    """−1 in a shape has no answer for empty arrays; where lengths are known it is not used."""
    x = Tensor(xp.zeros((2, 0, 3), "float32"), requires_grad=True)
    for fn, shape in (
        (lambda t: ops.tile(t, (2, 2, 1)), (4, 0, 3)),
        (lambda t: ops.repeat(t, 2, 0), (4, 0, 3)),
        (lambda t: ops.pad(t, 1), (4, 2, 5)),
        (lambda t: ops.concatenate([t, t], 1), (2, 0, 3)),
        (lambda t: ops.reshape(t, (0, 6)), (0, 6)),
    ):
        y = fn(x)
        (g,) = grad(y, x, xp.ones(shape, "float32"))
        assert (y.shape, g.shape, g.dtype) == (shape, x.shape, "float32")
        assert math.prod(y.shape) == y.size
