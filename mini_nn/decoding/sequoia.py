"""The best shape of a token tree: dynamic programming over how often a child of each rank stands.

Z. Chen, May, Svirschevski, Huang, Ryabinin, Jia & B. Chen 2024, *Sequoia: Scalable, Robust, and
Hardware-aware Speculative Decoding*, 2402.12374.

==================================================  ==========================
positional acceptance aᵣ: the chance that the       ``positional_acceptance``
children before rank r fall and the r-th stands
F(T) = Σᵥ Πᵤ a_rank(u), u on the path to v, the     ``expected_tokens_tree``
root's product being 1: tokens per target call
F(n, d) = 1 + G₁(n − 1, d − 1), where               ``best_tree``
Gᵣ(m, d) = max over j of aᵣ F(j, d) + Gᵣ₊₁(m − j, d)
max over n, d of F(n, d) / (t(n) + d c), where t    ``best_tree_size``
is the time of a call for n tokens in those of a
call for one, and c that of one call of the draft
==================================================  ==========================

Positional means that the chance depends on the rank alone, not on the depth or the text.  A tree is
a tuple of choices, that is paths of ranks counted from 0, as in ``TokenTree.from_choices``; a child
of rank r comes with the ranks before it, for it is tried after them.

Deviations: where several trees are best, an earlier rank gets the smallest subtree that is among
them.  Depths are counted without the root.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from .. import backend
from ..backend import Array

__all__ = [
    "TreeShape", "TreeSpeed", "best_tree", "best_tree_size", "expected_tokens_tree",
    "positional_acceptance",
]  # fmt: skip


class TreeShape(NamedTuple):
    """A tree that is best for its size and depth."""

    choices: tuple[tuple[int, ...], ...]
    """The path of ranks of each node but the root, by depth."""
    expected: float
    """Tokens per call of the target, the one after the accepted drafts included."""

    @property
    def size(self) -> int:
        """The number of nodes, the root included."""
        return len(self.choices) + 1

    @property
    def depth(self) -> int:
        """The length of the longest path: how many calls of the draft it takes."""
        return max((len(path) for path in self.choices), default=0)


def positional_acceptance(stood: Iterable[int | None], width: int) -> tuple[float, ...]:
    """How often the child of each rank stood, at nodes that had ``width`` children.

    Args:
        stood: of each node that was judged, ``Choice.child``.
        width: how many children each had, ≥ 1.

    Raises:
        ValueError: there is no node, or a rank is not in 0 … width − 1.
    """
    counts, nodes = [0] * width, 0
    for rank in stood:
        nodes += 1
        if rank is not None:
            if not 0 <= rank < width:
                raise ValueError(f"children have the ranks 0 … {width - 1}, got {rank}")
            counts[rank] += 1
    if nodes == 0:
        raise ValueError("positional_acceptance counts over judged nodes, got none")
    return tuple(count / nodes for count in counts)


def expected_tokens_tree(choices: Iterable[Sequence[int]], acceptance: Sequence[float]) -> float:
    """F(T), the tokens per target call: 1 + Σ over the nodes of the product along their paths.

    2402.12374, tree construction.  Exact where a child's chance depends on its rank alone.  A chain
    of g gives (1 − αᵍ⁺¹)/(1 − α).

    Args:
        choices: paths of ranks; see the top of this file.
        acceptance: aᵣ of each rank.
    """
    total = 1.0
    for path in choices:
        chance = 1.0
        for rank in path:
            chance *= acceptance[rank]
        total += chance
    return total


def best_tree(acceptance: Sequence[float], size: int, depth: int | None = None) -> TreeShape:
    """The tree of ``size`` nodes, the root included, that gives the most tokens per call.

    2402.12374, tree construction.  Where acceptance does not rise with the rank it consists of the
    n − 1 largest products; otherwise a rank may be worth taking for the sake of the next one, which
    the greedy choice would not see.  O(R D n²), in R D n steps of a row each.

    Args:
        acceptance: aᵣ in [0, 1] of each rank; no node has more children than it has numbers.
        size: n ≥ 1; 1 is plain decoding.
        depth: the longest path that is allowed; None: no bound.

    Raises:
        ValueError: ``size`` is below 1, ``depth`` below 0, an acceptance is not in [0, 1], or no
            tree of this depth and so many ranks has so many nodes.
    """
    depth = size - 1 if depth is None else depth
    shape = _shape(_levels(acceptance, size, depth), size, depth)
    if shape is None:
        raise ValueError(
            f"no tree of depth {depth} with up to {len(acceptance)} children a node has {size} "
            "nodes: allow more depth or more ranks, or ask for fewer nodes"
        )
    return shape


class TreeSpeed(NamedTuple):
    """A tree and how many times faster than plain decoding it is."""

    shape: TreeShape
    speedup: float


def best_tree_size(
    acceptance: Sequence[float],
    time: Callable[[int], float],
    draft: float,
    sizes: Iterable[int],
    depths: Iterable[int],
) -> TreeSpeed:
    """The tree that is fastest on given hardware: max F(n, d) / (t(n) + d c).

    2402.12374, hardware-aware optimisation.  Plain decoding, of size 1 and depth 0, is always
    compared too, so the result is ≥ 1/t(1); sizes that a depth has no tree for are passed over.  Of
    equally fast trees it is the one of least depth, then least size.

    Args:
        acceptance: as in ``best_tree``.
        time: t(n) > 0: the time of one target call for n tokens in units of a call for one.
        draft: c ≥ 0: the time of one call of the draft in these units; a level takes one.
        sizes: n ≥ 1 to be compared.
        depths: d ≥ 0 to be compared.
    """
    wanted, bounds = sorted({1, *sizes}), sorted({0, *depths})
    levels = _levels(acceptance, wanted[-1], bounds[-1])
    best = TreeSpeed(TreeShape((), 1.0), 1.0 / time(1))
    times = {size: time(size) for size in wanted}
    for depth in bounds:
        for size in wanted:
            value = float(levels[min(depth, len(levels) - 1)].value[size])
            speedup = value / (times[size] + depth * draft)
            if speedup > best.speedup:
                shape = _shape(levels, size, depth)
                best = TreeSpeed(shape, speedup) if shape is not None else best
    return best


class _Level(NamedTuple):
    """The best trees of one depth."""

    value: Array
    """(size + 1,) F of each number of nodes; −∞ where no tree has it."""
    share: Array
    """(R, size) the nodes that the subtree of a rank gets of those for it and the later ranks."""


def _levels(acceptance: Sequence[float], size: int, depth: int) -> list[_Level]:
    """The levels of depth 0, 1 … up to ``depth``, or to where more depth changes nothing."""
    if size < 1 or depth < 0 or not all(0.0 <= a <= 1.0 for a in acceptance):
        raise ValueError(
            "a tree has size ≥ 1 nodes, depth ≥ 0 and an acceptance in [0, 1] of each rank, got "
            f"size {size}, depth {depth} and acceptance {tuple(acceptance)}"
        )
    xp = backend.get("numpy").xp
    none = -float("inf")
    value = xp.full(size + 1, none)
    value[1] = 1.0
    levels = [_Level(value, xp.zeros((len(acceptance), size), dtype="int64"))]
    while len(levels) <= depth:
        shorter = levels[-1].value
        share = xp.zeros((len(acceptance), size), dtype="int64")
        forest = xp.full(size, none)  # of the ranks after the last: nothing for no nodes
        forest[0] = 0.0
        for rank in reversed(range(len(acceptance))):
            later, forest = forest, xp.full(size, none)
            forest[0] = 0.0
            # 0 · −∞ has no value, and a tree that does not exist is never worth 0
            gain = xp.full(size + 1, none)
            gain[shorter > none] = acceptance[rank] * shorter[shorter > none]
            for nodes in range(1, size):
                sums = gain[1 : nodes + 1] + later[:nodes][::-1]
                best = int(sums.argmax())
                forest[nodes], share[rank, nodes] = sums[best], best + 1
        value = xp.full(size + 1, none)
        value[1:] = 1.0 + forest
        levels.append(_Level(value, share))
        if bool((value == shorter).all()):
            break
    return levels


def _shape(levels: list[_Level], size: int, depth: int) -> TreeShape | None:
    """The best tree of this size and depth; None where there is none."""
    depth = min(depth, len(levels) - 1)
    expected = float(levels[depth].value[size])
    if expected == -float("inf"):
        return None
    paths: list[tuple[int, ...]] = []
    todo: list[tuple[tuple[int, ...], int, int]] = [((), size - 1, depth)]
    while todo:
        path, nodes, depth = todo.pop()
        rank = 0
        while nodes > 0:
            share = int(levels[depth].share[rank, nodes])
            paths.append((*path, rank))
            todo.append(((*path, rank), share - 1, depth - 1))
            nodes, rank = nodes - share, rank + 1
    return TreeShape(tuple(sorted(paths, key=lambda path: (len(path), path))), expected)
