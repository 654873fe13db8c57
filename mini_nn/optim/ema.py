"""Exponential moving averages of parameters.

Polyak & Juditsky 1992, "Acceleration of stochastic approximation by averaging", with exponential
instead of equal weights: after n updates with decay d,

    e = dⁿ θ₀ + (1 - d) Σₖ d^(n-k) θₖ,   k = 1 … n.

Deviation: the optional warm-up of the decay, min(d, (1 + t) / (10 + t)), is no paper's but common
practice (TensorFlow's ExponentialMovingAverage with a step).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from ..backend import of
from ..engine import Tensor
from .base import Blocks, copy_like, number


class EMA:
    """e ← d e + (1 - d) θ after every step, from e = θ at the start.

    Buffers of a model, such as running statistics, are not averaged.

    Args:
        params: the Tensors to follow.
        decay: d in [0, 1].
        warmup: use min(d, (1 + t) / (10 + t)) in update t = 0, 1, …, so that the random start is
            soon forgotten.

    Raises:
        TypeError: something is not a Tensor, or the decay not a number.
        ValueError: the decay is not in [0, 1].
    """

    def __init__(
        self, params: Iterable[Tensor], decay: float = 0.999, warmup: bool = False
    ) -> None:
        self.params = [*params]
        if not all(isinstance(p, Tensor) for p in self.params):
            raise TypeError("an EMA takes Tensors: pass model.parameters()")
        self.decay = number("decay", decay, high=1.0)
        self.warmup = warmup
        self.updates = 0
        self.averages = [copy_like(p.data, p.data) for p in self.params]
        self._blocks = Blocks()

    def update(self) -> None:
        """Take in the present parameters; comes after the optimiser's step."""
        t = self.updates
        d = min(self.decay, (1 + t) / (10 + t)) if self.warmup else self.decay
        for p, average in zip(self.params, self.averages, strict=True):
            xp = of(average)
            for e, x, s, _ in self._blocks(average, p.data):
                # e + (1 - d) (θ - e): where θ stands still, e = θ stays exactly
                xp.subtract(x, e, out=s)
                xp.multiply(s, 1.0 - d, out=s)
                xp.add(e, s, out=e)
        self.updates += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Let the parameters hold the averages inside the block, and their own numbers after it."""
        own = [p.data.copy() for p in self.params]
        try:
            for p, average in zip(self.params, self.averages, strict=True):
                p.data[...] = average
            yield
        finally:
            for p, x in zip(self.params, own, strict=True):
                p.data[...] = x

    def state_dict(self) -> dict[str, Any]:
        """The averages by ``"i"`` for parameter i, not copied, and the number of updates."""
        averages = {str(i): average for i, average in enumerate(self.averages)}
        return {**averages, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the result of ``state_dict``; arrays are copied.

        Raises:
            ValueError: other parameters, by number or by shape; nothing is changed.
        """
        shapes = {key: tuple(a.shape) for key, a in state.items() if key != "updates"}
        own = {str(i): p.shape for i, p in enumerate(self.params)}
        if shapes != own:
            raise ValueError(f"the saved averages have shapes {shapes} and the parameters {own}")
        self.updates = int(state["updates"])
        self.averages = [copy_like(state[str(i)], p.data) for i, p in enumerate(self.params)]
