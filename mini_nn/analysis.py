"""How a signal and its gradient travel through the layers of a module, beside the mean field.

B. Poole, S. Lahiri, M. Raghu, J. Sohl-Dickstein, S. Ganguli 2016, *Exponential expressivity in deep
neural networks through transient chaos*, arXiv:1606.05340; S. Schoenholz, J. Gilmer, S. Ganguli,
J. Sohl-Dickstein 2016, *Deep information propagation*, arXiv:1611.01232.

========================================================  ===============================
q' = σ_w² E f(√q z)² + σ_b²              (1606.05340, 3)   ``MeanField.second_moments``
q'c' = σ_w² E f(u₁) f(u₂) + σ_b²         (1606.05340, 5)   ``MeanField.cosines``
E g² = χ E g'²,  χ = σ_w² E f'(√q z)²    (1611.01232, 9)   ``MeanField.gradients``
========================================================  ===============================

z is standard normal, (u₁, u₂) are normal of variance q and correlation c, and the numbers without a
prime belong to the layer before.  q, c and g are those of what a linear layer puts out.

``signals`` measures the same three on any Module.  All of it runs once, outside training, and its
results are on the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from . import ops
from .backend import Array, backend_of, to_host, using
from .engine import Tensor, data_of, grad
from .nn.container import ModuleList
from .nn.gaussian import correlation_map, expectation
from .nn.module import Module
from .rng import Rng


@dataclass(frozen=True)
class Signal:
    """What one layer put out.

    Args:
        name: of the layer, as ``named_modules`` has it.
        second_moment: the mean of h² over all numbers of the output h.
        cosine: the mean cosine of the outputs of two different samples; nan if there is one.
        gradient: the mean of (∂L/∂h)², L being the sum of the last output times fixed random signs.
    """

    name: str
    second_moment: float
    cosine: float
    gradient: float


@contextmanager
def watching(modules: dict[str, Module]) -> Iterator[list[tuple[str, Any]]]:
    """Inside the block, note (name, output) of every call of one of the modules, in order.

    Args:
        modules: by the name under which to note them, such as ``dict(model.named_modules())``.
    """
    seen: list[tuple[str, Any]] = []

    def noting(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            seen.append((name, output))
            return output

        return call

    for name, module in modules.items():
        vars(module)["forward"] = noting(name, module.forward)
    try:
        yield seen
    finally:
        for module in modules.values():
            del vars(module)["forward"]


def signals(
    model: Module, *inputs: Any, layers: dict[str, Module] | None = None, rng: Rng | None = None
) -> list[Signal]:
    """The second moment, the cosine and the gradient at each layer's output, first to last.

    Args:
        model: called once with ``inputs``, as it is: in training if it is in training.
        inputs: whatever it takes; the first axis of every layer's output counts the samples.
        layers: which modules to look at, by name; None for the model's children, or, where one of
            these is a ``ModuleList``, its members.
        rng: draws the signs of L; None for ``Rng(0)``.

    Returns:
        One ``Signal`` for each call of a layer.  Where the model's output does not depend on a
        layer's, its gradient is 0.

    Raises:
        ValueError: no layer was called, or nothing that they put out can have a gradient (integers
            go in and every parameter is frozen).
    """
    chosen = _layers(model) if layers is None else layers
    leaves = [Tensor(x, requires_grad=True) if _fractional(x) else x for x in inputs]
    with watching(chosen) as seen:
        output = model(*leaves)
    if not seen or any(not isinstance(h, Tensor) or h.node is None for _, h in seen):
        raise ValueError(
            f"of {len(chosen)} layers none was called, or one puts out no Tensor with a history: "
            "pass layers={name: module, …} out of dict(model.named_modules()), and unfreeze()"
        )
    with using(backend_of(output.data).name):
        signs = (rng or Rng(0)).bernoulli(0.5, output.shape).astype(output.dtype) * 2.0 - 1.0
    hidden = [h for _, h in seen]
    gradients = grad(output, hidden, signs, materialize_grads=True)
    return [
        Signal(name, _mean_square(h.data), cosine(h.data), _mean_square(g.data))
        for (name, h), g in zip(seen, gradients, strict=True)
    ]


def _layers(model: Module) -> dict[str, Module]:
    found: dict[str, Module] = {}
    for name, child in model.named_children():
        if isinstance(child, ModuleList):
            found |= {f"{name}.{inner}": layer for inner, layer in child.named_children()}
        else:
            found[name] = child
    return found


def _fractional(x: Any) -> bool:
    """An array of fractions that is no Tensor yet."""
    return not isinstance(x, Tensor) and hasattr(x, "dtype") and x.dtype.kind == "f"


def _mean_square(x: Array) -> float:
    return float(to_host((x * x).mean()))


def cosine(hidden: Array) -> float:
    """The mean cosine of two different rows of (n, …), each flattened; nan if n < 2 or one is 0."""
    rows = hidden.reshape(hidden.shape[0], -1)
    n = rows.shape[0]
    if n < 2:
        return float("nan")
    unit = rows / ((rows * rows).sum(axis=1, keepdims=True) ** 0.5)
    total = unit.sum(axis=0)
    return float(to_host(((total * total).sum() - n) / (n * (n - 1))))


OVERFLOW = 1e150
"""Second moments whose own second moment is out of range."""


@dataclass(frozen=True)
class MeanField:
    """What a wide network x ← W f(x) + b does at initialisation, in the limit of infinite width.

    Args:
        f: the activation, a function of arrays or Tensors.
        weight_variance: σ_w² = fan_in · Var W.
        bias_variance: σ_b² = Var b.
    """

    f: Callable[[Any], Any]
    weight_variance: float = 1.0
    bias_variance: float = 0.0

    def second_moments(self, depth: int, first: float = 1.0) -> list[float]:
        """q of ``depth`` linear layers, of which the first has ``first``.

        An activation whose map is unstable (GELU) leaves the range of numbers after some hundred
        layers: inf from 1e150 on.
        """
        q = [first]
        while len(q) < depth:
            q.append(self._next(q[-1]))
        return q

    def cosines(self, depth: int, cosine: float, first: float = 1.0) -> list[float]:
        """c of the same layers for two inputs of equal length.

        Args:
            cosine: in [−1, 1], of what the first layer makes of them.
            first: q of both there.
        """
        cosines = [cosine]
        for q, following in self._pairs(depth, first):
            power = (following - self.bias_variance) / self.weight_variance
            both = power * correlation_map(self._scaled(q), min(max(cosines[-1], -1.0), 1.0))
            cosines.append((self.weight_variance * both + self.bias_variance) / following)
        return cosines

    def gradients(self, depth: int, first: float = 1.0) -> list[float]:
        """E g² of the same layers as a multiple of the last one's."""
        gradients = [1.0]
        for q, _ in reversed([*self._pairs(depth, first)]):
            slope = self._slope(q)
            gradients.append(gradients[-1] * self.weight_variance * slope)
        return gradients[::-1]

    def _pairs(self, depth: int, first: float) -> Iterator[tuple[float, float]]:
        return pairwise(self.second_moments(depth, first))

    def _scaled(self, q: float) -> Callable[[Any], Any]:
        return lambda z: data_of(self.f(math.sqrt(q) * z))

    def _next(self, q: float) -> float:
        if not q < OVERFLOW:
            return math.inf
        f = self._scaled(q)
        return self.weight_variance * expectation(lambda z: f(z) ** 2) + self.bias_variance

    def _slope(self, q: float) -> float:
        """E f'(√q z)², by differentiating f itself."""

        def squared(z: Any) -> Any:
            x = Tensor(math.sqrt(q) * z, requires_grad=True)
            (slope,) = grad(ops.sum(self.f(x)), x)
            return slope.data**2

        return expectation(squared)
