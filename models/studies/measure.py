"""How long a call takes, how much memory, and how either grows with the length of its input."""

from __future__ import annotations

import gc
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from mini_nn import Tensor, backend, grad

WORDS = {"> 0": "positive", "< 0": "negative", "+": "plus", "√": "root "}

FROM = 1024
"""Tokens from which on growth is fitted: below, calls take more time than arithmetic."""


def as_name(label: str) -> str:
    """A label as the name of a metric: lower-case words joined by underscores."""
    for sign, word in WORDS.items():
        label = label.replace(sign, word)
    letters = [c.lower() if c.isalnum() else "_" for c in label]
    return "_".join(filter(None, "".join(letters).split("_")))


def lengths(first: int, last: int) -> Iterator[int]:
    """The powers of 2 from one to the other."""
    while first <= last:
        yield first
        first *= 2


def milliseconds(call: Callable[[], Any], repeats: int = 5) -> float:
    """The shortest of so many runs, until a result of it is on the host."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        backend.to_host(call())
        times.append(time.perf_counter() - began)
    return 1e3 * min(times)


def peak_mebibytes(call: Callable[[], Any]) -> float:
    """The most that one run holds at a time beyond what was there before, on the host."""
    gc.collect()
    tracemalloc.start()
    try:
        result = call()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    del result
    return peak / 2**20


def slope(points: Sequence[tuple[float, float]]) -> float:
    """The exponent a of y ≈ c xᵃ: least squares of log y over log x.

    Raises:
        ValueError: there are fewer than two points.
    """
    if len(points) < 2:
        raise ValueError(f"a slope takes at least two points, got {len(points)}")
    x, y = np.log(np.array(points, dtype="float64")).T
    return float(np.polyfit(x, y, 1)[0])


def growth(points: Sequence[tuple[float, float]]) -> float:
    """The slope from ``FROM`` on, or of all points if there are not two of those."""
    late = [point for point in points if point[0] >= FROM]
    return slope(late if len(late) > 1 else points)


def there_and_back(attention: Callable[..., Any], arrays: Sequence[Any]) -> Callable[[], Any]:
    """A call that runs attention on these queries, keys and values, and differentiates it."""
    leaves = [Tensor(x, requires_grad=True) for x in arrays]

    def call() -> Any:
        y = attention(*leaves)
        return grad(y, leaves, arrays[2])[0].data

    return call
