"""What is built on the tape: checkpointing, and products with the Jacobian and the Hessian."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from . import backend
from .engine import Tensor, grad, replay, tensor_of, wrap
from .rng import replaying, watching
from .tape import Node, clock, recording


class _Block:
    """The primitive of a checkpointed block: it keeps its inputs and runs again in the walk."""

    def __init__(self, fn: Callable[..., Any], draws: dict[Any, Any], captured: list[Node]) -> None:
        self.fn, self.draws, self.captured = fn, draws, captured

    def pull(self, node: Node, g: Any, wanted: Any, create_graph: bool) -> list[tuple[Node, Any]]:
        kept: Any = node.kept
        seeds = [g.get(i) for i in range(len(node.shape))] if type(node.shape) is list else [g]
        with replaying(self.draws):
            own = node.parents[: len(kept["args"])]
            return replay(self.fn, kept["args"], own, self.captured, seeds, create_graph)


def reached_since(start: int, outputs: Sequence[Any]) -> set[Node]:
    """The nodes that outputs came from, back to those older than ``start``, a tick of ``clock``.

    The older ones among them are what was closed over.
    """
    reached: set[Node] = set()
    ends = [getattr(o, "node", None) for o in outputs]
    stack = [node for node in ends if node is not None]
    while stack:
        node = stack.pop()
        if node not in reached:
            reached.add(node)
            if node.order > start:
                stack += [parent for parent in node.parents if parent is not None]
    return reached


def checkpoint(fn: Callable[..., Any], *args: Any) -> Any:
    """``fn(*args)``, keeping only the inputs: the backward pass runs ``fn`` again.

    Trades time for memory (Chen et al. 2016, arXiv:1604.06174).  Tensors that ``fn`` closes over,
    such as parameters, get their gradients too, and generators (``Rng``) draw the same numbers
    again.  ``fn`` returns a Tensor or a tuple of them and must have no other effect.
    """
    if not recording.get():
        return fn(*args)
    start = next(clock)
    parents = [arg.node if isinstance(arg, Tensor) else None for arg in args]
    inner = [
        arg if p is None else tensor_of(arg.data, Node(None, {}, (), p.shape, p.dtype))
        for arg, p in zip(args, parents, strict=True)
    ]
    with watching() as draws:
        outputs = fn(*inner)
    several = isinstance(outputs, tuple)
    reached = reached_since(start, outputs if several else (outputs,))
    if not reached:
        return outputs
    captured = [node for node in reached if node.order < start]
    block = _Block(fn, draws, captured)
    arrays: Any = tuple([o.data for o in outputs]) if several else outputs.data
    shape = [o.shape for o in arrays] if several else arrays.shape
    dtype = [o.dtype for o in arrays] if several else arrays.dtype
    kept = {"args": [arg if p is None else arg.data for arg, p in zip(args, parents, strict=True)]}
    return wrap(arrays, Node(block, kept, parents + captured, shape, dtype))


def _leaves(primals: Any) -> list[Tensor]:
    primals = primals if isinstance(primals, (list, tuple)) else (primals,)
    return [Tensor(primal, requires_grad=True) for primal in primals]


def pullback(
    outputs: Any, inputs: Sequence[Tensor], cotangents: Any, create_graph: bool = False
) -> tuple[Tensor, ...]:
    """As ``grad`` of Tensors or tuples of them, but zeros for whatever does not depend on inputs.

    The graph is kept.
    """
    outputs = outputs if isinstance(outputs, (list, tuple)) else (outputs,)
    live = [(o, v) for o, v in zip(outputs, cotangents, strict=True) if o.node is not None]
    if not live:
        return tuple([tensor_of(backend.of(x.data).zeros_like(x.data), None) for x in inputs])
    heads, seeds = zip(*live, strict=True)
    return grad(heads, inputs, seeds, create_graph, retain_graph=True, materialize_grads=True)


def vjp(fn: Callable[..., Any], *primals: Any) -> tuple[Any, Callable[..., tuple[Tensor, ...]]]:
    """``fn(*primals)`` and the map from a cotangent v of it to vᵀJ, as torch.func.vjp.

    The map takes one cotangent for each output, may be called repeatedly, and returns a tuple with
    one Tensor for each primal (zeros where the output does not depend on it).
    """
    inputs = _leaves(primals)
    outputs = fn(*inputs)

    def pull(*cotangents: Any) -> tuple[Tensor, ...]:
        return pullback(outputs, inputs, cotangents)

    return outputs, pull


def jvp(fn: Callable[..., Any], primals: Any, tangents: Any) -> tuple[Any, Any]:
    """``fn(*primals)`` and J·tangents, as torch.func.jvp: forward mode from two reverse passes.

    vᵀJ is linear in v, so its own reverse derivative along the tangents is J·tangents, whatever v
    (J. Townsend, "A new trick for calculating Jacobian vector products", 2017).
    """
    inputs = _leaves(primals)
    tangents = tangents if isinstance(tangents, (list, tuple)) else (tangents,)
    outputs = fn(*inputs)
    outs = outputs if isinstance(outputs, tuple) else (outputs,)
    dummies = [Tensor(backend.of(o.data).zeros_like(o.data), requires_grad=True) for o in outs]
    pulled = pullback(outs, inputs, dummies, create_graph=True)
    pushed = pullback(pulled, dummies, tangents)
    return outputs, pushed if isinstance(outputs, tuple) else pushed[0]


def hvp(fn: Callable[..., Any], inputs: Any, v: Any) -> tuple[Tensor, Any]:
    """``fn(*inputs)``, a scalar, and its Hessian times ``v``, as torch.autograd.functional.hvp.

    ``inputs`` and ``v`` are a Tensor each or tuples of the same length; the product has their form.

    Raises:
        RuntimeError: ``fn`` returns more than one number.
    """
    leaves = _leaves(inputs)
    output = fn(*leaves)
    slopes = pullback(output, leaves, [None], create_graph=True)
    products = pullback(slopes, leaves, v if isinstance(v, (list, tuple)) else (v,))
    return output, products if isinstance(inputs, (list, tuple)) else products[0]
