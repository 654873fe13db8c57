"""mini_nn.decoding.sequoia: against all trees there are, and against the law that it counts on."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mini_nn.decoding import (
    RngSource,
    TokenTree,
    best_tree,
    best_tree_size,
    draw_without_replacement,
    expected_tokens,
    expected_tokens_tree,
    positional_acceptance,
    verify_tree,
    without_replacement,
)
from mini_nn.rng import Rng
from tests.decoding.enumerate import law
from tests.support import assert_close

Paths = tuple[tuple[int, ...], ...]

VECTORS = st.lists(st.floats(0.0, 1.0), min_size=1, max_size=3)


def forests(nodes: int, rank: int, ranks: int, depth: int) -> Iterator[Paths]:
    """Every way to give ``nodes`` nodes to the children of ranks rank, rank + 1 … of one node."""
    if nodes == 0:
        yield ()
    elif rank < ranks and depth > 0:
        for mine in range(1, nodes + 1):
            below = forests(mine - 1, 0, ranks, depth - 1)
            for inner, later in itertools.product(
                [*below], [*forests(nodes - mine, rank + 1, ranks, depth)]
            ):
                yield ((rank,), *((rank, *path) for path in inner), *later)


@pytest.mark.parametrize("depth", [None, 0, 1, 2, 3])
@given(VECTORS, st.integers(1, 6))
def test_no_tree_is_better(depth: int | None, acceptance: list[float], size: int) -> None:
    every = [*forests(size - 1, 0, len(acceptance), size if depth is None else depth)]
    if not every:
        with pytest.raises(ValueError, match="allow more depth or more ranks"):
            best_tree(acceptance, size, depth)
        return
    shape = best_tree(acceptance, size, depth)
    best = max(expected_tokens_tree(paths, acceptance) for paths in every)
    assert_close(shape.expected, best, rtol=1e-12)
    assert_close(expected_tokens_tree(shape.choices, acceptance), best, rtol=1e-12)
    assert tuple(sorted(shape.choices)) in {tuple(sorted(paths)) for paths in every}
    assert shape.size == size and shape.depth <= (size if depth is None else depth)


def largest_products(acceptance: list[float], nodes: int) -> float:
    """1 + the sum of the largest products: always the best node that the tree can grow by."""
    total, open_ = 1.0, [(-acceptance[0], 0, 1.0)]
    for _ in range(nodes):
        negative, rank, above = heapq.heappop(open_)
        total -= negative
        heapq.heappush(open_, (negative * acceptance[0], 0, -negative))
        if rank + 1 < len(acceptance):
            heapq.heappush(open_, (-above * acceptance[rank + 1], rank + 1, above))
    return total


@given(VECTORS, st.integers(1, 40))
def test_acceptance_that_falls_with_the_rank_needs_only_greed(
    acceptance: list[float], size: int
) -> None:
    acceptance = sorted(acceptance, reverse=True)
    found = best_tree(acceptance, size).expected
    assert_close(found, largest_products(acceptance, size - 1), rtol=1e-12)


def test_greed_does_not_see_past_a_poor_rank() -> None:
    """Why it is a dynamic program."""
    acceptance = [0.3, 0.01, 0.6]
    assert best_tree(acceptance, 4).choices == ((0,), (1,), (2,))
    assert best_tree(acceptance, 4).expected > largest_products(acceptance, 3) + 0.4


@given(st.floats(0.0, 1.0), st.integers(0, 8))
def test_one_rank_is_a_chain(alpha: float, g: int) -> None:
    shape = best_tree([alpha], g + 1)
    assert shape.choices == tuple((0,) * n for n in range(1, g + 1))
    assert_close(shape.expected, sum(alpha**n for n in range(g + 1)), rtol=1e-12)
    assert_close(shape.expected, expected_tokens(alpha, g), rtol=1e-9)


@given(VECTORS)
def test_depth_one_is_a_star(acceptance: list[float]) -> None:
    shape = best_tree(acceptance, len(acceptance) + 1, depth=1)
    assert shape.choices == tuple((rank,) for rank in range(len(acceptance)))
    assert_close(shape.expected, 1.0 + sum(acceptance), rtol=1e-12)


@given(VECTORS, st.integers(1, 20))
def test_a_node_more_is_never_a_loss(acceptance: list[float], size: int) -> None:
    fewer, more = best_tree(acceptance, size).expected, best_tree(acceptance, size + 1).expected
    assert fewer <= more * (1.0 + 1e-12)


def test_a_large_tree_may_be_deep() -> None:
    shape = best_tree([0.8, 0.1, 0.05], 64)
    assert shape.size == 64 and shape.depth > 10
    assert best_tree([0.8, 0.1, 0.05], 64, depth=5).expected < shape.expected
    assert best_tree([0.0, 0.0], 3, depth=1).expected == 1.0


@settings(max_examples=4)
@given(st.integers(0, 2**32), st.integers(1, 5))
def test_what_it_counts_on_is_the_law_of_the_verifier(seed: int, size: int) -> None:
    """Where the laws do not depend on the text, tokens per call are F exactly, by enumeration."""
    rng = np.random.default_rng(seed)
    p, q = rng.dirichlet(np.ones(3), size=2)

    def child(source: Any) -> int | None:
        return without_replacement(draw_without_replacement(q, 2, source), q, p, source).child

    chances = law(child)
    acceptance = [chances.get(0, 0.0), chances.get(1, 0.0)]
    shape = best_tree(acceptance, size)

    def accepted(source: Any) -> int:
        tree, number = TokenTree((0,), (-1,)), {(): 0}
        for parent in ((), *shape.choices):
            below = [path for path in shape.choices if path[:-1] == parent]
            first = len(tree)
            tree = tree.extend(number[parent], draw_without_replacement(q, len(below), source))
            number.update({path: first + path[-1] for path in below})
        rows = np.ones((size, 1))
        return verify_tree(tree, rows * q, rows * p, without_replacement, source).accepted

    found = law(accepted)
    mean = 1.0 + sum(count * chance for count, chance in found.items())
    assert_close(mean, shape.expected, atol=1e-12)


def test_positional_acceptance_counts() -> None:
    assert positional_acceptance([0, None, 1, 0], 3) == (0.5, 0.25, 0.0)
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.3, 0.5])
    source, n = RngSource(Rng(0)), 4000
    stood = [
        without_replacement(draw_without_replacement(q, 2, source), q, p, source).child
        for _ in range(n)
    ]
    chances = law(lambda s: without_replacement(draw_without_replacement(q, 2, s), q, p, s).child)
    for rank, found in enumerate(positional_acceptance(stood, 2)):
        a = chances[rank]
        assert abs(found - a) < 5.2 * (a * (1.0 - a) / n) ** 0.5  # false alarms: 2e-7
    for wrong in ([], [2], [-1]):
        with pytest.raises(ValueError):
            positional_acceptance(wrong, 2)


@settings(max_examples=10)
@given(VECTORS, st.floats(0.0, 0.5), st.floats(0.0, 0.5))
def test_the_fastest_size(acceptance: list[float], slope: float, draft: float) -> None:
    def time(n: int) -> float:
        return 1.0 + slope * (n - 1)

    found = best_tree_size(acceptance, time, draft, range(1, 8), range(4))
    best = 1.0
    for size, depth in itertools.product(range(1, 8), range(4)):
        for paths in forests(size - 1, 0, len(acceptance), depth):
            value = expected_tokens_tree(paths, acceptance) / (time(size) + depth * draft)
            best = max(best, value)
    assert_close(found.speedup, best, rtol=1e-12)
    cost = time(found.shape.size) + found.shape.depth * draft
    assert_close(found.shape.expected / cost, best, rtol=1e-12)


def test_where_verification_is_free_the_largest_tree_is_best_and_where_it_is_dear_none() -> None:
    free = best_tree_size([0.5, 0.3], lambda n: 1.0, 0.0, [4, 16], [1, 3, 15])
    assert free.shape.size == 16
    dear = best_tree_size([0.5, 0.3], float, 0.0, [4, 16], [1, 3, 15])
    assert dear.shape.size == 1 and dear.speedup == 1.0


@pytest.mark.parametrize(
    ("acceptance", "size", "depth"),
    [([0.5], 0, None), ([0.5], 2, -1), ([1.5], 2, None), ([-0.1], 2, None), ([], 2, None)],
)
def test_bad_input(acceptance: list[float], size: int, depth: int | None) -> None:
    with pytest.raises(ValueError):
        best_tree(acceptance, size, depth)
