"""What an entry of the catalogue is: a function, its oracle, and where its inputs come from."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mini_nn import ops


@dataclass(frozen=True)
class Case:
    """One call of one function for inputs of one tuple of shapes."""

    name: str
    call: Callable[..., Any]
    oracle: Callable[..., Any]
    specs: tuple[Any, ...]
    draws: tuple[Any, ...]
    label: str

    def inputs(self, seed: int = 0) -> list[Any]:
        """The host arrays: float64 numbers for the shapes, and the ready arrays as they are."""
        rng = np.random.default_rng([seed, zlib.crc32(self.label.encode())])
        draws = itertools.chain(self.draws, itertools.repeat(self.draws[-1]))
        pairs = zip(self.specs, draws, strict=False)
        return [np.asarray(d(rng, s)) if isinstance(s, tuple) else s for s, d in pairs]


CASES: list[Case] = []


def normal(rng: np.random.Generator, shape: tuple[int, ...]) -> Any:
    return rng.standard_normal(shape)


def positive(rng: np.random.Generator, shape: tuple[int, ...]) -> Any:
    return rng.uniform(0.4, 2.5, shape)


def inside(rng: np.random.Generator, shape: tuple[int, ...]) -> Any:
    return rng.uniform(-0.8, 0.8, shape)


def apart(rng: np.random.Generator, shape: tuple[int, ...]) -> Any:
    """Pairwise at least 0.2 apart and at least 0.1 from 0: no ties, no kinks."""
    size = int(np.prod(shape))
    grid = 0.3 * (np.arange(size) - size // 2 + 0.5)
    return (rng.permutation(grid) + rng.uniform(-0.05, 0.05, size)).reshape(shape)


def regular(rng: np.random.Generator, shape: tuple[int, ...]) -> Any:
    """Matrices far from singular."""
    return 0.3 * rng.standard_normal(shape) + 2.0 * np.eye(*shape[-2:])


def definite(rng: np.random.Generator, shape: tuple[int, ...]) -> Any:
    a = rng.standard_normal(shape)
    return a @ a.swapaxes(-1, -2) + 1.5 * np.eye(shape[-1])


def case(
    names: str,
    oracle: Any,
    *variants: str,
    given: tuple[Any, ...] = (),
    then: tuple[Any, ...] = (),
    draw: Any = normal,
    call: Any = None,
    listed: bool = False,
    **options: Any,
) -> None:
    """Enter the functions ``names`` (``oracle`` may be a module that has them) for each variant.

    ``call`` stands in for the function where its arguments come in another order than the arrays;
    ``listed``: it takes the arrays as one list.
    """
    draws = draw if isinstance(draw, tuple) else (draw,)
    for name, variant in itertools.product(names.split(), variants):
        ready = iter(given)
        specs = tuple(next(ready) if word == "#" else _shape(word) for word in variant.split())
        number = sum(other.name == name for other in CASES)
        extra = [*map(str, then), *(f"{k}={v}" for k, v in options.items())]
        text = ", ".join([variant.replace(" ", ","), *extra])

        def bind(function: Any) -> Callable[..., Any]:
            if listed:
                return lambda *xs: function(xs, *then, **options)
            return lambda *xs: function(*xs, *then, **options)

        expected = oracle if callable(oracle) else getattr(oracle, name)
        chosen = bind(call or getattr(ops, name))
        label = f"{name}-{number}({text})".replace(" ", "")
        CASES.append(Case(name, chosen, bind(expected), specs, draws, label))


def _shape(word: str) -> tuple[int, ...]:
    return () if word == "-" else tuple(map(int, word.split("x")))


def ints(*values: Any) -> Any:
    return np.array(values, dtype="int64")


def bools(*values: Any) -> Any:
    return np.array(values, dtype="bool")
