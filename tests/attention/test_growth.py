"""How the work grows with the length: multiply-adds, counted by a device that sees every product.

The growth that the papers claim is a statement about arithmetic, so it is tested on counts, which
are the same on every machine; how long it takes is measured in ``tests/benchmarks``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

import mini_nn
from mini_nn import Rng
from mini_nn import attention as A
from tests import device
from tests.attention.methods import CAUSAL
from tests.device import counters

LENGTHS = (256, 512, 1024, 2048)
D = 8


class Count:
    """Multiply-adds of matrix products, and elements that any other operation made."""

    def __init__(self) -> None:
        self.products = 0
        self.elements = 0


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Count]:
    """Count on the stand-in device, where every operation goes through one function."""
    count, launch = Count(), counters.launch

    def counting(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = launch(function, *args, **kwargs)
        if function is np.matmul:
            count.products += result.size * args[0].shape[-1]
        elif isinstance(result, np.ndarray):
            count.elements += result.size
        return result

    device.register()
    with monkeypatch.context() as patch, mini_nn.using("strict"):
        patch.setattr(counters, "launch", counting)
        yield count


def work(method: Callable[..., Any], is_causal: bool, monkeypatch: Any) -> list[tuple[int, int]]:
    """Multiply-adds and elements for each of ``LENGTHS``."""
    found = []
    for n in LENGTHS:
        with counted(monkeypatch) as count:
            query, key, value = Rng(0).normal((3, n, D), dtype="float64")
            method(query, key, value, is_causal=is_causal)
        found.append((count.products, count.elements))
    return found


def exponent(counts: list[int]) -> float:
    return float(np.polyfit(np.log(LENGTHS), np.log(counts), 1)[0])


LINEAR = [
    "linear, ELU + 1", "linear, Taylor", "unnormalized", "TransNormer", "retention", "delta rule",
    "exp features", "local",
]  # fmt: skip


@pytest.mark.parametrize("name", LINEAR)
def test_linear_work(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = work(CAUSAL[name], True, monkeypatch)
    assert abs(exponent([products for products, _ in counts]) - 1.0) < 0.02
    assert exponent([elements for _, elements in counts]) < 1.1


@pytest.mark.parametrize("name", ["linear, ELU + 1", "unnormalized", "exp features"])
def test_linear_work_in_both_directions(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = work(CAUSAL[name], False, monkeypatch)
    assert abs(exponent([products for products, _ in counts]) - 1.0) < 0.02


def test_features_cost_n_times_m(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice as many features: twice the work, whatever the length."""

    def with_features(m: int) -> Callable[..., Any]:
        def method(query: Any, key: Any, value: Any, is_causal: bool) -> Any:
            drawn = A.gaussian_matrix(m, D, Rng(1), dtype="float64")
            return A.favor_attention(query, key, value, drawn, is_causal=is_causal)

        return method

    few, many = (work(with_features(m), False, monkeypatch) for m in (16, 32))
    for (a, _), (b, _) in zip(few, many, strict=True):
        assert b == 2 * a
    assert abs(exponent([products for products, _ in few]) - 1.0) < 0.02


@pytest.mark.parametrize(
    "method",
    [A.softmax_attention, A.blockwise_attention, CAUSAL["top-k"], A.taylor_attention],
    ids=["dense", "in blocks", "top-k", "Taylor"],
)
def test_quadratic_work(method: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative twins: these have the matrix, in one piece or in tiles."""
    counts = work(method, False, monkeypatch)
    assert abs(exponent([products for products, _ in counts]) - 2.0) < 0.02


def test_dense_softmax_costs_what_the_model_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """n² d for the scores and n² d for the values, and no other product of that size."""
    for n, (products, _) in zip(LENGTHS, work(CAUSAL["softmax"], False, monkeypatch), strict=True):
        assert 2 * n * n * D <= products <= 2 * n * n * D + n * n  # + the sums of rows
    assert A.softmax_core_cost(LENGTHS[0], 1, D) == 2 * LENGTHS[0] ** 2 * D
