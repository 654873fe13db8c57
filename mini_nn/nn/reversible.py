"""Residual blocks that can be run backwards, so that nothing between them has to be kept.

====================================  ===========================================================
y₁ = x₁ + F(x₂),  y₂ = x₂ + G(y₁)     Gomez, Ren, Urtasun, Grosse 2017, "The Reversible Residual
                                      Network", arXiv:1707.04585, 3.1: ``ReversibleBlock``
x₂ = y₂ − G(y₁),  x₁ = y₁ − F(x₂)     its inverse: ``ReversibleBlock.inverse``
the walk back, their algorithm 1      ``ReversibleSequence``
F attention, G feed-forward           Kitaev, Kaiser, Levskaya 2020, "Reformer", arXiv:2001.04451,
                                      section 3: ``models.reformer``
====================================  ===========================================================

The walk back through a block, with ȳ₁ and ȳ₂ known::

    x₂ = y₂ − G(y₁)    z̄ = ȳ₁ + (∂G/∂y₁)ᵀ ȳ₂
    x₁ = y₁ − F(x₂)    x̄₂ = ȳ₂ + (∂F/∂x₂)ᵀ z̄    x̄₁ = z̄

F and G run once more, as with ``checkpoint``, whose memory grows with the number of blocks; here it
does not.  What is rebuilt has rounding errors, which grow with the depth and with how much larger
the branches are than the stream: gradients agree with those of kept activations to a few digits
less than the dtype has.

Deviations: under ``create_graph=True`` the inputs are rebuilt and the blocks run as they are
written, with everything kept: second order is exact, and its memory is not flat.  A branch that
decides by a comparison (LSH) may decide otherwise on the rebuilt numbers; released code keeps its
buckets, here they are computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from ..backend import Array
from ..engine import Tensor, data_of, replay, tensor_of, wrap
from ..rng import replaying, watching
from ..tape import Node, clock, no_grad, recording
from ..transforms import reached_since
from .container import ModuleList
from .module import Module

__all__ = ["ReversibleBlock", "ReversibleSequence"]

Branch = Callable[[Any], Any]


class ReversibleBlock(Module):
    """y₁ = x₁ + F(x₂), y₂ = x₂ + G(y₁): invertible, whatever F and G are.

    By itself it keeps its activations; ``ReversibleSequence`` does not.

    Args:
        f, g: F and G: each keeps shape and dtype, returns the same for the same draws from its
            generators, and has no other effect, since it runs several times.
    """

    def __init__(self, f: Branch, g: Branch) -> None:
        self.f = f
        self.g = g

    def forward(self, x1: Any, x2: Any) -> tuple[Any, Any]:
        """Two of one shape to two of that shape.

        Raises:
            ValueError: F or G does not keep shape and dtype.
        """
        y1 = x1 + _alike(self.f(x2), x2)
        return y1, x2 + _alike(self.g(y1), y1)

    def inverse(self, y1: Any, y2: Any) -> tuple[Any, Any]:
        """The inputs, up to rounding, where F and G draw no random numbers."""
        x2 = y2 - self.g(y1)
        return y1 - self.f(x2), x2


class ReversibleSequence(Module):
    """Reversible blocks one after the other, whose activations are rebuilt in the backward pass.

    Kept is the pair that comes out, whatever the number of blocks.  Numbers drawn from ``Rng``s
    (dropout) are drawn again when a branch runs again; parameters, shared or not, and whatever else
    a branch closes over get their gradients.

    Args:
        blocks: with ``f`` and ``g`` as in ``ReversibleBlock``.
    """

    def __init__(self, blocks: Iterable[Module]) -> None:
        self.blocks = ModuleList(blocks)

    def forward(self, x1: Any, x2: Any) -> tuple[Any, Any]:
        """Two of one shape and dtype to two of that shape and dtype; as they are without blocks.

        Raises:
            ValueError: the two differ in shape or dtype, or a branch does not keep them.
        """
        if x1.shape != x2.shape or x1.dtype != x2.dtype:
            raise ValueError(
                "reversible blocks take two inputs of one shape and dtype, got "
                f"{x1.shape} {x1.dtype} and {x2.shape} {x2.dtype}"
            )
        if not recording.get() or not len(self.blocks):
            return self.kept(x1, x2)
        start = next(clock)
        y = [data_of(x1), data_of(x2)]
        steps = []
        blocks: Any = self.blocks
        with watching() as draws:
            for block in blocks:
                for half, branch in enumerate((block.f, block.g)):
                    step, change = _Step.forward(branch, half, y[1 - half], start)
                    y[half] = y[half] + change
                    steps.append(step)
        captured = [*{node for step in steps for node in step.captured}]
        parents = [x.node if isinstance(x, Tensor) else None for x in (x1, x2)]
        outputs = (y[0], y[1])
        if not captured and not any(parents):
            tensors = isinstance(x1, Tensor) or isinstance(x2, Tensor)
            return wrap(outputs, None) if tensors else outputs
        tape = _Reversal(self.kept, steps, draws, captured)
        shapes, dtypes = [array.shape for array in y], [array.dtype for array in y]
        return wrap(outputs, Node(tape, {"y": outputs}, parents + captured, shapes, dtypes))

    def kept(self, x1: Any, x2: Any) -> tuple[Any, Any]:
        """The same with everything kept: the definition."""
        for block in self.blocks:
            x1, x2 = block(x1, x2)
        return x1, x2

    def inverse(self, y1: Any, y2: Any) -> tuple[Any, Any]:
        """The inputs, up to rounding, where the branches draw no random numbers."""
        for block in reversed([*self.blocks]):
            y1, y2 = block.inverse(y1, y2)
        return y1, y2


class _Step:
    """One branch of one block, as it ran: y[half] += branch(y[1 − half])."""

    def __init__(self, branch: Branch, half: int, draws: Any, captured: list[Node]) -> None:
        self.branch, self.half = branch, half
        self.draws, self.captured = draws, captured

    @classmethod
    def forward(cls, branch: Branch, half: int, x: Array, start: int) -> tuple[_Step, Array]:
        """Run the branch on a tape that is dropped at once: what counts is where it leads."""
        with watching() as draws:
            change = branch(tensor_of(x, _leaf(x)))
        _alike(change, x)
        captured = [node for node in reached_since(start, [change]) if node.order < start]
        return cls(branch, half, draws, captured), data_of(change)

    def again(self, x: Array) -> Array:
        """What the branch returned."""
        with replaying(self.draws), no_grad():
            return data_of(self.branch(tensor_of(x, None)))

    def back(self, x: Array, g: Array) -> tuple[Array, Array | None, list[tuple[Node, Array]]]:
        """What the branch returned, and the gradients of its input and of what it closes over."""
        seen: list[Array] = []

        def run(x: Any) -> Any:
            change = self.branch(x)
            seen.append(data_of(change))
            return change

        leaf = _leaf(x)
        with replaying(self.draws):
            parts = replay(run, [x], [leaf], self.captured, [g], False)
        own = next((part for node, part in parts if node is leaf), None)
        return seen[0], own, [(node, part) for node, part in parts if node is not leaf]


class _Reversal:
    """The primitive of a sequence: it keeps the outputs and walks back from them."""

    def __init__(self, kept: Any, steps: list[_Step], draws: Any, captured: list[Node]) -> None:
        self.kept, self.steps, self.draws, self.captured = kept, steps, draws, captured

    def pull(self, node: Node, g: Any, wanted: Any, create_graph: bool) -> list[tuple[Node, Any]]:
        kept: Any = node.kept
        y, grads = [*kept["y"]], [g.get(0), g.get(1)]
        if create_graph:
            for step in reversed(self.steps):
                y[step.half] = y[step.half] - step.again(y[1 - step.half])
            with replaying(self.draws):
                return replay(self.kept, y, node.parents[:2], self.captured, grads, True)
        totals: dict[Node, Array] = {}
        for step in reversed(self.steps):
            here, there = step.half, 1 - step.half
            if grads[here] is None:
                y[here] = y[here] - step.again(y[there])
                continue
            change, part, others = step.back(y[there], grads[here])
            y[here] = y[here] - change
            if part is not None:
                grads[there] = part if grads[there] is None else grads[there] + part
            for parent, share in others:
                totals[parent] = totals[parent] + share if parent in totals else share
        inputs = zip(node.parents[:2], grads, strict=True)
        return [(p, part) for p, part in inputs if p is not None and part is not None] + [
            *totals.items()
        ]


def _leaf(x: Array) -> Node:
    return Node(None, {}, (), x.shape, x.dtype)


def _alike(change: Any, x: Any) -> Any:
    """What a branch made of x, if it has the shape and dtype of x."""
    if change.shape != x.shape or change.dtype != x.dtype:
        raise ValueError(
            f"a reversible branch keeps shape and dtype, but {x.shape} {x.dtype} became "
            f"{change.shape} {change.dtype}"
        )
    return change
