"""Laws of the tape: what it keeps, what it visits, and that threads do not meet."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mini_nn import Tensor, grad, no_grad, ops, primitive
from mini_nn.engine import Kept, Primitive, tensor_of
from mini_nn.ops.elementwise import of
from mini_nn.tape import Node
from tests.support import assert_close, host


def leaf(xp: Any, *shape: int, dtype: str = "float64", seed: int = 0) -> Tensor:
    values = np.random.default_rng(seed).standard_normal(shape)
    return Tensor(xp.asarray(values.astype(dtype)), requires_grad=True)


def graph(output: Tensor) -> list[Node]:
    """Every node that an output reaches."""
    seen = {output.node}
    stack = [output.node]
    while stack:
        for parent in stack.pop().parents:
            if parent is not None and parent not in seen:
                seen.add(parent)
                stack.append(parent)
    return [*seen]


# what is kept


def test_a_node_keeps_what_the_rules_in_use_name(xp: Any) -> None:
    x, w = leaf(xp, 2, 3), leaf(xp, 3, 4)
    constant = xp.ones((3, 4))

    def kept(y: Tensor) -> dict[str, Any]:
        return {
            name: value for name, value in y.node.kept.items() if isinstance(value, type(x.data))
        }

    assert kept(x @ constant).keys() == {"x2"} and kept(x @ constant)["x2"] is constant
    assert kept(xp.ones((2, 2)) @ x).keys() == {"x1"}
    both = kept(x @ w)
    assert both["x1"] is x.data and both["x2"] is w.data
    y = ops.tanh(x)
    assert kept(y)["y"] is y.data and len(kept(y)) == 1
    assert kept(ops.sin(x))["x"] is x.data
    for y in (x + x, x - 2.0, -x, ops.sum(x), x.reshape(6), x.T, x[0], ops.concatenate([x, x])):
        assert not kept(y), y.node.primitive
    assert kept(x * 2.0) == {} and kept(x * x).keys() == {"x1", "x2"}


def test_a_fused_primitive_keeps_its_inputs_for_the_twin_and_what_its_rule_asks_for(
    xp: Any,
) -> None:
    @primitive(composite=lambda x, scale: ops.sin(x) * scale)
    def fused(x: Any, scale: Any) -> Any:
        s = of(x).sin(x)
        return Kept(s * scale, cosine=of(x).cos(x), unasked=s)

    fused.derivative(x=lambda g, cosine, scale: g * cosine * scale)
    assert fused(leaf(xp, 2), 3.0).node.kept.keys() == {"x", "scale", "cosine"}


def test_nodes_point_at_nodes_and_never_at_tensors(xp: Any) -> None:
    x = leaf(xp, 3)
    y = (ops.softmax(x * x) * ops.exp(x)).sum()
    for node in graph(y):
        assert all(parent is None or type(parent) is Node for parent in node.parents)
        assert not any(isinstance(value, Tensor) for value in dict(node.kept or {}).values())


def test_a_nodes_inputs_are_older(xp: Any) -> None:
    x = leaf(xp, 3)
    y = (ops.softmax(x * x) * ops.exp(x)).sum()
    for node in graph(y):
        assert all(parent is None or parent.order < node.order for parent in node.parents)


def test_backward_releases_what_it_has_used(xp: Any) -> None:
    x = leaf(xp, 3)
    y = ops.exp(ops.tanh(x) * x).sum()
    nodes = [node for node in graph(y) if node.primitive]
    y.backward()
    assert all(node.kept is None and node.parents == () for node in nodes)


# what is visited


class Visits:
    """Counts of the rules that run: how often each node is asked for its inputs' gradients."""

    def __init__(self) -> None:
        self.nodes: Counter[int] = Counter()

    def __enter__(self) -> Visits:
        self.pull = Primitive.pull

        def counting(primitive: Any, node: Any, *rest: Any) -> Any:
            self.nodes[node.order] += 1
            return self.pull(primitive, node, *rest)

        Primitive.pull = counting
        return self

    def __exit__(self, *error: Any) -> None:
        Primitive.pull = self.pull


@pytest.mark.parametrize("create_graph", [False, True])
def test_each_node_is_visited_once_however_many_paths_there_are(
    xp: Any, create_graph: bool
) -> None:
    """x ← x + x sixty times: 2⁶⁰ paths, 60 nodes."""
    x = leaf(xp, 2)
    y = x
    for _ in range(60):
        y = y + y
    with Visits() as visits:
        (g,) = grad(y.sum(), x, create_graph=create_graph)
    assert_close(g, [2.0**60, 2.0**60])
    assert [*visits.nodes.values()] == [1] * 61


def test_the_count_of_visits_is_linear_in_the_length(xp: Any) -> None:
    counts = []
    for length in (50, 100, 200):
        x = y = leaf(xp, 2)
        for _ in range(length):
            y = ops.tanh(y) * x + y
        with Visits() as visits:
            y.sum().backward()
        counts.append(visits.nodes.total())
    assert counts == [3 * n + 1 for n in (50, 100, 200)]


def test_visits_are_counted_by_the_same_measure_when_paths_are_walked(xp: Any) -> None:
    """The negative twin: a walk without the schedule visits every path."""
    y = leaf(xp, 2)
    for _ in range(10):
        y = y + y

    def naive(node: Node, g: Any) -> None:
        for parent, part in node.primitive.pull(node, g, None, False) if node.primitive else ():
            naive(parent, part)

    with Visits() as visits:
        naive(y.node, xp.ones(2))
    assert visits.nodes.total() == 2**10 - 1


def test_rules_of_inputs_that_nobody_asked_for_are_not_run(xp: Any) -> None:
    ran = []

    @primitive
    def product(first: Any, second: Any) -> Any:
        return first * second

    product.derivative(
        first=lambda g, second: ran.append("first") or g * second,
        second=lambda g, first: ran.append("second") or g * first,
    )
    x, w = leaf(xp, 3), leaf(xp, 3)
    grad(product(x, w).sum(), x)
    grad(product(xp.ones(3), w).sum(), w)
    assert ran == ["first", "second"]
    side = product(x, x)  # a branch that does not lead to the input asked for
    trunk = product(w, xp.ones(3))
    ran.clear()
    with Visits() as visits:
        grad((side + trunk).sum(), w)
    assert ran == ["first"] and side.node.order not in visits.nodes
    y = w * 2.0  # below the input asked for
    with Visits() as visits:
        grad((y * y).sum(), y)
    assert y.node.order not in visits.nodes


# threads


def run(*bodies: Callable[[], None]) -> None:
    """The bodies at once, each in a thread; the first exception is raised here."""
    errors: list[BaseException] = []

    def guarded(body: Callable[[], None]) -> None:
        try:
            body()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(body,)) for body in bodies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_threads_record_and_differentiate_at_once(xp: Any) -> None:
    shared = leaf(xp, 4)
    barrier = threading.Barrier(2, timeout=30)
    found: dict[int, Any] = {}

    def body(power: int) -> None:
        barrier.wait()
        for _ in range(100):
            y = shared
            for _ in range(power):
                y = y * shared
            (found[power],) = grad(y.sum(), shared)

    run(lambda: body(1), lambda: body(2))
    assert_close(found[1], 2 * host(shared))
    assert_close(found[2], 3 * host(shared) ** 2)


def test_no_grad_in_one_thread_does_not_affect_another(xp: Any) -> None:
    x = leaf(xp, 2)
    inside, done = threading.Event(), threading.Event()

    def silent() -> None:
        with no_grad():
            inside.set()
            assert done.wait(30)
            assert (x * x).node is None

    def recording() -> None:
        assert inside.wait(30)
        try:
            assert (x * x).node is not None
        finally:
            done.set()

    run(silent, recording)
    with no_grad():
        run(lambda: pytest.fail("not recorded") if (x * x).node is None else None)


# accumulation in place


def test_gradients_are_added_in_place_only_where_nobody_else_sees(xp: Any) -> None:
    """Rules may hand on the array they were given, for several inputs at once; three and more
    contributions are added to a sum of the walk's own.
    """

    @primitive
    def three(first: Any, second: Any, third: Any) -> Any:
        return first + second + third

    three.derivative(first=lambda g: g, second=lambda g: g, third=lambda g: g)
    x, y = leaf(xp, 3), leaf(xp, 3)
    v = xp.ones(3)
    total = three(x, y, x) + three(x, x, x) + three(y, x, y)
    gx, gy = grad(total, [x, y], v)
    assert_close(gx, [6.0] * 3)
    assert_close(gy, [3.0] * 3)
    assert_close(v, [1.0] * 3)


def test_a_tensor_of_a_node_made_by_hand(xp: Any) -> None:
    """tensor_of attaches a history without checks: what the engine's own parts build on."""
    x = leaf(xp, 2)
    again = tensor_of(x.data, x.node)
    assert_close(grad((again * of(x).asarray(x.data)).sum(), x)[0], host(x))
