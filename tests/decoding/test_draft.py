"""mini_nn.decoding.draft: lookups against naive loops, and streams against the target's own law."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mini_nn import Rng
from mini_nn.decoding import (
    NGramDraft,
    NGramModel,
    NoDraft,
    PromptLookup,
    Proposal,
    RngSource,
    TokenTree,
    Warper,
    block_verification,
    deterministic,
    deterministic_children,
    draw_chain,
    greedy,
    one_hot,
    speculative_sampling,
    tree_laws,
    verify_tree,
)
from tests.decoding.enumerate import distance, law, total
from tests.decoding.test_verify import World
from tests.support import assert_close

Text = tuple[int, ...]

SEEDS = st.integers(0, 2**32)
KINDS = st.sampled_from(World.KINDS)
LETTERS = st.integers(0, 2)
TEXTS = st.lists(LETTERS, min_size=1, max_size=14)
GREEDY = Warper(temperature=0.0)


def no_source() -> Any:
    """For what draws nothing: any question is an error."""
    return None


# Models and loops that the tests of all drafts share


def rows_of(laws_of: Callable[[Text], Any]) -> Any:
    """Logits with these laws; −inf where a token has none."""
    known: dict[Text, Any] = {}

    def rows(tokens: Sequence[int], count: int) -> Any:
        found = []
        for length in range(len(tokens) - count + 1, len(tokens) + 1):
            text = tuple(tokens[:length])
            if text not in known:
                p = np.asarray(laws_of(text))
                known[text] = np.where(p > 0.0, np.log(np.where(p > 0.0, p, 1.0)), -np.inf)
            found.append(known[text])
        assert len(found) == count >= 1
        return np.stack(found)

    return rows


class Counted:
    """A model that counts its calls."""

    def __init__(self, rows: Any) -> None:
        self.rows, self.calls = rows, 0

    def __call__(self, tokens: Any, count: Any) -> Any:
        self.calls += 1
        return self.rows(tokens, count)


def plain(rows: Any, text: Sequence[int], count: int) -> list[int]:
    """Greedy decoding, one token at a time."""
    found = list(text)
    for _ in range(count):
        found.append(int(rows(found, 1)[0].argmax()))
    return found[len(text) :]


def generate(
    rows: Any,
    draft: Any,
    rule: Any,
    text: Sequence[int],
    count: int,
    source: Any,
    g: int = 2,
    warper: Warper = Warper(),  # noqa: B008
) -> list[int]:
    """Round after round: draft, one call, verify; a tree's rule is one of its nodes."""
    known = list(text)
    stop = len(known) + count
    while len(known) < stop:
        offer = draft.propose(known, min(g, stop - len(known) - 1), warper, source)
        drafts = offer.tokens
        if isinstance(drafts, TokenTree):
            assert drafts.tokens[0] == known[-1] and offer.q is None
            paths = [[drafts.tokens[n] for n in drafts.path(node)] for node in range(len(drafts))]
            logits = np.concatenate([rows([*known, *path], 1) for path in paths])
            p = tree_laws(logits, known, drafts, warper)
            verdict = verify_tree(drafts, None, p, rule, source)
            known += [drafts.tokens[node] for node in verdict.path]
        else:
            p = warper(rows([*known, *drafts], len(drafts) + 1), known, drafts)
            verdict = rule(drafts, offer.laws(p.shape[1]), p, source)
            known += drafts[: verdict.accepted]
        known.append(verdict.token)
    assert len(known) == stop
    return known[len(text) :]


def joint(rows: Any, text: Text, count: int, warper: Warper = Warper()) -> dict[Text, float]:  # noqa: B008
    """The model's own law of what follows a text."""
    found: dict[Text, float] = {(): 1.0}
    for _ in range(count):
        found = {
            (*new, x): chance * float(p)
            for new, chance in found.items()
            for x, p in enumerate(warper(rows([*text, *new], 1), (*text, *new))[0])
            if p > 0.0
        }
    return found


def bias(
    rows: Any,
    draft: Any,
    rule: Any,
    text: Text,
    count: int,
    g: int = 2,
    warper: Warper | None = None,
) -> float:
    """How far the law of a stream is from the model's own."""
    warper = warper or Warper()
    found = law(lambda s: tuple(generate(rows, draft, rule, text, count, s, g, warper)))
    assert abs(total(found) - 1.0) < 1e-12
    return distance(found, joint(rows, text, count, warper))


def periodic(size: int, period: int) -> Any:
    """A model whose greedy text repeats what was ``period`` tokens ago."""

    def laws_of(text: Text) -> Any:
        return 0.9 * one_hot(text[-period] if len(text) >= period else 0, size) + 0.1 / size

    return rows_of(laws_of)


# Prompt lookup


def lookup(text: list[int], count: int, largest: int, ends: Text = ()) -> list[int]:
    """The policy word for word: n = N … 1, the first place that something follows."""
    for n in range(min(largest, len(text) - 1), 0, -1):
        for place in range(len(text) - n + 1):
            follow = text[place + n : place + n + count]
            if text[place : place + n] == text[-n:] and follow:
                return [*itertools.takewhile(lambda x: x not in ends, follow)]
    return []


def lookup_of_the_last_match(text: list[int], count: int, largest: int) -> list[int]:
    for n in range(min(largest, len(text) - 1), 0, -1):
        for place in reversed(range(len(text) - n)):
            if text[place : place + n] == text[-n:]:
                return text[place + n : place + n + count]
    return []


def lookup_of_the_end_itself(text: list[int], count: int, largest: int) -> list[int]:
    """Takes the end for a match of itself when it is the first one of that n."""
    for n in range(min(largest, len(text)), 0, -1):
        for place in range(len(text) - n + 1):
            if text[place : place + n] == text[-n:]:
                return text[place + n : place + n + count]
    return []


def proposed(draft: Any, text: Sequence[int], count: int) -> Any:
    offer = draft.propose(text, count, Warper(), no_source())
    assert offer.q is None
    return offer.tokens


@settings(max_examples=200)
@given(TEXTS, st.integers(0, 5), st.integers(1, 5), st.sets(LETTERS, max_size=1))
def test_prompt_lookup_is_the_naive_loop(
    text: list[int], count: int, largest: int, ends: set[int]
) -> None:
    before = list(text)
    drafts = proposed(PromptLookup(largest, tuple(ends)), text, count)
    assert drafts == lookup(text, count, largest, tuple(ends)) and text == before
    assert proposed(PromptLookup(largest, tuple(ends)), tuple(text), count) == drafts
    assert not ends & set(drafts) and len(drafts) <= count
    # verbatim, and followed by nothing that the text does not have
    assert any(text[i : i + len(drafts)] == drafts for i in range(len(text)))


@pytest.mark.parametrize(
    ("text", "largest", "drafts"),
    [
        ([1], 3, []),
        ([1, 2, 3], 3, []),  # no match
        ([1, 2], 9, []),  # N longer than the text
        ([1, 1], 9, [1]),
        ([1, 1, 1], 2, [1]),  # the longer match overlaps the end, the shorter would give two
        ([1, 2, 3, 1, 2], 2, [3, 1, 2]),
        ([1, 2, 0, 1, 2, 9, 1, 2], 2, [0, 1, 2, 9]),  # the first match
        ([9, 2, 0, 1, 2, 7, 1, 2], 2, [7, 1, 2]),  # the longest one, though it comes later
        ([9, 2, 0, 1, 2, 7, 1, 2], 1, [0, 1, 2, 7]),
    ],
)
def test_lookups_by_hand(text: list[int], largest: int, drafts: list[int]) -> None:
    assert proposed(PromptLookup(largest), text, 4) == drafts


def test_other_policies_are_seen() -> None:
    text = [1, 2, 0, 1, 2, 9, 1, 2]
    assert lookup_of_the_last_match(text, 4, 2) != lookup(text, 4, 2)
    assert lookup_of_the_end_itself(text, 4, 9) == [] != lookup(text, 4, 9)


def test_an_end_token_cuts_the_proposal_before_it() -> None:
    text = [1, 2, 7, 3, 1]
    assert proposed(PromptLookup(2, (7,)), text, 4) == [2]
    assert proposed(PromptLookup(2, (2, 7)), text, 4) == []


def test_copying_takes_count_plus_one_tokens_per_call() -> None:
    """A text that repeats itself: all drafts stand, once there is something to copy."""
    prompt = [3, 1, 4, 1, 5, 9, 2, 6]
    rows = Counted(periodic(10, len(prompt)))
    k, calls = 5, 20
    count = calls * (k + 1)
    text = generate(rows, PromptLookup(3), greedy, prompt * 2, count, None, k, GREEDY)
    assert text == (prompt * 30)[:count] and rows.calls == calls
    rows.calls = 0
    generate(rows, NoDraft(), greedy, prompt * 2, 24, None, k, GREEDY)
    assert rows.calls == 24


# Streams: greedy equality and the law


@given(SEEDS, TEXTS, st.integers(0, 4), st.integers(1, 4))
def test_greedy_streams(seed: int, text: list[int], g: int, largest: int) -> None:
    world = World(seed)
    rows = rows_of(world.p)
    wanted = plain(rows, text, 8)
    model = NGramModel(3, 3, text)
    for draft in (NoDraft(), PromptLookup(largest), NGramDraft(model), Poisoned(seed)):
        for rule in (deterministic, speculative_sampling, block_verification):
            source = RngSource(Rng(seed))
            assert generate(rows, draft, rule, text, 8, source, g, GREEDY) == wanted


class Poisoned:
    """Tokens that have nothing to do with the text."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def propose(self, text: Any, count: int, warper: Any, source: Any) -> Proposal:
        return Proposal([int(x) for x in self.rng.integers(0, 3, count)], None)


EXACT = {
    "none": (NoDraft(), speculative_sampling),
    "lookup": (PromptLookup(2), deterministic),
    "lookup, one-hot": (PromptLookup(2), speculative_sampling),
    "lookup, one-hot block": (PromptLookup(2), block_verification),
    "n-gram": (NGramDraft(NGramModel(2, 3, [0, 1, 1, 2, 0, 1])), speculative_sampling),
    "n-gram, block": (NGramDraft(NGramModel(2, 3, [0, 1, 1, 2, 0, 1])), block_verification),
    "n-gram, q not read": (NGramDraft(NGramModel(2, 3, [0, 1, 1, 2, 0, 1])), deterministic),
}


@pytest.mark.parametrize("name", EXACT)
@settings(max_examples=5)
@given(SEEDS, KINDS)
def test_the_law_of_a_stream(name: str, seed: int, kind: str) -> None:
    draft, rule = EXACT[name]
    assert bias(rows_of(World(seed, kind).p), draft, rule, (0, 1, 0), 3) < 1e-12


@pytest.mark.parametrize(
    "warper",
    [
        Warper(temperature=0.7, top_k=2),
        Warper(top_p=0.8, repetition_penalty=1.3),
        Warper(no_repeat_ngram_size=3),
    ],
)
def test_warped_streams(warper: Warper) -> None:
    """The same filters on both sides, and what looks at the text sees the drafts row by row."""
    for seed in range(3):
        rows = rows_of(World(seed).p)
        for name in ("lookup", "n-gram"):
            assert bias(rows, *EXACT[name], (0, 1, 0), 3, warper=warper) < 1e-12


def test_a_filtered_draft_that_says_it_was_not_is_biased() -> None:
    """q before the filters, for a token that was drawn after them."""
    draft = EXACT["n-gram"][0]
    warper = Warper(top_k=1)

    class Unfiltered:
        def propose(self, text: Any, count: int, _: Any, source: Any) -> Proposal:
            offer = draft.propose(text, count, warper, source)
            assert isinstance(offer.tokens, list)
            raw = [draft.model.law([*text, *offer.tokens[:i]]) for i in range(len(offer.tokens))]
            return Proposal(offer.tokens, np.stack(raw) if raw else None)

    rows = rows_of(World(3).p)
    assert bias(rows, draft, speculative_sampling, (0, 1), 2) < 1e-12
    assert bias(rows, Unfiltered(), speculative_sampling, (0, 1), 2) > 1e-2


# Stopping


def below(threshold: float) -> Any:
    return lambda token, q: q[token] < threshold


class Stopping:
    """A draft from a world's q, whose length depends on what was drawn."""

    def __init__(self, world: World, stop: Any, discard: bool = False) -> None:
        self.rows, self.stop, self.discard = rows_of(world.q), stop, discard

    def propose(self, text: Any, count: int, warper: Warper, source: Any) -> Proposal:
        offer = draw_chain(self.rows, text, count, warper, source, self.stop)
        assert isinstance(offer.tokens, list)
        if self.discard and offer.q is not None and self.stop(offer.tokens[-1], offer.q[-1]):
            return Proposal(offer.tokens[:-1], offer.q[:-1])  # the bug
        return offer


@settings(max_examples=5)
@given(SEEDS, KINDS, st.sampled_from([0.0, 0.3, 0.5, 1.1]))
def test_stopping_after_a_token_keeps_the_law(seed: int, kind: str, threshold: float) -> None:
    world = World(seed, kind)
    for rule in (speculative_sampling, deterministic):
        draft = Stopping(world, below(threshold))
        assert bias(rows_of(world.p), draft, rule, (0,), 3) < 1e-12


def test_dropping_a_token_for_what_it_is_does_not() -> None:
    """The stop is right and the removal is not: what remains was not drawn from q."""
    for seed in range(3):
        world = World(seed)
        kept, dropped = (Stopping(world, below(0.4), discard) for discard in (False, True))
        assert bias(rows_of(world.p), kept, speculative_sampling, (0,), 3) < 1e-12
        assert bias(rows_of(world.p), dropped, speculative_sampling, (0,), 3) > 1e-2


def test_dropping_by_the_targets_opinion_is_biased_too() -> None:
    world = World(1)

    def improbable(text: Text) -> Any:
        return lambda token, _: world.p(text)[token] < 0.4

    class Peeking:
        def propose(self, text: Any, count: int, warper: Warper, source: Any) -> Proposal:
            offer = draw_chain(rows_of(world.q), text, min(count, 1), warper, source)
            if offer.tokens and improbable(tuple(text))(offer.tokens[0], None):
                return Proposal([], None)
            return offer

    assert bias(rows_of(world.p), Peeking(), speculative_sampling, (0,), 2) > 1e-2


def test_where_a_chain_stops() -> None:
    rows = rows_of(World(0).q)
    whole = draw_chain(rows, [0], 5, Warper(), RngSource(Rng(4)))
    seen: list[int] = []

    def third(token: int, q: Any) -> bool:
        seen.append(token)
        assert q.shape == (3,) and abs(q.sum() - 1.0) < 1e-12
        return len(seen) == 3

    part = draw_chain(rows, [0], 5, Warper(), RngSource(Rng(4)), third)
    assert part.tokens == seen == whole.tokens[:3]  # type: ignore[index]
    assert_close(part.q, whole.q[:3])  # type: ignore[index]
    assert draw_chain(rows, [0], 0, Warper(), no_source()) == ([], None)


@given(SEEDS, st.integers(1, 4))
def test_q_is_the_law_of_the_draw(seed: int, count: int) -> None:
    world = World(seed)
    warper = Warper(temperature=0.6, top_k=2, repetition_penalty=1.5)
    rows = rows_of(world.q)
    offer = draw_chain(rows, (0,), count, warper, RngSource(Rng(seed)))
    assert isinstance(offer.tokens, list) and offer.q is not None
    assert offer.q.dtype == np.float64
    text = [0, *offer.tokens]
    assert_close(offer.q, warper(rows(text[:-1], count), [0], offer.tokens[:-1]))
    # and the joint law of the tokens is the product of the rows
    found = law(lambda s: tuple(draw_chain(rows, (0,), 2, warper, s).tokens))
    assert distance(found, joint(rows, (0,), 2, warper)) < 1e-12
    sure = draw_chain(rows, (0,), count, GREEDY, RngSource(Rng(seed)))
    assert sure.tokens == plain(rows, [0], count)
    assert_close(sure.laws(3), np.eye(3)[sure.tokens])  # type: ignore[index]


# The n-gram model


def witten_bell(model: NGramModel, text: list[int], history: list[int], token: int) -> float:
    """The recursion, from the longest history down, counting the text anew each time."""

    def p(h: list[int] | None) -> float:
        if h is None:
            return 1.0 / model.size
        follow = [text[i + len(h)] for i in range(len(text) - len(h)) if text[i : i + len(h)] == h]
        shorter = p(h[1:] if h else None)
        kinds = len(set(follow))
        if not follow:
            return shorter
        return (follow.count(token) + kinds * shorter) / (len(follow) + kinds)

    return p(history[max(0, len(history) - model.order + 1) :])


@given(st.lists(LETTERS, max_size=12), st.lists(LETTERS, max_size=4), st.integers(1, 4))
def test_an_ngram_law(text: list[int], history: list[int], order: int) -> None:
    model = NGramModel(order, 4, text)
    law_ = model.law(history)
    assert_close(law_, np.array([witten_bell(model, text, history, x) for x in range(4)]))
    assert_close(law_.sum(), 1.0, atol=1e-14)
    assert (law_ > 0.0).all()
    if len(history) >= order:
        assert_close(model.law([3, *history]), law_)
    if history:
        rows = model.rows(history, len(history))
        wanted = [np.log(model.law(history[: n + 1])) for n in range(len(history))]
        assert_close(rows, np.stack(wanted))


def test_an_ngram_model_that_knows_nothing_or_everything() -> None:
    assert_close(NGramModel(3, 5).law([1, 2]), 0.2)
    model = NGramModel(3, 2, [0, 1] * 500)
    assert model.law([0, 1])[0] > 0.99 and model.law([1, 0])[1] > 0.99
    # texts are counted apart: nothing follows the end of one
    apart = NGramModel(2, 3, [0, 1])
    apart.count([2])
    assert (1,) not in apart.followers and NGramModel(2, 3, [0, 1, 2]).followers[(1,)] == {2: 1}


# Doors


def test_one_hot_rows_of_a_proposal() -> None:
    assert_close(Proposal([2, 0], None).laws(3), np.eye(3)[[2, 0]])
    assert Proposal([], None).laws(3).shape == (0, 3)
    q = np.full((1, 3), 1.0 / 3.0)
    assert Proposal([1], q).laws(3) is q
    chain = Proposal(TokenTree.from_chains(0, [[1, 2]]), None)
    assert_close(chain.laws(3), np.array([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]))
    with pytest.raises(ValueError, match="2 children"):
        Proposal(TokenTree.from_chains(0, [[1], [2]]), None).laws(3)


def test_doors() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        PromptLookup(0)
    for order, size in ((0, 2), (1, 0)):
        with pytest.raises(ValueError, match="order ≥ 1"):
            NGramModel(order, size)
    for token in (-1, 2):
        with pytest.raises(ValueError, match="0 … 1"):
            NGramModel(2, 2, [0, token])


def test_trees_go_through_the_same_loop() -> None:
    class Both:
        """Every token of the vocabulary, to depth 1: one call gives two tokens."""

        def propose(self, text: Any, count: int, warper: Any, source: Any) -> Proposal:
            return Proposal(TokenTree.from_chains(text[-1], [[x][:count] for x in range(2)]), None)

    rows = Counted(rows_of(World(5, size=2).p))
    generate(rows, Both(), deterministic_children, (0,), 6, RngSource(Rng(0)))
    assert bias(rows.rows, Both(), deterministic_children, (0,), 4) < 1e-12
