"""Patterns of sparse attention: their definitions, the keys of a row, and who reaches whom."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from hypothesis import given
from hypothesis import strategies as st

from mini_nn import Rng
from mini_nn.attention import (
    atrous_mask,
    big_bird_mask,
    causal_mask,
    fixed_mask,
    local_mask,
    reachable,
    sliding_window_mask,
    strided_mask,
)
from tests.support import host

GOLDEN = Path(__file__).parents[1] / "golden" / "attention_sparse.safetensors"

lengths = st.tuples(st.integers(0, 12), st.integers(0, 6)).map(lambda t: (t[0], t[0] + t[1]))


def by_definition(n: int, m: int, is_causal: bool, rule: Callable[[int, int], bool]) -> Any:
    """The matrix, pair by pair; query i has the number m − n + i."""
    mask = np.zeros((n, m), bool)
    for row in range(n):
        i = m - n + row
        for j in range(m):
            mask[row, j] = rule(i, j) and (j <= i or not is_causal)
    return mask


@given(lengths, st.integers(0, 13), st.integers(1, 13), st.booleans())
def test_local_atrous_and_strided(xp: Any, nm: Any, w: int, s: int, is_causal: bool) -> None:
    n, m = nm
    local = local_mask(n, w, is_causal, m)
    atrous = atrous_mask(n, s, is_causal, m)
    want = by_definition(n, m, is_causal, lambda i, j: -w <= i - j <= w)
    assert np.array_equal(host(local), want)
    want = by_definition(n, m, is_causal, lambda i, j: (i - j) % s == 0)
    assert np.array_equal(host(atrous), want)
    union = by_definition(n, m, is_causal, lambda i, j: abs(i - j) <= w or (i - j) % s == 0)
    assert np.array_equal(host(strided_mask(n, w, s, is_causal, m)), union)
    assert np.array_equal(host(local | atrous), union)


@given(lengths, st.integers(1, 13), st.integers(1, 13), st.booleans())
def test_fixed(xp: Any, nm: Any, block: int, summary: int, is_causal: bool) -> None:
    n, m = nm
    summary = min(summary, block)

    def rule(i: int, j: int) -> bool:
        return i // block == j // block or j % block >= block - summary

    got = host(fixed_mask(n, block, summary, is_causal, m))
    assert np.array_equal(got, by_definition(n, m, is_causal, rule))


@given(lengths, st.integers(0, 5), st.integers(1, 5), st.booleans(), st.integers(0, 99))
def test_sliding_window(
    xp: Any, nm: Any, w: int, dilation: int, is_causal: bool, seed: int
) -> None:
    n, m = nm
    chosen = Rng(seed).bernoulli(0.2, m)
    numbers = host(chosen)

    def rule(i: int, j: int) -> bool:
        steps, rest = divmod(abs(i - j), dilation)
        return (rest == 0 and steps <= w) or bool(numbers[i] or numbers[j])

    got = host(sliding_window_mask(n, w, dilation, chosen, is_causal, m))
    assert np.array_equal(got, by_definition(n, m, is_causal, rule))
    plain = host(sliding_window_mask(n, w, 1, None, is_causal, m))
    assert np.array_equal(plain, host(local_mask(n, w, is_causal, m)))


def test_global_tokens_of_several_texts(xp: Any) -> None:
    chosen = Rng(1).bernoulli(0.3, (2, 3, 7))
    got = host(sliding_window_mask(7, 1, 1, chosen))
    for b in range(2):
        for h in range(3):
            assert np.array_equal(got[b, h], host(sliding_window_mask(7, 1, 1, chosen[b, h])))


@given(st.integers(0, 12), st.integers(0, 4), st.integers(0, 4), st.integers(0, 6), st.booleans())
def test_big_bird(xp: Any, n: int, w: int, g: int, r: int, is_causal: bool) -> None:
    """What is not random is by definition; each row has exactly r more, or all that there are."""
    mask = host(big_bird_mask(n, w, g, r, is_causal, rng=Rng(n)))

    def rule(i: int, j: int) -> bool:
        return abs(i - j) <= w or i < g or j < g

    certain = by_definition(n, n, is_causal, rule)
    assert np.array_equal(mask & certain, certain)
    possible = by_definition(n, n, is_causal, lambda i, j: True)
    assert not (mask & ~possible).any()
    left = (possible & ~certain).sum(axis=1)
    assert np.array_equal((mask & ~certain).sum(axis=1), np.minimum(left, r))
    assert np.array_equal(mask, host(big_bird_mask(n, w, g, r, is_causal, rng=Rng(n))))


def test_big_birds_random_keys_are_uniform(xp: Any) -> None:
    """One key of 16 for each of 16 · 256 rows.

    Each is drawn 256 times on average, with a standard deviation of 15.5: more than 6 of these have
    a probability below 1e-7 for the 16 together.
    """
    masks = [host(big_bird_mask(17, 0, 0, 1, rng=Rng(seed))) for seed in range(256)]
    counts = sum(mask.astype(int) for mask in masks) - 256 * np.eye(17, dtype=int)
    assert counts.sum() == 17 * 256
    assert abs(counts.sum(axis=0) - 256).max() < 6 * 15.5


# How many keys


@given(st.integers(1, 40), st.integers(0, 45), st.integers(1, 45))
def test_keys_of_a_row(xp: Any, n: int, w: int, s: int) -> None:
    """2 w + 1 in a window but for the ends, w + 1 if causal; n / s, up or down, if atrous."""
    local, i = host(local_mask(n, w)), np.arange(n)
    assert np.array_equal(local.sum(axis=1), np.minimum(i, w) + 1 + np.minimum(n - 1 - i, w))
    causal = host(local_mask(n, w, is_causal=True))
    assert np.array_equal(causal.sum(axis=1), np.minimum(i, w) + 1)
    assert set(host(atrous_mask(n, s)).sum(axis=1)) <= {n // s, -(-n // s)}


@given(st.integers(1, 20), st.integers(0, 9), st.integers(1, 9), st.booleans())
def test_a_token_sees_itself(xp: Any, n: int, w: int, s: int, is_causal: bool) -> None:
    """So no row is empty."""
    for mask in (
        local_mask(n, w, is_causal),
        atrous_mask(n, s, is_causal),
        strided_mask(n, w, s, is_causal),
        fixed_mask(n, s, 1, is_causal),
        sliding_window_mask(n, w, s, None, is_causal),
        big_bird_mask(n, w, 1, 1, is_causal, rng=Rng(0)),
        causal_mask(n),
    ):
        assert host(mask).diagonal().all()


# Who reaches whom


@given(st.integers(1, 24), st.integers(0, 10), st.integers(1, 10), st.booleans())
def test_a_local_and_an_atrous_layer_connect_all(
    xp: Any, n: int, w: int, s: int, is_causal: bool
) -> None:
    """If and only if the window has every remainder on one side alone: w ≥ min(s, n) − 1.

    Position 0 has no other side, which is why 2 w + 1 ≥ s is not enough.
    """
    local, atrous = local_mask(n, w, is_causal), atrous_mask(n, s, is_causal)
    wanted = host(causal_mask(n)) if is_causal else np.ones((n, n), bool)
    for layers in ([local, atrous], [atrous, local]):
        assert np.array_equal(host(reachable(layers)), wanted) == (w >= min(s, n) - 1)


def test_covering_the_stride_from_both_sides_is_not_enough(xp: Any) -> None:
    """w = 1, s = 3: three keys cover the stride, but output 0 cannot see input 2."""
    paths = host(reachable([atrous_mask(6, 3), local_mask(6, 1)]))
    assert paths[1:5].all() and not paths[0, 2]


@given(st.integers(1, 24), st.integers(1, 8), st.integers(1, 8))
def test_two_fixed_layers_connect_all(xp: Any, n: int, block: int, summary: int) -> None:
    """The first carries a block to its last position, the second from there to all later ones."""
    mask = fixed_mask(n, block, min(summary, block), is_causal=True)
    assert np.array_equal(host(reachable([mask, mask])), host(causal_mask(n)))


def test_one_global_token_connects_all_in_two_layers(xp: Any) -> None:
    chosen = xp.arange(20) == 7
    mask = sliding_window_mask(20, 1, 1, chosen)
    assert host(reachable([mask, mask])).all()
    assert not host(reachable([mask])).all()


@given(st.integers(1, 15), st.integers(0, 4), st.integers(1, 6))
def test_windows_add_up(xp: Any, n: int, w: int, layers: int) -> None:
    """l windows of w are one of l w: what Longformer builds on."""
    mask = local_mask(n, w)
    assert np.array_equal(host(reachable([mask] * layers)), host(local_mask(n, layers * w)))


def test_the_first_layer_comes_first(xp: Any) -> None:
    first, second = xp.zeros((3, 3), "bool"), xp.zeros((3, 3), "bool")
    first[1, 0] = second[2, 1] = True  # 0 → 1 in the first layer, 1 → 2 in the second
    assert host(reachable([first, second])).nonzero() == ([2], [0])
    assert not host(reachable([second, first])).any()


# The released code


def test_released_patterns(xp: Any) -> None:
    """OpenAI's: a window of ctx keys with the token itself, every ctx-th key, and the fixed one."""
    with safetensors.safe_open(GOLDEN, framework="np") as file:
        names = [name for name in [*file.keys()] if name.startswith("pattern")]
        cases = {name: file.get_tensor(name) for name in names}
    assert len(cases) == 10
    for name, want in cases.items():
        _, mode, n, *sizes = name.split(".")
        if mode == "local":
            got = local_mask(int(n), int(sizes[0]) - 1, is_causal=True)
        elif mode == "strided":
            got = atrous_mask(int(n), int(sizes[0]), is_causal=True)
        else:
            got = fixed_mask(int(n), int(sizes[0]), int(sizes[1]), is_causal=True)
        assert np.array_equal(host(got), want), name


def test_patterns_refuse(xp: Any) -> None:
    for use, message in (
        (lambda: local_mask(3, -1), "window is at least 0"),
        (lambda: atrous_mask(3, 0), "dilation is at least 1"),
        (lambda: strided_mask(3, 1, 0), "stride is at least 1"),
        (lambda: fixed_mask(3, 2, 3), "summary ≤ block"),
        (lambda: fixed_mask(3, 2, 0), "1 ≤ summary"),
        (lambda: sliding_window_mask(3, 1, 0), "dilation is at least 1"),
        (lambda: sliding_window_mask(3, 1, 1, xp.ones(1, "bool")), r"global_mask is \(…, 3\)"),
        (lambda: sliding_window_mask(3, 1, 1, xp.ones(4, "bool")), r"got \(4,\)"),
        (lambda: big_bird_mask(-1, 1, 1, 1, rng=Rng(0)), "at least 0"),
        (lambda: big_bird_mask(3, -1, 1, 1, rng=Rng(0)), "at least 0"),
        (lambda: big_bird_mask(3, 1, -1, 1), "at least 0"),
        (lambda: big_bird_mask(3, 1, 1, -1, rng=Rng(0)), "at least 0"),
        (lambda: causal_mask(3, 2), "last n of m"),
        (lambda: reachable([]), "at least one"),
        (lambda: reachable([causal_mask(2), causal_mask(3)]), "one n"),
        (lambda: reachable([causal_mask(2, 3)]), "one n"),
    ):
        with pytest.raises(ValueError, match=message):
            use()
    for use, message in (
        (lambda: sliding_window_mask(3, 1, 1, xp.asarray([1, 0, 0])), "global_mask has booleans"),
        (lambda: reachable([causal_mask(2), xp.ones((2, 2), "int64")]), "each mask has booleans"),
        (lambda: reachable([xp.ones((2, 2))]), "each mask has booleans"),
    ):
        with pytest.raises(TypeError, match=message):
            use()
