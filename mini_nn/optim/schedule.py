"""Learning rates that change with the step.

Warm-up on a line: Goyal et al. 2017, "Accurate, large minibatch SGD", arXiv:1706.02677, § 2.2.
Half a cosine down: Loshchilov & Hutter 2017, "SGDR", arXiv:1608.03983, eq. 5, without restarts.
Noam: Vaswani et al. 2017, "Attention is all you need", arXiv:1706.03762, eq. 3.

Steps count from 0, the first update.  Deviation: warm-up ends one step earlier than in libraries
that start at a rate of 0, whose first update changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from .base import Optimizer

Ratio = Callable[[int], float]


def warmup_cosine(step: int, warmup: int, total: int, min_ratio: float = 0.0) -> float:
    """(step + 1) / warmup before step ``warmup``, then r + (1 - r) (1 + cos πx) / 2.

    x runs from 0 at step ``warmup`` to 1 at step ``total``; from there on the ratio is r, the
    ``min_ratio``.  The result is the factor of the highest learning rate.

    Raises:
        ValueError: not 0 ≤ warmup ≤ total, a negative step, or min_ratio outside [0, 1].
    """
    if not 0 <= warmup <= total or step < 0 or not 0.0 <= min_ratio <= 1.0:
        raise ValueError(
            "warmup_cosine needs step ≥ 0, 0 ≤ warmup ≤ total and min_ratio in [0, 1], got "
            f"step {step}, warmup {warmup}, total {total}, min_ratio {min_ratio}"
        )
    if step < warmup:
        return (step + 1) / warmup
    if step >= total:
        return float(min_ratio)
    x = (step - warmup) / (total - warmup)
    return min_ratio + (1.0 - min_ratio) * 0.5 * (1.0 + math.cos(math.pi * x))


def noam(step: int, d_model: int, warmup: int = 4000) -> float:
    """d^(-1/2) min(s^(-1/2), s w^(-3/2)) with s = step + 1 and w = ``warmup``.

    Largest at s = w, where it is (d w)^(-1/2).  This is the paper's rate itself, so
    the optimiser's own is 1.

    Raises:
        ValueError: a negative step, or d_model or warmup below 1.
    """
    if step < 0 or d_model < 1 or warmup < 1:
        raise ValueError(
            "noam needs step ≥ 0, d_model ≥ 1 and warmup ≥ 1, got "
            f"step {step}, d_model {d_model}, warmup {warmup}"
        )
    s = step + 1
    return float(d_model**-0.5 * min(s**-0.5, s * warmup**-1.5))


class Schedule:
    """Sets the learning rate of each group to the one it was made with times ``lr_lambda(step)``.

    This is torch's LambdaLR: the rate of step 0 is set at once, and ``step()`` comes after the
    optimiser's.

    Args:
        optimizer: whose groups' ``"lr"`` is written.
        lr_lambda: a function of the number of steps taken, such as
            ``partial(warmup_cosine, warmup=100, total=5000)``, or one for each group.

    Raises:
        ValueError: there are not as many functions as groups.
    """

    def __init__(self, optimizer: Optimizer, lr_lambda: Ratio | Sequence[Ratio]) -> None:
        groups = optimizer.param_groups
        self.optimizer = optimizer
        self.lr_lambdas = [lr_lambda] * len(groups) if callable(lr_lambda) else [*lr_lambda]
        self.base_lrs = [float(group["lr"]) for group in groups]
        self.steps = 0
        if len(self.lr_lambdas) != len(groups):
            raise ValueError(
                f"{len(groups)} groups need one function or as many, got {len(self.lr_lambdas)}"
            )
        self._set()

    def step(self) -> None:
        """Go on to the rates of the next step."""
        self.steps += 1
        self._set()

    def get_last_lr(self) -> list[float]:
        """The present learning rate of each group."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Where the schedule stands, fit for JSON; the functions are not part of it."""
        return {"steps": self.steps, "base_lrs": [*self.base_lrs]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the result of ``state_dict``, and set the rates.

        Raises:
            ValueError: it was made for another number of groups.
        """
        if len(state["base_lrs"]) != len(self.base_lrs):
            raise ValueError(
                f"the saved schedule has {len(state['base_lrs'])} groups and this one "
                f"{len(self.base_lrs)}: build the optimiser as it was built then"
            )
        self.steps = int(state["steps"])
        self.base_lrs = [float(lr) for lr in state["base_lrs"]]
        self._set()

    def _set(self) -> None:
        groups = self.optimizer.param_groups
        for group, base, ratio in zip(groups, self.base_lrs, self.lr_lambdas, strict=True):
            group["lr"] = base * float(ratio(self.steps))


LambdaLR = Schedule
