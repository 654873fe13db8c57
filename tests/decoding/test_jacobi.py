"""mini_nn.decoding.jacobi: greedy texts for any start, window and pool, and the law of sampling."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mini_nn import Rng, no_grad
from mini_nn.decoding import (
    Lookahead,
    NGramPool,
    RngSource,
    TokenTree,
    Warper,
    Window,
    deterministic_children,
    greedy_children,
    jacobi_decode,
    jacobi_iterate,
    lookahead_decode,
    match_children,
    rows_by_paths,
    tree_laws,
    verify_tree,
)
from models.gpt import GPT, GPTConfig
from models.speculative import CachedModel
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
LETTERS = st.integers(0, 2)
STARTS = st.lists(LETTERS, max_size=6)
PROMPTS = st.lists(LETTERS, min_size=1, max_size=4)


# Jacobi


def naive_states(rows: Any, text: Sequence[int], start: Sequence[int]) -> list[list[int]]:
    """Every position anew in each iteration, until nothing changes."""
    states = [list(start)]
    while True:
        state = states[-1]
        new = [int(rows([*text, *state[:i]], 1)[0].argmax()) for i in range(len(state))]
        if new == state:
            return states
        states.append(new)


@given(SEEDS, KINDS, PROMPTS, STARTS)
def test_jacobi_reaches_the_greedy_text(
    seed: int, kind: str, text: list[int], start: list[int]
) -> None:
    rows = Counted(rows_of(World(seed, kind).p))
    wanted = plain(rows.rows, text, len(start))
    run = jacobi_iterate(rows, text, start)
    assert run.calls == rows.calls <= len(start)
    assert run.states == naive_states(rows.rows, text, start)
    assert run.states[0] == start and run.states[-1] == wanted
    for j, state in enumerate(run.states):
        assert state[:j] == wanted[:j]
    # from the answer one iteration says that nothing changes
    again = jacobi_iterate(rows, text, wanted)
    assert again.states == [wanted] and again.calls == (1 if wanted else 0)


@given(SEEDS)
def test_the_answer_is_the_only_fixed_point(seed: int) -> None:
    rows = rows_of(World(seed).p)
    fixed = [
        list(state)
        for state in itertools.product(range(3), repeat=4)
        if len(naive_states(rows, [0], state)) == 1
    ]
    assert fixed == [plain(rows, [0], 4)]


def test_ties_go_to_the_lowest_number() -> None:
    rows = rows_of(lambda text: np.full(3, 1.0 / 3.0))
    assert jacobi_iterate(rows, [1], [2, 2, 2]).states == [[2, 2, 2], [0, 0, 0]]
    # the bug: another rule for ties has another answer
    assert [int(len(r) - 1 - r[::-1].argmax()) for r in rows([1, 2, 2], 3)] != [0, 0, 0]


@given(SEEDS, PROMPTS, STARTS, st.sets(LETTERS, max_size=2))
def test_what_stands_behind_an_end_may_still_change(
    seed: int, text: list[int], start: list[int], ends: set[int]
) -> None:
    rows = Counted(rows_of(World(seed).p))
    wanted = plain(rows.rows, text, len(start))
    state = jacobi_iterate(rows, text, start, tuple(ends)).states[-1]
    upto = next((i + 1 for i, x in enumerate(wanted) if x in ends), len(wanted))
    assert state[:upto] == wanted[:upto]
    rows.calls = 0
    assert jacobi_iterate(rows, text, start, tuple(ends)).calls <= upto
    for block in (1, 2, 5):
        found = jacobi_decode(rows.rows, text, len(start), block, tuple(ends))
        assert found == wanted[:upto]


def test_an_end_that_is_only_guessed_does_not_count() -> None:
    rows = periodic(4, 3)
    assert jacobi_decode(rows, [1, 2, 3], 6, 6, ends=(0,)) == [1, 2, 3, 1, 2, 3]
    run = jacobi_iterate(rows, [1, 2, 3], [0] * 6, ends=(0,))
    assert run.states[-1] == [1, 2, 3, 1, 2, 3]


def test_how_many_calls_jacobi_takes() -> None:
    """A model that copies from ``period`` tokens ago gets that many more right per iteration."""
    for period, iterations in ((1, 0), (2, 6), (4, 3)):
        rows = Counted(periodic(9, period))
        prompt = list(range(1, period + 1))
        run = jacobi_iterate(rows, prompt, [period] * 12)
        assert run.states[-1] == (prompt * 12)[:12]
        assert len(run.states) - 1 == iterations and run.calls == iterations + 1
        rows.calls = 0
        assert jacobi_decode(rows, prompt, 12, 12) == run.states[-1] and rows.calls == run.calls
    assert jacobi_decode(rows, [1], 0, 3) == []
    with pytest.raises(ValueError, match="at least 1"):
        jacobi_decode(rows, [1], 3, 0)
    with pytest.raises(ValueError, match="nan"):
        jacobi_iterate(lambda tokens, count: np.full((count, 2), np.nan), [0], [1])


# The pool


class NaivePool:
    """A list of (first, rest), the latest last."""

    def __init__(self, most: int) -> None:
        self.entries: list[tuple[int, Text]] = []
        self.most = most

    def add(self, ngram: Text) -> None:
        entry = (ngram[0], ngram[1:])
        self.entries = [e for e in self.entries if e != entry] + [entry]
        same = [e for e in self.entries if e[0] == entry[0]]
        for old in same[: max(len(same) - self.most, 0)]:
            self.entries.remove(old)

    def after(self, token: int) -> list[Text]:
        return [rest for first, rest in reversed(self.entries) if first == token]


@given(st.lists(st.tuples(LETTERS, LETTERS, LETTERS), max_size=30), st.integers(0, 4))
def test_the_pool_keeps_the_latest(ngrams: list[tuple[int, int, int]], most: int) -> None:
    pool, naive = NGramPool(3, most), NaivePool(most)
    for ngram in ngrams:
        pool.add(ngram)
        naive.add(ngram)
        for token in range(3):
            assert pool.after(token) == naive.after(token)
            assert len(pool.after(token)) <= most


def test_an_ngram_that_comes_again_is_the_latest_again() -> None:
    pool = NGramPool(2, 2)
    for x in (1, 2, 1, 3):
        pool.add((0, x))
    assert pool.after(0) == [(3,), (1,)]  # by first arrival it would be 3 and 2
    pool.after(0)
    pool.add((0, 4))
    assert pool.after(0) == [(4,), (3,)]
    text = NGramPool(3, 5)
    text.add_text([0, 1, 2, 0, 1])
    assert text.after(0) == [(1, 2)] and text.after(2) == [(0, 1)] and text.after(9) == []
    short = NGramPool(3, 5)
    short.add_text([0, 1])
    assert not short.followers


def test_a_pool_is_a_draft_of_its_own() -> None:
    pool = NGramPool(3, 4)
    for ngram in ((0, 1, 2), (0, 1, 0), (0, 2, 2)):
        pool.add(ngram)
    source: Any = None
    tree = pool.propose([1, 0], 2, Warper(), source).tokens
    assert tree == TokenTree.from_chains(0, [(2, 2), (1, 0), (1, 2)])
    assert pool.propose([1, 0], 1, Warper(), source).tokens == TokenTree.from_chains(
        0, [(2,), (1,), (1,)]
    )
    for seed in range(2):
        rows = rows_of(World(seed).p)
        assert bias(rows, pool, deterministic_children, (1, 0), 3) < 1e-12
        wanted = plain(rows, [1, 0], 6)
        source = RngSource(Rng(0))
        assert generate(rows, pool, match_children, [1, 0], 6, source, 2, GREEDY) == wanted


# Lookahead


def poisoned(seed: int, size: int, most: int, letters: int = 3) -> NGramPool:
    """Full of n-grams that have nothing to do with the text."""
    pool, rng = NGramPool(size, most), np.random.default_rng(seed)
    for _ in range(12 * most):
        pool.add(tuple(int(x) for x in rng.integers(0, letters, size)))
    return pool


def run(
    tree_rows: Any, state: Lookahead, text: Sequence[int], count: int, warper: Warper, source: Any
) -> list[int]:
    found = list(text)
    stop = len(found) + count
    while len(found) < stop:
        found += state.step(tree_rows, found, stop - len(found) - 1, warper, source)[0]
    assert len(found) == stop
    return found[len(text) :]


@settings(max_examples=40)
@given(SEEDS, PROMPTS, st.integers(1, 4), st.integers(2, 5), st.integers(0, 4), st.booleans())
def test_lookahead_is_greedy_decoding(
    seed: int, text: list[int], width: int, size: int, most: int, poison: bool
) -> None:
    rows = rows_of(World(seed).p)
    wanted, tree_rows = plain(rows, text, 7), rows_by_paths(rows)
    source = RngSource(Rng(seed))
    assert lookahead_decode(tree_rows, text, 7, width, size, most, GREEDY, source) == wanted
    pool = poisoned(seed, size, most) if poison else NGramPool(size, most)
    state = Lookahead(Window(width, size), pool)
    assert run(tree_rows, state, text, 7, GREEDY, source) == wanted


@pytest.mark.parametrize(("width", "size", "most"), [(2, 2, 2), (2, 3, 2), (1, 3, 1), (3, 4, 3)])
def test_lookahead_samples_the_models_law(width: int, size: int, most: int) -> None:
    for seed, kind in enumerate(World.KINDS):
        world = World(seed, kind, size=2)
        rows = rows_of(world.p)
        tree_rows = rows_by_paths(rows)

        def sampled(source: Any, tree_rows: Any = tree_rows, seed: int = seed) -> Text:
            pool = NGramPool(size, most)
            for ngram in itertools.islice(itertools.product(range(2), repeat=size), seed, None, 3):
                pool.add(ngram)
            state = Lookahead(Window(width, size), pool)
            return tuple(run(tree_rows, state, (0, 1), 4, Warper(), source))

        found = law(sampled)
        assert abs(total(found) - 1.0) < 1e-12
        assert distance(found, joint(rows, (0, 1), 4)) < 1e-12


def test_sampling_that_verifies_greedily_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The released code's fallback: asked for a sample, it decodes greedily."""
    rows = rows_of(World(0, size=2).p)

    def sampled(source: Any) -> Text:
        pool = poisoned(0, 2, 2, letters=2)
        state = Lookahead(Window(2, 2), pool)
        return tuple(run(rows_by_paths(rows), state, (0,), 3, Warper(), source))

    wanted = joint(rows, (0,), 3)
    assert distance(law(sampled), wanted) < 1e-12
    monkeypatch.setattr("mini_nn.decoding.jacobi.deterministic_children", greedy_children)
    assert distance(law(sampled), wanted) > 1e-2


def test_nothing_leaks_from_one_text_to_the_next() -> None:
    rows = Counted(rows_of(World(7).p))
    tree_rows, source = rows_by_paths(rows), RngSource(Rng(0))
    calls = []
    for _ in range(3):
        rows.calls = 0
        lookahead_decode(tree_rows, [0, 1, 2], 9, 3, 3, 2, GREEDY, source)
        lookahead_decode(tree_rows, [2, 2], 9, 3, 3, 2, GREEDY, source)
        calls.append(rows.calls)
    assert len(set(calls)) == 1
    window = Window(2, 3)
    window.start([1, 2])
    window.move([5, 6])
    window.start([7, 8])
    assert window.states == [[7, 8]] and not window.full


class Watched:
    """A tree model that keeps what it was asked and what it said."""

    def __init__(self, tree_rows: Any) -> None:
        self.tree_rows, self.trees, self.found = tree_rows, [], []

    def __call__(self, text: Any, tree: TokenTree) -> Any:
        self.trees.append(tree)
        self.found.append(self.tree_rows(text, tree))
        return self.found[-1]


@pytest.mark.parametrize(("width", "size"), [(1, 2), (3, 2), (1, 3), (2, 3), (4, 4), (2, 5)])
def test_the_window_is_the_papers(width: int, size: int) -> None:
    """A simulation by (state, position): what each token sees, the diagonals and the shift."""
    world = World(width * 10 + size)
    rows = rows_of(world.p)
    tree_rows = Watched(rows_by_paths(rows))
    state = Lookahead(Window(width, size), NGramPool(size, 50))
    text = [0, 1, 2, 1]
    source = RngSource(Rng(0))
    # by position relative to the last token of the text; state 0 of position 0 is that token
    states = [{i: text[(i - 1) % len(text)] for i in range(1, width + size - 2)}]
    ngrams: set[Text] = set()
    for _ in range(size + 4):
        full = len(states) == size - 1
        first = 0 if full else 1
        last = len(states) - 1
        new = {}
        for i in range(first, max(states[0], default=0) + 1 if not full else width):
            seen = [states[0][j] for j in range(1, i + 1)]
            seen += [states[s][i] for s in range(1, last + 1)]
            new[i] = int(rows([*text, *seen], 1)[0].argmax())
            if full:
                ngrams.add((text[-1] if i == 0 else states[0][i], *(seen[i:]), new[i]))
        pooled = state.pool.propose(text, 3, GREEDY, source).tokens
        tokens, verdict = state.step(tree_rows, text, 3, GREEDY, source)
        assert len(tree_rows.trees[-1]) == len(pooled) + sum(map(len, states))
        assert len(tokens) == verdict.accepted + 1
        assert tokens == plain(rows, text, len(tokens))
        kept = {(key, *rest) for key, found in state.pool.followers.items() for rest in found}
        assert kept == ngrams
        if full:
            # state 1 of position i is a guess for i + 1, which is position i of the next text
            later = [*states[1:], new]
            states = [{i: later[0][i] for i in range(1, width)}, *later[1:]]
        else:
            states = [
                *(
                    {i - 1: s[i] for i in s if i > (1 if n == 0 else 0)}
                    for n, s in enumerate(states)
                ),
                {i - 1: new[i] for i in new},
            ]
        assert [sorted(s.items()) for s in states] == [
            [*enumerate(s, start=1 if n == 0 else 0)] for n, s in enumerate(state.window.states)
        ]
        text += tokens
    assert state.window.full and [len(s) for s in state.window.states] == [
        width - 1,
        *[width] * (size - 2),
    ]


def test_no_token_of_the_window_is_above_an_ngram() -> None:
    """And all of the up to G n-grams are verified, not W of them."""
    rows = rows_of(World(3).p)
    for width, most in ((1, 4), (4, 1), (3, 3)):
        pool = poisoned(1, 3, most)
        tree_rows = Watched(rows_by_paths(rows))
        state = Lookahead(Window(width, 3), pool)
        text = [0, 1]
        for _ in range(4):
            chains = pool.after(text[-1])
            assert len(chains) == most
            proposed = TokenTree.from_chains(text[-1], chains)
            text += state.step(tree_rows, text, 2, GREEDY, RngSource(Rng(0)))[0]
            tree, n = tree_rows.trees[-1], len(proposed)
            assert tree.tokens[:n] == proposed.tokens and tree.parents[:n] == proposed.parents
            assert not tree.ancestors[:n, n:].any()
            assert all(tree.find(chain) is not None for chain in chains)


class Corrupted:
    """A tree model in whose passes the window's tokens are replaced by others."""

    def __init__(self, tree_rows: Any, pool: NGramPool, seed: int) -> None:
        self.tree_rows, self.pool = tree_rows, pool
        self.rng = np.random.default_rng(seed)
        self.passes: list[Any] = []

    def __call__(self, text: Any, tree: TokenTree) -> Any:
        n = len(TokenTree.from_chains(text[-1], self.pool.after(text[-1])))
        others = [int(x) for x in self.rng.integers(0, 7, len(tree) - n)]
        found = self.tree_rows(text, TokenTree((*tree.tokens[:n], *others), tree.parents))
        self.passes.append((n, found, self.tree_rows(text, tree)))
        return found


def tiny_model(xp: Any) -> Any:
    config = GPTConfig(vocab_size=7, n_positions=64, n_embd=8, n_layer=2, n_head=2)
    model = GPT(config, Rng(3)).astype("float64").eval()
    rng = np.random.default_rng(0)
    with no_grad():
        for parameter in model.parameters():
            parameter.data = xp.asarray(rng.normal(size=parameter.shape) * 0.7)
    return CachedModel(model)


def test_the_window_does_not_reach_what_is_verified(xp: Any) -> None:
    """On a real model, in one pass with the tree's mask: the verified rows and the text stay."""
    model = tiny_model(xp)
    text = [1, 2, 3, 1, 2]
    wanted = plain(model.logits, text, 12)
    for width, size in ((3, 3), (2, 4)):
        for seed in range(2):
            pool = poisoned(seed, size, 3)
            tree_rows = Corrupted(model.tree_logits, pool, seed)
            state = Lookahead(Window(width, size), pool)
            found = list(text)
            while len(found) < len(text) + 12:
                found += state.step(tree_rows, found, size - 1, GREEDY, RngSource(Rng(0)))[0]
            assert found[len(text) :][:12] == wanted
            for n, changed, clean in tree_rows.passes:
                assert_close(changed[:n], clean[:n], rtol=0.0, atol=1e-12)
            assert any(not np.allclose(x[n:], clean[n:]) for n, x, clean in tree_rows.passes)
    # a plain causal mask, under which what comes earlier is seen, would let it
    tree = TokenTree((2, 1, 4, 3), (-1, 0, 1, 2))
    other = TokenTree((2, 1, 5, 3), (-1, 0, 1, 2))
    last = [model.tree_logits(text, x)[3] for x in (tree, other)]
    assert not np.allclose(last[0], last[1])


def test_one_pass_is_the_paths(xp: Any) -> None:
    """``rows_by_paths`` and the tree pass of a model agree, as do their decoded texts."""
    model = tiny_model(xp)
    text = [1, 2, 3, 1, 2]
    tree = TokenTree.from_chains(2, [[1, 2], [1, 3], [4]]).extend(0, [5])
    by_paths = rows_by_paths(model.logits)
    assert_close(model.tree_logits(text, tree), by_paths(text, tree), rtol=0.0, atol=1e-12)
    source = RngSource(Rng(0))
    wanted = plain(model.logits, text, 14)
    for tree_rows in (model.tree_logits, by_paths):
        assert lookahead_decode(tree_rows, text, 14, 4, 3, 3, GREEDY, source) == wanted
    assert jacobi_decode(model.logits, text, 14, 5) == wanted


def test_the_rows_of_accepted_ngrams_are_kept(xp: Any) -> None:
    """The verdict's path is one of the whole pass, so the cache is compacted as after any tree."""
    text, fed = [1, 2, 3, 1, 2], []
    for keep in (True, False):
        model = tiny_model(xp)
        wanted = plain(tiny_model(xp).logits, text, 20)
        state, found = Lookahead(Window(2, 3), NGramPool(3, 3)), list(text)
        for i in range(len(wanted) - 2):  # so that something stands
            state.pool.add(([2, *wanted])[i : i + 3])
        while len(found) < len(text) + 20:
            count = len(text) + 20 - len(found) - 1
            new, verdict = state.step(model.tree_logits, found, count, GREEDY, RngSource(Rng(0)))
            assert len(new) == verdict.accepted + 1
            if keep:
                model.keep(found, verdict.path)
                assert model.tokens == [*found, *new[:-1]]
            found += new
        assert found[len(text) :] == wanted
        fed.append(model.fed)
    assert fed[0] < fed[1]


def test_a_window_that_does_not_fit_is_left_out(xp: Any) -> None:
    model = tiny_model(xp)
    text = [1, 2, 3, 1, 2]
    wanted = plain(model.logits, text, 59)
    state = Lookahead(Window(5, 4), NGramPool(4, 3), positions=64)
    assert run(model.tree_logits, state, text, 59, GREEDY, RngSource(Rng(0))) == wanted
    with pytest.raises(ValueError, match="positions"):
        run(
            model.tree_logits,
            Lookahead(Window(5, 4), NGramPool(4, 3)),
            text,
            59,
            GREEDY,
            RngSource(Rng(0)),
        )


def test_lookahead_needs_fewer_passes_than_tokens() -> None:
    word = [3, 1, 4, 1, 5, 9, 2, 6]
    tree_rows = Watched(rows_by_paths(periodic(10, len(word))))
    found = lookahead_decode(tree_rows, word * 2, 30, 2, 4, 3, GREEDY, RngSource(Rng(0)))
    assert found == (word * 9)[:30]
    assert len(tree_rows.trees) == 8  # 3 drafts and one more in each, and 2 in the last


@given(SEEDS, PROMPTS)
def test_laws_of_a_tree(seed: int, text: list[int]) -> None:
    """What looks at the text sees the path of the node, not the order of the nodes."""
    tree = TokenTree.from_chains(text[-1], [[1, 2], [0, 0], [1, 1]])
    rows = rows_of(World(seed).p)
    logits = rows_by_paths(rows)(text, tree)
    for warper in (Warper(), Warper(0.7, top_k=2), Warper(repetition_penalty=1.5), GREEDY):
        p = tree_laws(logits, text, tree, warper)
        for node in range(len(tree)):
            path = [*text, *(tree.tokens[n] for n in tree.path(node))]
            assert_close(p[node], warper(rows(path, 1), path)[0])


def test_verifying_the_wrong_hit_is_seen() -> None:
    """The released code once took the tokens of another n-gram than the one that stood."""
    rows = rows_of(World(2).p)
    text = [0, 1]
    right = plain(rows, text, 2)
    wrong = [(right[0] + 1) % 3, right[1]]
    tree = TokenTree.from_chains(1, [wrong, right])
    p = tree_laws(rows_by_paths(rows)(text, tree), text, tree, GREEDY)
    verdict = verify_tree(tree, None, p, deterministic_children, RngSource(Rng(0)))
    assert [tree.tokens[node] for node in verdict.path] == right != wrong
    assert [*verdict.path, verdict.token] == [
        *tree.path(tree.find(right) or 0),
        plain(rows, text, 3)[2],
    ]


def test_doors() -> None:
    for size, most in ((1, 2), (2, -1)):
        with pytest.raises(ValueError, match="size ≥ 2"):
            NGramPool(size, most)
    with pytest.raises(ValueError, match="3 tokens, got 2"):
        NGramPool(3, 1).add((0, 1))
    for width, size in ((0, 2), (1, 1)):
        with pytest.raises(ValueError, match="W ≥ 1"):
            Window(width, size)
    with pytest.raises(ValueError, match="one size"):
        Lookahead(Window(2, 3), NGramPool(2, 2))
