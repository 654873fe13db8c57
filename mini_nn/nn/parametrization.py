"""The same layer in other coordinates: what is trained is not the weight, but what it is made of.

A reparametrised layer computes its weight from raw parameters at each call and then does what the
layer does.  The function is the same; the gradient, and so the path of training, is another.

==========================  =====================================================  ===============
W = w/√m, w ~ N(0, 1)       Jacot, Gabriel, Hongler 2018, arXiv:1806.07572, 3;     ``ntk``
                            Sohl-Dickstein et al. 2020, arXiv:2001.07301
W = √(2/m) w                Karras, Aila, Laine, Lehtinen 2017, arXiv:1710.10196,  ``equalized``
                            4.1
W = g v/‖v‖                 Salimans & Kingma 2016, arXiv:1602.07868, eq. 2        ``weight_norm``
variances, multipliers and  Yang et al. 2022, arXiv:2203.03466, tables 3 and 8     ``mup_rules``,
learning rates by role                                                             ``mup``
==========================  =====================================================  ===============

m is the fan-in.  For W = c w, a step of SGD with learning rate η on w is one with c² η on W; one of
Adam with η is one with c η, if its ε is multiplied by c on w.  Decay that is decoupled, W ← (1 − δ)
W, is the same for both; as AdamW has δ = η λ and η changes by c, λ has to by 1/c.  A penalty λ‖w‖²
is one of λ/c² on W.

Deviations: μP's factors are relative to a base width, at which they are all 1, as in the authors'
package; its attention, with 1/d in place of 1/√d, is the model's business.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from .. import ops
from ..backend import Array
from ..engine import data_of
from ..rng import Rng, default_rng
from .init import fans
from .layers import Embedding
from .module import Module, Parameter

__all__ = [
    "MupRule", "Parametrized", "Scaled", "WeightNorm", "equalized", "mup", "mup_rules", "ntk",
    "weight_norm",
]  # fmt: skip


class Parametrized(Module):
    """A layer whose weight is computed by a rule from parameters of the rule.

    The layer that is handed over is left as it is and shares its other parameters, such as the
    bias, with this one.  A weight that is tied to another layer's is so no more.

    Args:
        layer: any Module with a Parameter of that name.
        rule: a Module that is called without arguments and returns the weight.
        name: which parameter.

    Attributes:
        layer: a copy of the layer without that parameter.
        rule: what has the raw ones.

    Raises:
        ValueError: the layer has no parameter of that name.
    """

    def __init__(self, layer: Module, rule: Module, name: str = "weight") -> None:
        _weight(layer, name)
        self.name = name
        self.layer = copy.copy(layer)
        delattr(self.layer, name)
        self.rule = rule

    def remove(self) -> Module:
        """The plain layer of the same function: a Parameter with what the rule gives now.

        It shares the other parameters with this one, which is left as it is.
        """
        layer = copy.copy(self.layer)
        trained = any(p.requires_grad for p in self.rule.parameters())
        setattr(layer, self.name, Parameter(data_of(self.rule()).copy(), requires_grad=trained))
        return layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the layer.

        It is called as a shallow copy that has the weight of this call, so nothing is kept from one
        call to the next; buffers that it writes in place are shared.
        """
        layer = copy.copy(self.layer)
        setattr(layer, self.name, self.rule())
        return layer(*args, **kwargs)


def _weight(layer: Module, name: str) -> Parameter:
    found = getattr(layer, name, None)
    if not isinstance(found, Parameter):
        raise ValueError(
            f"{type(layer).__name__} has no Parameter {name!r} to reparametrise: pass the name of "
            "one"
        )
    return found


# W = c w


class Scaled(Module):
    """W = c w.

    Args:
        raw: w, an array that is shared, or a Tensor.
        multiplier: c.
        requires_grad: whether w is trained.

    Attributes:
        raw: the parameter w.
    """

    def __init__(self, raw: Any, multiplier: float, requires_grad: bool = True) -> None:
        self.raw = Parameter(data_of(raw), requires_grad=requires_grad)
        self.multiplier = multiplier

    def forward(self) -> Any:
        """The shape of w."""
        return self.multiplier * self.raw


def _scaled(
    layer: Module, squared: float, layout: str, name: str, redraw: bool, rng: Rng | None
) -> Parametrized:
    weight = _weight(layer, name)
    if isinstance(layer, Embedding):
        raise ValueError(
            "an Embedding's output is one row, a sum of one term: it has no fan-in to divide by; "
            "draw its weight from N(0, 1)"
        )
    multiplier = math.sqrt(squared / fans(weight.shape, layout)[0])
    raw: Array
    if redraw:
        raw = (default_rng() if rng is None else rng).normal(weight.shape, dtype=weight.dtype)
    else:
        raw = weight.data / multiplier
    return Parametrized(layer, Scaled(raw, multiplier, weight.requires_grad), name)


def ntk(
    layer: Module, *, layout: str = "out_in", name: str = "weight", redraw: bool = True,
    rng: Rng | None = None,
) -> Parametrized:  # fmt: skip
    """The NTK parametrisation, y = b + x w/√m with w drawn from N(0, 1).

    Args:
        layer: Linear, a convolution, or whatever sums over a fan-in; its bias is kept.
        layout: of the weight, as for ``init.fans``: ``"in_out"`` for GPT-2's Conv1D and transposed
            convolutions, whose axis of outputs is 1 and not 0.
        name: of the weight.
        redraw: draw w; False keeps the layer's function, w = √m W.
        rng: where to draw from; None for ``default_rng()``.

    Raises:
        ValueError: there is no such parameter, it has one axis, or the layer is an Embedding.
    """
    return _scaled(layer, 1.0, layout, name, redraw, rng)


def equalized(
    layer: Module, *, layout: str = "out_in", name: str = "weight", redraw: bool = True,
    rng: Rng | None = None,
) -> Parametrized:  # fmt: skip
    """The equalised learning rate: He's constant at run time, W = √(2/m) w; see ``ntk``."""
    return _scaled(layer, 2.0, layout, name, redraw, rng)


# Weight norm


class WeightNorm(Module):
    """W = g v/‖v‖ with one length g for each output.

    Args:
        weight: W to start from: v = W and g = ‖W‖.
        dim: the axis of the outputs, see ``weight_norm``.

    Attributes:
        g: ‖W‖ over all axes but ``dim``, which are kept with length 1, as torch's weight_g.
        v: the direction.  Its length has no meaning, and steps of plain gradient descent only let
            it grow: the gradient is orthogonal to v.

    Raises:
        ValueError: there is no such axis, or an output's weights are all 0.
    """

    def __init__(self, weight: Any, dim: int | None = 0) -> None:
        v = data_of(weight)
        if dim is not None and not -v.ndim <= dim < v.ndim:
            raise ValueError(f"a weight of shape {v.shape} has no axis {dim} of outputs")
        self.dim = dim if dim is None else dim % v.ndim
        g = (v * v).sum(axis=self._axes(v.ndim), keepdims=True) ** 0.5
        if bool((g == 0.0).any()):
            raise ValueError(
                "weight norm needs a direction for each output, but some have weights that are all "
                "0: start from other values and set g to 0 instead"
            )
        trained = getattr(weight, "requires_grad", True)
        self.v = Parameter(v.copy(), requires_grad=trained)
        self.g = Parameter(g, requires_grad=trained)

    def _axes(self, ndim: int) -> tuple[int, ...]:
        return tuple(axis for axis in range(ndim) if axis != self.dim)

    def forward(self) -> Any:
        """The shape of v.  A v that has become 0 gives nan: it has no direction."""
        square = ops.sum(self.v * self.v, axis=self._axes(self.v.ndim), keepdims=True)
        return self.v * (self.g * ops.rsqrt(square))


def weight_norm(layer: Module, name: str = "weight", dim: int | None = 0) -> Parametrized:
    """Weight normalisation of a layer, which keeps its function; arguments of torch's weight_norm.

    Args:
        layer: any Module with such a Parameter.
        name: of the weight.
        dim: the axis of the outputs: 0 for Linear and convolutions, and for an Embedding, whose
            rows have a length each; 1 for GPT-2's Conv1D and transposed convolutions; None for one
            length of the whole weight.

    Raises:
        ValueError: there is no such parameter or axis, or an output's weights are all 0.
    """
    return Parametrized(layer, WeightNorm(_weight(layer, name), dim), name)


# μP


class MupRule(NamedTuple):
    """Factors for one role: of the initial standard deviation, the weight, the learning rate."""

    std: float
    multiplier: float
    lr: float


def mup_rules(
    width: int, base_width: int, optimizer: str = "adam", table: int = 3
) -> dict[str, MupRule]:
    """How μP changes each parameter of a model that was tuned at another width.

    With r = width/base_width, and ``std`` a factor of 1/√fan_in:

    ========  =======================  =====  ===========  ========  =========
    role      such as                  std    multiplier   lr, SGD   lr, Adam
    ========  =======================  =====  ===========  ========  =========
    input     first weight, embedding  1      1            r         1
    vector    biases, gains            1      1            r         1
    hidden    width to width           1      1            1         1/r
    output    last weight (table 3)    1/√r   1            1/r       1/r
    output    the same (table 8)       √r     1/r          r         1
    scalar    fixed size               1      1            1         1
    ========  =======================  =====  ===========  ========  =========

    ``vector`` is what has one axis, as long as the model is wide; a ``scalar`` has none that grows
    with it, as the bias of the last layer or a branch's α.  The two forms of the output take the
    same path (W = w/r); table 8's also fits an embedding that is tied to the output, as its factors
    are those of an input but for the multiplier, which belongs on the logits.

    Args:
        width: of the model.
        base_width: of the one that was tuned, at which all factors are 1.
        optimizer: ``"sgd"``, or ``"adam"`` and what else ignores the size of gradients; its ε is
            taken to be negligible.
        table: 3 or 8, of the paper.

    Returns:
        A ``MupRule`` by role.

    Raises:
        ValueError: a width below 1, an unknown optimiser or table.
    """
    if width < 1 or base_width < 1:
        raise ValueError(f"widths are at least 1, got {width} and base {base_width}")
    if optimizer not in ("sgd", "adam") or table not in (3, 8):
        raise ValueError(
            f"μP has rules for 'sgd' and 'adam' in tables 3 and 8, got {optimizer!r} and {table}"
        )
    r = width / base_width
    sgd = optimizer == "sgd"
    wide = MupRule(1.0, 1.0, r if sgd else 1.0)
    outputs = {
        3: MupRule(r**-0.5, 1.0, 1.0 / r),
        8: MupRule(r**0.5, 1.0 / r, r if sgd else 1.0),
    }
    return {
        "input": wide,
        "vector": wide,
        "hidden": MupRule(1.0, 1.0, 1.0 if sgd else 1.0 / r),
        "output": outputs[table],
        "scalar": MupRule(1.0, 1.0, 1.0),
    }


def mup(
    roles: Mapping[str, Iterable[Parameter]], rules: Mapping[str, MupRule], lr: float
) -> list[dict[str, Any]]:
    """Parameter groups for an optimiser; what μP asks of initial weights and multipliers is yours.

    AdamW multiplies its decay by the group's ``lr``: divide ``weight_decay`` by ``rule.lr`` to keep
    the decay of the base width.

    Args:
        roles: parameters by role.
        rules: from ``mup_rules``.
        lr: the learning rate tuned at the base width.

    Returns:
        One group for each role, with "params" and "lr".

    Raises:
        ValueError: an unknown role.
    """
    unknown = [role for role in roles if role not in rules]
    if unknown:
        raise ValueError(f"no rule for {', '.join(unknown)}: the roles are {', '.join(rules)}")
    return [{"params": [*group], "lr": lr * rules[role].lr} for role, group in roles.items()]
