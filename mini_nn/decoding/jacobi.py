"""Decoding without a draft: the model's own parallel guesses, iterated (Jacobi) and remembered.

===========================================  ============================  =====================
yᵢ ← argmax p(· | x, y₁ … yᵢ₋₁) for all i    Santilli et al. 2023,         ``jacobi_iterate``,
at once, until nothing changes               2305.10427, alg. 1; Song et   ``jacobi_decode``
                                             al. 2020, 2002.03629, 3
a window of W positions and N − 1 states of  Fu et al. 2024, *Lookahead    ``Window``
theirs; its diagonals are n-grams            Decoding*, 2402.02057, 3.1
the G latest n-grams of each first token     there, 3.1                    ``NGramPool``
up to G of them are verified in the pass     there, 3.2 and 3.3            ``Lookahead``,
that moves the window on                                                   ``lookahead_decode``
===========================================  ============================  =====================

Greedy decoding of n tokens is a triangular system y = f(y), in which fᵢ reads y₁ … yᵢ₋₁ only.  So
it has one solution, and after j iterations from any start the first j tokens are those of it.  An
iteration is a verification: what it confirms is known for good, and needs no row any more.

**Lookahead as a tree.**  A pass of lookahead decoding has three kinds of tokens: the last one of
the text; the pool's n-grams, which continue it; and the window.  Token (s, i) of the window, state
s of position i, sees the text, the state 0 of the positions up to i, and the states 1 … s of its
own.  This is what the nodes of a tree see: node 0 is the last token of the text, state 0 a chain
below it, and from each of its nodes a chain of the later states branches off, at positions that are
depths.  So the mask, the positions and the compaction of the cache are those of ``TokenTree``.  The
n-grams come first, and no token of the window is above one of them: what is verified does not
depend on the window.

    text … t ─┬─ n-grams of the pool that begin with t           (verified)
              ├─ state 1 ─ state 2                                (position 0)
              └─ (0, 1) ─┬─ state 1 ─ state 2                     (position 1)
                         └─ (0, 2) ─┬─ state 1 ─ state 2          (position 2)

Deviations: the paper starts the window at random; here it is a copy of the text, from its start on
and over again, so that a run can be repeated.  While the window still lacks states, n-grams that
are already in the pool are verified all the same.  Equal beginnings of n-grams are one node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import NamedTuple

from .. import backend
from ..backend import Array
from .draft import Proposal, Rows
from .multi import deterministic_children
from .processors import Warper
from .source import Source, Verdict
from .tree import TokenTree, verify_tree

__all__ = [
    "JacobiRun",
    "Lookahead",
    "NGramPool",
    "TreeRows",
    "Window",
    "jacobi_decode",
    "jacobi_iterate",
    "lookahead_decode",
    "rows_by_paths",
    "tree_laws",
]  # fmt: skip

TreeRows = Callable[[Sequence[int], TokenTree], Array]
"""``tree_rows(text, tree)``: (nodes, V) host logits; row u is that of the text, whose last token is
node 0, and the path to node u."""


class JacobiRun(NamedTuple):
    """A run of Jacobi iterations."""

    states: list[list[int]]
    """The start and what it became, each different from the one before; the last is the answer."""
    calls: int
    """How many times the model was asked."""


def jacobi_iterate(
    rows: Rows, text: Sequence[int], start: Sequence[int], ends: Sequence[int] = ()
) -> JacobiRun:
    """Iterate a guess of what follows the text until it is what greedy decoding gives.

    Santilli et al. 2023, 2305.10427, algorithm 1.  It takes at most as many calls as there are
    tokens, one if the guess is right, and asks for no row whose answer is already known.  Of tokens
    that tie the lowest number is taken.

    Args:
        rows: the model.
        text: at least one token.
        start: any guess; its length is how many tokens are decoded.
        ends: tokens that end a text.  The run is over once one of them is known, and what stands
            behind it is not to be used.

    Raises:
        ValueError: a row has nan.
    """
    known, calls, states = 0, 0, [list(start)]
    while known < len(start) and not any(x in ends for x in states[-1][:known]):
        state = states[-1]
        best = _best(rows([*text, *state[:-1]], len(state) - known))
        calls += 1
        # the first unknown token is right now, and so is each whose predecessors did not change
        agreed = known
        while agreed < len(state) and best[agreed - known] == state[agreed]:
            agreed += 1
        if agreed < len(state):
            states.append([*state[:known], *best])
        known = min(agreed + 1, len(state))
    return JacobiRun(states, calls)


def jacobi_decode(
    rows: Rows, text: Sequence[int], count: int, block: int, ends: Sequence[int] = ()
) -> list[int]:
    """Greedy decoding, ``block`` tokens at a time, each block by ``jacobi_iterate``.

    Santilli et al. 2023, 2305.10427, section 3.2 (the variant with blocks).  A block starts as the
    last token of the text, repeated.

    Args:
        rows: the model.
        text: at least one token.
        count: how many tokens, at most.
        block: how many are iterated at once, ≥ 1.
        ends: tokens that end a text.

    Returns:
        The new tokens, up to and including the first of ``ends``.

    Raises:
        ValueError: ``block`` is below 1, or a row has nan.
    """
    if block < 1:
        raise ValueError(f"jacobi_decode iterates blocks of at least 1 token, got {block}")
    found = list(text)
    stop = len(found) + count
    while len(found) < stop:
        start = [found[-1]] * min(block, stop - len(found))
        new, over = _cut(jacobi_iterate(rows, found, start, ends).states[-1], ends)
        found += new
        if over:
            break
    return found[len(text) :]


class NGramPool:
    """Of each first token the latest n-grams that began with it; a draft of its own, too.

    Fu et al. 2024, 2402.02057, section 3.1.  An n-gram that comes again is the latest again; being
    looked up does not count.

    Args:
        size: N ≥ 2, the length of an n-gram.
        most: G ≥ 0, how many are kept for each first token.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(self, size: int, most: int) -> None:
        if size < 2 or most < 0:
            raise ValueError(f"a pool keeps most ≥ 0 n-grams of size ≥ 2, got {most} of {size}")
        self.size, self.most = size, most
        self.followers: dict[int, dict[tuple[int, ...], None]] = {}
        """Of each first token: the N − 1 tokens after it, from the oldest n-gram to the latest."""

    def add(self, ngram: Sequence[int]) -> None:
        """Make an n-gram the latest of its first token, and drop the oldest one beyond G.

        Raises:
            ValueError: it has not N tokens.
        """
        if len(ngram) != self.size:
            raise ValueError(f"this pool has n-grams of {self.size} tokens, got {len(ngram)}")
        rest = tuple(ngram[1:])
        kept = self.followers.setdefault(ngram[0], {})
        kept.pop(rest, None)
        kept[rest] = None
        if len(kept) > self.most:
            del kept[next(iter(kept))]

    def add_text(self, text: Sequence[int]) -> None:
        """Add all n-grams of a text, such as the prompt."""
        for i in range(len(text) - self.size + 1):
            self.add(text[i : i + self.size])

    def after(self, token: int) -> list[tuple[int, ...]]:
        """The N − 1 tokens after this one in each n-gram, the latest first."""
        return list(reversed(self.followers.get(token, {})))

    def propose(self, text: Sequence[int], count: int, warper: Warper, source: Source) -> Proposal:
        """As every draft: the tree of the n-grams that begin with the last token of the text."""
        return Proposal(
            TokenTree.from_chains(text[-1], [rest[:count] for rest in self.after(text[-1])]), None
        )


@dataclass
class Window:
    """N − 1 states of W positions after the text, the latest state last.

    Fu et al. 2024, 2402.02057, section 3.1.  Position 0 is the last token of the text, which is its
    state 0; so state 0 has an entry fewer than the others.

    Args:
        width: W ≥ 1.
        size: N ≥ 2.
        states: the entries of each state; at first only of state 0, W + N − 3 of them, for until
            there are N − 1 states, each pass adds one, and all lose their first position.

    Raises:
        ValueError: an argument is out of its range.
    """

    width: int
    size: int
    states: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.width < 1 or self.size < 2:
            raise ValueError(
                f"a window has W ≥ 1 positions and n-grams of N ≥ 2, got {self.width}, {self.size}"
            )

    @property
    def full(self) -> bool:
        """Whether there are N − 1 states, so that diagonals are n-grams."""
        return len(self.states) == self.size - 1

    def start(self, text: Sequence[int]) -> None:
        """Forget everything, and let state 0 be the text, from its start on and over again."""
        self.states = [list(islice(cycle(text), self.width + self.size - 3))]

    def attach(self, tree: TokenTree) -> tuple[TokenTree, list[int]]:
        """The tree with the window below node 0, and the nodes of the latest state.

        The latter are by position, from position 0, or while the window is not full from position
        1 on.
        """
        tokens, parents = list(tree.tokens), list(tree.parents)
        first = [0]
        for token in self.states[0]:
            tokens.append(token)
            parents.append(first[-1])
            first.append(len(tokens) - 1)
        latest = first
        for state in self.states[1:]:
            grown = []
            for parent, token in zip(latest, state, strict=True):
                tokens.append(token)
                parents.append(parent)
                grown.append(len(tokens) - 1)
            latest = grown
        draws = [list(members) for members in tree.draws] + [[] for _ in tokens[len(tree) :]]
        for node in range(len(tree), len(tokens)):
            draws[parents[node]].append(node)
        whole = TokenTree(tuple(tokens), tuple(parents), tuple(tuple(x) for x in draws))
        return whole, latest if self.full else latest[1:]

    def ngrams(self, last: int, new: Sequence[int]) -> list[tuple[int, ...]]:
        """The diagonals of a full window: (state 0 … state N − 2, new) of each position.

        Args:
            last: state 0 of position 0, the last token of the text.
            new: the state that follows the latest one, W tokens.
        """
        return list(zip([last, *self.states[0]], *self.states[1:], new, strict=True))

    def move(self, new: Sequence[int]) -> None:
        """Take a new state in, and go one position on.

        Full: the oldest state is dropped, and state 1 of the positions from 1 on is the new state
        0.  Else all states stay, without their first positions.
        """
        if self.full:
            states = [*self.states[1:], list(new)]
            self.states = [states[0][1:], *states[1:]]
        else:
            self.states = [*(state[1:] for state in self.states), list(new)]


@dataclass
class Lookahead:
    """One text's lookahead decoding: a window and a pool.

    Fu et al. 2024, 2402.02057, algorithm 2.  The text is that of plain decoding, whatever the
    window and the pool hold: in distribution, and at temperature 0 token by token.

    Args:
        window: W and N; ``start`` it for each new text.
        pool: G; it may be kept from text to text, or be given n-grams from elsewhere.
        positions: how many the model has; None for no limit.  A window that does not fit in is left
            out of the pass.

    Raises:
        ValueError: window and pool differ in N.
    """

    window: Window
    pool: NGramPool
    positions: int | None = None

    def __post_init__(self) -> None:
        if self.window.size != self.pool.size:
            raise ValueError(
                "window and pool have n-grams of one size N, got "
                f"{self.window.size} and {self.pool.size}"
            )

    def step(
        self, tree_rows: TreeRows, text: Sequence[int], count: int, warper: Warper, source: Source
    ) -> tuple[list[int], Verdict]:
        """One pass: the tokens that it adds to the text, and the verdict on the pool's n-grams.

        The verdict's path has the numbers of the nodes of the whole pass, so ``TokenTree.compact``
        of that tree says which rows of a cache stand.

        Args:
            tree_rows: the model, called once.
            text: all so far, at least one token.
            count: how many tokens may stand before the one that ends the round, ≥ 0.
            warper: makes the target's laws.  The window itself is always greedy.
            source: the choices.

        Raises:
            ValueError: a row has nan.
        """
        proposed = self.pool.propose(text, count, warper, source).tokens
        assert isinstance(proposed, TokenTree)
        if not self.window.states:
            self.window.start(text)
        whole, latest = self.window.attach(proposed)
        if self.positions is not None and len(text) + int(whole.depths.max()) > self.positions:
            whole, latest = proposed, []
        logits = tree_rows(text, whole)
        p = tree_laws(logits[: len(proposed)], text, proposed, warper)
        verdict = verify_tree(proposed, None, p, deterministic_children, source)
        if latest:
            new = _best(logits[latest])
            if self.window.full:
                for ngram in self.window.ngrams(text[-1], new):
                    self.pool.add(ngram)
            self.window.move(new)
        return [*(proposed.tokens[node] for node in verdict.path), verdict.token], verdict


def lookahead_decode(
    tree_rows: TreeRows,
    text: Sequence[int],
    count: int,
    width: int,
    size: int,
    most: int,
    warper: Warper,
    source: Source,
) -> list[int]:
    """Decode ``count`` tokens with a fresh window and a pool that starts with the text's n-grams.

    Args:
        tree_rows: the model; see ``rows_by_paths`` for one that has only chains.
        text: at least one token.
        count: how many tokens.
        width, size, most: W ≥ 1, N ≥ 2 and G ≥ 0.
        warper: the target's laws; temperature 0 is greedy decoding.
        source: the choices.
    """
    pool = NGramPool(size, most)
    pool.add_text(text)
    state, found = Lookahead(Window(width, size), pool), list(text)
    stop = len(found) + count
    while len(found) < stop:
        found += state.step(tree_rows, found, stop - len(found) - 1, warper, source)[0]
    return found[len(text) :]


def rows_by_paths(rows: Rows) -> TreeRows:
    """A tree pass by one call of ``rows`` for each leaf; the numbers are those of one pass."""

    def tree_rows(text: Sequence[int], tree: TokenTree) -> Array:
        found: dict[int, Array] = {}
        for path in tree.paths():
            logits = rows([*text, *(tree.tokens[node] for node in path)], len(path) + 1)
            found.update(zip((0, *path), logits, strict=True))
        return backend.get("numpy").xp.stack([found[node] for node in range(len(tree))])

    return tree_rows


def tree_laws(logits: Array, text: Sequence[int], tree: TokenTree, warper: Warper) -> Array:
    """The warped law after each node, whose text is the one so far and the node's path.

    Args:
        logits: (nodes, V) host rows of a tree pass.
        text: all so far; node 0 is its last token.
        tree: the drafts.
        warper: applied to each row; what looks at the text sees the path.

    Returns:
        (nodes, V) host.
    """
    if warper.repetition_penalty == 1 and warper.no_repeat_ngram_size is None:
        return warper(logits, text, tree.tokens[1:])  # a row's text does not matter
    laws = [
        warper(logits[node : node + 1], [*text, *(tree.tokens[n] for n in tree.path(node))])
        for node in range(len(tree))
    ]
    return backend.get("numpy").xp.concatenate(laws)


def _best(logits: Array) -> list[int]:
    if bool((logits != logits).any()):
        raise ValueError("the model's row has nan: the best token is not known")
    return [int(x) for x in logits.argmax(axis=-1)]


def _cut(tokens: Sequence[int], ends: Iterable[int]) -> tuple[list[int], bool]:
    """Up to and including the first token that ends a text, and whether there is one."""
    ends = set(ends)
    for i, token in enumerate(tokens):
        if token in ends:
            return [*tokens[: i + 1]], True
    return [*tokens], False
