"""The tape: nodes that remember one step each, and the walk back along them.

The walk goes by creation order, newest first: a node is younger than all of its inputs, so when its
turn comes every contribution to its gradient has arrived (Griewank & Walther, Evaluating
Derivatives, 2008, ch. 3).  Nodes point at the nodes of their inputs and never at Tensors, so there
are no cycles and reference counting frees the graph with the loss.

Gradients are arrays in a first-order pass and Tensors under ``create_graph=True``; the walk uses
only what both have: ``+``, ``sum``, ``reshape`` and ``astype``.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from . import backend
from .backend import Array

recording: ContextVar[bool] = ContextVar("mini_nn_recording", default=True)
"""Whether primitives record; each thread and each context has its own answer."""

clock = itertools.count()
_age = operator.attrgetter("order")


@contextmanager
def record_mode(on: bool) -> Iterator[None]:
    """Record, or do not, inside the block."""
    token = recording.set(on)
    try:
        yield
    finally:
        recording.reset(token)


def no_grad() -> Any:
    """Record nothing inside a ``with no_grad():`` block or a function under ``@no_grad()``."""
    return record_mode(False)


class Node:
    """One step of the tape; a leaf (a Tensor made with ``requires_grad``) has no primitive."""

    __slots__ = ("primitive", "kept", "parents", "shape", "dtype", "order", "grad", "__weakref__")

    def __init__(self, primitive: Any, kept: Any, parents: Any, shape: Any, dtype: Any) -> None:
        self.primitive = primitive
        self.kept: dict[str, Any] | None = kept  # None once a pass has used and released it
        self.parents: Sequence[Node | None] = parents  # None for an input without a gradient
        self.shape = shape  # the output's; a list of them where the primitive returns a tuple
        self.dtype = dtype
        self.order = next(clock)
        self.grad: Array | None = None  # of a leaf, written by Tensor.backward


class Kept:
    """What a forward may return: its output, and values that its rules ask for by name."""

    __slots__ = ("output", "extras")

    def __init__(self, output: Any, **extras: Any) -> None:
        self.output = output
        self.extras = extras


class Parts(dict[int, Any]):
    """The gradient of a tuple: those of its members that have one, by position."""

    def __add__(self, other: Parts) -> Parts:
        sums = {i: self[i] + g if i in self else g for i, g in other.items()}
        return Parts({**self, **sums})

    def filled(self, node: Node) -> tuple[Any, ...]:
        """The gradients of all outputs of the node, with zeros for those that were not used."""
        some = next(iter(self.values()))
        zeros = backend.of(some.data if hasattr(some, "node") else some).zeros
        sizes = enumerate(zip(node.shape, node.dtype, strict=True))
        return tuple([self[i] if i in self else zeros(n, dtype) for i, (n, dtype) in sizes])


def conform(g: Any, node: Node) -> Any:
    """Give a gradient the shape and dtype of what it belongs to, undoing a broadcast by its sum."""
    if g.shape != node.shape:
        extra = g.ndim - len(node.shape)
        ones = [i + extra for i, n in enumerate(node.shape) if n == 1 != g.shape[i + extra]]
        g = g.sum(axis=(*range(extra), *ones)).reshape(node.shape)
    return g if g.dtype == node.dtype else g.astype(node.dtype)


def schedule(roots: Iterable[Node], targets: Any, stop: Any) -> tuple[list[Node], Any]:
    """The nodes to visit, newest first, and those that lead to a target (None: all do)."""
    seen = {*roots}
    stack = [*seen]
    while stack:
        node = stack.pop()
        if node in stop:
            continue
        if node.kept is None:
            raise RuntimeError(
                "this graph has been used by an earlier backward pass, which released what it "
                "kept: pass retain_graph=True (or create_graph=True) there, or compute it again"
            )
        for parent in node.parents:
            if parent is not None and parent not in seen:
                seen.add(parent)
                stack.append(parent)
    newest_first = sorted(seen, key=_age, reverse=True)
    if targets is None:
        return newest_first, None
    wanted: set[Node] = set()
    for node in reversed(newest_first):
        if node in targets or (node not in stop and not wanted.isdisjoint(node.parents)):
            wanted.add(node)
    return [node for node in newest_first if node in wanted], wanted


def backprop(
    seeds: list[tuple[Node, Any]], targets: Any, create_graph: bool, retain: bool, stop: Any = ()
) -> dict[Node, Any]:
    """The walk: gradients of ``targets`` (None: of the leaves), given those of some outputs.

    Args:
        seeds: pairs of an output's node and its cotangent.
        targets: the set of nodes whose gradients are wanted.
        create_graph: rules run on Tensors and are recorded themselves.
        retain: keep what the nodes hold; otherwise a node lets go of it as soon as it is used.
        stop: nodes that the walk does not go beyond.
    """
    order, wanted = schedule([node for node, _ in seeds], targets, stop)
    grads: dict[Node, Any] = {}
    owned: set[Node] = set()  # whose gradient is an array of our own, to be added to in place
    found = {}

    def give(node: Node, part: Any) -> None:
        if wanted is not None and node not in wanted:
            return
        if type(part) is not Parts and (part.shape != node.shape or part.dtype != node.dtype):
            part = conform(part, node)
        if node not in grads:
            grads[node] = part  # by reference: rules may return the array they were given
        elif node in owned:
            grads[node] += part
        else:
            grads[node] = grads[node] + part
            if not create_graph and type(part) is not Parts:
                owned.add(node)

    token = recording.set(create_graph)
    try:
        for node, g in seeds:
            give(node, g)
        for node in order:
            g = grads.pop(node, None)
            if g is None:  # no rule had a gradient to give
                continue
            primitive = node.primitive
            if node in targets if targets is not None else primitive is None:
                found[node] = g
            if primitive is None or node in stop:
                continue
            if wanted is None or not wanted.isdisjoint(node.parents):
                for parent, part in primitive.pull(node, g, wanted, create_graph):
                    give(parent, part)
                if not retain:
                    node.kept, node.parents = None, ()
    finally:
        recording.reset(token)
    return found
