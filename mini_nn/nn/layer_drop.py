"""LayerSkip's training: layers that are left out at random, and a loss at every exit.

Elhoushi, Shrivastava, Liskovich, Hosmer, Wasti, Lai, Mahmoud, Acun, Agarwal, Roman, Aly, Chen, Wu
2024, *LayerSkip: Enabling Early Exit Inference and Self-Speculative Decoding*, 2404.16710.

=================================================  ===============  ============================
x + M(p) f(x), M = 0 with probability p            4.1, eq. 1       ``LayerDropout``
pₗ = S(t) D(l) p_max, D(l) = exp(l ln 2/(L−1)) − 1 4.1, eq. 2, 3    ``layer_drop_rates``
S(t) = exp(t ln 2/(T−1)) − 1                       4.1              ``curriculum``
Σₗ ẽ(l) Jₗ, ẽ(l) = C(l) e(l) / Σᵢ C(i) e(i)        4.2, eq. 4, 5    ``early_exit_loss``
e(l) = s Σ_{i≤l} i; e(L−1) = L − 1 + s Σ_{i≤L−2} i 4.2              ``early_exit_weights``
C: every R-th layer, in turns                      4.2              ``rotational_exits``
C: one more from the last one down, every T/2L     4.2              ``gradual_exits``
=================================================  ===============  ============================

l = 0 … L − 1 are the layers, t = 0 … T − 1 the steps.  All exits share the model's norm and head.

Deviations: e(0) = 0, so the first layer has no exit, as in the formula above; the authors' later
code counts l from 1 there and does not scale the last layer's sum.  The last layer takes part in
every step of every curriculum, so that the weights have a sum to be divided by.  A dropped layer is
computed and then not used, where the authors leave its rows out: the numbers are the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from .. import ops
from ..rng import Rng, default_rng
from . import functional as F
from .module import Module

__all__ = [
    "LayerDropout", "curriculum", "early_exit_loss", "early_exit_weights", "gradual_exits",
    "layer_drop_rates", "rotational_exits",
]  # fmt: skip


def curriculum(step: int, total: int) -> float:
    """S(t) = 2^(t/(T−1)) − 1, from 0 at the first of T steps to 1 at the last; 1 if T = 1.

    Raises:
        ValueError: ``step`` is not in 0 … total − 1.
    """
    if not 0 <= step < total:
        raise ValueError(f"the steps are 0 … {total - 1}, got {step}")
    return _rise(step, total) if total > 1 else 1.0


def layer_drop_rates(n_layer: int, p_max: float, scale: float = 1.0) -> list[float]:
    """pₗ = scale · D(l) · p_max: 0 in the first layer, scale · p_max in the last.

    Args:
        n_layer: L ≥ 1; a single layer is never dropped.
        p_max: the probability with which the last layer is dropped.
        scale: S, ``curriculum`` for a training from scratch, 1 for a continued one.

    Raises:
        ValueError: an argument is out of its range.
    """
    if n_layer < 1 or not 0.0 <= p_max <= 1.0 or not 0.0 <= scale <= 1.0:
        raise ValueError(
            "dropout of layers takes n_layer ≥ 1, p_max and scale in [0, 1], got "
            f"{n_layer}, {p_max}, {scale}"
        )
    return [scale * p_max * _rise(l, n_layer) for l in range(n_layer)]


def _rise(i: int, count: int) -> float:
    """2^(i/(count−1)) − 1: exactly 0 at the start and 1 at the end; 0 where there is one only."""
    return 2.0 ** (i / (count - 1)) - 1.0 if count > 1 else 0.0


class LayerDropout(Module):
    """In training, the whole layer is the identity with probability p, for each row of a batch.

    What is kept is not divided by 1 − p, as in the paper; in evaluation nothing is dropped.

    Args:
        block: x ↦ x + f(x) of a batch (b, …), such as a ``models.gpt.Block``; further arguments go
            to it.  Take ``block`` out again to save weights under the names without it.
        p: the probability; ``p`` may be changed while training.
        rng: what is drawn from, at each call in training with p > 0 (None: ``default_rng()``).

    Raises:
        ValueError: ``p`` is not a probability.
    """

    def __init__(self, block: Module, p: float, *, rng: Rng | None = None) -> None:
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"LayerDropout takes a probability p in [0, 1], got {p}")
        self.block, self.p, self.rng = block, p, rng

    def forward(self, x: Any, *context: Any) -> Any:
        """(b, …) to the same."""
        if not self.training or self.p == 0:
            return self.block(x, *context)
        rng = default_rng() if self.rng is None else self.rng
        kept = rng.bernoulli(1.0 - self.p, (x.shape[0], *(1,) * (x.ndim - 1)))
        return ops.where(kept, self.block(x, *context), x)

    def extra_repr(self) -> str:
        """The probability."""
        return f"p={self.p}"


def rotational_exits(n_layer: int, every: int, step: int) -> list[bool]:
    """C: in each step the loss of every R-th layer, all in turn within R steps; and of the last.

    Args:
        n_layer: L.
        every: R ≥ 1.
        step: t.

    Raises:
        ValueError: ``every`` or ``n_layer`` is below 1.
    """
    if every < 1 or n_layer < 1:
        raise ValueError(f"exits of every R-th of L layers, both ≥ 1, got {every} of {n_layer}")
    return [(l - step) % every == 0 or l == n_layer - 1 for l in range(n_layer)]


def gradual_exits(n_layer: int, step: int, total: int) -> list[bool]:
    """C: the last layer first, then one more below it every T/2L steps; all in the second half.

    Args:
        n_layer: L.
        step: t.
        total: T.

    Raises:
        ValueError: ``step`` is not in 0 … total − 1, or ``n_layer`` is below 1.
    """
    if n_layer < 1 or not 0 <= step < total:
        raise ValueError(f"L ≥ 1 layers and the steps 0 … {total - 1}, got {n_layer} and {step}")
    open_layers = 1 + 2 * n_layer * step // total
    return [l >= n_layer - open_layers for l in range(n_layer)]


def early_exit_weights(
    n_layer: int, scale: float, enabled: Iterable[bool] | None = None
) -> list[float]:
    """ẽ(l), which sum to 1: the later the exit, the heavier.

    Args:
        n_layer: L ≥ 1; of a single layer the weight is 1.
        scale: s ≥ 0; 0 is ordinary training, all weight on the last layer.
        enabled: C, L booleans; None for all.

    Raises:
        ValueError: an argument is out of its range, or no layer of positive weight is enabled.
    """
    chosen = [True] * n_layer if enabled is None else [*enabled]
    if n_layer < 1 or not 0.0 <= scale < math.inf or len(chosen) != n_layer:
        raise ValueError(
            "exits take n_layer ≥ 1, scale ≥ 0 and a boolean for each layer, got "
            f"{n_layer}, {scale} and {len(chosen)} booleans"
        )
    last = n_layer - 1
    raw = [scale * l * (l + 1) / 2.0 for l in range(last)]
    raw.append(last + scale * (last - 1) * last / 2.0 if last else 1.0)
    raw = [e if on else 0.0 for e, on in zip(raw, chosen, strict=True)]
    total = math.fsum(raw)
    if not total > 0.0:
        raise ValueError(
            f"none of the enabled layers {[l for l, on in enumerate(chosen) if on]} has a positive "
            "weight: the last one has"
        )
    return [e / total for e in raw]


def early_exit_loss(
    states: Iterable[Any],
    head: Callable[[Any], Any],
    target: Any,
    weights: Sequence[float],
    loss: Callable[[Any, Any], Any] = F.cross_entropy,
) -> Any:
    """Σₗ ẽ(l) J(head(stateₗ), target).

    Args:
        states: the hidden states after each layer, (b, t, d); may be a generator, of which each is
            asked for once.
        head: the norm and the head that all exits share, to (b, t, V).
        target: (b, t) integers.
        weights: as many; a layer of weight 0 costs no head.
        loss: of logits (b t, V) and targets (b t,); a number.

    Returns:
        A 0-d array.

    Raises:
        ValueError: there is another number of weights than of states, or none is positive.
    """
    whole: Any = None
    for state, weight in zip(states, weights, strict=True):
        if weight == 0.0:
            continue
        logits = head(state)
        term = weight * loss(logits.reshape(-1, logits.shape[-1]), target.reshape(-1))
        whole = term if whole is None else whole + term
    if whole is None:
        raise ValueError(f"at least one exit has a positive weight, got {[*weights]}")
    return whole
