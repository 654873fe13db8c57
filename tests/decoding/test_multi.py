"""mini_nn.decoding.multi: the law of one node by enumeration, and the best that any rule can do."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from mini_nn import backend
from mini_nn.decoding import (
    Choice,
    deterministic_children,
    draw_iid,
    draw_without_replacement,
    greedy_children,
    k_seq,
    k_seq_rho,
    match_children,
    multi,
    multi_step,
    one_hot,
    optimal_acceptance,
    residual,
    sample_match,
    speculative_sampling,
    top_children,
    without_replacement,
)
from tests.decoding.enumerate import distance, law, total
from tests.decoding.test_verify import World
from tests.support import assert_close

SEEDS = st.integers(0, 2**32)
KINDS = st.sampled_from(World.KINDS)


def node(seed: int, kind: str, size: int = 3) -> tuple[Any, Any]:
    """p and q of one node, which nobody may write to."""
    world = World(seed, kind, size)
    p, q = world.p(()), world.q(())
    p.flags.writeable = q.flags.writeable = False
    return p, q


def best(q: Any, k: int, source: Any) -> tuple[int, ...]:
    return top_children(q, k)


def emitted(rule: Any, draw: Any, p: Any, q: Any, k: int) -> dict[tuple[bool, int], float]:
    """The law of (did a draft stand, token) at one node with k children."""

    def run(source: Any) -> tuple[bool, int]:
        children = draw(q, k, source)
        child, left = rule(children, q, p, source)
        if child is not None:
            return True, children[child]
        assert_close(left.sum(), 1.0)
        return False, source.categorical(left)

    return law(run)


def tokens_of(found: dict[tuple[bool, int], float]) -> dict[int, float]:
    tokens: dict[int, float] = {}
    for (_, token), chance in found.items():
        tokens[token] = tokens.get(token, 0.0) + chance
    return tokens


def bias(rule: Any, draw: Any, p: Any, q: Any, k: int) -> float:
    """How far the emitted token's law is from p."""
    found = tokens_of(emitted(rule, draw, p, q, k))
    assert abs(total(found) - 1.0) < 1e-12
    return distance(found, dict(enumerate(p)))


def stands(rule: Any, draw: Any, p: Any, q: Any, k: int) -> float:
    """The probability that one of the drafts stands."""
    found = emitted(rule, draw, p, q, k)
    return sum(chance for (stood, _), chance in found.items() if stood)


EXACT = {
    "multi step": (multi_step, draw_iid),
    "without replacement": (without_replacement, draw_without_replacement),
    "without replacement, of i.i.d. children": (without_replacement, draw_iid),
    "k-SEQ": (k_seq, draw_iid),
    "match": (match_children, draw_iid),
    "match of different children": (match_children, draw_without_replacement),
    "match of the best": (match_children, best),
    "deterministic": (deterministic_children, best),
    "deterministic, though drawn": (deterministic_children, draw_iid),
}

IID = ("multi step", "k-SEQ", "match", "without replacement, of i.i.d. children")


READERS = [multi_step, without_replacement, k_seq]
"""The rules that read q."""


# The law


@pytest.mark.parametrize("name", EXACT)
@given(SEEDS, KINDS, st.integers(2, 4), st.integers(0, 3))
def test_the_emitted_law_is_the_targets(name: str, seed: int, kind: str, size: int, k: int) -> None:
    """Also with p = q, zeros, disjoint supports, temperature 0, more drafts than q has tokens."""
    assert bias(*EXACT[name], *node(seed, kind, size), k) < 1e-12


@pytest.mark.parametrize("name", EXACT)
@given(SEEDS, KINDS)
def test_one_child_is_the_chain(name: str, seed: int, kind: str) -> None:
    """k = 1: speculative sampling with a single draft, or sample-match."""
    rule, draw = EXACT[name]
    p, q = node(seed, kind)
    drafted_from = q if draw is not best else one_hot(top_children(q, 1)[0], 3)
    chain = sample_match if rule is match_children else speculative_sampling
    if rule is deterministic_children and draw is draw_iid:
        return  # a chosen draft's rule
    found = emitted(rule, draw, p, q, 1)

    def run(source: Any) -> tuple[bool, int]:
        x = draw(q, 1, source)[0]
        verdict = chain([x], drafted_from[None], np.stack([p, p]), source)
        return verdict.accepted == 1, x if verdict.accepted else verdict.token

    assert distance(found, law(run)) < 1e-12


@given(SEEDS, KINDS, st.integers(0, 3))
def test_greedy_stands_where_the_best_token_is_a_child(seed: int, kind: str, k: int) -> None:
    p, q = node(seed, kind)
    y = int(p.argmax())
    found = emitted(greedy_children, draw_iid, p, q, k)
    assert set(tokens_of(found)) == {y}
    assert_close(found.get((True, y), 0.0), 1.0 - (1.0 - q[y]) ** k, atol=1e-12)


def test_of_tokens_that_tie_the_lowest_is_the_best() -> None:
    p = np.array([0.2, 0.4, 0.4])
    assert greedy_children([2, 1, 1], None, p, None).child == 1
    assert greedy_children([2], None, p, None).child is None
    assert top_children(p, 2) == (1, 2) and top_children(p, 9) == (1, 2, 0)


@given(SEEDS, st.integers(1, 3))
def test_children_that_are_all_tokens_stand_surely(seed: int, k: int) -> None:
    """k = V: without replacement and deterministic leave nothing to draw from the residual."""
    p, q = node(seed, "any", k)
    for rule, draw in (
        (without_replacement, draw_without_replacement),
        (deterministic_children, best),
        (match_children, best),
    ):
        assert_close(stands(rule, draw, p, q, k), 1.0)


# The classic bugs


def recursive(
    remove: bool, renormalise: bool = True, skip: bool = False, update: bool = True
) -> Any:
    """Recursive rejection in a few lines, of which each can be left out."""

    def rule(children: Sequence[int], q: Any, p: Any, source: Any) -> Choice:
        first = p
        for i, x in enumerate(children):
            if skip and x in children[:i]:
                continue
            a = min(1.0, (p if update else first)[x] / q[x])
            if a >= 1.0 or (a > 0.0 and source.bernoulli(a)):
                return Choice(i, p)
            p = residual(p, q)
            if remove:
                q = np.where(np.arange(len(q)) == x, 0.0, q)
                if renormalise and q.sum() > 0.0:
                    q = q / q.sum()
        return Choice(None, p)

    return rule


def worst(rule: Any, draw: Any, k: int, kind: str = "any") -> float:
    return max(bias(rule, draw, *node(seed, kind, 4), k) for seed in range(5))


def test_the_classic_bugs_change_the_law() -> None:
    right = recursive(remove=True)
    assert worst(right, draw_without_replacement, 3) < 1e-12
    assert worst(recursive(remove=False), draw_iid, 3) < 1e-12

    not_renormalised = recursive(remove=True, renormalise=False)
    assert worst(not_renormalised, draw_without_replacement, 3) > 1e-2
    siblings_reuse_p = recursive(remove=True, update=False)
    assert worst(siblings_reuse_p, draw_without_replacement, 3) > 1e-2
    assert worst(recursive(remove=False, update=False), draw_iid, 3) > 1e-2
    # each rule on the other's children
    assert worst(multi_step, draw_without_replacement, 3) > 1e-2
    # of i.i.d. children a repeated one is tried again, or q forgets it, but not neither
    assert worst(recursive(remove=False, skip=True), draw_iid, 3) > 1e-3
    assert worst(recursive(remove=True, skip=True), draw_iid, 3) < 1e-12


def test_a_repeated_child_is_not_tried_again_in_the_form_without_replacement() -> None:
    p, q = np.array([0.1, 0.2, 0.7]), np.array([0.8, 0.1, 0.1])
    assert without_replacement([0, 0], q, p, Refusing()).child is None
    with pytest.warns(RuntimeWarning, match="divide"):  # the bug: its q is 0 by then
        recursive(remove=True)([0, 0], q, p, Refusing())


@pytest.mark.parametrize("order", ["sorted", "side by side"])
def test_the_order_of_iid_children_matters(order: str) -> None:
    """A set of drafts, or equal ones moved together, is no i.i.d. sequence any more."""

    def reordered(q: Any, k: int, source: Any) -> Sequence[int]:
        drawn = draw_iid(q, k, source)
        return sorted(drawn, key=None if order == "sorted" else drawn.index)

    assert worst(multi_step, draw_iid, 3) < 1e-12
    assert worst(multi_step, reordered, 3) > 1e-3


def test_chosen_children_are_no_draws() -> None:
    assert worst(multi_step, best, 2) > 1e-2
    assert worst(k_seq, best, 2) > 1e-2


class Refusing:
    """A source that accepts nothing that it may refuse."""

    def bernoulli(self, a: float) -> bool:
        return False

    def categorical(self, p: Any) -> int:
        return int(p.argmax())


@pytest.mark.parametrize("rule", READERS)
def test_a_residual_of_nothing_falls_back_to_p(rule: Any) -> None:
    """p ≤ q everywhere, by rounding, though both are laws: (p − q)₊ / 0 would be nan."""
    q = np.array([0.5, 0.25, 0.25])
    p = np.array([0.5, np.nextafter(0.25, 0.0), 0.25])
    assert p.sum() == q.sum() == 1.0 and p[1] / q[1] < 1.0
    child, left = rule([1, 1], q, p, Refusing())
    assert child is None
    assert_close(left, p)


def test_p_that_has_nothing_for_the_remaining_children_gives_no_nan() -> None:
    p, q = np.array([0.0, 0.0, 1.0]), np.array([0.6, 0.4, 0.0])
    for rule in (multi_step, without_replacement, k_seq, deterministic_children):
        child, left = rule([0, 1], q, p, Refusing())
        assert child is None
        assert_close(left, p)


# Acceptance


@given(SEEDS, KINDS, st.integers(1, 3))
def test_how_many_stand(seed: int, kind: str, k: int) -> None:
    """The closed form of each rule; the residuals of multi-step do not depend on the tokens."""
    p, q = node(seed, kind)
    fall, rest = 1.0, p
    for _ in range(k):
        beta = np.minimum(rest, q).sum()
        fall, rest = fall * (1.0 - beta), residual(rest, q)
    assert_close(stands(multi_step, draw_iid, p, q, k), 1.0 - fall, atol=1e-12)
    rho = k_seq_rho(p, q, k)
    b = np.minimum(q, p / rho).sum()
    assert_close(stands(k_seq, draw_iid, p, q, k), 1.0 - (1.0 - b) ** k, atol=1e-12)
    matched = (p * (1.0 - (1.0 - q) ** k)).sum()
    assert_close(stands(match_children, draw_iid, p, q, k), matched, atol=1e-12)
    chosen = p[[*top_children(q, k)]].sum()
    assert_close(stands(deterministic_children, best, p, q, k), chosen, atol=1e-12)


@given(SEEDS, KINDS, st.integers(1, 5))
def test_rho_is_the_root(seed: int, kind: str, k: int) -> None:
    p, q = node(seed, kind, 4)
    rho = k_seq_rho(p, q, k)
    b = np.minimum(q, p / rho).sum()
    assert 1.0 <= rho <= k
    assert_close(1.0 - (1.0 - b) ** k, rho * b, atol=1e-10)
    if kind == "disjoint" or k == 1:
        assert rho == 1.0


def test_k_seq_is_exact_above_the_root_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """So the tolerance of the root finder is no error; too small a ρ is the classic one."""
    for scale, exact in ((lambda p, q, k: float(k), True), (lambda p, q, k: 1.0, False)):
        monkeypatch.setattr(multi, "k_seq_rho", scale)
        found = worst(k_seq, draw_iid, 3)
        assert found < 1e-12 if exact else found > 1e-3


def tuples(q: Any, k: int, replacement: bool) -> dict[tuple[int, ...], float]:
    """The law of k drafts, by its definition."""
    if replacement:
        every = itertools.product(range(len(q)), repeat=k)
        return {drafts: math.prod(q[x] for x in drafts) for drafts in every}
    found = {}
    possible = np.flatnonzero(q).tolist()
    for drafts in itertools.permutations(possible, min(k, len(possible))):
        chance, rest = 1.0, q.copy()
        for x in drafts:
            chance *= rest[x] / rest.sum()
            rest[x] = 0.0
        found[drafts] = chance
    return found


def transported(p: Any, drafts: dict[tuple[int, ...], float]) -> float:
    """The optimal transport itself: the most mass that goes from tuples to tokens they contain."""
    pairs = [(i, x) for i, tokens in enumerate(drafts) for x in sorted(set(tokens))]
    rows = np.zeros((len(drafts) + len(p), len(pairs)))
    for column, (i, x) in enumerate(pairs):
        rows[i, column] = rows[len(drafts) + x, column] = 1.0
    bound = np.concatenate([[*drafts.values()], p])
    return -float(linprog(-np.ones(len(pairs)), A_ub=rows, b_ub=bound).fun)


@given(SEEDS, KINDS, st.integers(2, 4), st.integers(1, 3), st.booleans())
def test_optimal_acceptance_is_the_transport(
    seed: int, kind: str, size: int, k: int, replacement: bool
) -> None:
    """The linear program, and the least of all 2ⱽ cuts, of which V + 1 are looked at."""
    p, q = node(seed, kind, size)
    drafts = tuples(q, k, replacement)
    found = optimal_acceptance(p, q, k, replacement)
    assert_close(found, transported(p, drafts), atol=1e-9)
    cuts = [
        1.0
        - p[[*members]].sum()
        + sum(chance for tokens, chance in drafts.items() if set(tokens) & set(members))
        for n in range(size + 1)
        for members in itertools.combinations(range(size), n)
    ]
    assert_close(found, min(cuts), atol=1e-12)


@given(SEEDS, KINDS, st.integers(1, 3))
def test_no_rule_exceeds_the_optimum(seed: int, kind: str, k: int) -> None:
    p, q = node(seed, kind)
    optimum = optimal_acceptance(p, q, k)
    for name in IID:
        assert stands(*EXACT[name], p, q, k) <= optimum + 1e-12, name
    assert stands(k_seq, draw_iid, p, q, k) >= (1.0 - 1.0 / math.e) * optimum - 1e-12
    without = stands(without_replacement, draw_without_replacement, p, q, k)
    assert without <= optimal_acceptance(p, q, k, replacement=False) + 1e-12


def test_a_rule_that_keeps_more_than_the_optimum_is_not_exact() -> None:
    def greedy_for_drafts(children: Any, q: Any, p: Any, source: Any) -> Choice:
        return Choice(0, p) if p[children[0]] > 0.0 else multi_step(children, q, p, source)

    p, q = node(1, "any")
    assert stands(greedy_for_drafts, draw_iid, p, q, 2) > optimal_acceptance(p, q, 2)
    assert bias(greedy_for_drafts, draw_iid, p, q, 2) > 1e-2


@given(SEEDS, KINDS, st.booleans())
def test_optimal_acceptance_of_few_drafts(seed: int, kind: str, replacement: bool) -> None:
    p, q = node(seed, kind)
    assert abs(optimal_acceptance(p, q, 0, replacement)) < 1e-15
    assert_close(optimal_acceptance(p, q, 1, replacement), np.minimum(p, q).sum(), atol=1e-12)
    assert_close(optimal_acceptance(p, p, 1, replacement), 1.0)


# Draws and doors


@given(SEEDS, KINDS, st.integers(0, 4), st.booleans())
def test_the_law_of_the_draws(seed: int, kind: str, k: int, replacement: bool) -> None:
    _, q = node(seed, kind)
    draw = draw_iid if replacement else draw_without_replacement
    found = law(lambda source: draw(q, k, source))
    assert distance(found, tuples(q, k, replacement)) < 1e-12


@settings(max_examples=5)
@given(SEEDS)
def test_float32_rows_that_do_not_quite_sum_to_1(seed: int) -> None:
    p, q = (row.astype("float32") for row in node(seed, "any"))
    left = multi_step([0], q, p * np.float32(1.0001), Refusing()).left
    assert left.dtype == "float64"
    assert_close(left.sum(), 1.0)


@pytest.mark.parametrize(
    "rule", [*READERS, match_children, deterministic_children, greedy_children]
)
def test_bad_input(rule: Any) -> None:
    p = np.array([0.5, 0.5, 0.0])
    for children, q, wrong in (
        ([3], p, p),
        ([-1], p, p),
        ([0], p, p[None]),
        ([0], p, 3.0 * p),
        ([0], p, np.array([0.5, np.nan, 0.5])),
    ):
        with pytest.raises(ValueError):
            rule(children, q, wrong, Refusing())
    if rule in READERS:
        with pytest.raises(ValueError, match="of that shape"):
            rule([0], p[:2], p, Refusing())
    with pytest.raises(TypeError):
        rule([0.5], p, p, Refusing())


@pytest.mark.parametrize("rule", READERS)
def test_a_child_that_cannot_have_been_drafted(rule: Any) -> None:
    p, q = np.array([0.1, 0.1, 0.8]), np.array([0.5, 0.5, 0.0])
    with pytest.raises(ValueError, match="drafted token has probability"):
        rule([2], q, p, Refusing())
    with pytest.raises(ValueError, match="do without q"):
        rule([0], None, p, Refusing())
    assert rule([], None, p, Refusing()).child is None


def test_numbers_of_drafts() -> None:
    p = np.array([0.5, 0.5])
    with pytest.raises(ValueError, match="k ≥ 1"):
        k_seq_rho(p, p, 0)
    with pytest.raises(ValueError, match="k ≥ 0"):
        optimal_acceptance(p, p, -1)


def test_arrays_of_a_device_are_brought_to_the_host(xp: Any, backend_name: str) -> None:
    p = xp.asarray([0.5, 0.5, 0.0])
    assert multi_step([0], backend.to_host(p), backend.to_host(p), Refusing()).child == 0
    if backend_name != "numpy":
        with pytest.raises(TypeError, match="to_host"):
            multi_step([0], p, p, Refusing())
