"""Laws of the engine as a whole, found by planting bugs that no other test noticed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mini_nn import Rng, Tensor, checkpoint, grad, no_grad, ops, tape
from tests.support import assert_close, host


def leaf(xp: Any, *values: float) -> Tensor:
    return Tensor(xp.asarray(np.array(values)), requires_grad=True)


@pytest.mark.parametrize("kind", ["checkpoint", "twin"])
def test_a_replay_does_not_walk_what_lies_below_it(
    xp: Any, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nodes are put in order a few times for each block, not once for each block above them."""
    ages: list[int] = []

    def age(node: Any) -> int:
        ages.append(node.order)
        return int(node.order)

    monkeypatch.setattr(tape, "_age", age)
    blocks = 40
    x = y = leaf(xp, 0.5, -1.0)
    for _ in range(blocks):
        y = checkpoint(ops.tanh, y) if kind == "checkpoint" else ops.silu(y)
    grad(y.sum(), x, create_graph=kind == "twin")
    assert blocks < len(ages) < 8 * blocks  # with the walk below: more than blocks² / 2 = 800


def test_what_backward_has_stored_is_not_written_to_later(xp: Any) -> None:
    """A gradient that was taken out stays what it was when the next pass adds to it."""
    x = leaf(xp, 1.0, 2.0)
    (x * x).sum().backward()
    taken = x.grad
    given = xp.ones(2)
    (x * x).sum().backward()
    assert_close(taken, [2.0, 4.0])
    assert_close(x.grad, [4.0, 8.0])
    x.grad = given
    (x * x).sum().backward()
    assert_close(given, [1.0, 1.0])
    assert_close(x.grad, [3.0, 5.0])


def test_a_pass_leaves_recording_as_it_was(xp: Any) -> None:
    x = leaf(xp, 1.0, 2.0)
    for create_graph in (False, True):
        y, z = (x * x).sum(), (x * x).sum()
        with no_grad():
            grad(y, x, create_graph=create_graph)
            assert (x * x).node is None
        grad(z, x, create_graph=create_graph)
        assert (x * x).node is not None


def test_a_cotangent_of_the_same_size_but_another_shape_is_refused(xp: Any) -> None:
    x = leaf(xp, 1.0, 2.0, 3.0)
    for y, wrong in ((x * x, (1, 3)), ((x * x).reshape(3, 1), (3,)), (x.sum(), (1,))):
        with pytest.raises(ValueError, match="a cotangent has its output's shape"):
            grad(y, x, xp.ones(wrong))
        with pytest.raises(ValueError, match="a cotangent has its output's shape"):
            y.backward(xp.ones(wrong))


def test_requiring_a_gradient_again_changes_nothing(xp: Any) -> None:
    """Neither the gradient that a leaf has nor what was computed from it is lost."""
    x = leaf(xp, 1.0, 2.0)
    (x * x).sum().backward()
    y = (x * x).sum()
    x.requires_grad = True
    assert_close(x.grad, [2.0, 4.0])
    y.backward()
    assert_close(x.grad, [4.0, 8.0])
    product = x * x
    product.requires_grad = True  # it does already: its history is not cut
    assert_close(grad(product.sum(), x)[0], 2 * host(x))


def test_a_cast_to_integers_cuts_the_tape(xp: Any) -> None:
    """A gradient has its Tensor's dtype, so one that went through integers would be cut short."""
    x = leaf(xp, 1.5, -2.5)
    whole = x.astype("int64")
    assert whole.node is None and not whole.requires_grad
    assert_close(grad((whole * x).sum(), x)[0], [1.0, -2.0])
    assert_close(grad((whole * 0.5 + x * x).sum(), x)[0], [3.0, -5.0])


def test_retain_graph_decides_whatever_create_graph_says(xp: Any) -> None:
    for create_graph in (False, True):
        for retain_graph in (False, True, None):
            x = leaf(xp, 1.0, 2.0)
            y = (x * x).sum()
            grad(y, x, create_graph=create_graph, retain_graph=retain_graph)
            if create_graph if retain_graph is None else retain_graph:
                assert_close(grad(y, x)[0], 2 * host(x))
            else:
                with pytest.raises(RuntimeError, match="released"):
                    grad(y, x)


def test_a_block_of_one_step_whose_only_leaf_is_closed_over(xp: Any) -> None:
    """The first node inside a checkpoint is already one of its own."""
    w, constant = leaf(xp, 1.0, 2.0), xp.asarray(np.array([3.0, -5.0]))
    for argument in (constant, Tensor(constant)):
        y = checkpoint(lambda a: a * w, argument)
        assert_close(grad(y.sum(), w)[0], constant)


def test_generators_split_off_in_a_checkpoint_are_the_same_in_its_replay(xp: Any) -> None:
    rng, x = Rng(3), leaf(xp, 1.0, 2.0)
    y = checkpoint(lambda t: t * rng.split(2)[1].normal((2,), dtype="float64"), x)
    ahead = rng.state_dict()
    assert_close(grad(y.sum(), x)[0] * x, y)
    assert rng.state_dict() == ahead
