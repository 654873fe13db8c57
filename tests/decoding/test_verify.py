"""mini_nn.decoding.verify: the law of the production code, by enumeration of all its choices."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from mini_nn import Rng
from mini_nn.decoding import (
    GumbelCoupled,
    Lenient,
    Relaxed,
    RngSource,
    Verdict,
    Warper,
    accept,
    block_verification,
    deterministic,
    greedy,
    gumbel_match,
    gumbel_token,
    one_hot,
    residual,
    sample_match,
    speculative_sampling,
)
from tests.decoding.enumerate import distance, law, total
from tests.decoding.test_source import LAST, WEIGHTS, normal, stuck
from tests.support import assert_close

V = 3


# A world: what target and draft think after each text


class World:
    """Two laws for each text, random but fixed.

    Kinds: ``any``; ``zeros`` has tokens without probability; ``equal`` has p = q exactly at every
    other text; ``disjoint`` has no token in common; ``sure`` has temperature 0 on the target's
    side, ``surer`` on both.
    """

    KINDS = ("any", "zeros", "equal", "disjoint", "sure", "surer")

    def __init__(self, seed: int, kind: str = "any", size: int = V) -> None:
        self.seed, self.kind, self.size = seed, kind, size

    def _pair(self, text: tuple[int, ...]) -> tuple[Any, Any]:
        rng = np.random.default_rng([self.seed, self.size, *(token + 1 for token in text)])
        p, q = rng.exponential(size=(2, self.size))
        if self.kind == "zeros":
            for law_ in (p, q):
                law_[rng.permutation(self.size)[: rng.integers(0, self.size)]] = 0.0
        if self.kind == "equal" and rng.random() < 0.5:
            q = p
        if self.kind == "disjoint":
            mine = np.arange(self.size) < rng.integers(1, self.size)
            p, q = p * mine, q * ~mine
        if self.kind in ("sure", "surer"):
            p = one_hot(int(p.argmax()), self.size)
        if self.kind == "surer":
            q = one_hot(int(q.argmax()), self.size)
        return p / p.sum(), q / q.sum()

    def p(self, text: tuple[int, ...]) -> Any:
        return self._pair(text)[0]

    def q(self, text: tuple[int, ...]) -> Any:
        return self._pair(text)[1]

    def joint(self, length: int) -> dict[tuple[int, ...], float]:
        """The target's own law of texts of that length."""
        found = {(): 1.0}
        for _ in range(length):
            found = {
                (*text, x): chance * self.p(text)[x]
                for text, chance in found.items()
                for x in range(self.size)
            }
        return found


Draft = Callable[[World, tuple[int, ...], Any], tuple[int, Any]]


def drawn(world: World, text: tuple[int, ...], source: Any) -> tuple[int, Any]:
    """A token from the draft's law, and that law."""
    q = world.q(text)
    return source.categorical(q), q


def chosen(world: World, text: tuple[int, ...], source: Any) -> tuple[int, Any]:
    """The draft's best token, whose law is one-hot."""
    best = int(world.q(text).argmax())
    return best, one_hot(best, world.size)


def chosen_with_softmax(world: World, text: tuple[int, ...], source: Any) -> tuple[int, Any]:
    """The classic bug: an argmax draft that says it was drawn."""
    return int(world.q(text).argmax()), world.q(text)


def play(
    world: World, rule: Any, g: int, source: Any, text: tuple[int, ...] = (), draft: Draft = drawn
) -> tuple[tuple[int, ...], int]:
    """One round: the text with what is emitted, and how many drafts stood."""
    tokens, q = [], np.zeros((g, world.size))
    for i in range(g):
        x, q[i] = draft(world, (*text, *tokens), source)
        tokens.append(x)
    p = np.stack([world.p((*text, *tokens[:i])) for i in range(g + 1)])
    verdict = rule(tokens, q, p, source)
    assert isinstance(verdict, Verdict) and 0 <= verdict.accepted <= g
    return (*text, *tokens[: verdict.accepted], verdict.token), verdict.accepted


def block(world: World, rule: Any, g: int, draft: Draft = drawn) -> dict[tuple[int, ...], float]:
    """The law of one round, completed to g + 1 tokens by the target itself."""

    def run(source: Any) -> tuple[int, ...]:
        text, _ = play(world, rule, g, source, draft=draft)
        while len(text) < g + 1:
            text = (*text, source.categorical(world.p(text)))
        return text

    return law(run)


def stream(
    world: World, rule: Any, g: int, length: int, draft: Draft = drawn
) -> dict[tuple[int, ...], float]:
    """The law of round after round, with as many drafts as still fit in."""

    def run(source: Any) -> tuple[int, ...]:
        text: tuple[int, ...] = ()
        while len(text) < length:
            text, _ = play(world, rule, min(g, length - len(text) - 1), source, text, draft)
        return text

    return law(run)


def mean_accepted(world: World, rule: Any, g: int, draft: Draft = drawn) -> float:
    found = law(lambda source: play(world, rule, g, source, draft=draft)[1])
    return sum(count * chance for count, chance in found.items())


EXACT = {
    "speculative sampling": (speculative_sampling, drawn),
    "of a chosen draft": (speculative_sampling, chosen),
    "lenience 1": (Lenient(1.0), drawn),
    "block": (block_verification, drawn),
    "block of a chosen draft": (block_verification, chosen),
    "deterministic": (deterministic, chosen),
    "deterministic, though drawn": (deterministic, drawn),  # lossless, only slower
    "match": (sample_match, drawn),
    "match of a chosen draft": (sample_match, chosen),
}

SEEDS = st.integers(0, 2**32)
KINDS = st.sampled_from(World.KINDS)


def name_of(rule: Any) -> str:
    """The same in every process, unlike the repr of a function."""
    return getattr(rule, "__name__", repr(rule))


@pytest.mark.parametrize("name", EXACT)
@settings(max_examples=12)
@given(SEEDS, KINDS, st.integers(0, 2))
def test_the_emitted_law_is_the_targets(name: str, seed: int, kind: str, g: int) -> None:
    rule, draft = EXACT[name]
    world = World(seed, kind)
    found = block(world, rule, g, draft)
    assert abs(total(found) - 1.0) < 1e-12
    assert distance(found, world.joint(g + 1)) < 1e-12


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("g", [1, 2])
def test_and_over_several_rounds(name: str, g: int) -> None:
    rule, draft = EXACT[name]
    for seed, kind in enumerate(World.KINDS):
        world = World(seed, kind, size=2)
        found = stream(world, rule, g, 4, draft)
        assert distance(found, world.joint(4)) < 1e-12


@pytest.mark.parametrize("name", EXACT)
def test_and_for_long_blocks(name: str) -> None:
    rule, draft = EXACT[name]
    for seed, kind in enumerate(World.KINDS):
        world = World(seed, kind, size=2)
        assert distance(block(world, rule, 4, draft), world.joint(5)) < 1e-12


# The classic bugs, each of which the enumeration must see


def redraws_from_p(tokens: Any, q: Any, p: Any, source: Any) -> Verdict:
    for i, x in enumerate(tokens):
        if not accept(p[i, x], q[i, x], source):
            return Verdict(i, source.categorical(p[i]))
    return Verdict(len(tokens), source.categorical(p[-1]))


def takes_the_bonus_a_row_early(tokens: Any, q: Any, p: Any, source: Any) -> Verdict:
    verdict = speculative_sampling(tokens, q, p, source)
    if verdict.accepted < len(tokens):
        return verdict
    return Verdict(verdict.accepted, source.categorical(p[-2]))


def block_with_the_chains_residual(tokens: Any, q: Any, p: Any, source: Any) -> Verdict:
    """Block verification that forgets π in the residual."""

    class Forgetful:
        bernoulli = source.bernoulli

        def categorical(self, law_: Any) -> int:
            return -1

    verdict = block_verification(tokens, q, p, Forgetful())  # type: ignore[arg-type]
    i = verdict.accepted
    return Verdict(i, source.categorical(p[i] if i == len(tokens) else residual(p[i], q[i])))


@pytest.mark.parametrize(
    ("rule", "draft"),
    [
        (redraws_from_p, drawn),
        (takes_the_bonus_a_row_early, drawn),
        (block_with_the_chains_residual, drawn),
        (speculative_sampling, chosen_with_softmax),
        (block_verification, chosen_with_softmax),
        (greedy, drawn),
        (Lenient(0.5), drawn),
        (Relaxed(2, 1.0), drawn),
    ],
)
def test_a_wrong_verifier_has_another_law(rule: Any, draft: Draft) -> None:
    world = World(3)
    found = block(world, rule, 2, draft)
    assert abs(total(found) - 1.0) < 1e-12
    assert distance(found, world.joint(3)) > 1e-4


def test_u_equal_to_zero() -> None:
    """u < p/q, strictly: with ≤ a token that the target rules out is accepted at u = 0."""
    p, q = np.array([[0.0, 1.0], [0.5, 0.5]]), np.array([[1.0, 0.0]])

    def with_at_most(u: float) -> bool:
        return u <= p[0, 0] / q[0, 0]

    assert with_at_most(0.0)  # the bug
    for rule in (speculative_sampling, block_verification, deterministic, sample_match):
        for u in (0.0, LAST):
            assert rule([0], q, p, stuck(u))[:2] == (0, 1)


@given(SEEDS, KINDS, st.sampled_from([0.0, LAST]))
def test_no_choice_emits_what_the_target_rules_out(seed: int, kind: str, u: float) -> None:
    world = World(seed, kind)
    for rule, draft in EXACT.values():
        text, _ = play(world, rule, 2, stuck(u), draft=draft)
        assert all(world.p(text[:i])[x] > 0.0 for i, x in enumerate(text))


# How much is accepted


@given(WEIGHTS, WEIGHTS)
def test_one_draft(a: Any, b: Any) -> None:
    """Σ min(p, q) stand; of a chosen one p(x); by sample-match Σ p q."""
    p, q = normal(a), normal(b)
    rows = np.stack([p, p])

    def share(rule: Any, draw: bool) -> float:
        def run(source: Any) -> int:
            x = source.categorical(q) if draw else int(q.argmax())
            law_ = q if draw else one_hot(x, V)
            return rule([x], law_[None], rows, source).accepted

        return law(run).get(1, 0.0)

    for rule in (speculative_sampling, block_verification):
        assert_close(share(rule, True), np.minimum(p, q).sum(), atol=1e-14)
    for rule in (speculative_sampling, block_verification, deterministic, sample_match):
        assert_close(share(rule, False), p[q.argmax()], atol=1e-14)
    for rule in (deterministic, sample_match):
        assert_close(share(rule, True), (p * q).sum(), atol=1e-14)


@given(SEEDS)
def test_equal_laws_accept_everything_and_ask_nothing(seed: int) -> None:
    """Only drafts and bonus are drawn: V^g branches before the bonus, and no coin is tossed."""
    world = World(seed)
    world.q = world.p  # type: ignore[method-assign]
    for rule in (speculative_sampling, block_verification, Lenient(0.3)):
        assert law(lambda source, rule=rule: play(world, rule, 2, source)[1]).keys() == {2}


@given(SEEDS)
def test_disjoint_supports_emit_one_token(seed: int) -> None:
    world = World(seed, "disjoint")
    for rule, _ in EXACT.values():
        assert law(lambda source, rule=rule: play(world, rule, 2, source)[1]).keys() == {0}


def test_laws_that_differ_by_rounding_only() -> None:
    """p − q has no positive number though p ≠ q: a rejected draft's position is drawn from p."""
    p = np.array([[0.5, 0.25, 0.25], [0.2, 0.3, 0.5]])
    q = np.array([[0.5, 0.25, np.nextafter(0.25, 1.0)]])
    assert q.sum() == 1.0 and not np.maximum(p[0] - q[0], 0.0).any() and p[0, 2] < q[0, 2]
    for rule in (speculative_sampling, block_verification):
        assert rule([2], q, p, stuck(LAST))[:2] == (0, 2)  # rejected, and drawn from p
    single = p.astype("float32")
    other = single[:1].copy()
    other[0, 2] = np.nextafter(other[0, 2], np.float32(1.0))
    for rule in (speculative_sampling, block_verification):
        assert rule([2], other, single, stuck(LAST)).token in (0, 1, 2)


@given(SEEDS, KINDS, st.integers(1, 2))
@settings(max_examples=15)
def test_a_block_keeps_at_least_as_many(seed: int, kind: str, g: int) -> None:
    """Theorem 2 of 2403.10444; a block of one is the chain's rule, choice for choice."""
    world = World(seed, kind)
    whole, single = (mean_accepted(world, r, g) for r in (block_verification, speculative_sampling))
    assert whole >= single - 1e-13
    if g == 1:
        laws_ = [
            law(lambda source, rule=rule: play(world, rule, 1, source))
            for rule in (block_verification, speculative_sampling)
        ]
        assert distance(*laws_) < 1e-13


def test_a_block_mostly_keeps_more() -> None:
    gains = [
        mean_accepted(World(seed), block_verification, 2)
        / mean_accepted(World(seed), speculative_sampling, 2)
        for seed in range(10)
    ]
    assert np.mean(gains) > 1.005 and sum(gain > 1.0 + 1e-9 for gain in gains) >= 8


def block_as_published(tokens: Any, q: Any, p: Any, source: Any) -> Verdict:
    """Algorithm 2 of 2403.10444, line by line: all coins from the first to the last."""
    g, kept, last = len(tokens), 1.0, 0
    weights = [1.0]
    for i in range(1, g + 1):
        kept = min(kept * p[i - 1, tokens[i - 1]] / q[i - 1, tokens[i - 1]], 1.0)
        weights.append(kept)
        if i == g:
            h = kept
        else:
            left = np.maximum(kept * p[i] - q[i], 0.0).sum()
            h = left / (left + 1.0 - kept) if left + 1.0 - kept > 0.0 else 1.0
        if h >= 1.0 or (h > 0.0 and source.bernoulli(h)):
            last = i
    if last == g:
        return Verdict(g, source.categorical(p[g]))
    return Verdict(last, source.categorical(residual(weights[last] * p[last], q[last])))


@pytest.mark.parametrize("kind", World.KINDS)
def test_the_block_rule_is_the_published_one(kind: str) -> None:
    for seed, (g, size) in enumerate([(1, 3), (2, 3), (2, 3), (3, 2), (3, 2), (4, 2)]):
        world = World(seed, kind, size)
        found, wanted = (
            law(lambda source, rule=rule, world=world, g=g: play(world, rule, g, source))
            for rule in (block_verification, block_as_published)
        )
        assert distance(found, wanted) < 1e-13


# Lenience


@given(SEEDS, st.sampled_from(["any", "zeros", "disjoint"]), st.floats(0.05, 1.0))
def test_lenience_bounds_what_a_token_gets(seed: int, kind: str, lenience: float) -> None:
    world = World(seed, kind)
    p, q = world.p(()), world.q(())
    found = law(lambda source: play(world, Lenient(lenience), 1, source)[0][0])
    emitted = np.array([found.get(x, 0.0) for x in range(V)])
    assert_close(emitted.sum(), 1.0)
    assert np.all(emitted <= p / lenience + 1e-12)
    accepted = law(lambda source: play(world, Lenient(lenience), 1, source)[1]).get(1, 0.0)
    assert_close(accepted, np.minimum(p / lenience, q).sum(), atol=1e-13)


def test_lenience_zero_is_the_draft() -> None:
    world = World(1, "zeros")
    found = law(lambda source: play(world, Lenient(0.0), 2, source)[0][:2])
    wanted = {
        (x, y): world.q(())[x] * world.q((x,))[y] for x, y in itertools.product(range(V), repeat=2)
    }
    assert distance(found, wanted) < 1e-13
    for lenience in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="between 0 and 1"):
            Lenient(lenience)


# Greedy, and rules that are near it


def greedy_text(world: World, length: int) -> tuple[int, ...]:
    text: tuple[int, ...] = ()
    while len(text) < length:
        text = (*text, int(world.p(text).argmax()))
    return text


@given(SEEDS, st.sampled_from(["any", "zeros", "equal", "sure"]), st.integers(0, 3))
def test_greedy_is_greedy_decoding_for_any_draft(seed: int, kind: str, g: int) -> None:
    world = World(seed, kind, size=2)
    for rule in (greedy, Relaxed(1, 5.0), Relaxed(2, 0.0)):
        assert stream(world, rule, g, 4).keys() == {greedy_text(world, 4)}


@given(SEEDS, st.integers(1, 2))
def test_temperature_zero_is_greedy_whatever_drafts(seed: int, g: int) -> None:
    """The target's law is one-hot; exact rules then accept what greedy does."""
    world = World(seed, "sure")
    wanted = law(lambda source: play(world, greedy, g, source))
    for rule in (speculative_sampling, sample_match, deterministic):
        assert law(lambda source, rule=rule: play(world, rule, g, source)) == wanted
    text = {greedy_text(world, g + 1): 1.0}
    assert distance(block(world, block_verification, g), text) < 1e-13


def test_the_limit_of_low_temperature() -> None:
    """Away from ties the law tends to that of temperature 0."""
    logits = np.array([[1.0, 0.5, -1.0], [0.0, 2.0, 1.0]])
    drafts = np.array([[0.3, 0.4, 0.3]])

    def run(source: Any, temperature: float) -> tuple[int, ...]:
        x = source.categorical(drafts[0])
        p = Warper(temperature)(logits, [], [x])
        verdict = speculative_sampling([x], drafts, p, source)
        return (*[x][: verdict.accepted], verdict.token)

    cold = law(lambda source: run(source, 0.0))
    gaps = [distance(law(lambda s, t=t: run(s, t)), cold) for t in (0.5, 0.1, 0.02)]
    assert gaps[0] > gaps[1] > gaps[2] and gaps[2] < 1e-9


def test_ties_go_to_the_lowest_number() -> None:
    p = np.array([[0.4, 0.4, 0.2], [0.3, 0.35, 0.35]])
    assert greedy([0], None, p, stuck(0.0)) == (1, 1, ())
    assert greedy([1], None, p, stuck(0.0)) == (0, 0, ())
    assert greedy([1], None, np.log(p), stuck(0.0)) == (0, 0, ())
    assert Relaxed(1, 0.0)([1], None, p, stuck(0.0)) == (1, 1, ())  # a tie is as good as the best
    hot = Warper(0.0)(np.log(p), [], [0])
    assert speculative_sampling([0], p[:1], hot, stuck(0.5)) == (1, 1, ())


def test_relaxed() -> None:
    p = np.array([[0.5, 0.3, 0.2, 0.0], [0.1, 0.2, 0.3, 0.4]])

    def stands(x: int, top: int, gap: float) -> bool:
        verdict = Relaxed(top, gap)([x], None, p, stuck(0.0))
        assert verdict.token == (3 if verdict.accepted else 0)
        return verdict.accepted == 1

    gap = float(np.log(0.5 / 0.3))
    assert stands(1, 2, gap + 1e-9) and not stands(1, 2, gap - 1e-9) and not stands(1, 1, 9.0)
    assert stands(2, 3, np.inf) and not stands(2, 2, np.inf)
    assert not stands(3, 4, np.inf)  # −∞ is not within any gap
    for top, wide in ((0, 1.0), (1, -1.0), (1, float("nan"))):
        with pytest.raises(ValueError, match="top ≥ 1"):
            Relaxed(top, wide)


# Processed laws: exact for what the target was processed to, whatever the draft was


PLAIN, COLD, NUCLEUS = Warper(), Warper(temperature=0.5, top_k=2), Warper(top_p=0.7)
PENALTY = Warper(repetition_penalty=1.7, no_repeat_ngram_size=2)


class Warped(World):
    """A world of logits, each side with a processor of its own."""

    def __init__(self, seed: int, target: Warper, draft: Warper, told: Warper | None = None):
        super().__init__(seed)
        self.target, self.draft, self.told = target, draft, told or draft

    def _logits(self, text: tuple[int, ...]) -> Any:
        return np.random.default_rng([self.seed, *(x + 1 for x in text)]).normal(size=(2, V))

    def p(self, text: tuple[int, ...]) -> Any:
        return self.target(self._logits(text)[:1], text)[0]

    def q(self, text: tuple[int, ...]) -> Any:
        return self.draft(self._logits(text)[1:], text)[0]

    def told_q(self, text: tuple[int, ...]) -> Any:
        return self.told(self._logits(text)[1:], text)[0]


def drawn_but_told_otherwise(world: Any, text: tuple[int, ...], source: Any) -> tuple[int, Any]:
    return source.categorical(world.q(text)), world.told_q(text)


@pytest.mark.parametrize("target", [PLAIN, COLD, NUCLEUS, PENALTY], ids=repr)
@pytest.mark.parametrize("draft", [PLAIN, COLD, NUCLEUS, PENALTY, Warper(0.0)], ids=repr)
def test_any_pair_of_processors_is_exact(target: Warper, draft: Warper) -> None:
    for rule in (speculative_sampling, block_verification):
        world = Warped(5, target, draft)
        assert distance(block(world, rule, 2), world.joint(3)) < 1e-12


def test_top_p_of_what_is_drawn_but_not_of_what_is_told() -> None:
    wrong, right = Warped(5, NUCLEUS, NUCLEUS, told=PLAIN), Warped(5, NUCLEUS, NUCLEUS)
    for world, bad in ((wrong, True), (right, False)):
        found = block(world, speculative_sampling, 2, drawn_but_told_otherwise)
        gap = distance(found, world.joint(3))
        assert gap > 1e-3 if bad else gap < 1e-12


def test_top_p_of_the_draft_only_is_not_top_p() -> None:
    """The rule keeps the target's law as it is told it: here with the tail."""
    half, both = Warped(5, PLAIN, NUCLEUS), Warped(5, NUCLEUS, NUCLEUS)
    assert distance(block(half, speculative_sampling, 2), both.joint(3)) > 1e-2


@pytest.mark.parametrize("early", [False, True])
def test_penalties_see_the_drafts_row_by_row(early: bool) -> None:
    """All rows in one call, as a target has them; the bug is to process them all with the text."""
    world = Warped(5, PENALTY, PLAIN)

    def run(source: Any) -> tuple[int, ...]:
        tokens, q = [], []
        for _ in range(2):
            q.append(world.q((0, *tokens)))
            tokens.append(source.categorical(q[-1]))
        logits = np.stack([world._logits((0, *tokens[:i]))[0] for i in range(3)])
        if early:
            p = np.concatenate([PENALTY(row[None], (0,)) for row in logits])
        else:
            p = PENALTY(logits, (0,), tokens)
        verdict = speculative_sampling(tokens, np.stack(q), p, source)
        text = (0, *tokens[: verdict.accepted], verdict.token)
        while len(text) < 4:
            text = (*text, source.categorical(world.p(text)))
        return text

    wanted = {
        (0, x, y, z): world.p((0,))[x] * world.p((0, x))[y] * world.p((0, x, y))[z]
        for x, y, z in itertools.product(range(V), repeat=3)
        if world.p((0,))[x] * world.p((0, x))[y] > 0
    }
    gap = distance(law(run), wanted)
    assert gap > 1e-2 if early else gap < 1e-12


# Shared noise


def noisy_text(world: World, noise: Any) -> tuple[int, ...]:
    text: tuple[int, ...] = ()
    for row in noise:
        text = (*text, gumbel_token(world.p(text), row))
    return text


@given(SEEDS, KINDS, st.integers(0, 4), st.booleans())
def test_the_text_of_shared_noise_is_that_of_plain_decoding(
    seed: int, kind: str, g: int, fresh: bool
) -> None:
    """Token for token, for any draft and any g, over all rounds; a draft with noise of its own
    changes how many stand and nothing else."""
    world, length = World(seed, kind, size=5), 12
    noise = np.random.default_rng(seed).gumbel(size=(length + 5, 5))
    other = np.random.default_rng(seed + 1).gumbel(size=noise.shape)
    text: tuple[int, ...] = ()
    while len(text) < length:
        start = len(text)
        tokens: list[int] = []
        for i in range(g):
            tokens.append(
                gumbel_token(world.q((*text, *tokens)), (other if fresh else noise)[start + i])
            )
        p = np.stack([world.p((*text, *tokens[:i])) for i in range(g + 1)])
        verdict = GumbelCoupled(noise[start:])(tokens, None, p, stuck(0.0))
        text = (*text, *tokens[: verdict.accepted], verdict.token)
    assert text[:length] == noisy_text(world, noise[:length])


def test_noise_a_row_late_gives_another_text() -> None:
    worlds = [World(seed, size=5) for seed in range(5)]
    noise = np.random.default_rng(0).gumbel(size=(9, 5))
    assert any(noisy_text(w, noise[:8]) != noisy_text(w, noise[1:]) for w in worlds)


def test_how_often_shared_noise_agrees() -> None:
    """The formula of ``gumbel_match``: 20,000 rounds, within 5 standard deviations (6e-7)."""
    world, n = World(2), 20_000
    p, q = world.p(()), world.q(())
    noise = np.random.default_rng(0).gumbel(size=(n, 1, V))
    rows = np.stack([p, p])
    both = np.concatenate([noise, noise], axis=1)
    count = sum(
        GumbelCoupled(both[i])([gumbel_token(q, noise[i, 0])], None, rows, stuck(0.0)).accepted
        for i in range(n)
    )
    chance = float(gumbel_match(p, q))
    assert abs(count - n * chance) < 5 * np.sqrt(n * chance * (1 - chance))


def test_gumbel_token() -> None:
    """Never a token of probability 0, whatever the noise; a factor changes nothing."""
    p, noise = np.array([0.0, 0.5, 0.5]), np.array([1e6, 0.0, 0.0])
    assert gumbel_token(p, noise) == 1 == gumbel_token(8.0 * p, noise)
    for bad, row in (
        (np.zeros(3), noise),
        (np.array([np.nan, 0.5, 0.5]), noise),
        (np.array([-0.5, 0.5, 1.0]), noise),
        (p, noise[:2]),
        (p[None], noise[None]),
    ):
        with pytest.raises(ValueError, match="one is positive"):
            gumbel_token(bad, row)
    rows = np.stack([p, p])
    for wrong in (noise[None], noise, np.zeros((2, 4))):
        with pytest.raises(ValueError, match="a row of noise"):
            GumbelCoupled(wrong)([1], None, rows, stuck(0.0))


# At random


@pytest.mark.parametrize("rule", [speculative_sampling, block_verification, redraws_from_p])
def test_a_sampled_stream(rule: Any) -> None:
    """χ² of independent blocks against the exact joint law (false alarm 1e-6)."""
    world, source, n = World(3), RngSource(Rng(1)), 4000
    counts = dict.fromkeys(world.joint(2), 0)
    for _ in range(n):
        text, _ = play(world, rule, 1, source)
        if len(text) < 2:
            text = (*text, source.categorical(world.p(text)))
        counts[text] += 1
    statistic = sum(
        (counts[text] - n * chance) ** 2 / (n * chance) for text, chance in world.joint(2).items()
    )
    limit = float(chi2.isf(1e-6, V * V - 1))
    assert statistic > 2 * limit if rule is redraws_from_p else statistic < limit


# What is refused, and what is left alone


ALL = [
    *[rule for rule, _ in EXACT.values()],
    greedy,
    Relaxed(2, 1.0),
    Lenient(0.5),
    GumbelCoupled(np.zeros((3, V))),
]


@pytest.mark.parametrize("rule", ALL, ids=name_of)
def test_shapes_and_tokens_are_checked(rule: Any) -> None:
    p, q = np.full((2, V), 1 / V), np.full((1, V), 1 / V)
    source = stuck(0.5)
    assert rule(np.array([1]), q, p, source) == rule([1], q, p, source)
    for tokens in ([-1], [V]):
        with pytest.raises(ValueError, match="tokens from 0 to 2"):
            rule(tokens, q, p, source)
    for tokens, rows in (([], p), ([1, 1], p), ([1], p[:1])):
        with pytest.raises(ValueError, match="rows of the target"):
            rule(tokens, q, rows, source)
    with pytest.raises(TypeError, match="integer"):
        rule([1.0], q, p, source)
    with pytest.raises(ValueError):
        rule([1], q, np.array([[np.nan, 0.5, 0.5], [0.2, 0.3, 0.5]]), source)
    with pytest.raises(ValueError):
        rule([1], q, p[0], source)
    assert rule([], np.zeros((0, V)), p[:1], source).accepted == 0


@pytest.mark.parametrize(
    "rule", [speculative_sampling, block_verification, Lenient(0.5)], ids=name_of
)
def test_q_is_checked_where_it_is_read(rule: Any) -> None:
    p = np.full((2, V), 1 / V)
    for q in (None, np.full((2, V), 1 / V), np.full((1, 2), 0.5), np.full(V, 1 / V)):
        with pytest.raises(ValueError, match="drawn from"):
            rule([1], q, p, stuck(0.5))
    with pytest.raises(ValueError, match="each row of q is a law"):
        rule([1], np.array([[0.0, 3.0, -1.0]]), p, stuck(0.5))
    with pytest.raises(ValueError, match="its own law"):
        rule([1], np.array([[0.5, 0.0, 0.5]]), p, stuck(0.5))


@pytest.mark.parametrize("rule", ALL, ids=name_of)
def test_arguments_are_left_alone(rule: Any) -> None:
    p, q = np.full((3, V), 1 / V, "float32"), np.full((2, V), 1 / V, "float32")
    p[:, 0] += 1e-4
    for u in (0.0, LAST):
        before = p.copy(), q.copy()
        rule([0, 1], q, p, stuck(u))
        assert_close(p, before[0], 0, 0)
        assert_close(q, before[1], 0, 0)


@pytest.mark.parametrize("size", [1, 2])
def test_small_vocabularies(size: int) -> None:
    """One token: everything stands."""
    world = World(0, size=size)
    for rule, draft in EXACT.values():
        assert distance(block(world, rule, 2, draft), world.joint(3)) < 1e-12
    if size == 1:
        assert mean_accepted(world, speculative_sampling, 2) == 2.0
