"""Token trees: many drafts that share their beginnings, verified in one call of the target.

==========================================  ============================  =======================
drafts merged where they begin alike        Miao et al. 2023,             ``from_chains``
                                            *SpecInfer*, 2305.09781
a node sees its ancestors and itself; its   there; Cai et al. 2024,       ``ancestors``, ``mask``,
position is the prefix's length + depth     *Medusa*, 2401.10774, 2.1.2   ``positions``
the tree of all pairs, triples … of the     2401.10774, 2.1.2 and 2.3.3   ``product_choices``,
top tokens of each depth, or some of them                                 ``from_choices``
from the root on, the child that a rule     2305.09781, alg. 2            ``verify_tree``,
of one node accepts; the last node gives                                  ``verify_tree_greedily``
the token that follows
==========================================  ============================  =======================

Conventions.  Node 0 is the last token of the text so far: it is emitted, but no cache has its row
yet, so the tree pass feeds it together with the drafts.  Nodes are numbered so that a parent comes
before its children; therefore a model that masks causally by slot *and* by ``mask`` loses nothing.
Row u of the pass is the target's law of the token after node u, so the children of u are judged by
p[u]; q[u] is the law that these children were drafted from.  A path leaves out node 0, and so its
length is the number of drafts that stand.

One round: build the tree; feed ``tokens`` at ``positions(start)`` under ``mask(start)``, where
``start`` rows are in the cache; bring the rows to the host; ``verify_tree``; keep the cache rows
``compact(path, start)``.  The emitted token that ends the round is node 0 of the next.

How other drafts fit.  *Medusa*: ``from_choices(root, table, choices)``, row d of the table being
the top tokens of head d + 1; all children at one depth share that head's law, so q, where a rule
reads it, is the head's softmax of each node's depth.  Its typical acceptance takes the longest of
``paths()``: another verifier that returns a ``Verdict`` of the same kind.  *EAGLE*: ``extend`` a
node by the top of its draft law, level by level, and ``subtree`` keeps the best nodes that its
reranking asks for.  *Sequoia*: ``sequoia.best_tree`` gives the choices, and ``extend`` draws them.

Deviations: 2305.09781 and 2401.10774 keep a set of children.  Here a node also has ``draws``, its
children in the order in which they were drafted, a child once for each draft of it: the rules for
i.i.d. children are exact for this sequence and for no other; sorted, or with equal drafts side by
side, they are biased from three children on.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from .. import backend
from ..backend import Array
from .multi import NodeRule
from .source import Source, Verdict

__all__ = ["TokenTree", "product_choices", "verify_tree", "verify_tree_greedily"]


@dataclass(frozen=True)
class TokenTree:
    """Drafts as a tree below the last token of the text; a value that is never changed.

    Args:
        tokens: of each node; node 0 is the last token of the text.
        parents: the number of each node's parent, smaller than its own; −1 for node 0.
        draws: of each node, its children in the order of drafting, one entry per draft.  Left out,
            it is every child once, by number.

    Raises:
        ValueError: there is no node 0, a parent does not come before its child, the lengths
            differ, or ``draws`` has other children than ``parents``.
    """

    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    draws: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        tokens = tuple(operator.index(x) for x in self.tokens)
        parents = tuple(operator.index(x) for x in self.parents)
        if not tokens or len(tokens) != len(parents) or parents[0] != -1:
            raise ValueError(
                "a tree has a token and a parent per node, and node 0 has the parent −1, got "
                f"{len(tokens)} tokens and the parents {parents}"
            )
        if not all(0 <= parent < node for node, parent in enumerate(parents) if node):
            raise ValueError(
                f"a parent has a smaller number than its child, got the parents {parents}: number "
                "the nodes by their depth"
            )
        children: list[list[int]] = [[] for _ in tokens]
        for node, parent in enumerate(parents[1:], start=1):
            children[parent].append(node)
        draws = tuple(tuple(members) for members in (self.draws or children))
        if [sorted(set(members)) for members in draws] != children:
            raise ValueError(
                f"draws lists the children of each node, each at least once, got {draws} where the "
                f"parents {parents} say {children}"
            )
        for name, value in (("tokens", tokens), ("parents", parents), ("draws", draws)):
            object.__setattr__(self, name, value)

    @classmethod
    def from_chains(cls, root: int, chains: Iterable[Sequence[int]]) -> TokenTree:
        """Drafts from ``root`` on, one node for all that agree so far: a trie.

        Nodes are numbered by depth, then by first appearance.  Chains may differ in length, be
        empty or equal; how often and in which order a node was drafted is in ``draws``.

        Args:
            root: the last token of the text.
            chains: the drafts, each without ``root``.
        """
        tokens, parents = [operator.index(root)], [-1]
        draws: list[list[int]] = [[]]
        at = [(0, tuple(chain)) for chain in chains]
        for depth in range(max((len(chain) for _, chain in at), default=0)):
            known: dict[tuple[int, int], int] = {}
            for i, (node, chain) in enumerate(at):
                if len(chain) <= depth:
                    continue
                step = (node, operator.index(chain[depth]))
                if step not in known:
                    known[step] = len(tokens)
                    tokens.append(step[1])
                    parents.append(node)
                    draws.append([])
                draws[node].append(known[step])
                at[i] = (known[step], chain)
        return cls(tuple(tokens), tuple(parents), tuple(tuple(x) for x in draws))

    @classmethod
    def from_choices(
        cls, root: int, table: Sequence[Sequence[int]], choices: Iterable[Sequence[int]]
    ) -> TokenTree:
        """Of each depth's best tokens those paths that ``choices`` names, as Medusa does.

        Cai et al. 2024, 2401.10774, section 2.3.3.  Nodes are numbered by (depth, ranks), as in
        the released code, whatever the order of ``choices``.

        Args:
            root: the last token of the text.
            table: table[d][r] is the token of rank r at depth d + 1.
            choices: paths of ranks (i₁ … iₘ); with a path also each of its beginnings.

        Raises:
            ValueError: a beginning of a path is missing, or a rank is not in the table.
        """
        ranks = sorted({tuple(path) for path in choices} - {()}, key=lambda path: (len(path), path))
        number: dict[tuple[int, ...], int] = {(): 0}
        tokens, parents = [root], [-1]
        for path in ranks:
            depth = len(path) - 1
            if path[:-1] not in number:
                raise ValueError(
                    f"choices has {path} but not its beginning {path[:-1]}: a node needs its parent"
                )
            if depth >= len(table) or not 0 <= path[-1] < len(table[depth]):
                raise ValueError(
                    f"choices has {path}, but the table's depths have {[len(row) for row in table]}"
                    " ranks: take more of the top tokens, or a smaller tree"
                )
            number[path] = len(tokens)
            tokens.append(int(table[depth][path[-1]]))
            parents.append(number[path[:-1]])
        return cls(tuple(tokens), tuple(parents))

    def extend(self, node: int, tokens: Iterable[int]) -> TokenTree:
        """A tree with further children of ``node``, drafted in this order; equal ones are merged.

        Raises:
            ValueError: there is no such node.
        """
        self._check(node)
        grown, parents = list(self.tokens), list(self.parents)
        draws = [list(members) for members in self.draws]
        known = {grown[child]: child for child in reversed(self.children(node))}
        for token in map(operator.index, tokens):
            if token not in known:
                known[token] = len(grown)
                grown.append(token)
                parents.append(node)
                draws.append([])
            draws[node].append(known[token])
        return TokenTree(tuple(grown), tuple(parents), tuple(tuple(x) for x in draws))

    def subtree(self, nodes: Iterable[int]) -> tuple[TokenTree, tuple[int, ...]]:
        """The tree of node 0 and these nodes only, and the old number of each of its nodes.

        Rows of p and q that belong to the old tree are brought along by indexing with the latter.

        Raises:
            ValueError: a node is kept without its parent, or there is no such node.
        """
        kept = sorted({0, *nodes})
        number = {old: new for new, old in enumerate(kept)}
        for old in kept:
            self._check(old)
            if old and self.parents[old] not in number:
                raise ValueError(
                    f"node {old} is kept but its parent {self.parents[old]} is not: a kept node "
                    "needs its ancestors"
                )
        return TokenTree(
            tuple(self.tokens[old] for old in kept),
            tuple(number[self.parents[old]] if old else -1 for old in kept),
            tuple(tuple(number[c] for c in self.draws[old] if c in number) for old in kept),
        ), tuple(kept)

    def __len__(self) -> int:
        """The number of nodes, node 0 included: what one pass costs."""
        return len(self.tokens)

    def children(self, node: int) -> tuple[int, ...]:
        """The numbers of a node's children, each once, in the order of their first draft."""
        return tuple(dict.fromkeys(self.draws[node]))

    def path(self, node: int) -> tuple[int, ...]:
        """The nodes from below node 0 down to ``node``; () for node 0."""
        self._check(node)
        found: list[int] = []
        while node:
            found.append(node)
            node = self.parents[node]
        return tuple(reversed(found))

    def paths(self) -> tuple[tuple[int, ...], ...]:
        """The path of each leaf, by number; of node 0 alone it is one empty path."""
        return tuple(self.path(node) for node in range(len(self)) if not self.draws[node])

    def find(self, tokens: Iterable[int]) -> int | None:
        """The node that these tokens lead to from node 0; None where the tree has no such draft."""
        node: int | None = 0
        for token in tokens:
            node = self.child(node, token) if node is not None else None
        return node

    def child(self, node: int, token: int) -> int | None:
        """The first child of a node that is this token, or None."""
        return next((c for c in self.children(node) if self.tokens[c] == token), None)

    @cached_property
    def depths(self) -> Array:
        """(nodes,) int64 on the host: the length of each node's path."""
        depths = [0]
        for parent in self.parents[1:]:
            depths.append(depths[parent] + 1)
        return _host().asarray(depths, dtype="int64")

    @cached_property
    def ancestors(self) -> Array:
        """(nodes, nodes) booleans on the host: [u, v] says that v is u or above u.

        Row u has depth(u) + 1 of them; column 0 is all true.
        """
        seen = _host().eye(len(self), dtype=bool)
        for node, parent in enumerate(self.parents[1:], start=1):
            seen[node] |= seen[parent]
        return seen

    def positions(self, start: int = 0) -> Array:
        """(nodes,) int64 on the host: the position of each node's token, ``start`` of node 0.

        Distances, for relative biases and windows, are differences of these, not of slots.
        """
        return self.depths + start

    def mask(self, start: int = 0) -> Array:
        """(nodes, start + nodes) booleans on the host: what each node may attend to.

        All of the ``start`` tokens in the cache, and of the tree its ancestors and itself: the
        ``attn_mask`` of ``scaled_dot_product_attention``.
        """
        xp = _host()
        return xp.concatenate([xp.ones((len(self), start), dtype=bool), self.ancestors], axis=1)

    def compact(self, path: Sequence[int], start: int = 0) -> Array:
        """Which rows of the cache stand, (start + 1 + accepted,) int64 on the host.

        The rows of the text, of node 0, and of the accepted nodes, in order: a cache that is
        indexed with them (which copies) is the one that a plain pass over the text would have left.

        Args:
            path: the accepted nodes, as in ``Verdict.path``.
            start: how many rows there were before the tree pass.

        Raises:
            ValueError: ``path`` does not lead downwards from node 0, step by step.
        """
        path = tuple(path)
        if path != (self.path(path[-1]) if path else ()):
            raise ValueError(
                f"{path} is no path from node 0 downwards in the tree with the parents "
                f"{self.parents}"
            )
        return _host().asarray([*range(start + 1), *(start + node for node in path)], dtype="int64")

    def _check(self, node: int) -> None:
        if not 0 <= node < len(self):
            raise ValueError(f"the tree has the nodes 0 … {len(self) - 1}, got {node}")


def product_choices(widths: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """The choices of the full tree that has widths[d] children below each node of depth d.

    Cai et al. 2024, 2401.10774, section 2.1.2: Σₖ Πᵢ≤ₖ sᵢ paths.
    """
    return tuple(
        path
        for depth in range(1, len(widths) + 1)
        for path in itertools.product(*(range(width) for width in widths[:depth]))
    )


def verify_tree(
    tree: TokenTree, q: Array | None, p: Array, rule: NodeRule, source: Source
) -> Verdict:
    """Go down the tree as long as the rule accepts a child; what is left then gives a token.

    Miao et al. 2023, 2305.09781, algorithm 2.  The emitted tokens, the accepted ones and the token
    after them, have the target's law if the rule is exact and the children of each node were drawn
    as it supposes, given their ancestors.  A chain is a tree; ``multi_step`` on it is
    ``verify.speculative_sampling``.

    Args:
        tree: the drafts.
        q: (nodes, V) host rows: what each node's children were drafted from; rows of leaves are
            not read.  None if the rule does not read it.
        p: (nodes, V) host rows of one tree pass: the target's law after each node.
        rule: judges the children of one node; see ``multi``.
        source: the choices.

    Returns:
        With the path of the accepted nodes.

    Raises:
        ValueError: the rows are not one per node, or what the rule raises about the rows of the
            nodes that are reached; the others are not read.
    """
    _check_rows("p", p, tree)
    if q is not None:
        _check_rows("q", q, tree)
    node, path = 0, list[int]()
    while True:
        drafted = tree.draws[node]
        tokens = [tree.tokens[child] for child in drafted]
        choice = rule(tokens, q[node] if q is not None and drafted else None, p[node], source)
        if choice.child is None:
            return Verdict(len(path), source.categorical(choice.left), tuple(path))
        node = drafted[choice.child]
        path.append(node)


def verify_tree_greedily(tree: TokenTree, logits: Array) -> Verdict:
    """Go down the tree along the target's best tokens; the text is that of greedy decoding.

    Stern et al. 2018, 1811.03115, section 3, on a tree (2305.09781, algorithm 2).  Of tokens that
    tie the lowest number is best.

    Args:
        tree: the drafts.
        logits: (nodes, V) host rows of one tree pass; probabilities will do.

    Raises:
        ValueError: the rows are not one per node, or one of them has nan.
    """
    _check_rows("logits", logits, tree)
    if bool((logits != logits).any()):
        raise ValueError("logits has nan: the best token is not known")
    best = [int(x) for x in logits.argmax(axis=1)]
    node, path = 0, list[int]()
    while (step := tree.child(node, best[node])) is not None:
        node = step
        path.append(node)
    return Verdict(len(path), best[node], tuple(path))


def _check_rows(name: str, rows: Array, tree: TokenTree) -> None:
    if rows.ndim != 2 or len(rows) != len(tree):
        raise ValueError(
            f"{name} has a row for each of the {len(tree)} nodes, node 0 included, got shape "
            f"{rows.shape}"
        )


def _host() -> backend.Namespace:
    return backend.get("numpy").xp
