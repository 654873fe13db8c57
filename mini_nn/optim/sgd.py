"""Stochastic gradient descent with momentum.

Polyak 1964, "Some methods of speeding up the convergence of iteration methods" (the heavy ball);
Nesterov's variant in the form of Sutskever, Martens, Dahl & Hinton 2013, "On the importance of
initialization and momentum in deep learning", eq. 3-4.

Deviations: as in torch the learning rate multiplies the momentum when it is used, not the gradient
when it enters, so a change of the rate acts on the whole step; and Nesterov's look-ahead is
rewritten for the point that the gradient is taken at.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from ..backend import Array, of
from .base import Group, Optimizer, number


def sgd_step(
    p: Any,
    g: Any,
    b: Any,
    t: int,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
) -> tuple[Any, Any]:
    """Step t = 1, 2, …: b ← μ b + (1 - τ) g, θ ← θ - η b; the first b is g itself.

    Args:
        p, g, b: θ, its gradient, and the momentum of step t - 1, arrays or Tensors.
        t, lr, momentum, dampening, weight_decay: t, η, μ, τ and λ, which adds λθ to g.
        nesterov: θ ← θ - η (g + μ b).

    Returns:
        The new θ and b; nothing is written in place.
    """
    g = g + weight_decay * p
    if momentum == 0:
        return p - lr * g, b
    b = g if t == 1 else momentum * b + (1 - dampening) * g
    return p - lr * (g + momentum * b if nesterov else b), b


class SGD(Optimizer):
    """``sgd_step`` in place.

    Args:
        params: Tensors or groups, see ``Optimizer``.
        lr: η ≥ 0.
        momentum: μ ≥ 0.
        dampening: τ, from the second step on.
        weight_decay: λ ≥ 0.
        nesterov: needs μ > 0 and τ = 0.

    Raises:
        TypeError, ValueError: as ``Optimizer``.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "dampening": dampening}
        super().__init__(params, {**defaults, "weight_decay": weight_decay, "nesterov": nesterov})

    def _check(self, group: Group) -> None:
        for name in ("lr", "momentum", "weight_decay"):
            group[name] = number(name, group[name])
        group["dampening"] = number("dampening", group["dampening"], low=-math.inf)
        group["nesterov"] = bool(group["nesterov"])
        if group["nesterov"] and (group["momentum"] == 0 or group["dampening"] != 0):
            raise ValueError(
                "nesterov needs momentum > 0 and dampening = 0, got "
                f"momentum {group['momentum']} and dampening {group['dampening']}"
            )

    def _buffers(self, group: Group) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] else ()

    def _update(self, target: Array, grad: Array, state: dict[str, Any], group: Group) -> None:
        xp, lr = of(target), float(group["lr"])
        momentum, weight_decay = group["momentum"], group["weight_decay"]
        taken = 1.0 if state["step"] == 1 else 1.0 - group["dampening"]
        buffers = [state[name] for name in self._buffers(group)]
        for p, g, *bs, d, s in self._blocks(target, grad, *buffers):
            if weight_decay:  # g ← g + λ θ
                xp.multiply(p, weight_decay, out=d)
                g = xp.add(g, d, out=d)
            for b in bs:
                xp.multiply(b, momentum, out=b)  # b ← μ b + (1 - τ) g
                xp.multiply(g, taken, out=s)
                xp.add(b, s, out=b)
                if group["nesterov"]:
                    xp.multiply(b, momentum, out=s)
                    g = xp.add(g, s, out=d)
                else:
                    g = b
            xp.multiply(g, lr, out=s)  # θ ← θ - η g
            xp.subtract(p, s, out=p)
