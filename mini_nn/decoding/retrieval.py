"""Drafts from a datastore: what followed the end of the text wherever it occurred before.

===========================================  ============================  =====================
all suffixes in order: an array of starts    Manber & Myers 1990, *Suffix  ``Datastore``
                                             Arrays*, 2 and 4
the longest end of the text, of at most N    He et al. 2023, *REST*,       ``Datastore.search``
tokens, that the datastore has               2311.08252, 3.2
a trie of the continuations, of which the c  there, 3.3                    ``Datastore.tree``
most frequent nodes are kept
all of them verified in one tree pass        there, 3.3 and 3.4            ``RetrievalDraft``
===========================================  ============================  =====================

The drafts are a function of the text, so a rule that does not read q verifies them:
``deterministic_children``, ``match_children`` (as REST does) or ``verify_tree_greedily``.

Deviations: where there are very many occurrences the paper reads the first ones; here they are
taken at equal distances in the sorted order, so that what is rare is left out and not what is late
in the alphabet.
"""

from __future__ import annotations

import operator
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from .. import backend
from ..backend import Array
from .draft import Proposal
from .processors import Warper
from .source import Source
from .tree import TokenTree

__all__ = ["Datastore", "RetrievalDraft", "suffix_array"]

BORDER = -1
"""What stands after each text, smaller than any token."""


class Datastore:
    """Texts, and the places of any sequence in them in O(length · ln size).

    Args:
        texts: sequences of integers ≥ 0, host.  Nothing is found across the border of two.

    Raises:
        ValueError: a token is negative.
    """

    def __init__(self, texts: Iterable[Iterable[int]]) -> None:
        joined: list[int] = []
        for text in texts:
            tokens = [operator.index(x) for x in text]
            if tokens and min(tokens) < 0:
                raise ValueError(f"tokens of a datastore are integers ≥ 0, got {min(tokens)}")
            joined.extend(tokens)
            joined.append(BORDER)
        xp = backend.get("numpy").xp
        self.tokens = xp.asarray(joined, dtype="int64")
        """(n,): all texts, each with a border after it."""
        self.suffixes = suffix_array(self.tokens)
        """(n,): where the suffixes of ``tokens`` start, in lexicographic order."""

    def occurrences(self, pattern: Sequence[int]) -> range:
        """The rows of ``suffixes`` that begin with the pattern, which has no negative token."""
        low, high = 0, len(self.suffixes)
        rows = range(high)
        for depth, token in enumerate(pattern):
            # rows low … high agree in depth tokens, none a border, and are sorted by the next one
            at = partial(self._token, depth)
            low, high = (
                bisect_left(rows, token, low, high, key=at),
                bisect_right(rows, token, low, high, key=at),
            )
        return range(low, high)

    def search(self, text: Sequence[int], longest: int, shortest: int = 1) -> tuple[int, range]:
        """The longest end of the text that occurs, and where.

        He et al. 2023, 2311.08252, section 3.2.

        Args:
            text: host integers.
            longest, shortest: how many tokens the end has at most and at least.

        Returns:
            Its length and the rows of ``suffixes``; 0 and no row if there is none.
        """
        for length in range(min(longest, len(text)), shortest - 1, -1):
            rows = self.occurrences(text[len(text) - length :])
            if rows:
                return length, rows
        return 0, range(0)

    def tree(self, root: int, rows: range, skip: int, depth: int, nodes: int) -> TokenTree:
        """The trie of what follows ``skip`` tokens in these rows, pruned to its frequent nodes.

        He et al. 2023, 2311.08252, section 3.3.  A node counts how many of the rows pass it, so
        none has more than its parent, and the most frequent ones are a tree.

        Args:
            root: the token of node 0.
            rows: rows of ``suffixes`` that agree in the first ``skip`` tokens.
            skip: how many tokens of each are left out.
            depth: how many are read after these, up to a border.
            nodes: how many are kept, node 0 not counted.

        Returns:
            Numbered from the most frequent node on; of those that tie the less deep comes first,
            then the one with the smaller tokens.
        """
        xp = backend.get("numpy").xp
        starts = self.suffixes[rows.start : rows.stop : rows.step] + skip
        places = xp.minimum(starts[:, None] + xp.arange(depth), len(self.tokens) - 1)
        follow = self.tokens[places]
        inside = xp.cumsum(follow == BORDER, axis=1) == 0
        # rows are sorted, so those of a node are neighbours: one begins where the prefix changes
        begins = xp.ones(follow.shape, dtype=bool)
        begins[1:] = xp.cumsum(follow[1:] != follow[:-1], axis=1) > 0
        deep, row = xp.nonzero(begins.T)
        edges = xp.concatenate([deep * len(rows) + row, xp.asarray([follow.size])])
        counts = edges[1:] - edges[:-1]
        real = inside[row, deep]
        deep, row, counts = deep[real], row[real], counts[real]
        order = xp.lexsort(xp.stack([row, deep, -counts]))[:nodes]
        member = xp.cumsum(begins, axis=0)
        number: dict[tuple[int, int], int] = {}
        tokens, parents = [root], [-1]
        for d, r in zip(deep[order].tolist(), row[order].tolist(), strict=True):
            number[d, int(member[r, d])] = len(tokens)
            tokens.append(int(follow[r, d]))
            parents.append(number[d - 1, int(member[r, d - 1])] if d else 0)
        return TokenTree(tuple(tokens), tuple(parents))

    def _token(self, depth: int, row: int) -> int:
        return int(self.tokens[self.suffixes[row] + depth])


def suffix_array(tokens: Array) -> Array:
    """The starts of all suffixes in lexicographic order, an end coming before any token.

    Manber & Myers 1990: sorted by their first 1, 2, 4 … tokens, in O(n ln² n) here.

    Args:
        tokens: (n,) host integers.

    Returns:
        (n,) int64.
    """
    xp, n, step = backend.get("numpy").xp, len(tokens), 1
    order = xp.argsort(tokens, kind="stable")
    ranks = _ranks(tokens, order)
    while n and int(ranks.max()) < n - 1:
        following = xp.zeros(n, "int64")  # an end counts 0
        following[: n - step] = ranks[step:] + 1
        pairs = ranks * (n + 1) + following
        order = xp.argsort(pairs, kind="stable")
        ranks, step = _ranks(pairs, order), 2 * step
    return order


def _ranks(keys: Array, order: Array) -> Array:
    """(n,) 0, 1 … : how many different keys are smaller."""
    xp = backend.get("numpy").xp
    ordered = keys[order]
    ranks = xp.zeros(len(keys), "int64")
    ranks[order[1:]] = xp.cumsum(ordered[1:] != ordered[:-1])
    return ranks


@dataclass(frozen=True)
class RetrievalDraft:
    """Proposes a tree of what follows the end of the text in a datastore.

    He et al. 2023, 2311.08252, section 3.

    Args:
        datastore: where is looked.
        longest: N, the longest end of the text that is looked for, ≥ ``shortest``.
        shortest: the shortest one, ≥ 1.
        nodes: c, the size of the tree, node 0 not counted.
        most: how many occurrences are read at most.

    Raises:
        ValueError: an argument is out of its range.
    """

    datastore: Datastore
    longest: int = 16
    shortest: int = 1
    nodes: int = 64
    most: int = 5000

    def __post_init__(self) -> None:
        if not (1 <= self.shortest <= self.longest and self.nodes >= 0 and self.most >= 1):
            raise ValueError(
                "retrieval looks for ends of 1 ≤ shortest ≤ longest tokens, reads most ≥ 1 places "
                f"and keeps nodes ≥ 0, got {self.shortest}, {self.longest}, {self.most}, "
                f"{self.nodes}"
            )

    def propose(self, text: Sequence[int], count: int, warper: Warper, source: Source) -> Proposal:
        """As every draft: a tree of depth ≤ ``count``, of node 0 alone where nothing is found."""
        length, rows = self.datastore.search(text, self.longest, self.shortest)
        stride = -(-len(rows) // self.most) if rows else 1
        tree = self.datastore.tree(text[-1], rows[::stride], length, count, self.nodes)
        return Proposal(tree, None)
