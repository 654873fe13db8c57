"""mini_nn.decoding.retrieval: the datastore against naive scans, its trees against the law."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mini_nn import Rng
from mini_nn.decoding import (
    Datastore,
    RetrievalDraft,
    RngSource,
    TokenTree,
    Warper,
    deterministic_children,
    greedy_children,
    match_children,
    suffix_array,
)
from tests.decoding.test_draft import GREEDY, bias, generate, periodic, plain, rows_of
from tests.decoding.test_verify import World

Text = tuple[int, ...]

LETTERS = st.integers(0, 2)
TEXT = st.lists(LETTERS, max_size=12)
TEXTS = st.lists(TEXT, max_size=4)
SEEDS = st.integers(0, 2**32)
KINDS = st.sampled_from(World.KINDS)


@settings(max_examples=100)
@given(st.lists(st.integers(-1, 2), max_size=30))
def test_a_suffix_array_is_sorted(tokens: list[int]) -> None:
    found = suffix_array(np.asarray(tokens, "int64"))
    assert found.tolist() == sorted(range(len(tokens)), key=lambda i: tokens[i:])


def test_a_long_repetitive_text_is_sorted() -> None:
    tokens = [0, 1] * 300 + [0] * 300
    found = suffix_array(np.asarray(tokens, "int64"))
    assert found.tolist() == sorted(range(len(tokens)), key=lambda i: tokens[i:])


def places(texts: list[list[int]], pattern: list[int]) -> list[tuple[int, int]]:
    """(text, place) of each occurrence, by looking everywhere."""
    return [
        (number, i)
        for number, text in enumerate(texts)
        for i in range(len(text) - len(pattern) + 1)
        if text[i : i + len(pattern)] == pattern
    ]


def continuations(texts: list[list[int]], pattern: list[int], depth: int) -> list[Text]:
    n = len(pattern)
    return [tuple(texts[t][i + n : i + n + depth]) for t, i in places(texts, pattern)]


@settings(max_examples=100)
@given(TEXTS, st.lists(LETTERS, min_size=1, max_size=4))
def test_occurrences_are_those_of_a_scan(texts: list[list[int]], pattern: list[int]) -> None:
    store = Datastore(texts)
    offsets = np.cumsum([0, *(len(text) + 1 for text in texts)])
    wanted = sorted(int(offsets[number]) + i for number, i in places(texts, pattern))
    assert sorted(store.suffixes[row] for row in store.occurrences(pattern)) == wanted


@given(TEXTS, TEXT, st.integers(1, 5), st.integers(1, 3))
def test_the_longest_end_is_found(
    texts: list[list[int]], text: list[int], longest: int, shortest: int
) -> None:
    length, rows = Datastore(texts).search(text, longest, shortest)
    possible = [n for n in range(shortest, min(longest, len(text)) + 1) if places(texts, text[-n:])]
    assert length == max(possible, default=0)
    assert len(rows) == (len(places(texts, text[-length:])) if length else 0)


def naive_tree(chains: list[Text], nodes: int) -> list[tuple[Text, int]]:
    """The most frequent beginnings; of equally frequent ones the shorter, then the smaller."""
    counts = Counter(chain[:n] for chain in chains for n in range(1, len(chain) + 1))
    return sorted(counts.items(), key=lambda kv: (-kv[1], len(kv[0]), kv[0]))[:nodes]


def spelled(tree: TokenTree) -> list[Text]:
    return [tuple(tree.tokens[n] for n in tree.path(node)) for node in range(len(tree))]


def proposed(draft: RetrievalDraft, text: list[int], depth: int) -> TokenTree:
    source: Any = None  # nothing is drawn
    offer = draft.propose(text, depth, Warper(), source)
    assert offer.q is None and isinstance(offer.tokens, TokenTree)
    return offer.tokens


@settings(max_examples=150)
@given(
    TEXTS,
    st.lists(LETTERS, min_size=1, max_size=6),
    st.integers(0, 4),
    st.integers(0, 9),
    st.integers(1, 4),
)
def test_the_tree_is_the_pruned_trie(
    texts: list[list[int]], text: list[int], depth: int, nodes: int, longest: int
) -> None:
    store = Datastore(texts)
    tree = proposed(RetrievalDraft(store, longest, nodes=nodes), text, depth)
    length, _ = store.search(text, longest)
    chains = continuations(texts, text[len(text) - length :], depth) if length else []
    assert spelled(tree) == [(), *(path for path, _ in naive_tree(chains, nodes))]
    assert tree.tokens[0] == text[-1]
    # a node's children in the order of their frequency, for rules that try one after another
    counts = dict(naive_tree(chains, 1000))
    paths = spelled(tree)
    for node in range(len(tree)):
        often = [counts[paths[child]] for child in tree.draws[node]]
        assert often == sorted(often, reverse=True)


def test_a_tree_by_hand() -> None:
    store = Datastore([[5, 6, 7, 8], [5, 6, 7, 9], [5, 6, 1, 2], [6, 3, 3, 3], [7, 5, 6]])
    tree = proposed(RetrievalDraft(store, 2, nodes=3), [0, 5, 6], 2)
    # 7 twice, then what occurs once, the less deep first; nothing follows the last 5 6
    assert spelled(tree) == [(), (7,), (1,), (1, 2)]
    everything = proposed(RetrievalDraft(store, 2), [0, 5, 6], 9)
    assert spelled(everything)[1:] == [(7,), (1,), (1, 2), (7, 8), (7, 9)]
    # no 9 6, so the end of one token is looked for; shortest says how short it may be
    assert len(proposed(RetrievalDraft(store, 2), [9, 6], 1)) == 4
    assert len(proposed(RetrievalDraft(store, 2, shortest=2), [9, 6], 1)) == 1


def test_nothing_is_found_across_the_border_of_two_texts() -> None:
    apart, joined = Datastore([[0, 1], [2, 0]]), Datastore([[0, 1, 2, 0]])
    assert not apart.occurrences([1, 2]) and joined.occurrences([1, 2])
    assert len(proposed(RetrievalDraft(apart), [1], 3)) == 1
    assert spelled(proposed(RetrievalDraft(joined), [1], 3)) == [(), (2,), (2, 0)]


def test_of_many_occurrences_some_are_read_at_equal_distances() -> None:
    """The first ones in order would all begin with 1: what is late in the alphabet is there."""
    store = Datastore([[0, 1 + i % 4, 9, i] for i in range(100)])
    tree = proposed(RetrievalDraft(store, 1, most=10), [0], 1)
    assert {path[0] for path in spelled(tree)[1:]} == {1, 2, 3, 4}
    few = store.tree(0, store.occurrences([0])[:10], 1, 1, 64)
    assert {path[0] for path in spelled(few)[1:]} == {1}


def test_an_empty_datastore_drafts_nothing() -> None:
    for texts in ([], [[]], [[], []]):
        assert len(proposed(RetrievalDraft(Datastore(texts)), [0, 1], 4)) == 1


# Streams


@given(SEEDS, TEXTS, st.lists(LETTERS, min_size=1, max_size=4), st.integers(0, 4))
def test_greedy_streams_for_any_datastore(
    seed: int, texts: list[list[int]], text: list[int], g: int
) -> None:
    rows = rows_of(World(seed).p)
    draft = RetrievalDraft(Datastore(texts), nodes=6)
    wanted = plain(rows, text, 6)
    for rule in (deterministic_children, match_children, greedy_children):
        source = RngSource(Rng(seed))
        assert generate(rows, draft, rule, text, 6, source, g, GREEDY) == wanted


@pytest.mark.parametrize("rule", [deterministic_children, match_children])
@settings(max_examples=5)
@given(SEEDS, KINDS)
def test_the_law_of_a_stream(rule: Any, seed: int, kind: str) -> None:
    draft = RetrievalDraft(Datastore([[0, 1, 2, 0, 0, 1], [1, 2, 2, 0, 1, 1]]), 2, nodes=5)
    warper = Warper(repetition_penalty=1.2) if seed % 2 else Warper()
    assert bias(rows_of(World(seed, kind).p), draft, rule, (0, 1), 3, warper=warper) < 1e-12


def test_greedy_children_are_not_for_sampling() -> None:
    draft = RetrievalDraft(Datastore([[0, 1, 2, 0, 0, 1]]), 2, nodes=5)
    assert bias(rows_of(World(0).p), draft, greedy_children, (0, 1), 2) > 1e-2


def test_a_datastore_with_the_answer_gives_count_plus_one_tokens_per_call() -> None:
    word, source = [3, 1, 4, 1, 5, 9, 2, 6], RngSource(Rng(0))

    class Counting:
        def __init__(self, texts: list[list[int]]) -> None:
            self.draft, self.rounds = RetrievalDraft(Datastore(texts)), 0

        def propose(self, *arguments: Any) -> Any:
            self.rounds += 1
            return self.draft.propose(*arguments)

    for texts, rounds in (([word * 4], 4), ([[0, 7, 0]], 24)):
        draft = Counting(texts)
        rows = periodic(10, len(word))
        text = generate(rows, draft, greedy_children, word, 24, source, 5, GREEDY)
        assert text == word * 3 and draft.rounds == rounds


def test_doors() -> None:
    with pytest.raises(ValueError, match="≥ 0"):
        Datastore([[0, -1]])
    store = Datastore([[0, 1]])
    for bad in ({"longest": 0}, {"shortest": 0}, {"longest": 1, "shortest": 2}, {"nodes": -1}):
        with pytest.raises(ValueError, match="shortest ≤ longest"):
            RetrievalDraft(store, **bad)
    with pytest.raises(ValueError, match="most"):
        RetrievalDraft(store, most=0)
