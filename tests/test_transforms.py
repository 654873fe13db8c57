"""checkpoint gives what the plain function gives, for less memory; vjp, jvp and hvp are products
with the dense Jacobian and Hessian, which are built here by differences.
"""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_nn import Rng, Tensor, checkpoint, grad, hvp, jvp, no_grad, ops, vjp
from mini_nn.check import arrays, check_grads
from tests.support import assert_close, host


def leaf(xp: Any, *shape: int, seed: int = 0) -> Tensor:
    values = np.random.default_rng(seed).standard_normal(shape)
    return Tensor(xp.asarray(values), requires_grad=True)


# checkpoint


class Block:
    """tanh(x W + b) with a dropout of its own, whose parameters the caller does not pass."""

    def __init__(self, xp: Any, seed: int = 0) -> None:
        self.weight, self.bias = leaf(xp, 4, 4, seed=seed), leaf(xp, 4, seed=seed + 1)
        self.rng = Rng(seed)
        self.runs = 0

    def __call__(self, x: Any) -> Any:
        self.runs += 1
        y = ops.tanh(x @ self.weight + self.bias)
        mask = self.rng.bernoulli(0.5, y.shape)
        return ops.where(mask, y * 2.0, 0.0)

    def parameters(self) -> list[Tensor]:
        return [self.weight, self.bias]


def test_values_and_gradients_are_those_of_the_plain_function(xp: Any) -> None:
    """For the arguments and for what is closed over, and equal to the last bit."""
    x, block, plain = leaf(xp, 3, 4), Block(xp), Block(xp)
    y, expected = checkpoint(block, x), plain(x)
    np.testing.assert_array_equal(host(y), host(expected))
    assert block.rng.state_dict() == plain.rng.state_dict()
    v = leaf(xp, 3, 4, seed=7).data
    found = grad(y, [x, *block.parameters()], v)
    wanted = grad(expected, [x, *plain.parameters()], v)
    for g, w in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(host(g), host(w))
    assert block.runs == 2
    assert block.rng.state_dict() == plain.rng.state_dict(), "the replay leaves no trace"


def test_the_negative_twin_draws_new_numbers_in_the_replay(xp: Any) -> None:
    """A recomputation that does not rewind the generator gives other gradients: it must matter."""
    x, block = leaf(xp, 3, 4), Block(xp)
    first = grad(block(x).sum(), x)[0]
    again = grad(block(x).sum(), x)[0]
    assert not np.array_equal(host(first), host(again))


def test_backward_reaches_arguments_and_closures(xp: Any) -> None:
    x, block, plain = leaf(xp, 3, 4), Block(xp), Block(xp)
    checkpoint(block, x).sum().backward()
    found, x.grad = x.grad, None
    plain(x).sum().backward()
    assert_close(found, x.grad)
    for p, q in zip(block.parameters(), plain.parameters(), strict=True):
        assert_close(p.grad, q.grad)


def test_chains_of_blocks_rewind_one_shared_generator(xp: Any) -> None:
    """The walk replays the last block first; every block must still see its own numbers."""

    def run(step: Any) -> tuple[Any, Any]:
        rng = Rng(3)

        def layer(x: Any) -> Any:
            return ops.sin(x) * rng.bernoulli(0.5, x.shape)

        x = y = leaf(xp, 8)
        for _ in range(4):
            y = step(layer, y)
        return grad(y.sum(), x)[0], rng.state_dict()

    plain, state = run(lambda layer, y: layer(y))
    saved, same = run(checkpoint)
    assert_close(saved, plain)
    assert state == same


def test_nested_checkpoints(xp: Any) -> None:
    def run(step: Any) -> Any:
        first, second = Block(xp, 1), Block(xp, 5)
        x = leaf(xp, 3, 4)
        y = step(lambda x: step(second, step(first, x) * x), x)
        return host_all(grad((y * y).sum(), [x, *first.parameters(), *second.parameters()]))

    for found, wanted in zip(run(checkpoint), run(lambda fn, x: fn(x)), strict=True):
        assert_close(found, wanted)


def host_all(xs: Any) -> list[Any]:
    return [host(x) for x in xs]


def test_several_inputs_and_outputs(xp: Any) -> None:
    def fn(x: Any, y: Any, power: int) -> Any:
        return x * y**power, ops.exp(x).sum(axis=0), y > 0

    x, y = leaf(xp, 3, 2), leaf(xp, 2, seed=1)
    outputs, plain = checkpoint(fn, x, y, 2), fn(x, y, 2)
    for one, other in zip(outputs, plain, strict=True):
        assert_close(one, other)
    assert outputs[2].node is None
    v = leaf(xp, 2, seed=2).data
    for pick in ([0], [1], [0, 1]):
        seeds = [None if i == 0 else v for i in pick]
        results = []
        for group in (outputs, plain):
            heads = [group[0].sum() if i == 0 else group[1] for i in pick]
            results.append(grad(heads, [x, y], seeds, retain_graph=True, materialize_grads=True))
        for one, other in zip(*results, strict=True):
            assert_close(one, other)


def test_constants_stay_tensors_and_may_be_returned(xp: Any) -> None:
    constant = leaf(xp, 3, seed=1).detach()
    seen = []

    def fn(x: Any, c: Any) -> Any:
        seen.append(type(c))
        return x * 2.0, c * 3.0

    x = leaf(xp, 3)
    first, second = checkpoint(fn, x, constant)
    assert_close(grad([first.sum(), second.sum()], x)[0], [2.0] * 3)
    assert seen == [Tensor, Tensor]


def test_one_tensor_twice_and_intermediate_arguments(xp: Any) -> None:
    x = leaf(xp, 3)
    y = x * x
    z = checkpoint(lambda a, b: a * ops.sin(b) - a, y, y)
    gy, gx = grad(z.sum(), [y, x])
    v = host(y)
    assert_close(gy, np.sin(v) + v * np.cos(v) - 1)
    assert_close(gx, host(gy) * 2 * host(x))


def test_a_closed_over_intermediate_result(xp: Any) -> None:
    x = leaf(xp, 3)
    gate = ops.sigmoid(x)
    z = checkpoint(lambda a: a * gate, x * 2.0)
    s = 1 / (1 + np.exp(-host(x)))
    assert_close(grad(z.sum(), x)[0], 2 * s + 2 * host(x) * s * (1 - s))


def test_closing_over_an_input_and_what_was_computed_from_it(xp: Any) -> None:
    """The replay stops at the gate: the way from there to x is the outer walk's, once."""
    x = leaf(xp, 3)
    gate = x * x
    z = checkpoint(lambda a: a * gate + x * gate, x * 2.0)
    (g,) = grad(z.sum(), x, create_graph=True)  # z = 3 x³
    assert_close(g, 9 * host(x) ** 2)
    assert_close(grad(g.sum(), x, retain_graph=True)[0], 18 * host(x))
    assert_close(grad((z * gate).sum(), x)[0], 15 * host(x) ** 4)


@pytest.mark.parametrize("order", [2, 3])
def test_every_order_goes_through_checkpoint(xp: Any, order: int) -> None:
    check_grads(
        lambda x, w: checkpoint(lambda x, w: ops.tanh(x @ w) * x, x, w),
        leaf(xp, 1, 2),
        leaf(xp, 2, 2),
        order=order,
    )


def test_second_order_reaches_what_is_closed_over(xp: Any) -> None:
    results = []
    for step in (checkpoint, lambda fn, x: fn(x)):
        x, w = leaf(xp, 3), leaf(xp, 3, seed=1)
        y = step(lambda x, w=w: ops.sin(x * w), x)
        gx, gw = grad(y.sum(), [x, w], create_graph=True)
        results.append(host_all(grad((gx * gw).sum(), [x, w])))
    assert_close(results[0], results[1])


def test_without_a_tape_it_is_the_function(xp: Any) -> None:
    x, block = leaf(xp, 3, 4), Block(xp)
    with no_grad():
        assert checkpoint(block, x).node is None
    assert checkpoint(lambda x: x * 2.0, x.detach()).node is None
    assert checkpoint(lambda x: x > 0, x).node is None
    assert isinstance(checkpoint(lambda x: x.detach(), x), Tensor)


def test_a_checkpoint_is_released_by_use(xp: Any) -> None:
    x = leaf(xp, 3)
    y = checkpoint(ops.sin, x).sum()
    first = grad(y, x, retain_graph=True)[0]
    assert_close(grad(y, x)[0], first)
    with pytest.raises(RuntimeError, match="retain_graph"):
        grad(y, x)


@pytest.mark.parametrize("saved", [True, False])
def test_memory_is_flat_in_the_depth_of_a_block(xp: Any, backend_name: str, saved: bool) -> None:
    """Only the blocks' inputs are held; the plain twin holds every layer and fails the bound."""
    if backend_name == "cupy":
        pytest.skip("tracemalloc does not see the memory of a device")
    depth, blocks = 10, 4

    def block(x: Any) -> Any:
        for _ in range(depth):
            x = ops.tanh(x)
        return x

    x = y = leaf(xp, 256, 256)
    array = x.data.nbytes
    tracemalloc.start()
    try:
        for _ in range(blocks):
            y = checkpoint(block, y) if saved else block(y)
        held = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        y.sum().backward()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (held <= 1.1 * blocks * array) == saved
    assert (peak <= (blocks + depth + 5) * array) == saved


# vjp, jvp, hvp


def jacobian(fn: Any, x: Any) -> Any:
    """(outputs, inputs), column by column, by central differences of host arrays."""
    columns = []
    for k in range(x.size):
        step = np.zeros(x.size)
        step[k] = 1e-5
        ahead, behind = (fn(x + s * step.reshape(x.shape)) for s in (1, -1))
        columns.append((ahead - behind).ravel() / 2e-5)
    return np.stack(columns, axis=1)


def field(x: Any) -> Any:
    """A map from (2, 3) to (2, 2) that is not symmetric, in NumPy's words and in ours."""
    xp = ops if isinstance(x, Tensor) else np
    return xp.tanh(x @ xp.transpose(x)) * x[:, :1] + xp.exp(x[0, 1]) * x[:, 1:]


@given(st.data())
def test_vjp_and_jvp_are_products_with_the_jacobian(xp: Any, data: Any) -> None:
    x, t = data.draw(arrays((2, 3), low=-1, high=1)), data.draw(arrays((2, 3)))
    v = data.draw(arrays((2, 2)))
    dense = jacobian(field, host(x))
    y, pull = vjp(field, x)
    assert_close(y, field(host(x)))
    for _ in range(2):  # may be called again
        (g,) = pull(v)
        assert_close(g.reshape(6), host(v).ravel() @ dense, rtol=1e-6, atol=1e-7)
    y, pushed = jvp(field, x, t)
    assert_close(y, field(host(x)))
    assert_close(pushed.reshape(4), dense @ host(t).ravel(), rtol=1e-6, atol=1e-7)


@given(st.data())
def test_forward_and_reverse_agree(xp: Any, data: Any) -> None:
    """⟨v, J t⟩ = ⟨vᵀJ, t⟩."""
    x, t = data.draw(arrays((2, 3))), data.draw(arrays((2, 3)))
    v = data.draw(arrays((2, 2)))
    pushed, pulled = jvp(field, x, t)[1], vjp(field, x)[1](v)[0]
    assert_close((pushed * v).sum(), (pulled * t).sum(), rtol=1e-9, atol=1e-9)


def test_several_inputs_and_outputs_of_vjp_and_jvp(xp: Any) -> None:
    x, y = leaf(xp, 2, 3).data, leaf(xp, 3, seed=1).data

    def fn(x: Any, y: Any) -> Any:
        return x * y, ops.sin(y)

    v, u = leaf(xp, 2, 3, seed=2).data, leaf(xp, 3, seed=3).data
    outputs, pull = vjp(fn, x, y)
    gx, gy = pull(v, u)
    assert_close(gx, host(v) * host(y))
    assert_close(gy, (host(v) * host(x)).sum(0) + host(u) * np.cos(host(y)))
    outputs, (first, second) = jvp(fn, (x, y), (v, u))
    assert_close(outputs[0], host(x) * host(y))
    assert_close(first, host(v) * host(y) + host(x) * host(u))
    assert_close(second, np.cos(host(y)) * host(u))


def test_linear_functions_and_functions_that_do_not_depend_on_an_input(xp: Any) -> None:
    x, y, t = (leaf(xp, 3, seed=i).data for i in range(3))
    ones = xp.ones(3)
    assert_close(jvp(lambda x: 2.0 * x, x, t)[1], 2 * host(t))
    assert_close(vjp(lambda x: 2.0 * x, x)[1](t)[0], 2 * host(t))
    assert_close(jvp(lambda x, y: y * 1.0, (x, y), (t, 0.0 * t))[1], [0.0] * 3)
    unused, used = vjp(lambda x, y: y * y, x, y)[1](t)
    assert_close(unused, [0.0] * 3)
    assert_close(used, 2 * host(y) * host(t))
    assert_close(vjp(lambda x: Tensor(ones), x)[1](t)[0], [0.0] * 3)
    assert_close(jvp(lambda x: Tensor(ones), x, t)[1], [0.0] * 3)
    moved, still = jvp(lambda x: (x * x, Tensor(ones)), x, t)[1]
    assert_close(moved, 2 * host(x) * host(t))
    assert_close(still, [0.0] * 3)


def energy(x: Any) -> Any:
    xp = ops if isinstance(x, Tensor) else np
    return xp.sum(xp.sin(x @ xp.transpose(x)) * x[:, :2]) + xp.exp(x[0, 1] * x[1, 2])


@given(st.data())
def test_hvp_is_the_product_with_the_hessian(xp: Any, data: Any) -> None:
    x, v = data.draw(arrays((2, 3), low=-1, high=1)), data.draw(arrays((2, 3)))

    def slope(values: Any) -> Any:
        leaf = Tensor(xp.asarray(values), requires_grad=True)
        return host(grad(energy(leaf), leaf)[0])

    hessian = jacobian(slope, host(x))
    np.testing.assert_allclose(hessian, hessian.T, atol=1e-6)
    value, product = hvp(energy, x, v)
    assert_close(value, energy(host(x)))
    assert_close(product.reshape(6), hessian @ host(v).ravel(), rtol=1e-5, atol=1e-6)


def test_hvp_of_several_inputs_and_of_functions_without_curvature(xp: Any) -> None:
    x, y, u, v = (leaf(xp, 3, seed=i).data for i in range(4))
    _, (px, py) = hvp(lambda x, y: (x * y * y).sum(), (x, y), (u, v))
    assert_close(px, 2 * host(y) * host(v))
    assert_close(py, 2 * host(y) * host(u) + 2 * host(x) * host(v))
    assert_close(hvp(lambda x: x.sum(), x, u)[1], [0.0] * 3)
    assert_close(hvp(lambda x: (2.0 * x).sum(), x, u)[1], [0.0] * 3)
    assert_close(hvp(lambda x: Tensor(xp.ones(())), x, u)[1], [0.0] * 3)
    _, (px, py) = hvp(lambda x, y: (x * x).sum() + y.sum(), (x, y), (u, v))
    assert_close(px, 2 * host(u))
    assert_close(py, [0.0] * 3)
    with pytest.raises(RuntimeError, match="one number"):
        hvp(lambda x: x * x, x, u)


def test_the_caller_keeps_its_tensors(xp: Any) -> None:
    """The products are taken at leaves of their own: nothing is added to .grad."""
    x = leaf(xp, 3)
    for call in (
        lambda: vjp(ops.sin, x)[1](x.data),
        lambda: jvp(ops.sin, x, x.data),
        lambda: hvp(lambda x: ops.sin(x).sum(), x, x.data),
    ):
        call()
        assert x.grad is None
