"""Seeded randomness: the same numbers on every backend.

A generator draws on the host (NumPy's PCG64) and the result is copied to where the arrays are
created, so one seed gives one set of weights, batches and samples everywhere; CuPy's own streams
differ from NumPy's for the same seed, and its ``Generator`` has no ``normal``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
from scipy.special import log_ndtr, ndtr, ndtri, ndtri_exp

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

    def truncated_normal(
        self,
        shape: Shape = (),
        mean: float = 0.0,
        std: float = 1.0,
        low: float = -2.0,
        high: float = 2.0,
        dtype: Any = "float32",
    ) -> Array:
        """Normal numbers of the given mean and standard deviation that fell into [low, high].

        ``mean`` and ``std`` are those before the truncation; see ``nn.init.truncated_moments`` for
        those of the result.  One uniform number is drawn for each result, wherever the interval
        lies: none is drawn again, and none is moved onto a bound.  Rounding to ``dtype`` stays
        within the bounds.

        Args:
            low, high: the bounds, absolute; either may be infinite.

        Raises:
            ValueError: ``std`` is not positive, the interval is empty, or ``dtype`` has no number
                within it.
        """
        if not (math.isfinite(mean) and 0.0 < std < math.inf and low < high):
            raise ValueError(
                "a truncated normal needs a finite mean, 0 < std < inf and low < high, got "
                f"mean={mean}, std={std}, low={low}, high={high}"
            )
        inner = _inner(low, high, np.dtype(dtype))
        uniform = np.maximum(self.host.random(shape), 2.0**-53)  # 0 would be the bound itself
        drawn = _truncated_quantile(uniform, mean, std, low, high)
        with np.errstate(over="ignore"):  # beyond the largest number of the dtype: clipped
            return self._place(np.clip(np.asarray(drawn, dtype), *inner), dtype)

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


def _inner(low: float, high: float, dtype: Any) -> tuple[Any, Any]:
    """The smallest and the largest number of this dtype in [low, high]."""
    limit = float(np.finfo(dtype).max)
    first, last = (np.asarray(min(max(x, -limit), limit), dtype) for x in (low, high))
    if float(first) < low:
        first = np.nextafter(first, np.asarray(np.inf, dtype))
    if float(last) > high:
        last = np.nextafter(last, np.asarray(-np.inf, dtype))
    if not low <= float(first) <= float(last) <= high:
        raise ValueError(f"{dtype} has no number in [{low}, {high}]: draw in a wider dtype")
    return first, last


def _truncated_quantile(u: Any, mean: float, std: float, low: float, high: float) -> Any:
    """The number below which a normal variable in [low, high] lies with probability u.

    Formulas of the left half, where Φ has its digits; the other half is its mirror image.
    """
    a, b, width = (low - mean) / std, (high - mean) / std, (high - low) / std
    if a > 0.0:
        return -_truncated_quantile(1.0 - u, -mean, std, -high, -low)
    if b < -1e4:  # (z² − b²) / 2 is exponential but for a factor b / z of the density
        excess = -np.log1p((1.0 - u) * math.expm1(width * (a + b) / 2.0))
        return high + std * (2.0 * excess / b / (1.0 + np.sqrt(1.0 + 2.0 * excess / b / b)))
    if width < 1e-5:  # exp(−(a + t)² / 2) ∝ exp(−a t) where t² is nothing
        t = u * width if a == 0.0 else -np.log1p(u * math.expm1(-a * width)) / a
        return low + std * t
    if b <= 0.0:
        log_p = np.logaddexp(np.log1p(-u) + log_ndtr(a), np.log(u) + log_ndtr(b))
        return np.clip(mean + std * ndtri_exp(log_p), low, high)
    below, above = ndtr(a), ndtr(-b)
    left = below + u * (1.0 - below - above)
    right = above + (1.0 - u) * (1.0 - below - above)
    z = np.where(left < right, ndtri(left), -ndtri(right))
    return np.clip(mean + std * z, low, high)


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
