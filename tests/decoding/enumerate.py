"""The exact law of code that asks a ``Source`` for its choices: every branch, each once."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T", bound=Hashable)


class Enumerating:
    """A source that follows a prefix of choices and then always takes the first possible one.

    It keeps, for each question, the choices that are still to be tried after the one taken.
    """

    def __init__(self, prefix: list[int]) -> None:
        self.prefix = prefix
        self.taken: list[int] = []
        self.open: list[list[int]] = []
        self.probability = 1.0

    def _choose(self, chances: dict[int, float]) -> int:
        possible = [choice for choice, chance in chances.items() if chance > 0.0]
        at = len(self.taken)
        choice = self.prefix[at] if at < len(self.prefix) else possible[0]
        self.taken.append(choice)
        self.open.append(possible[possible.index(choice) + 1 :])
        self.probability *= chances[choice]
        return choice

    def categorical(self, p: Any) -> int:
        p = np.asarray(p, "float64")
        assert p.ndim == 1 and np.all(p >= 0.0) and abs(p.sum() - 1.0) < 1e-9, p
        return self._choose(dict(enumerate(p.tolist())))

    def bernoulli(self, a: float) -> bool:
        assert 0.0 < a < 1.0, f"only a question that is open is asked, got {a}"
        return bool(self._choose({1: float(a), 0: 1.0 - float(a)}))


def law(run: Callable[[Enumerating], T], limit: int = 200_000) -> dict[T, float]:
    """The probability of each outcome of ``run(source)``, which must be a function of the choices.

    Depth first over prefixes of choices: after each run the last choice that has an alternative is
    changed to the next one, and all later ones are forgotten.
    """
    found: dict[T, float] = {}
    prefix: list[int] | None = []
    for _ in range(limit):
        source = Enumerating(prefix)
        outcome = run(source)
        found[outcome] = found.get(outcome, 0.0) + source.probability
        while source.open and not source.open[-1]:
            source.open.pop()
            source.taken.pop()
        if not source.open:
            return found
        prefix = [*source.taken[:-1], source.open[-1][0]]
    raise AssertionError(f"more than {limit} branches")


def total(found: dict[Any, float]) -> float:
    """The mass of a law: 1 if no branch was forgotten."""
    return sum(found.values())


def distance(found: dict[Any, float], wanted: dict[Any, float]) -> float:
    """The largest difference of the probability of any outcome."""
    return max(abs(found.get(x, 0.0) - wanted.get(x, 0.0)) for x in {*found, *wanted})
