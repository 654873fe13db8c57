"""mini_nn.decoding.cascade: what is exact by enumeration, what is not by its limits, and clocks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mini_nn import Rng
from mini_nn.decoding import (
    Fallback,
    NGramDraft,
    NGramModel,
    NoDraft,
    PromptLookup,
    Proposal,
    RngSource,
    Rollback,
    Router,
    StagedDraft,
    TokenTree,
    Verdict,
    Warper,
    expected_tokens,
    greedy,
    pearl,
    residual,
    speculative_sampling,
    speedup,
)
from tests.decoding.enumerate import distance, law, total
from tests.decoding.test_draft import (
    GREEDY,
    Counted,
    bias,
    generate,
    joint,
    periodic,
    plain,
    rows_of,
)
from tests.decoding.test_verify import World
from tests.support import assert_close

Text = tuple[int, ...]

SEEDS = st.integers(0, 2**32)
KINDS = st.sampled_from(World.KINDS)
PROMPTS = st.lists(st.integers(0, 2), min_size=1, max_size=4)
BIGRAM = NGramDraft(NGramModel(2, 3, [0, 1, 1, 2, 0, 1]))


def tokens_of(offer: Proposal) -> list[int]:
    assert isinstance(offer.tokens, list)
    return offer.tokens


# Stages


@pytest.mark.parametrize("inner", [NoDraft(), PromptLookup(2), BIGRAM])
@settings(max_examples=4)
@given(SEEDS, KINDS)
def test_what_a_stage_offers_has_its_models_law(inner: Any, seed: int, kind: str) -> None:
    world = World(seed, kind)
    rows = rows_of(world.q)
    draft = StagedDraft(rows, inner, 2)

    def run(source: Any) -> Text:
        offer = draft.propose((0, 1), 3, Warper(), source)
        text = [0, 1, *tokens_of(offer)]
        assert offer.q is not None and offer.q.dtype == np.float64
        assert_close(offer.q, np.stack([world.q(tuple(text[: 2 + i])) for i in range(3)]))
        return tuple(text[2:])

    found = law(run)
    assert abs(total(found) - 1.0) < 1e-12
    assert distance(found, joint(rows, (0, 1), 3)) < 1e-12


@settings(max_examples=4)
@given(SEEDS, KINDS)
def test_a_staged_stream(seed: int, kind: str) -> None:
    world = World(seed, kind, size=2)
    small = NGramDraft(NGramModel(2, 2, [0, 1, 1, 0, 1]))
    two = StagedDraft(rows_of(world.q), small, 1)
    three = StagedDraft(rows_of(world.q), StagedDraft(rows_of(world.q), small, 1), 2)
    for draft in (two, three):
        assert bias(rows_of(world.p), draft, speculative_sampling, (0,), 3) < 1e-12


def test_the_wrong_q_of_a_stage_is_seen() -> None:
    """The law of the lowest draft, for tokens that the middle model has corrected."""

    class Lowest:
        def __init__(self, world: World) -> None:
            self.stage = StagedDraft(rows_of(world.q), BIGRAM, 2)

        def propose(self, text: Any, count: int, warper: Warper, source: Any) -> Proposal:
            tokens = tokens_of(self.stage.propose(text, count, warper, source))
            if not tokens:
                return Proposal([], None)
            return Proposal(tokens, np.exp(BIGRAM.model.rows([*text, *tokens[:-1]], len(tokens))))

    world = World(3)
    assert bias(rows_of(world.p), Lowest(world), speculative_sampling, (0,), 2) > 1e-2


@given(SEEDS, PROMPTS, st.integers(0, 5), st.integers(0, 3))
def test_a_stage_at_temperature_zero(seed: int, text: list[int], count: int, inner: int) -> None:
    world = World(seed)
    draft = StagedDraft(rows_of(world.q), PromptLookup(2), inner)
    source = RngSource(Rng(seed))
    offer = draft.propose(text, count, GREEDY, source)
    assert offer.tokens == plain(rows_of(world.q), text, count)
    wanted = plain(rows_of(world.p), text, 7)
    assert generate(rows_of(world.p), draft, greedy, text, 7, source, 3, GREEDY) == wanted


def test_a_stage_saves_calls_of_its_model() -> None:
    prompt = [3, 1, 4, 1, 5, 9, 2, 6] * 2
    rows = Counted(periodic(10, 8))
    source = RngSource(Rng(0))
    assert (
        tokens_of(StagedDraft(rows, PromptLookup(3), 5).propose(prompt, 12, GREEDY, source))
        == ((prompt * 2)[:12])
    )
    assert rows.calls == 2
    rows.calls = 0
    StagedDraft(rows, NoDraft(), 5).propose(prompt, 12, GREEDY, source)
    assert rows.calls == 12


def test_a_stage_takes_chains_only() -> None:
    class Tree:
        def propose(self, text: Any, count: int, warper: Any, source: Any) -> Proposal:
            return Proposal(TokenTree((text[-1],), (-1,)), None)

    with pytest.raises(TypeError, match="trees"):
        StagedDraft(periodic(3, 1), Tree(), 2).propose([0], 3, Warper(), RngSource(Rng(0)))
    with pytest.raises(ValueError, match="≥ 0"):
        StagedDraft(periodic(3, 1), NoDraft(), -1)


# BiLD


def bild(world: World, a: float, b: float, text: list[int], count: int, g: int = 3) -> list[int]:
    small, large = rows_of(world.q), rows_of(world.p)
    draft = Fallback(small, a)
    return generate(large, draft, Rollback(b), text, count, RngSource(Rng(0)), g)


@given(SEEDS, PROMPTS)
def test_the_limits_of_bild(seed: int, text: list[int]) -> None:
    world = World(seed)
    large = plain(rows_of(world.p), text, 8)
    assert bild(world, 1.1, np.inf, text, 8) == large  # never confident
    assert bild(world, 0.0, 0.0, text, 8) == large  # never close enough, for no p is 1
    # always confident and always close: the small model, but for the last token of a round
    found = bild(world, 0.0, np.inf, text, 8, g=7)
    assert found[:7] == plain(rows_of(world.q), text, 7)


@given(SEEDS, KINDS, PROMPTS, st.floats(0.0, 1.0), st.floats(0.0, 5.0))
def test_what_bild_keeps(seed: int, kind: str, text: list[int], a: float, b: float) -> None:
    """Every token is the large model's best one, or its −ln p is at most b."""
    world = World(seed, kind)
    found = bild(world, a, b, text, 6)
    for i, x in enumerate(found):
        p = world.p((*text, *found[:i]))
        assert x == p.argmax() or -np.log(p[x]) <= b + 1e-9
    offer = tokens_of(Fallback(rows_of(world.q), a).propose(text, 5, Warper(), None))  # type: ignore[arg-type]
    for i, x in enumerate(offer):
        q = world.q((*text, *offer[:i]))
        assert x == q.argmax() and q[x] >= a - 1e-12
    if len(offer) < 5:
        assert world.q((*text, *offer)).max() < a + 1e-12


def test_bild_is_not_lossless_but_greedy_verification_makes_it_so() -> None:
    world, text = World(0), [0]
    wanted = plain(rows_of(world.p), text, 12)
    assert bild(world, 0.0, 1.5, text, 12) != wanted
    draft = Fallback(rows_of(world.q), 0.5)
    assert generate(rows_of(world.p), draft, greedy, text, 12, None, 3) == wanted
    # temperature 0 makes the rollback greedy, for any finite threshold
    source = RngSource(Rng(0))
    assert generate(rows_of(world.p), draft, Rollback(9.0), text, 12, source, 3, GREEDY) == wanted


def test_a_rollback_by_hand() -> None:
    p = np.array([[0.5, 0.4, 0.1], [0.1, 0.1, 0.8], [0.0, 0.5, 0.5]])
    source: Any = None
    assert Rollback(1.0)([1, 2], None, p, source) == Verdict(2, 1)
    assert Rollback(0.9)([1, 2], None, p, source) == Verdict(0, 0)
    assert Rollback(2.0)([1, 0], None, p, source) == Verdict(1, 2)
    assert Rollback(np.inf)([1, 0], None, p, source) == Verdict(2, 1)
    assert Rollback(np.inf)([0], None, p[1:], source).accepted == 1
    assert Rollback(1e9)([0], None, p[[2, 0]], source) == Verdict(0, 1)  # p = 0 is infinitely far
    for bad in (-1.0, np.nan):
        with pytest.raises(ValueError, match="≥ 0 nats"):
            Rollback(bad)
    with pytest.raises(ValueError, match="2 drafts need 3 rows"):
        Rollback(1.0)([0, 1], None, p[:2], source)
    with pytest.raises(ValueError, match="from 0 to 2"):
        Rollback(1.0)([3], None, p[:2], source)


# Routing


def test_routing_gives_up_the_targets_law() -> None:
    world = World(0)
    router = Router(rows_of(world.q), rows_of(world.p), len, 2.0)
    assert router.choose([0, 1, 2]) is router.large and router.choose([0, 1]) is router.small
    target = joint(router.large, (0,), 2)
    assert distance(joint(router.choose((0,)), (0,), 2), target) > 1e-2
    draft = StagedDraft(router.small, NoDraft())
    assert bias(router.large, draft, speculative_sampling, (0,), 2) < 1e-12


def test_what_routing_costs() -> None:
    router = Router(periodic(2, 1), periodic(2, 1), len, 2.0)
    assert_close(router.cost([[0], [0, 1], [0, 1, 1], [0] * 9], 0.1), 0.55)
    assert_close(router.cost([[0]], 0.1), 0.1)
    assert_close(router.cost([[0] * 3], 0.1), 1.0)
    with pytest.raises(ValueError, match="no prompt"):
        router.cost([], 0.1)


# PEARL


@pytest.mark.parametrize("ahead", [1, 2, 3])
def test_pearls_law(ahead: int) -> None:
    for seed, kind in enumerate(World.KINDS):
        world = World(seed, kind, size=2)
        target, draft = rows_of(world.p), rows_of(world.q)

        def run(source: Any, target: Any = target, draft: Any = draft) -> Text:
            return tuple(pearl(target, draft, (0,), 3, ahead, 0.5, Warper(), source).tokens)

        found = law(run)
        assert abs(total(found) - 1.0) < 1e-12
        assert distance(found, joint(target, (0,), 3)) < 1e-12


def test_redrawing_from_p_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Instead of from the residual: the enumeration of pearl's law is not blind."""
    world = World(1, size=2)
    target, draft = rows_of(world.p), rows_of(world.q)

    def bias_of() -> float:
        found = law(lambda s: tuple(pearl(target, draft, (0,), 2, 2, 0.5, Warper(), s).tokens))
        return distance(found, joint(target, (0,), 2))

    assert bias_of() < 1e-12
    monkeypatch.setattr("mini_nn.decoding.cascade.residual", lambda p, q: p)
    assert bias_of() > 1e-2
    assert_close(residual(np.array([0.5, 0.5]), np.array([1.0, 0.0])), np.array([0.0, 1.0]))


@given(SEEDS, PROMPTS, st.integers(1, 4), st.integers(0, 9))
def test_pearl_at_temperature_zero(seed: int, text: list[int], ahead: int, count: int) -> None:
    world, source = World(seed), RngSource(Rng(seed))
    target = Counted(rows_of(world.p))
    found = pearl(target, rows_of(world.q), text, count, ahead, 0.25, GREEDY, source)
    assert found.tokens == plain(target.rows, text, count)
    assert found.calls == target.calls <= count


def test_pearls_clock() -> None:
    same, source, c = periodic(5, 2), RngSource(Rng(0)), 0.25
    for ahead in (1, 3, 4, 6):
        # drafts that always stand: a token in the first phase, ``ahead`` in each one after it
        found = pearl(same, same, [1, 2], 1 + 5 * ahead, ahead, c, GREEDY, source)
        assert found.calls == 6
        assert_close(found.time, 6 * max(1.0, ahead * c))
        # drafts that never do: a token per phase
        never = pearl(same, periodic(5, 3), [1, 2, 3, 4], 12, ahead, c, GREEDY, source)
        assert never.calls == 12
    # with as many drafts as fit into a call it gains on verifying in turn
    balanced = pearl(same, same, [1, 2], 1 + 4 * 30, 4, c, GREEDY, source)
    assert 121 / balanced.time > 3.9 > speedup(1.0, 4, c) == 2.5
    assert expected_tokens(1.0, 4) == 5.0
    assert pearl(same, same, [1], 0, 2, c, GREEDY, source) == ([], 0.0, 0)
    for ahead, time in ((0, 0.1), (1, -0.1), (1, np.nan)):
        with pytest.raises(ValueError, match="ahead ≥ 1"):
            pearl(same, same, [1], 1, ahead, time, GREEDY, source)
