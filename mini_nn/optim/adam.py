"""Adam and AdamW: steps of the size of the learning rate, whatever the gradient's scale.

Kingma & Ba 2015, "Adam: a method for stochastic optimization", arXiv:1412.6980, algorithm 1;
Loshchilov & Hutter 2019, "Decoupled weight decay regularization", arXiv:1711.05101, algorithm 2.

=========  =====================================  ==============
η          learning rate                          ``lr``
β₁, β₂     decay of the first, second moment      ``betas``
ε          keeps the denominator from 0           ``eps``
λ          weight decay                           ``weight_decay``
m, v       moving averages of g and of g²         ``exp_avg``, ``exp_avg_sq``
=========  =====================================  ==============

Deviations: AdamW multiplies λ by η, as torch does, where the paper has a schedule's factor of its
own.  The classes compute in the order that Kingma & Ba give at the end of section 2: since
√v̂ = √v / √(1 - β₂ᵗ), both corrections become factors of η and ε, numbers instead of arrays.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from ..backend import Array, of
from ..ops import sqrt
from .base import Group, Optimizer, number


def adam_step(
    p: Any,
    g: Any,
    m: Any,
    v: Any,
    t: int,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> tuple[Any, Any, Any]:
    """Step t = 1, 2, … from zero moments: θ ← θ - η m̂ / (√v̂ + ε), where λ adds λθ to the gradient.

    ``p``, ``g``, ``m`` and ``v`` are arrays or Tensors; returns the new θ, m and v.
    """
    b1, b2 = betas
    g = g + weight_decay * p
    m = b1 * m + (1 - b1) * g
    v = b2 * v + (1 - b2) * (g * g)
    m_hat = m / (1 - b1**t)
    v_hat = v / (1 - b2**t)
    return p - lr * m_hat / (sqrt(v_hat) + eps), m, v


def adamw_step(
    p: Any,
    g: Any,
    m: Any,
    v: Any,
    t: int,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
) -> tuple[Any, Any, Any]:
    """θ ← (1 - ηλ) θ, then ``adam_step`` without decay: the moments never see the decay."""
    return adam_step(p - lr * weight_decay * p, g, m, v, t, lr, betas, eps)


class Adam(Optimizer):
    """``adam_step`` in place.

    The moments have the parameter's dtype: keep parameters in float32, since squares of small
    gradients vanish in float16.

    Args:
        params: Tensors or groups, see ``Optimizer``.
        lr: η ≥ 0.
        betas: β₁ and β₂, in [0, 1).
        eps: ε ≥ 0; with 0 an element whose gradients have all been 0 becomes nan.
        weight_decay: λ ≥ 0.

    Raises:
        TypeError, ValueError: as ``Optimizer``.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    def _check(self, group: Group) -> None:
        for name in ("lr", "eps", "weight_decay"):
            group[name] = number(name, group[name])
        if len(group["betas"]) != 2:
            raise ValueError(f"betas are two numbers, got {group['betas']}")
        group["betas"] = tuple(number("a beta", b, high=1.0, below=True) for b in group["betas"])

    def _buffers(self, group: Group) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    def _update(self, target: Array, grad: Array, state: dict[str, Any], group: Group) -> None:
        xp, lr, t = of(target), float(group["lr"]), state["step"]
        b1, b2 = group["betas"]
        root = math.sqrt(1.0 - b2**t)
        rate = lr * root / (1.0 - b1**t)
        eps = group["eps"] * root
        for p, g, m, v, d, s in self._blocks(target, grad, state["exp_avg"], state["exp_avg_sq"]):
            g = self._decay(p, g, d, lr, group["weight_decay"])
            xp.multiply(m, b1, out=m)  # m ← β₁ m + (1 - β₁) g
            xp.multiply(g, 1.0 - b1, out=s)
            xp.add(m, s, out=m)
            xp.multiply(v, b2, out=v)  # v ← β₂ v + (1 - β₂) g²
            xp.multiply(g, g, out=s)
            xp.multiply(s, 1.0 - b2, out=s)
            xp.add(v, s, out=v)
            xp.sqrt(v, out=s)  # θ ← θ - rate · m / (√v + ε root)
            xp.add(s, eps, out=s)
            xp.divide(m, s, out=s)
            xp.multiply(s, rate, out=s)
            xp.subtract(p, s, out=p)

    def _decay(self, p: Array, g: Array, scratch: Array, lr: float, weight_decay: float) -> Array:
        """g + λθ, the gradient of f + λ/2 |θ|²."""
        if not weight_decay:
            return g
        of(p).multiply(p, weight_decay, out=scratch)
        return of(p).add(g, scratch, out=scratch)


class AdamW(Adam):
    """``adamw_step`` in place: λ shrinks θ by the factor 1 - ηλ a step, whatever the gradient.

    Arguments and errors are Adam's; the default of ``weight_decay`` is 0.01.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay)

    def _decay(self, p: Array, g: Array, scratch: Array, lr: float, weight_decay: float) -> Array:
        if weight_decay:
            of(p).multiply(p, 1.0 - lr * weight_decay, out=p)
        return g
