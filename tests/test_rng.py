"""Rng is a value: it can be saved, restored, split; and its numbers have the laws they claim."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from mini_nn import Rng, backend, default_rng, manual_seed
from mini_nn.rng import replaying, watching
from tests.support import host

FALSE_ALARM = 1e-6  # the rate of each statistical test below


def draws(rng: Rng) -> list[Any]:
    """One of everything, on the host."""
    return [
        host(rng.normal((2, 3), 1.0, 2.0)),
        host(rng.uniform((2,), -1.0, 1.0, "float64")),
        host(rng.integers(0, 10, (4,))),
        host(rng.permutation(5)),
        host(rng.bernoulli(0.3, (6,))),
        host(rng.gumbel((2,))),
    ]


def same(first: list[Any], second: list[Any]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


@given(st.integers(0, 2**64))
def test_a_seed_names_a_stream(seed: int) -> None:
    assert same(draws(Rng(seed)), draws(Rng(seed)))
    assert not same(draws(Rng(seed)), draws(Rng(seed + 1)))
    assert repr(Rng(seed)) == f"Rng({seed})"


@given(st.integers(0, 1000), st.integers(0, 5))
def test_the_state_survives_json(seed: int, before: int) -> None:
    """Also in the middle of a stream, and into a generator of another seed."""
    rng = Rng(seed)
    for _ in range(before):
        draws(rng)
    saved = json.loads(json.dumps(rng.state_dict()))
    expected = draws(rng)
    other = Rng(seed + 1)
    other.load_state_dict(saved)
    assert same(draws(other), expected)
    rng.load_state_dict(saved)
    assert same(draws(rng), expected)


def test_a_saved_state_does_not_move_with_the_stream() -> None:
    rng = Rng(0)
    saved = rng.state_dict()
    draws(rng)
    assert saved == Rng(0).state_dict() != rng.state_dict()


def test_places_dtypes_and_shapes(xp: Any) -> None:
    """Numbers are drawn on the host and placed on the current backend: the same everywhere."""
    rng, reference = Rng(7), np.random.Generator(np.random.PCG64(7))
    for array, wanted, dtype in (
        (rng.normal((2, 3)), reference.standard_normal((2, 3)), "float32"),
        (rng.normal(4, dtype="float64"), reference.standard_normal(4), "float64"),
        (rng.uniform((2,), 2.0, 4.0), reference.random(2) * 2.0 + 2.0, "float32"),
        (rng.integers(-3, 3, (5,)), reference.integers(-3, 3, size=5), "int64"),
        (rng.permutation(6), reference.permutation(6), "int64"),
        (rng.bernoulli(0.4, (3, 2)), reference.random((3, 2)) < 0.4, "bool"),
        (rng.gumbel((3,), "float64"), reference.gumbel(size=3), "float64"),
        (rng.normal(), reference.standard_normal(()), "float32"),
        (rng.normal((0, 3)), np.zeros((0, 3)), "float32"),
    ):
        assert type(array) is backend.current().array_type
        assert array.dtype == dtype and array.shape == np.shape(wanted)
        np.testing.assert_array_equal(host(array), np.asarray(wanted, dtype))


def test_the_numbers_do_not_depend_on_the_backend(backend_name: str) -> None:
    found = []
    for name in ("numpy", backend_name):
        with backend.using(name):
            found.append(draws(Rng(11)))
    assert same(*found)


def test_split_streams_are_reproducible_distinct_and_leave_the_parent_elsewhere() -> None:
    parent, again = Rng(3), Rng(3)
    children = parent.split(3)
    streams = [draws(rng) for rng in children]
    for child, stream in zip(again.split(3), streams, strict=True):
        assert same(draws(child), stream)
    for i in range(3):
        assert not same(streams[i], streams[i - 1])
        assert not same(streams[i], draws(Rng(3)))
    before = Rng(3)
    before.split(3)
    assert parent.state_dict() == before.state_dict() != Rng(3).state_dict()


def test_split_streams_are_uncorrelated() -> None:
    """√n times the correlation of independent streams is standard normal, for large n."""
    first, second = (host(rng.normal((20_000,), dtype="float64")) for rng in Rng(5).split(2))
    bound = scipy.stats.norm.isf(FALSE_ALARM / 2)
    assert abs(np.corrcoef(first, second)[0, 1]) * math.sqrt(20_000) <= bound
    together = abs(np.corrcoef(first, first)[0, 1]) * math.sqrt(20_000)
    assert together > bound  # the negative twin: one stream handed out twice


@pytest.mark.parametrize("p", [0.0, 0.05, 0.5, 0.9, 1.0])
def test_bernoulli_is_true_with_its_probability(p: float) -> None:
    """The count of n draws is binomial: its exact tails bound it."""
    n = 20_000
    count = int(host(Rng(1).bernoulli(p, (n,))).sum())
    law = scipy.stats.binom(n, p)
    assert law.cdf(count) > FALSE_ALARM / 2 and law.sf(count - 1) > FALSE_ALARM / 2
    if 0.0 < p < 1.0:  # the negative twin: with 1 − p, or a probability 0.05 away, it fails
        for wrong in {1 - p, p + 0.05} - {p}:
            law = scipy.stats.binom(n, wrong)
            assert min(law.cdf(count), law.sf(count - 1)) < FALSE_ALARM / 2


def test_distributions() -> None:
    """Kolmogorov-Smirnov against the laws they claim."""
    rng, n = Rng(2), 5_000
    for sample, law in (
        (rng.normal((n,), 1.0, 2.0, "float64"), scipy.stats.norm(1.0, 2.0)),
        (rng.uniform((n,), -1.0, 3.0, "float64"), scipy.stats.uniform(-1.0, 4.0)),
        (rng.gumbel((n,), "float64"), scipy.stats.gumbel_r()),
    ):
        assert scipy.stats.kstest(host(sample), law.cdf).pvalue > FALSE_ALARM
        assert scipy.stats.kstest(host(sample) + 0.5, law.cdf).pvalue < FALSE_ALARM


def test_integers_and_permutations() -> None:
    rng = Rng(4)
    assert {*host(rng.integers(-2, 3, (200,))).tolist()} == {-2, -1, 0, 1, 2}
    assert sorted(host(rng.permutation(50)).tolist()) == [*range(50)]


def test_argmax_of_logits_plus_gumbel_samples_from_softmax() -> None:
    n, p = 20_000, np.array([0.1, 0.2, 0.7])
    chosen = (np.log(p) + host(Rng(6).gumbel((n, 3), "float64"))).argmax(1)
    counts = np.bincount(chosen, minlength=3)
    assert scipy.stats.chisquare(counts, n * p).pvalue > FALSE_ALARM
    assert scipy.stats.chisquare(counts, n * p[::-1]).pvalue < FALSE_ALARM


def test_what_is_refused() -> None:
    for seed in (1.0, "1", None, True):
        with pytest.raises(TypeError, match="a seed is an integer"):
            Rng(seed)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 0, got -1"):
        Rng(-1)
    for p in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="between 0 and 1"):
            Rng(0).bernoulli(p)
    assert Rng(np.int64(3)).seed == 3  # type: ignore[arg-type]


def test_the_default_generator_is_seeded_by_manual_seed() -> None:
    state, seed = default_rng().state_dict(), default_rng().seed
    try:
        assert manual_seed(9) is default_rng()
        assert same(draws(default_rng()), draws(Rng(9))) and repr(default_rng()) == "Rng(9)"
    finally:
        manual_seed(seed).load_state_dict(state)


# what checkpoint builds on


def test_a_watched_block_can_be_drawn_again() -> None:
    first, second, idle = Rng(1), Rng(2), Rng(3)
    draws(first)
    with watching() as seen:
        numbers = [draws(first), draws(second), draws(first)]
    assert {*seen} == {first, second}
    draws(second)
    after = [rng.state_dict() for rng in (first, second, idle)]
    with replaying(seen):
        assert all(map(same, [draws(first), draws(second), draws(first)], numbers))
    assert [rng.state_dict() for rng in (first, second, idle)] == after
    with pytest.raises(KeyError), replaying(seen):
        raise KeyError
    assert [rng.state_dict() for rng in (first, second, idle)] == after


def test_an_outer_watcher_learns_of_an_inner_ones_draws() -> None:
    rng = Rng(1)
    start = rng.state_dict()
    with watching() as outer:
        with watching() as inner:
            draws(rng)
        draws(rng)
        with watching() as later:
            draws(rng)
    assert outer == {rng: start} == inner
    assert later[rng] != start
