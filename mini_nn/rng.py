"""Seeded randomness: the same numbers on every backend.

A generator draws on the host (NumPy's PCG64) and the result is copied to where the arrays are
created, so one seed gives one set of weights, batches and samples everywhere; CuPy's own streams
differ from NumPy's for the same seed, and its ``Generator`` has no ``normal``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np

from . import backend
from .backend import Array

Shape = int | Sequence[int]

_watcher: ContextVar[dict[Rng, dict[str, Any]] | None] = ContextVar("mini_nn_rng", default=None)


class Rng:
    """A stream of random numbers that is a value: it can be saved, restored and split.

    Args:
        seed: any non-negative integer.

    Raises:
        TypeError, ValueError: ``seed`` is not a non-negative integer.
    """

    def __init__(self, seed: int) -> None:
        if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
            raise TypeError(f"a seed is an integer, got {type(seed).__name__}")
        if seed < 0:
            raise ValueError(f"a seed is at least 0, got {seed}")
        self.seed = int(seed)
        self._generator = np.random.Generator(np.random.PCG64(self.seed))

    def __repr__(self) -> str:
        return f"Rng({self.seed})"

    @property
    def host(self) -> np.random.Generator:
        """NumPy's generator of this stream, for draws that stay on the host."""
        seen = _watcher.get()
        if seen is not None and self not in seen:
            seen[self] = self.state_dict()
        return self._generator

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands: plain integers and strings, fit for JSON."""
        return dict(self._generator.bit_generator.state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to where ``state_dict`` was taken."""
        self._generator.bit_generator.state = state

    def split(self, count: int) -> list[Rng]:
        """``count`` generators that are independent of each other; advances this one."""
        return [Rng(int(seed)) for seed in self.host.integers(0, 2**63 - 1, size=count)]

    def normal(
        self, shape: Shape = (), mean: float = 0.0, std: float = 1.0, dtype: Any = "float32"
    ) -> Array:
        """Normal numbers of the given mean and standard deviation."""
        return self._place(self.host.standard_normal(shape) * std + mean, dtype)

    def uniform(
        self, shape: Shape = (), low: float = 0.0, high: float = 1.0, dtype: Any = "float32"
    ) -> Array:
        """Uniform numbers in [low, high); rounding to float32 may reach ``high`` itself."""
        return self._place(self.host.random(shape) * (high - low) + low, dtype)

    def integers(self, low: int, high: int, shape: Shape = ()) -> Array:
        """Integers in [low, high), int64."""
        return self._place(self.host.integers(low, high, size=shape), "int64")

    def permutation(self, n: int) -> Array:
        """The numbers 0 … n − 1 in random order, int64."""
        return self._place(self.host.permutation(n), "int64")

    def bernoulli(self, p: float, shape: Shape = ()) -> Array:
        """Booleans that are true with probability ``p``."""
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"a probability is between 0 and 1, got {p}")
        return self._place(self.host.random(shape) < p, "bool")

    def gumbel(self, shape: Shape = (), dtype: Any = "float32") -> Array:
        """Standard Gumbel numbers: argmax(logits + gumbel) samples from softmax(logits)."""
        return self._place(self.host.gumbel(size=shape), dtype)

    @staticmethod
    def _place(drawn: Any, dtype: Any) -> Array:
        return backend.current().xp.asarray(np.asarray(drawn, dtype=dtype))


@contextmanager
def watching() -> Iterator[dict[Rng, dict[str, Any]]]:
    """Note the state of every generator at its first draw inside the block."""
    seen: dict[Rng, dict[str, Any]] = {}
    token = _watcher.set(seen)
    try:
        yield seen
    finally:
        _watcher.reset(token)
        outer = _watcher.get()
        if outer is not None:  # a block inside a watched block: the outer one must know too
            for rng, state in seen.items():
                outer.setdefault(rng, state)


@contextmanager
def replaying(seen: dict[Rng, dict[str, Any]]) -> Iterator[None]:
    """Let the generators draw again what they drew in the watched block, then restore them."""
    before = {rng: rng.state_dict() for rng in seen}
    for rng, state in seen.items():
        rng.load_state_dict(state)
    try:
        yield
    finally:
        for rng, state in before.items():
            rng.load_state_dict(state)


_default = Rng(0)


def default_rng() -> Rng:
    """The generator that layers draw from when they are given none; it starts as ``Rng(0)``."""
    return _default


def manual_seed(seed: int) -> Rng:
    """Start the default generator afresh from ``seed``, as torch.manual_seed; returns it."""
    _default.load_state_dict(Rng(seed).state_dict())
    _default.seed = seed
    return _default
