"""mini_nn.decoding.speedup: the formulas against the production verifier and the paper's tables."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_nn import Rng, Tensor
from mini_nn.check import check_grads
from mini_nn.decoding import (
    Acceptance,
    RngSource,
    acceptance,
    best_gamma,
    coupling_bounds,
    expected_tokens,
    expected_tokens_chain,
    gumbel_match,
    operations,
    speculative_sampling,
    speedup,
)
from tests.decoding.test_source import WEIGHTS, normal
from tests.decoding.test_verify import V, World, mean_accepted, play
from tests.support import assert_close, host

ALPHAS = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0.0, 1.0))
COSTS = st.one_of(st.just(0.0), st.floats(0.001, 2.0))


# Acceptance


@given(WEIGHTS, WEIGHTS)
def test_acceptance_is_one_minus_the_total_variation(xp: Any, a: Any, b: Any) -> None:
    p, q = normal(a), normal(b)
    got = host(acceptance(xp.asarray(p), xp.asarray(q)))
    assert_close(got, 1.0 - abs(p - q).sum() / 2.0, atol=1e-15)
    events = [np.array([i >> x & 1 for x in range(V)]) for i in range(2**V)]
    widest = max(((p - q) * event).sum() for event in events)  # TV is the largest of any event
    assert_close(got, 1.0 - widest, atol=1e-15)
    assert_close(acceptance(xp.asarray(p), xp.asarray(p)), 1.0, 1e-15)


def test_acceptance_of_many_rows_and_its_gradient(xp: Any) -> None:
    rows = Rng(0).uniform((2, 4, 5), dtype="float32")
    p, q = rows / rows.sum(axis=-1, keepdims=True)
    got = acceptance(p, q)
    assert got.shape == (4,) and str(got.dtype) == "float32"
    assert acceptance(p[:0], q[:0]).shape == (0,)
    check_grads(acceptance, *(Tensor(x.astype("float64")) for x in (p, q)))
    with pytest.raises(ValueError, match="acceptance"):
        acceptance(p, q[:, :3])


# Expected tokens


@given(ALPHAS, st.integers(0, 12))
def test_the_geometric_sum(alpha: float, gamma: int) -> None:
    got = expected_tokens(alpha, gamma)
    assert_close(got, sum(alpha**i for i in range(gamma + 1)), 1e-12)
    if alpha < 0.99:
        assert_close(got, (1 - alpha ** (gamma + 1)) / (1 - alpha), 1e-12)
    assert 1.0 <= got <= gamma + 1
    assert_close(expected_tokens_chain([alpha] * gamma), got, 1e-12)


def test_limits_of_expected_tokens() -> None:
    """No 0/0 at α = 1, where the sum is γ + 1, nor cancellation on the way to it."""
    assert expected_tokens(1.0, 7) == 8.0 and expected_tokens(0.0, 7) == 1.0
    assert expected_tokens(0.5, 0) == 1.0 and expected_tokens_chain([]) == 1.0
    assert_close(expected_tokens(1.0 - 1e-12, 7), 8.0 - 28e-12, 1e-15)


@given(st.integers(0, 2**32), st.sampled_from(World.KINDS), st.integers(0, 3))
def test_tokens_of_a_round_are_those_of_the_chain(seed: int, kind: str, g: int) -> None:
    """Where laws do not depend on the text: 1 + β₁ + β₁β₂ + …, and E tokens where all β are one."""
    world = World(seed, kind)
    pairs = [world._pair((0,) * i) for i in range(g + 1)]
    for fixed in (pairs, [pairs[0]] * (g + 1)):
        world.p = lambda text, fixed=fixed: fixed[len(text)][0]  # type: ignore[method-assign]
        world.q = lambda text, fixed=fixed: fixed[len(text)][1]  # type: ignore[method-assign]
        betas = [float(acceptance(p, q)) for p, q in fixed[:g]]
        got = 1.0 + mean_accepted(world, speculative_sampling, g)
        assert_close(got, expected_tokens_chain(min(beta, 1.0) for beta in betas), 1e-12)
    assert_close(got, expected_tokens(min(betas[0], 1.0) if betas else 0.3, g), 1e-12)


def conditional_betas(world: World, g: int) -> list[float]:
    """The chance of each draft to stand given that all before it do, by the laws min(p, q)."""
    reached, betas = {(): 1.0}, []
    for _ in range(g):
        stood = {
            (*text, x): chance * min(world.p(text)[x], world.q(text)[x])
            for text, chance in reached.items()
            for x in range(V)
        }
        betas.append(sum(stood.values()) / sum(reached.values()))
        reached = stood
    return betas


def test_acceptance_that_depends_on_the_text() -> None:
    """β_j is conditional on acceptance.  Averaged over what the draft writes, in the place of what
    is accepted of it, it is another number."""
    gaps = []
    for seed in range(5):
        world = World(seed)
        got = 1.0 + mean_accepted(world, speculative_sampling, 2)
        assert_close(got, expected_tokens_chain(conditional_betas(world, 2)), 1e-12)
        first = float(acceptance(world.p(()), world.q(())))
        second = sum(
            world.q(())[x] * float(acceptance(world.p((x,)), world.q((x,)))) for x in range(V)
        )
        gaps.append(abs(expected_tokens_chain([first, second]) - got))
    assert max(gaps) > 0.01


# Speed-up


TABLE = [
    # α, γ, operations, speed-up: table 1 of 2211.17192, for c = ĉ = 0
    (0.6, 2, 1.53, 1.96),
    (0.7, 3, 1.58, 2.53),
    (0.8, 2, 1.23, 2.44),
    (0.8, 5, 1.63, 3.69),
    (0.9, 2, 1.11, 2.71),
    (0.9, 10, 1.60, 6.86),
]


@pytest.mark.parametrize(("alpha", "gamma", "work", "speed"), TABLE)
def test_the_papers_table(alpha: float, gamma: int, work: float, speed: float) -> None:
    assert abs(operations(alpha, gamma, 0.0) - work) < 0.006
    assert abs(speedup(alpha, gamma, 0.0) - speed) < 0.006


@given(ALPHAS, st.integers(0, 12), COSTS)
def test_speedup_and_operations(alpha: float, gamma: int, c: float) -> None:
    tokens = expected_tokens(alpha, gamma)
    assert_close(speedup(alpha, gamma, c), tokens / (gamma * c + 1), 1e-12)
    assert_close(operations(alpha, gamma, c) * tokens, gamma * c + gamma + 1, 1e-12)
    assert speedup(alpha, 0, c) == operations(alpha, 0, c) == 1.0
    assert operations(alpha, gamma, c) >= 1.0 - 1e-12  # arithmetic is never saved


@given(ALPHAS, COSTS)
def test_the_best_length(alpha: float, c: float) -> None:
    """Corollary 3.9: a gain exists iff α > c, then of (1 + α)/(1 + c) at least; and one summit."""
    most = 24
    best = best_gamma(alpha, c, most)
    curve = [speedup(alpha, gamma, c) for gamma in range(most + 1)]
    assert curve[best] == max(curve) and best == curve.index(max(curve))
    if alpha > c + 1e-9:
        assert best >= 1 and curve[best] >= (1 + alpha) / (1 + c) - 1e-12
    if alpha <= c:
        assert best == 0
    assert all(curve[i] <= curve[i + 1] + 1e-12 for i in range(best))
    assert all(curve[i] >= curve[i + 1] - 1e-12 for i in range(best, most))


def test_the_best_length_at_the_ends() -> None:
    assert best_gamma(1.0, 0.5, 9) == 9 and best_gamma(0.5, 0.0, 9) == 9
    assert best_gamma(1.0, 1.0) == best_gamma(0.0, 0.0) == 0
    assert best_gamma(0.8, 0.05, 0) == 0
    lengths = [best_gamma(0.8, c) for c in (0.01, 0.05, 0.2, 0.5)]
    assert lengths == sorted(lengths, reverse=True) and lengths[0] > lengths[-1] > 0


def test_refusals() -> None:
    for alpha, gamma, c in ((-0.1, 1, 0.1), (1.1, 1, 0.1), (math.nan, 1, 0.1), (0.5, -1, 0.1)):
        for formula in (speedup, operations):
            with pytest.raises(ValueError, match=r"between 0 and 1|gamma ≥ 0"):
                formula(alpha, gamma, c)
        with pytest.raises(ValueError, match=r"between 0 and 1|gamma ≥ 0"):
            expected_tokens(alpha, gamma)
    for c in (-0.1, math.nan):
        for use in (speedup, operations, best_gamma):
            with pytest.raises(ValueError, match="c ≥ 0"):
                use(0.5, 1, c) if use is not best_gamma else use(0.5, c)
    with pytest.raises(ValueError, match="between 0 and 1"):
        expected_tokens_chain([0.5, 1.5])


# Shared noise


@given(WEIGHTS, WEIGHTS)
def test_shared_noise_agrees_within_the_bounds(xp: Any, a: Any, b: Any) -> None:
    p, q = xp.asarray(normal(a)), xp.asarray(normal(b))
    low, high = coupling_bounds(p, q)
    match = gumbel_match(p, q)
    assert float(low) - 1e-12 <= float(match) <= float(high) + 1e-12
    assert_close(gumbel_match(q, p), match)
    assert_close(gumbel_match(p, p), 1.0, 1e-12)
    tv = abs(host(p) - host(q)).sum() / 2.0
    assert_close(low, (1.0 - tv) / (1.0 + tv), atol=1e-15)
    assert float(match) >= float((p * q).sum()) - 1e-12  # more than independent draws


def test_two_tokens_agree_as_often_as_any_coupling() -> None:
    """For V = 2 the order of the noise is one number, so 1 − TV is attained; for V = 3 it is not,
    and (1 − TV)/(1 + TV) is what two laws of disjoint remainders have."""
    for first, second in ((0.3, 0.9), (0.5, 0.5), (0.0, 0.4)):
        p, q = np.array([first, 1 - first]), np.array([second, 1 - second])
        assert_close(gumbel_match(p, q), acceptance(p, q), 1e-12)
    p, q = np.array([0.5, 0.5, 0.0]), np.array([0.5, 0.0, 0.5])
    assert_close(gumbel_match(p, q), 1.0 / 3.0, 1e-12)
    assert_close(coupling_bounds(p, q)[0], 1.0 / 3.0, 1e-12)


def test_dtype_of_shared_noise(xp: Any) -> None:
    p = xp.asarray(np.array([0.25, 0.75], "float32"))
    assert all(str(x.dtype) == "float32" for x in (gumbel_match(p, p), *coupling_bounds(p, p)))


# Counting


def test_counts() -> None:
    seen = Acceptance()
    assert math.isnan(seen.alpha) and math.isnan(seen.tokens_per_call) and seen.betas == []
    for drafted, accepted in ((3, 3), (3, 1), (2, 0), (0, 0), (2, 2)):
        seen.add(drafted, accepted)
    assert (seen.rounds, seen.drafted, seen.accepted, seen.emitted) == (5, 10, 6, 11)
    assert seen.judged == [4, 3, 1] and seen.stood == [3, 2, 1]
    assert seen.alpha == 0.75 and seen.betas == [0.75, 2 / 3, 1.0]
    assert seen.tokens_per_call == 11 / 5
    for drafted, accepted in ((2, 3), (2, -1), (-1, 0)):
        with pytest.raises(ValueError, match="are accepted"):
            seen.add(drafted, accepted)


@given(st.integers(0, 2**32), st.integers(1, 6))
def test_tokens_are_the_formula_of_the_counted_betas(seed: int, g: int) -> None:
    """With as many drafts in each round, 1 + β₁ + β₁β₂ + … of the counts is the count itself."""
    rng, seen = np.random.default_rng(seed), Acceptance()
    for accepted in rng.integers(0, g + 1, size=20):
        seen.add(g, int(accepted))
    assert_close(expected_tokens_chain(seen.betas), seen.tokens_per_call, 1e-12)


def test_what_was_judged_is_easier_than_what_is_there() -> None:
    """Half of the texts are easy (β = 0.95), half hard (0.15), and stay so for a round.

    α is 0.55.  The share of the judged drafts that stood is far above; the first drafts are not
    (2,000 rounds: within 5 standard deviations, 6e-7).
    """
    easy = np.array([0.95, 0.05, 0.0]), np.array([0.95, 0.0, 0.05])
    hard = np.array([0.15, 0.85, 0.0]), np.array([0.15, 0.0, 0.85])
    source, rounds, g = RngSource(Rng(0)), 2000, 3
    seen = Acceptance()
    for _ in range(rounds):
        p, q = easy if source.bernoulli(0.5) else hard
        world = World(0)
        world.p = lambda text, p=p: p  # type: ignore[method-assign]
        world.q = lambda text, q=q: q  # type: ignore[method-assign]
        seen.add(g, play(world, speculative_sampling, g, source)[1])
    deviation = math.sqrt(0.55 * 0.45 / rounds)
    assert abs(seen.alpha - 0.55) < 5 * deviation
    assert sum(seen.stood) / sum(seen.judged) > 0.55 + 10 * deviation
    assert seen.betas[2] > seen.betas[1] > seen.betas[0]
