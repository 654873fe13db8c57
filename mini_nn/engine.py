"""The engine: a tape of what was computed, and one walk back along it.

A primitive is a function of arrays and a table of its derivatives::

    @primitive
    def tanh(x):
        return of(x).tanh(x)

    tanh.derivative(x=lambda g, y: g * (1 - y * y))

Called with arrays it returns an array and records nothing; called with Tensors it returns a Tensor
whose ``Node`` remembers the primitive, the nodes of its inputs, and of the values only those that a
rule of an input in need of a gradient asks for by name: an input's name, ``y`` for the output.
Rules are written with the same primitives, so they run on arrays in a first-order pass and on
Tensors under ``create_graph=True``, which is why derivatives of every order come without more code.

Three more names a rule may ask for: ``like``, the shape and dtype of the input it belongs to;
``needs``, which inputs of a joint rule are wanted; whatever the forward handed over by ``Kept``.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, overload

from . import backend
from .backend import Array
from .tape import Kept, Node, Parts, backprop, record_mode, recording

if TYPE_CHECKING:
    from .ops.methods import ArrayMethods
else:
    ArrayMethods = object

Rule = Callable[..., Any]


class Tensor(ArrayMethods):
    """An array that remembers how it was computed.

    Its methods and operators are those of an ndarray (``mini_nn.ops`` attaches them).

    Args:
        data: a Tensor, an array of a known backend (both shared, not copied), or numbers in lists;
            Python floats become float32 and Python ints int64, on the current backend.
        dtype: converts ``data`` if given.
        requires_grad: make it a leaf that gradients are computed for.

    Raises:
        TypeError: a gradient is asked for numbers that are not floating point, or ``data`` belongs
            to a library that no backend is registered for.
    """

    __slots__ = ("data", "node", "__weakref__")
    __array_ufunc__ = None  # array ∘ Tensor is left to the Tensor's reflected operator

    def __init__(self, data: Any, dtype: Any = None, requires_grad: bool = False) -> None:
        self.data: Array = backend.as_array(data_of(data), dtype)
        self.node: Node | None = None
        self.requires_grad = requires_grad

    @property
    def requires_grad(self) -> bool:
        """Whether gradients flow here; may be set on a leaf (freezing a parameter is ``False``)."""
        return self.node is not None

    @requires_grad.setter
    def requires_grad(self, wanted: bool) -> None:
        if wanted == (self.node is not None):
            return
        if not wanted and self.node is not None and self.node.primitive is not None:
            raise RuntimeError("only a leaf can stop requiring a gradient: cut here with detach()")
        if wanted and self.data.dtype.kind != "f":
            raise TypeError(
                f"only floating-point tensors can require a gradient, got dtype {self.data.dtype}: "
                "convert with astype('float32') first"
            )
        self.node = Node(None, (), (), self.data.shape, self.data.dtype) if wanted else None

    @property
    def grad(self) -> Array | None:
        """The gradient that ``backward`` accumulated for a leaf: a plain array, or None."""
        return None if self.node is None else self.node.grad

    @grad.setter
    def grad(self, value: Array | None) -> None:
        value = None if value is None else backend.as_array(data_of(value))
        if self.node is None or self.node.primitive is not None:
            raise RuntimeError("only a leaf that requires a gradient has one to set")
        if value is not None and value.shape != self.shape:
            raise ValueError(f"a gradient has its tensor's shape {self.shape}, got {value.shape}")
        self.node.grad = value

    def detach(self) -> Tensor:
        """The same array without its history."""
        return tensor_of(self.data, None)

    def __setitem__(self, index: Any, value: Any) -> None:
        raise TypeError(
            "a Tensor cannot be assigned to in place: the tape may still need what it holds. Use "
            "ops.where(mask, value, x) or ops.scatter_add(x, index, value), which return new ones; "
            "to set a parameter's numbers outside the tape, write to x.data[...]"
        )

    def backward(self, gradient: Any = None, *, retain_graph: bool = False) -> None:
        """Add the gradient of this tensor to ``.grad`` of every leaf it depends on.

        Args:
            gradient: the cotangent, of this tensor's shape; may be left out for one element.
            retain_graph: keep the graph, for a second backward pass.

        Raises:
            RuntimeError: the tensor has no history, is not a scalar and ``gradient`` is missing, or
                its graph has already been used.
            ValueError: ``gradient`` has another shape.
        """
        found = backprop(_seeds([self], [gradient], False), None, False, retain_graph)
        for node, g in found.items():
            g = g if node.grad is None else node.grad + g
            # a copy: the array may be shared with another leaf's, and 0-d sums are scalars
            node.grad = backend.of(g).array(g, dtype=node.dtype, order="C")


class Primitive:
    """A function of arrays with a table of its derivatives; see the module's docstring.

    ``composite`` is its twin in plain primitives: the readable definition, and what is
    differentiated under ``create_graph=True`` if the rules work in place or on ``Kept`` values.
    A function of ``*xs`` takes its other arguments by keyword and has one joint rule, for ``xs``.
    """

    __name__: str

    def __init__(self, forward: Callable[..., Any], composite: Any = None) -> None:
        functools.update_wrapper(self, forward)
        parameters = list(inspect.signature(forward).parameters.values())
        self.forward = forward
        self.composite = composite
        self.variadic = any(p.kind is p.VAR_POSITIONAL for p in parameters)
        self.names = [p.name for p in parameters]
        self._arity = -1 if self.variadic else len(parameters)
        self.defaults = [p.default for p in parameters]
        self.rules: list[tuple[int, Rule, list[str], Rule]] = []
        self.joint_rules: list[tuple[tuple[int, ...], Rule, list[str], Rule]] = []
        self._plans: dict[tuple[bool, ...], list[tuple[str, int]]] = {}

    def derivative(self, **rules: Rule) -> None:
        """State the rule of each differentiable input: ``rule(g, …)`` is its gradient."""
        for name, rule in rules.items():
            if self.variadic:
                self.joint_derivative(name)(rule)
            else:
                self.rules.append((self._place(name), rule, *_asked(rule)))

    def joint_derivative(self, *inputs: str) -> Callable[[Rule], Rule]:
        """Decorate one rule that gives the gradients of several inputs, as a tuple."""

        def state(rule: Rule) -> Rule:
            self.joint_rules.append((tuple(map(self._place, inputs)), rule, *_asked(rule)))
            return rule

        return state

    def _place(self, name: str) -> int:
        if name not in self.names:
            raise TypeError(f"{self.__name__} has no input {name!r}: its inputs are {self.names}")
        return self.names.index(name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for arg in (*args, *kwargs.values()) if kwargs else args:
            if isinstance(arg, Tensor):
                break
        else:  # arrays only: nothing to record
            output = self.forward(*args, **kwargs)
            return output.output if type(output) is Kept else output
        if kwargs or len(args) != self._arity:
            args = self._bind(args, kwargs)
        values, parents = [], []
        for arg in args:
            if isinstance(arg, Tensor):
                values.append(arg.data)
                parents.append(arg.node)
            else:
                values.append(arg)
                parents.append(None)
        output = self._apply(values) if self.variadic else self.forward(*values)
        extras: dict[str, Any] = {}
        if type(output) is Kept:
            output, extras = output.output, output.extras
        if (self.rules or self.joint_rules) and any(parents) and recording.get():
            return wrap(output, self._record(values, parents, output, extras))
        return wrap(output, None)

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """Every argument in the order of the names; the operands of ``*xs`` stand first."""
        start = 1 if self.variadic else len(args)
        rest = zip(self.names[start:], self.defaults[start:], strict=True)
        bound = (*args, *(kwargs.pop(name, default) for name, default in rest))
        if kwargs or (len(args) > len(self.names) and not self.variadic):
            given = [*kwargs] or f"{len(args)} arguments"
            raise TypeError(f"{self.__name__}({', '.join(self.names)}) does not take {given}")
        if any(value is inspect.Parameter.empty for value in bound):
            raise TypeError(f"{self.__name__}({', '.join(self.names)}) misses an argument")
        return bound

    def _apply(self, values: list[Any]) -> Any:
        count = len(values) - len(self.names) + 1
        keywords = dict(zip(self.names[1:], values[count:], strict=True))
        return self.forward(*values[:count], **keywords)

    def _record(
        self, values: list[Any], parents: list[Any], output: Any, extras: Any
    ) -> Node | None:
        """The tape's entry, which keeps exactly what the rules in use ask for."""
        if self.variadic:
            count = len(values) - len(self.names) + 1
            values, parents = [tuple(values[:count]), *values[count:]], parents[:count]
            wanted: tuple[bool, ...] = (True,)
        else:
            wanted = tuple(map(bool, parents))
        plan = self._plans.get(wanted)
        if plan is None:
            plan = self._plans[wanted] = self._plan(wanted)
        kept = {}
        for name, place in plan:
            kept[name] = values[place] if place >= 0 else output if name == "y" else extras[name]
        if type(output) is tuple:
            return Node(self, kept, parents, [o.shape for o in output], [o.dtype for o in output])
        if output.dtype.kind != "f":  # a cast to integers: a gradient would be cut to an integer
            return None
        return Node(self, kept, parents, output.shape, output.dtype)

    def _plan(self, wanted: tuple[bool, ...]) -> list[tuple[str, int]]:
        """Name and place (−1: not an input) of what the rules of the ``wanted`` inputs ask for."""
        asked = {n for place, _, names, _ in self.rules if wanted[place] for n in names}
        for places, _, names, _ in self.joint_rules:
            if any(wanted[place] for place in places):
                asked |= {*names}
        asked |= {*self.names} if self.composite else set()
        return [(n, self._place(n) if n in self.names else -1) for n in asked - {"like", "needs"}]

    def pull(self, node: Node, g: Any, wanted: Any, create_graph: bool) -> list[tuple[Node, Any]]:
        """The gradients of the node's parents that are in ``wanted`` (None: all), from its own."""
        kept: Any = node.kept
        if create_graph:
            if self.composite:
                inputs = [kept[name] for name in self.names]
                seeds = [g.get(i) for i in range(len(node.shape))] if type(g) is Parts else [g]
                return replay(self.composite, inputs, node.parents, [], seeds, True)
            kept = self._linked(node)
        if type(node.shape) is list:
            g = g.filled(node)
        pulled = []
        for place, rule, asked, fetch in self.rules:
            parent = node.parents[place]
            if parent is not None and (wanted is None or parent in wanted):
                named = {**kept, "like": parent} if "like" in asked else kept
                pulled.append((parent, rule(g, *fetch(named))))
        for places, rule, _, fetch in self.joint_rules:
            parents: Any = node.parents
            parents = parents if self.variadic else [parents[place] for place in places]
            needs = [p is not None and (wanted is None or p in wanted) for p in parents]
            if any(needs):
                parts = rule(g, *fetch({**kept, "like": parents, "needs": needs}))
                pulled += [(p, part) for p, part, n in zip(parents, parts, needs, strict=True) if n]
        return pulled

    def _linked(self, node: Node) -> dict[str, Any]:
        """What the tape kept, as Tensors that continue its graph."""
        linked: dict[str, Any] = {}
        for name, value in (node.kept or {}).items():
            if name == "y" and "y" not in self.names:
                linked[name] = wrap(value, node)
            elif name not in self.names:
                raise TypeError(f"{self.__name__} keeps {name!r}: its second order needs a twin")
            elif self.variadic and name == self.names[0]:
                pairs = zip(value, node.parents, strict=True)
                linked[name] = tuple(v if p is None else tensor_of(v, p) for v, p in pairs)
            else:
                parent = None if self.variadic else node.parents[self.names.index(name)]
                linked[name] = value if parent is None else tensor_of(value, parent)
        return linked


@overload
def primitive(forward: Callable[..., Any]) -> Primitive: ...
@overload
def primitive(*, composite: Callable[..., Any]) -> Callable[[Callable[..., Any]], Primitive]: ...
def primitive(forward: Any = None, *, composite: Any = None) -> Any:
    """Make a function of arrays, which must not change its arguments, a ``Primitive``.

    Args:
        forward: the function, where the decorator is used without parentheses.
        composite: its twin in plain primitives, with the same arguments.
    """
    return Primitive(forward, composite) if forward else lambda fn: Primitive(fn, composite)


def _asked(rule: Rule) -> tuple[list[str], Rule]:
    """The names that a rule asks for, and what fetches their values as a tuple."""
    names = list(inspect.signature(rule).parameters)[1:]
    if len(names) == 1:
        return names, lambda kept, name=names[0]: (kept[name],)
    return names, operator.itemgetter(*names) if names else lambda kept: ()


def data_of(x: Any) -> Any:
    """The array of a Tensor; anything else as it is."""
    return x.data if isinstance(x, Tensor) else x


def tensor_of(data: Array, node: Node | None) -> Tensor:
    """A Tensor of this array and this history, without the checks of the constructor."""
    made: Tensor = _new(Tensor)
    made.data = data
    made.node = node
    return made


_new = object.__new__
_pick = Primitive(lambda outputs, index: outputs[index])
_pick.derivative(outputs=lambda g, index: Parts({index: g}))
_alias = Primitive(lambda x: x)
_alias.derivative(x=lambda g: g)


def wrap(output: Any, node: Node | None) -> Any:
    """A primitive's output as a Tensor, or as a tuple of them that share its node."""
    if type(output) is tuple:
        made = [wrap(member, None) for member in output]
        for i, member in enumerate(made if node is not None else ()):
            if member.data.dtype.kind == "f":
                member.node = Node(_pick, {"index": i}, [node, None], member.shape, member.dtype)
        return tuple(made)
    if type(output) not in backend.array_types:  # NumPy's reductions over everything give scalars
        output = backend.of(output).asarray(output)
    return tensor_of(output, node)


def replay(
    fn: Callable[..., Any],
    values: Sequence[Any],
    parents: Sequence[Node | None],
    captured: list[Node],
    seeds: Sequence[Any],
    create_graph: bool,
) -> list[tuple[Node, Any]]:
    """Run ``fn`` again on a tape of its own and differentiate that: parents and gradients."""
    aliases = [p and Node(_alias, {}, [p], p.shape, p.dtype) for p in parents]
    pairs = zip(values, aliases, strict=True)
    with record_mode(True):
        outputs = fn(*[v if node is None else tensor_of(v, node) for v, node in pairs])
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    begin = [(o.node, g) for o, g in zip(outputs, seeds, strict=True) if g is not None and o.node]
    targets = [node for node in aliases if node] + captured
    owners = [p for p in parents if p] + captured
    found = backprop(begin, {*targets}, create_graph, create_graph, {*targets})
    return [(p, found[t]) for p, t in zip(owners, targets, strict=True) if t in found]


def _seeds(outputs: Sequence[Tensor], cotangents: Sequence[Any], create_graph: bool) -> list[Any]:
    """The node and the cotangent of each output."""
    seeds = []
    for output, g in zip(outputs, cotangents, strict=True):
        if output.node is None:
            raise RuntimeError(
                "the output has no history: no input requires a gradient, or no_grad() was on"
            )
        if g is None:
            if output.data.size != 1:
                raise RuntimeError(
                    f"a gradient can start by itself only at one number, not at {output.shape}: "
                    "reduce it (.sum()) or pass its cotangent (grad_outputs=, gradient=)"
                )
            g = backend.of(output.data).ones_like(output.data)
        data = data_of(g)
        if getattr(data, "shape", ()) != output.shape:
            raise ValueError(f"a cotangent has its output's shape {output.shape}, got {data.shape}")
        g = data if not create_graph else g if isinstance(g, Tensor) else tensor_of(g, None)
        seeds.append((output.node, g))
    return seeds


def grad(
    outputs: Tensor | Sequence[Tensor],
    inputs: Tensor | Sequence[Tensor],
    grad_outputs: Any = None,
    create_graph: bool = False,
    *,
    retain_graph: bool | None = None,
    allow_unused: bool = False,
    materialize_grads: bool = False,
) -> tuple[Tensor, ...]:
    """The gradients of the sum of ``outputs`` with respect to ``inputs``, as torch.autograd.grad.

    Args:
        outputs: one Tensor or several.
        inputs: one Tensor or several, leaves or not, that the outputs were computed from.
        grad_outputs: a cotangent for each output, of its shape; None stands for 1 and is allowed
            for outputs of one element.
        create_graph: record this computation too, so that its result can be differentiated.
        retain_graph: keep the graph for another pass (default: as ``create_graph``).
        allow_unused: return None, instead of raising, for an input that no output depends on.
        materialize_grads: return zeros for such an input.

    Returns:
        One Tensor for each input, of its shape and dtype; always a tuple.

    Raises:
        RuntimeError: an output has no history, or is not a scalar and has no cotangent; an input
            requires no gradient or is unused; the graph has been released by an earlier pass.
        ValueError: a cotangent's shape is not its output's.
    """
    outputs = [outputs] if isinstance(outputs, Tensor) else [*outputs]
    inputs = [inputs] if isinstance(inputs, Tensor) else [*inputs]
    if not isinstance(grad_outputs, (list, tuple)):
        grad_outputs = [grad_outputs] * (len(outputs) if grad_outputs is None else 1)
    if len(grad_outputs) != len(outputs):
        raise ValueError(f"{len(outputs)} outputs, but {len(grad_outputs)} grad_outputs")
    for i, x in enumerate(inputs):
        if x.node is None:
            raise RuntimeError(f"input {i}, of shape {x.shape}, does not require a gradient")
    seeds = _seeds(outputs, grad_outputs, create_graph)
    retain = create_graph if retain_graph is None else retain_graph
    found = backprop(seeds, {x.node for x in inputs}, create_graph, retain)
    results: list[Any] = []
    for i, x in enumerate(inputs):
        if x.node in found:
            g = found[x.node]
            results.append(g if isinstance(g, Tensor) else wrap(g, None))
        elif materialize_grads:
            results.append(tensor_of(backend.of(x.data).zeros_like(x.data), None))
        elif allow_unused:
            results.append(None)
        else:
            raise RuntimeError(
                f"no output depends on input {i}, of shape {x.shape}: use it, or pass "
                "allow_unused=True for None or materialize_grads=True for zeros"
            )
    return tuple(results)
