"""mini_nn.decoding.tree: the law of trees by enumeration, and one tree pass against path passes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mini_nn.decoding import (
    RngSource,
    TokenTree,
    Verdict,
    deterministic_children,
    draw_iid,
    draw_without_replacement,
    greedy,
    greedy_children,
    k_seq,
    match_children,
    multi_step,
    product_choices,
    sample_match,
    speculative_sampling,
    top_children,
    verify_tree,
    verify_tree_greedily,
    without_replacement,
)
from mini_nn.rng import Rng
from tests.decoding.enumerate import distance, law, total
from tests.decoding.test_verify import World as Uncached
from tests.support import assert_close, host

SEEDS = st.integers(0, 2**32)
KINDS = st.sampled_from(Uncached.KINDS)
LETTERS = st.integers(0, 2)
CHAINS = st.lists(st.lists(LETTERS, max_size=4), max_size=5)

Text = tuple[int, ...]


@st.composite
def trees(draw: st.DrawFn) -> TokenTree:
    """Any tree, also with siblings of one token."""
    size = draw(st.integers(1, 9))
    parents = [-1, *(draw(st.integers(0, node - 1)) for node in range(1, size))]
    return TokenTree(tuple(draw(LETTERS) for _ in parents), tuple(parents))


def spelled(tree: TokenTree, node: int) -> Text:
    return tuple(tree.tokens[n] for n in tree.path(node))


# The tree itself


@given(LETTERS, CHAINS)
def test_a_trie_has_a_node_for_each_beginning(root: int, chains: list[list[int]]) -> None:
    tree = TokenTree.from_chains(root, chains)
    beginnings = {tuple(chain[:n]) for chain in chains for n in range(len(chain) + 1)} | {()}
    assert sorted(spelled(tree, node) for node in range(len(tree))) == sorted(beginnings)
    assert tree.tokens[0] == root and [*tree.depths] == sorted(tree.depths)
    for node in range(len(tree)):
        assert tree.find(spelled(tree, node)) == node
        # every draft is remembered, in its place
        drafted = [
            chain[len(tree.path(node))]
            for chain in chains
            if tuple(chain[: len(tree.path(node))]) == spelled(tree, node)
            and len(chain) > len(tree.path(node))
        ]
        assert [tree.tokens[child] for child in tree.draws[node]] == drafted
    assert tree.find((7,)) is None and tree.find((7, 0)) is None
    assert {spelled(tree, path[-1]) for path in tree.paths() if path} <= set(map(tuple, chains))


@given(trees(), st.integers(0, 3))
def test_the_mask_is_reachability(tree: TokenTree, start: int) -> None:
    seen = tree.ancestors
    for u, v in itertools.product(range(len(tree)), repeat=2):
        assert seen[u, v] == (v in (0, u, *tree.path(u)))
    assert seen.sum(axis=1).tolist() == (tree.depths + 1).tolist()
    assert not np.triu(seen, 1).any()  # so a causal mask on top takes nothing away
    mask = tree.mask(start)
    assert mask.shape == (len(tree), start + len(tree)) and mask[:, :start].all()
    assert (mask[:, start:] == seen).all()
    assert (tree.positions(start) == start + tree.depths).all()
    leaves = [node for node in range(len(tree)) if node not in tree.parents]
    assert [path[-1] if path else 0 for path in tree.paths()] == leaves


@given(st.lists(st.integers(1, 3), max_size=3), st.randoms())
def test_the_full_tree(widths: list[int], shuffler: Any) -> None:
    """Medusa's: 1 + Σₖ Πᵢ≤ₖ sᵢ nodes, a leaf per member of the product; choices in any order."""
    choices = product_choices(widths)
    table = [[10 * depth + rank for rank in range(4)] for depth in range(len(widths))]
    tree = TokenTree.from_choices(5, table, choices)
    assert len(tree) == 1 + sum(int(np.prod(widths[: k + 1])) for k in range(len(widths)))
    wanted = {
        tuple(10 * depth + rank for depth, rank in enumerate(ranks))
        for ranks in itertools.product(*map(range, widths))
    }
    assert {spelled(tree, path[-1]) if path else () for path in tree.paths()} == wanted
    shuffled = [list(path) for path in choices]
    shuffler.shuffle(shuffled)
    assert TokenTree.from_choices(5, table, shuffled) == tree


def test_choices_need_their_beginnings_and_their_ranks() -> None:
    tree = TokenTree.from_choices(9, [[1, 2], [3, 4]], [(1,), (0,), (1, 1)])
    assert tree == TokenTree((9, 1, 2, 4), (-1, 0, 0, 2))
    with pytest.raises(ValueError, match="needs its parent"):
        TokenTree.from_choices(9, [[1, 2], [3, 4]], [(0, 1)])
    for choice in ((2,), (-1,)):
        with pytest.raises(ValueError, match="top tokens"):
            TokenTree.from_choices(9, [[1, 2]], [choice])
    with pytest.raises(ValueError, match="top tokens"):
        TokenTree.from_choices(9, [[1, 2]], [(0,), (0, 0)])


@given(LETTERS, CHAINS)
def test_extending_by_each_chain_is_the_trie(root: int, chains: list[list[int]]) -> None:
    tree = TokenTree((root,), (-1,))
    for chain in chains:
        for depth, token in enumerate(chain):
            node = tree.find(chain[:depth])
            assert node is not None
            tree = tree.extend(node, [token])
    trie = TokenTree.from_chains(root, chains)
    assert len(tree) == len(trie)
    for node in range(len(tree)):
        twin = trie.find(spelled(tree, node))
        assert twin is not None
        assert [tree.tokens[c] for c in tree.draws[node]] == [
            trie.tokens[c] for c in trie.draws[twin]
        ]


@given(trees(), st.sets(st.integers(0, 8), max_size=4))
def test_a_subtree_keeps_what_it_is_told(tree: TokenTree, leaves: set[int]) -> None:
    kept = {0}.union(*(tree.path(node) for node in leaves if node < len(tree)))
    part, old = tree.subtree(kept)
    assert set(old) == kept
    assert [spelled(part, new) for new in range(len(part))] == [spelled(tree, node) for node in old]
    for node in range(1, len(tree)):
        if tree.parents[node]:
            with pytest.raises(ValueError, match="needs its ancestors"):
                tree.subtree([node])


@pytest.mark.parametrize(
    ("tokens", "parents", "draws"),
    [
        ((), (), ()),
        ((1,), (0,), ()),
        ((1, 2), (-1,), ()),
        ((1, 2, 3), (-1, 2, 0), ()),  # a parent after its child
        ((1, 2), (-1, -1), ()),  # two roots
        ((1, 2), (-1, 0), ((), ())),  # a child that was not drafted
        ((1, 2), (-1, 0), ((1, 1), (1,))),
        ((1, 2), (-1, 0), ((1, 1),)),
    ],
)
def test_what_is_no_tree(tokens: Text, parents: Text, draws: tuple[Text, ...]) -> None:
    with pytest.raises(ValueError):
        TokenTree(tokens, parents, draws)


def test_doors() -> None:
    tree = TokenTree.from_chains(0, [[1, 2], [1, 0]])
    row = np.full((4, 3), 1.0 / 3.0)
    for node in (-1, 4):
        with pytest.raises(ValueError, match="0 … 3"):
            tree.extend(node, [1])
        with pytest.raises(ValueError, match="0 … 3"):
            tree.path(node)
    for path in ((2,), (2, 1), (1, 3, 2), (1, 1), (0,)):
        with pytest.raises(ValueError, match="no path"):
            tree.compact(path)
    with pytest.raises(ValueError, match="4 nodes"):
        verify_tree(tree, None, row[:3], match_children, RngSource(Rng(0)))
    with pytest.raises(ValueError, match="4 nodes"):
        verify_tree(tree, row[1:], row, multi_step, RngSource(Rng(0)))
    with pytest.raises(ValueError, match="nan"):
        verify_tree_greedily(tree, row * np.nan)


# The law


class World(Uncached):
    """The enumeration comes back to every text many times."""

    def __init__(self, seed: int, kind: str = "any", size: int = 3) -> None:
        super().__init__(seed, kind, size)
        self.known: dict[Text, tuple[Any, Any]] = {}

    def _pair(self, text: Text) -> tuple[Any, Any]:
        if text not in self.known:
            self.known[text] = super()._pair(text)
        return self.known[text]


Grow = Callable[[World, Text, Any], TokenTree]


def grown(draw: Any, *widths: int, only_first: bool = False) -> Grow:
    """Level by level: widths[d] children below each node of depth d, or below the first alone."""

    def grow(world: World, text: Text, source: Any) -> TokenTree:
        tree, level = TokenTree((-1 if not text else text[-1],), (-1,)), [0]
        for width in widths:
            following = []
            for node in level[:1] if only_first else level:
                q = world.q((*text, *spelled(tree, node)))
                tree = tree.extend(node, draw(q, width, source))
                following += tree.children(node)
            level = following
        return tree

    return grow


def chains(k: int, g: int) -> Grow:
    """k independent drafts of g tokens, merged where they begin alike."""

    def grow(world: World, text: Text, source: Any) -> TokenTree:
        drafts: list[list[int]] = [[] for _ in range(k)]
        for draft, _ in itertools.product(drafts, range(g)):
            draft += draw_iid(world.q((*text, *draft)), 1, source)
        return TokenTree.from_chains(-1 if not text else text[-1], drafts)

    return grow


def grouped(grow: Grow) -> Grow:
    """The bug: how often a node was drafted is kept, the order is not."""

    def regroup(world: World, text: Text, source: Any) -> TokenTree:
        tree = grow(world, text, source)
        order = tuple(tuple(sorted(members)) for members in tree.draws)
        return TokenTree(tree.tokens, tree.parents, order)

    return regroup


def best(q: Any, k: int, source: Any) -> Text:
    return top_children(q, k)


def play(world: World, grow: Grow, rule: Any, source: Any, text: Text = ()) -> tuple[Text, int]:
    """One round: the text with what is emitted, and how many drafts stood."""
    tree = grow(world, text, source)
    rows = [(*text, *spelled(tree, node)) for node in range(len(tree))]
    q, p = np.stack([world.q(row) for row in rows]), np.stack([world.p(row) for row in rows])
    for node in range(len(tree)):
        if not tree.draws[node]:
            q[node] = np.nan  # of a leaf no draft was asked
    verdict = verify_tree(tree, q, p, rule, source)
    assert isinstance(verdict, Verdict) and verdict.accepted == len(verdict.path)
    assert (*verdict.path,) == (tree.path(verdict.path[-1]) if verdict.path else ())
    tokens = tuple(tree.tokens[node] for node in verdict.path)
    return (*text, *tokens, verdict.token), verdict.accepted


def completed(world: World, texts: dict[Text, float], length: int) -> dict[Text, float]:
    """Texts of any lengths, each written on by the target up to ``length`` tokens."""
    found: dict[Text, float] = {}
    for text, chance in texts.items():
        for rest in itertools.product(range(world.size), repeat=length - len(text)):
            weight = chance
            for n, x in enumerate(rest):
                weight *= world.p((*text, *rest[:n]))[x]
            found[(*text, *rest)] = found.get((*text, *rest), 0.0) + weight
    return found


def bias(world: World, grow: Grow, rule: Any, depth: int) -> float:
    """How far one round, written on to depth + 1 tokens by the target, is from the target."""
    found = law(lambda source: play(world, grow, rule, source)[0])
    assert abs(total(found) - 1.0) < 1e-12
    return distance(completed(world, found, depth + 1), world.joint(depth + 1))


EXACT = {
    "multi step": (multi_step, grown(draw_iid, 2, 2, only_first=True)),
    "multi step, merged chains": (multi_step, chains(2, 2)),
    "without replacement": (without_replacement, grown(draw_without_replacement, 2, 2)),
    "without replacement, merged chains": (without_replacement, chains(2, 2)),
    "k-SEQ": (k_seq, grown(draw_iid, 2, 2, only_first=True)),
    "k-SEQ, merged chains": (k_seq, chains(2, 2)),
    "match": (match_children, grown(draw_iid, 2, 1)),
    "match, merged chains": (match_children, chains(2, 2)),
    "match of the best": (match_children, grown(best, 2, 2)),
    "deterministic": (deterministic_children, grown(best, 2, 2)),
    "deterministic, merged chains": (deterministic_children, chains(2, 2)),
}


@pytest.mark.parametrize("name", EXACT)
@settings(max_examples=3)
@given(SEEDS, KINDS)
def test_the_emitted_law_is_the_targets(name: str, seed: int, kind: str) -> None:
    rule, grow = EXACT[name]
    assert bias(World(seed, kind), grow, rule, 2) < 1e-12


@pytest.mark.parametrize(
    "name",
    [
        "multi step, merged chains",
        "without replacement",
        "k-SEQ, merged chains",
        "match of the best",
        "deterministic, merged chains",
    ],
)
@settings(max_examples=2)
@given(SEEDS, KINDS)
def test_round_after_round(name: str, seed: int, kind: str) -> None:
    """Two rounds, of two letters: nothing of the first is left in the second."""
    rule, grow = EXACT[name]
    world = World(seed, kind, 2)
    first = law(lambda source: play(world, grow, rule, source)[0])
    found: dict[Text, float] = {}
    for text, chance in first.items():
        for longer, more in law(lambda s, t=text: play(world, grow, rule, s, t)[0]).items():
            found[longer] = found.get(longer, 0.0) + chance * more
    assert distance(completed(world, found, 6), world.joint(6)) < 1e-12


@settings(max_examples=3)
@given(SEEDS, KINDS)
def test_three_merged_chains(seed: int, kind: str) -> None:
    for rule in (multi_step, without_replacement, k_seq):
        assert bias(World(seed, kind, 3), chains(3, 1), rule, 1) < 1e-12


def test_the_classic_bugs_change_the_law() -> None:
    def worst(grow: Grow, rule: Any, depth: int) -> float:
        return max(bias(World(seed, "any"), grow, rule, depth) for seed in range(3))

    assert worst(grouped(chains(3, 1)), multi_step, 1) > 1e-3
    assert worst(grown(draw_without_replacement, 2, 1), multi_step, 2) > 1e-3
    assert worst(grown(best, 2, 1), multi_step, 2) > 1e-2

    def redraws_from_p(children: Any, q: Any, p: Any, source: Any) -> Any:
        return multi_step(children, q, p, source)._replace(left=p)

    assert worst(grown(draw_iid, 2, 1), redraws_from_p, 2) > 1e-2


@settings(max_examples=5)
@given(SEEDS, KINDS, st.integers(0, 3))
def test_a_chain_is_a_tree(seed: int, kind: str, g: int) -> None:
    """With speculative sampling's verdicts, not only its law."""
    world, rng = World(seed, kind), np.random.default_rng(seed)
    tokens: list[int] = []
    for _ in range(g):
        tokens.append(int(rng.choice(3, p=world.q(tuple(tokens)))))
    rows = [tuple(tokens[:n]) for n in range(g + 1)]
    p, q = np.stack([world.p(row) for row in rows]), np.stack([world.q(row) for row in rows])
    tree = TokenTree.from_chains(0, [tokens])
    as_tree = law(lambda source: verify_tree(tree, q, p, multi_step, source)[:2])
    as_chain = law(lambda source: speculative_sampling(tokens, q[:g], p, source)[:2])
    assert distance(as_tree, as_chain) < 1e-12


@settings(max_examples=10)
@given(SEEDS)
def test_the_full_tree_always_stands_to_its_depth(seed: int) -> None:
    """All V children to depth 2: three tokens a round, for a draft of any quality."""
    world = World(seed, "any", 2)
    for rule, draw in (
        (without_replacement, draw_without_replacement),
        (deterministic_children, best),
        (match_children, best),
    ):
        grow = grown(draw, 2, 2)
        found = law(lambda s, g=grow, r=rule: play(world, g, r, s)[1])
        assert_close(found[2], 1.0, atol=1e-12)


# Merging


@given(SEEDS, KINDS, st.lists(st.lists(LETTERS, min_size=1, max_size=3), max_size=4))
def test_merging_chains_changes_nothing_but_the_cost(
    seed: int, kind: str, drafts: list[list[int]]
) -> None:
    """Greedy and match: the tree's text is that of the best of its chains, which is the plain one.

    Match draws the same tokens whatever was drafted, so one seed gives one text.
    """
    world = World(seed, kind)
    tree = TokenTree.from_chains(0, drafts)
    p = np.stack([world.p(spelled(tree, node)) for node in range(len(tree))])
    of_tree = verify_tree_greedily(tree, p)
    same = verify_tree(tree, None, p, greedy_children, RngSource(Rng(0)))
    assert of_tree == same
    matched = verify_tree(tree, None, p, match_children, Plain(seed))
    for verdict, rule in ((of_tree, greedy), (matched, sample_match)):
        verdicts = []
        for draft in [*drafts, []]:
            rows = np.stack([world.p(tuple(draft[:n])) for n in range(len(draft) + 1)])
            one = rule(draft, None, rows, Plain(seed))
            verdicts.append((*draft[: one.accepted], one.token))
        text = (*(tree.tokens[node] for node in verdict.path), verdict.token)
        assert text == max(verdicts, key=len)


class Plain(RngSource):
    """Plain decoding's noise: a uniform number per draw, but none for what is sure."""

    def __init__(self, seed: int) -> None:
        super().__init__(Rng(seed))

    def categorical(self, p: Any) -> int:
        return int(p.argmax()) if p.max() == 1.0 else super().categorical(p)


def test_of_tokens_that_tie_the_lowest_is_best() -> None:
    tree = TokenTree.from_chains(0, [[2], [1, 1]])
    logits = np.array([[0.0, 3.0, 3.0], [0.0, 0.0, 0.0], [1.0, 1.0, 0.0], [5.0, 5.0, 5.0]])
    assert verify_tree_greedily(tree, logits) == Verdict(1, 0, (2,))


# One tree pass


class Tiny:
    """Two layers of attention with learned positions, whose cache and mask are arguments."""

    def __init__(self, xp: Any, seed: int) -> None:
        rng, self.xp = Rng(seed), xp
        self.embedding = rng.normal((3, 4), dtype="float64")
        self.position = rng.normal((12, 4), dtype="float64")
        self.weights = [[rng.normal((4, 4), dtype="float64") for _ in range(4)] for _ in range(2)]

    def __call__(self, tokens: Any, positions: Any, mask: Any, cache: Any = None) -> Any:
        """(nodes, 3) logits, and the keys and values of each layer, cached ones first."""
        xp, kept = self.xp, []
        x = self.embedding[self.xp.asarray(tokens)] + self.position[self.xp.asarray(positions)]
        for i, (wq, wk, wv, wo) in enumerate(self.weights):
            k, v = x @ wk, x @ wv
            if cache is not None:
                k, v = (xp.concatenate(pair) for pair in zip(cache[i], (k, v), strict=True))
            kept.append((k, v))
            weights = xp.where(self.xp.asarray(mask), xp.exp((x @ wq) @ k.T / 2.0), 0.0)
            x = x + xp.tanh((weights / weights.sum(axis=1, keepdims=True)) @ v @ wo)
        return x @ self.embedding.T, kept

    def plain(self, text: Text) -> Any:
        """An ordinary causal pass over a text, without a cache."""
        n = len(text)
        return self(np.asarray(text), np.arange(n), np.tri(n, dtype=bool))


PREFIXES = st.lists(LETTERS, max_size=3).map(tuple)


def tree_pass(model: Tiny, prefix: Text, tree: TokenTree, mask: Any, positions: Any) -> Any:
    cache = model.plain(prefix)[1] if prefix else None
    return model(np.asarray(tree.tokens), positions, mask, cache)


@given(SEEDS, PREFIXES, trees())
def test_a_tree_pass_is_a_plain_pass_over_each_path(
    xp: Any, seed: int, prefix: Text, tree: TokenTree
) -> None:
    model, start = Tiny(xp, seed), len(prefix)
    logits, _ = tree_pass(model, prefix, tree, tree.mask(start), tree.positions(start))
    for node in range(len(tree)):
        wanted, _ = model.plain((*prefix, tree.tokens[0], *spelled(tree, node)))
        assert_close(logits[node], wanted[-1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("bug", ["slots as positions", "causal mask", "siblings seen"])
def test_other_masks_and_positions_are_other_models(xp: Any, bug: str) -> None:
    model, prefix = Tiny(xp, 0), (1, 0)
    tree = TokenTree.from_chains(2, [[0, 1], [1, 2]])
    mask, positions = tree.mask(2), tree.positions(2)
    if bug == "slots as positions":
        positions = 2 + np.arange(len(tree))
    elif bug == "causal mask":
        mask = np.tri(len(tree), 2 + len(tree), 2, dtype=bool)
    else:
        mask[1, 2 + 2] = True
    logits, _ = tree_pass(model, prefix, tree, mask, positions)
    wanted = [model.plain((*prefix, 2, *spelled(tree, n)))[0][-1] for n in range(len(tree))]
    assert np.abs(host(logits) - host(wanted)).max() > 1e-3


@given(SEEDS, PREFIXES, trees(), st.data())
def test_the_compacted_cache_is_a_plain_passes(
    xp: Any, seed: int, prefix: Text, tree: TokenTree, data: st.DataObject
) -> None:
    """Also of paths whose rows lie where others are to go, and what is predicted from it next."""
    model, start = Tiny(xp, seed), len(prefix)
    _, cache = tree_pass(model, prefix, tree, tree.mask(start), tree.positions(start))
    path = tree.path(data.draw(st.integers(0, len(tree) - 1)))
    rows = tree.compact(path, start)
    text = (*prefix, tree.tokens[0], *(tree.tokens[node] for node in path))
    assert rows.shape == (len(text),) and len(text) == start + 1 + len(path)
    kept = [[x[xp.asarray(rows)] for x in layer] for layer in cache]
    _, fresh = model.plain(text)
    for ours, wanted in zip(kept, fresh, strict=True):
        for a, b in zip(ours, wanted, strict=True):
            assert_close(a, b, rtol=1e-10, atol=1e-12)
    following = TokenTree((1,), (-1,))
    logits, _ = model(
        np.asarray(following.tokens),
        following.positions(len(text)),
        following.mask(len(text)),
        kept,
    )
    assert_close(logits[0], model.plain((*text, 1))[0][-1], rtol=1e-10, atol=1e-12)


def test_a_stale_row_is_noticed(xp: Any) -> None:
    """Truncating instead of compacting keeps the rejected sibling that stood in that slot."""
    model, tree = Tiny(xp, 0), TokenTree.from_chains(2, [[0], [1]])
    _, cache = tree_pass(model, (), tree, tree.mask(), tree.positions())
    (_, fresh), stale = model.plain((2, 1)), cache[0][0][:2]
    assert np.abs(host(stale) - host(fresh[0][0])).max() > 1e-3
    assert tree.compact((2,)).tolist() == [0, 2]


@settings(max_examples=10)
@given(SEEDS, PREFIXES, trees(), LETTERS, st.data())
def test_a_further_node_changes_no_other(
    xp: Any, seed: int, prefix: Text, tree: TokenTree, token: int, data: st.DataObject
) -> None:
    model, start = Tiny(xp, seed), len(prefix)
    before, _ = tree_pass(model, prefix, tree, tree.mask(start), tree.positions(start))
    larger = tree.extend(data.draw(st.integers(0, len(tree) - 1)), [token])
    after, _ = tree_pass(model, prefix, larger, larger.mask(start), larger.positions(start))
    assert_close(after[: len(tree)], before, rtol=1e-12, atol=1e-12)
