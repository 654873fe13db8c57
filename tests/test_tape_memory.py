"""What the tape frees, and when: no cycles, no recursion, and no byte that no rule names."""

from __future__ import annotations

import contextlib
import gc
import math
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from mini_nn import checkpoint, grad, ops
from mini_nn.engine import Primitive
from mini_nn.tape import Node
from tests.support import assert_close

from .test_tape import graph, leaf


def kept_arrays(nodes: list[Node]) -> dict[int, Any]:
    """The arrays that the nodes hold, once each."""
    held = [value for node in nodes if node.primitive for value in node.kept.values()]
    return {id(value): value for value in held if hasattr(value, "nbytes")}


# cycles


def count_garbage(step: Callable[[], object]) -> int:
    """The objects that only the cycle collector can free; the least of three runs, for another
    thread of the test runner may leave some of its own.
    """
    counts = []
    for _ in range(3):
        gc.collect()
        gc.disable()
        try:
            step()
            counts.append(gc.collect())
        finally:
            gc.enable()
    return min(counts)


@pytest.fixture
def training_step(xp: Any) -> Callable[[], object]:
    x, labels = leaf(xp, 5, 4).data, xp.asarray(np.array([0, 2, 1, 2, 0]))
    weights = [leaf(xp, 4, 8), leaf(xp, 8), leaf(xp, 8, 3), leaf(xp, 3)]

    def step() -> None:
        hidden = ops.gelu(ops.addmm(weights[1], x, weights[0]))
        hidden = checkpoint(lambda h: ops.layer_norm(ops.tanh(h)), hidden)
        first, second = ops.split(hidden, 2, -1)
        logits = ops.concatenate([first, second], -1) @ weights[2] + weights[3]
        loss = ops.cross_entropy(logits, labels).mean()
        loss.backward()
        for w in weights:
            w.data -= 0.1 * w.grad
            w.grad = None

    step()  # whatever is made once (plans, imports) is not of this test
    return step


def test_a_training_step_leaves_no_cycles(training_step: Any) -> None:
    assert count_garbage(training_step) == 0


def test_a_forward_pass_that_is_dropped_leaves_no_cycles(xp: Any) -> None:
    x = leaf(xp, 3)
    assert count_garbage(lambda: ops.softmax(ops.exp(x) * x).sum()) == 0


def test_second_order_leaves_no_cycles(xp: Any) -> None:
    x = leaf(xp, 3)

    def step() -> None:
        (g,) = grad(ops.softmax(ops.exp(x) * x)[0], x, create_graph=True)
        (g * g).sum().backward()
        x.grad = None

    step()
    assert count_garbage(step) == 0


def test_an_error_in_the_middle_leaves_no_cycles(xp: Any) -> None:
    x = leaf(xp, 3)

    def step() -> None:
        with contextlib.suppress(RuntimeError):
            (x * x).backward()

    assert count_garbage(step) == 0


def test_a_node_that_points_back_at_its_tensor_is_caught(xp: Any) -> None:
    """The negative twin of the four tests above: the classic mistake, under the same measure."""

    class Owning(Primitive):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            y = super().__call__(*args, **kwargs)
            y.node.kept["output"] = y
            return y

    double = Owning(lambda x: x * 2.0)
    double.derivative(x=lambda g: g * 2.0)
    x = leaf(xp, 3)
    assert count_garbage(lambda: double(x)) > 0


@pytest.fixture
def traced(backend_name: str) -> Iterator[Callable[[], tuple[int, int]]]:
    """Bytes in use now and at most since the last reset, of all that was made in this test."""
    if backend_name == "cupy":
        pytest.skip("tracemalloc does not see the memory of a device")
    tracemalloc.start()
    yield tracemalloc.get_traced_memory
    tracemalloc.stop()


def test_memory_of_a_deep_chain_is_what_the_rules_name(xp: Any, traced: Any) -> None:
    """x ← tanh(x W) forty times: the rules name W and each layer's output, not x W."""
    n, layers = 512, 40
    w = leaf(xp, n, n, dtype="float32")
    w.data *= n**-0.5
    x = y = leaf(xp, n, n, dtype="float32", seed=1)
    array = x.data.nbytes
    before = traced()[0]
    for _ in range(layers):
        y = ops.tanh(y @ w)
    y = y.sum()
    now, peak = traced()
    held = kept_arrays(graph(y))
    named = sum(value.nbytes for value in held.values() if value is not w.data)
    named -= x.data.nbytes  # which was there before, as W was
    assert named == layers * array
    assert peak - before <= 1.1 * named
    assert named <= now - before
    tracemalloc.reset_peak()
    held.clear()
    y.backward()
    now, peak = traced()
    # the cotangent, its product with tanh', two gradients and the sum of those of W
    assert peak - before <= 1.1 * named + 6 * array
    assert now - before <= 3 * array, "only x.grad and w.grad are left"
    assert x.grad is not None and w.grad is not None


def test_memory_that_no_rule_names_is_not_held(xp: Any, traced: Any) -> None:
    """Additions, reshapes and transpositions name nothing: a chain of them holds one array."""
    x = y = leaf(xp, 256, 256, dtype="float32")
    before = traced()[0]
    for _ in range(40):
        y = (y.T + 1.0).reshape(256, 256) - x
    assert not kept_arrays(graph(y))
    assert traced()[0] - before <= 1.5 * x.data.nbytes  # the nodes themselves need some, too


def test_a_chain_of_100_000_nodes(xp: Any) -> None:
    """Recorded, differentiated and dropped without recursion."""
    x = y = leaf(xp, 1)
    for _ in range(100_000):
        y = y + 1.0
    dropped = y * 2.0
    del dropped
    y.sum().backward()
    assert_close(x.grad, [1.0])
    del y
    y = x
    for _ in range(100_000):
        y = -y
    del y  # with all it keeps, never differentiated


def test_a_chain_of_1_000_nodes_recorded_again(xp: Any) -> None:
    """create_graph on a chain: the walk's own tape is a chain too."""
    x = y = leaf(xp, 1)
    for _ in range(1_000):
        y = y * 1.001
    (g,) = grad((y * y).sum(), x, create_graph=True)
    assert_close(grad(g.sum(), x)[0], [2 * 1.001**2000], rtol=1e-9)


def test_the_sum_over_many_uses_is_exact_and_makes_one_array(xp: Any, traced: Any) -> None:
    w = leaf(xp, 256, 256, dtype="float32")
    parts = [w * float(i) for i in range(30)]
    y = ops.stack([part.sum() for part in parts]).sum()
    del parts
    before = traced()[0]
    tracemalloc.reset_peak()
    (g,) = grad(y, w)
    assert traced()[1] - before <= 4 * w.data.nbytes
    assert_close(g, np.full((256, 256), math.comb(30, 2), "float32"))
