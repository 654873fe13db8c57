"""Several candidates for one position: which of them stands, and what is left of p if none does.

One node of a token tree: k children were drafted from q, and the target's law is p.

==========================================  ==============================  ====================
accept x with min(1, p/q); after a          Miao et al. 2023, *SpecInfer*,  ``multi_step``
rejection p ← norm((p − q)₊); i.i.d. x      2305.09781, alg. 2
the same, and q ← q without x,              Yang et al. 2024, *Multi-*      ``without_replacement``
renormalised; x drawn without replacement   *Candidate Speculative De-*
                                            *coding*, 2401.06706; Jeon et
                                            al. 2024, 2402.14160; Z. Chen
                                            et al. 2024, 2402.12374
draw y from p; the child that is y stands   2305.09781, 6 (baseline)        ``match_children``
accept x with min(1, p/(ρ q)), ρ the root   Z. Sun et al. 2023, *SpecTr*,   ``k_seq``, ``k_seq_rho``
of 1 − (1 − b)ᵏ = ρ b, where                2310.15141 (k-SEQ)
b = Σ min(q, p/ρ); i.i.d. x
q one-hot: accept x with p(x); after a      ``multi_step`` with the         ``deterministic_``
rejection p ← p without x, renormalised     one-hot law of each child       ``children``
the child that is argmax p stands           Stern et al. 2018, 1811.03115   ``greedy_children``
min over sets S of 1 − p(S) + Pr[a draft    2310.15141; Hu et al. 2025,     ``optimal_``
is in S]: what no exact rule can exceed     2502.18779                      ``acceptance``
==========================================  ==============================  ====================

All rules have one signature, ``rule(children, q, p, source) -> Choice``: children are k ≥ 0 tokens
in the order in which they were drafted, q and p are host arrays (V,) of probabilities, divided by
their sums in float64.  Rules that do not read q take None.  Without children nothing stands, and
what is drawn from the rest has the law p.  All but ``greedy_children`` are exact: if the children
were drawn as the rule supposes (by ``draw_iid``, by ``draw_without_replacement``, or in any way
where q is not read), the accepted child, or else a token drawn from what is left, has the law p.

They raise a ValueError if q and p are no laws over one vocabulary, a child is not in it, or (where
q is read) a child has q = 0, hence cannot have been drafted.

Deviations: the rest of p of ``k_seq`` is p − ((1 − (1 − b)ᵏ)/b) min(q, p/ρ), which is the paper's
p − min(p, ρ q) at the root and exact for every ρ above it too, so that the tolerance of the root
finder is no error of the law.  ``without_replacement`` passes over a child that has been tried
already, and this makes it exact for i.i.d. children also: the next *new* token of an i.i.d.
sequence has the law of q without the earlier ones, whenever it comes.  2305.09781 gives each child
the law of its own draft model; here all have one.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from ..backend import Array
from ..ops.elementwise import of
from .source import Source, accept, laws, one_hot, residual

__all__ = [
    "Choice", "NodeRule", "deterministic_children", "draw_iid", "draw_without_replacement",
    "greedy_children", "k_seq", "k_seq_rho", "match_children", "multi_step", "optimal_acceptance",
    "top_children", "without_replacement",
]  # fmt: skip

HALVINGS = 40
"""Of the interval [1, k] of ρ; each reads all of q and p once."""


class Choice(NamedTuple):
    """What a rule decided about the children of one node."""

    child: int | None
    """Which of the children stands, counted from 0; None if none does."""
    left: Array
    """(V,) what the position is drawn from if none stands; sums to 1, host, float64."""


class NodeRule(Protocol):
    """A verifier of one node; see the top of this file for the arguments."""

    def __call__(
        self, children: Sequence[int] | Array, q: Array | None, p: Array, source: Source
    ) -> Choice:
        """Which child stands, and what is left of p."""


def multi_step(
    children: Sequence[int] | Array, q: Array | None, p: Array, source: Source
) -> Choice:
    """SpecInfer's rule for i.i.d. children: one after the other against what is left of p.

    Miao et al. 2023, 2305.09781, algorithm 2 (recursive rejection with replacement).  A token that
    was drafted twice is tried twice: the second draft may be rejected for what the first left.

    Args:
        children: (k,) drawn by ``draw_iid``, in that order.
        q: (V,) what they were drawn from.
        p: (V,) the target's law.
        source: the choices: at most k coins.
    """
    tokens, q, p = _node(children, q, p, reads_q=True)
    for i, x in enumerate(tokens):
        if accept(float(p[x]), float(q[x]), source):
            return Choice(i, p)
        p = residual(p, q)
    return Choice(None, p)


def without_replacement(
    children: Sequence[int] | Array, q: Array | None, p: Array, source: Source
) -> Choice:
    """Recursive rejection for distinct children: q, too, is what the earlier ones left of it.

    Yang et al. 2024, 2401.06706; Jeon et al. 2024, 2402.14160.  If the children are all tokens with
    q > 0 and p > 0 needs no other, one of them stands.  A token that was drafted before is passed
    over, so the children may be i.i.d. draws as well.

    Args:
        children: (k,) drawn by ``draw_without_replacement``, in that order.
        q: (V,) what the first of them was drawn from.
        p: (V,) the target's law.
        source: the choices: at most k coins.
    """
    tokens, q, p = _node(children, q, p, reads_q=True)
    rest = q
    for i, x in enumerate(tokens):
        if x in tokens[:i]:
            continue
        mass = float(rest.sum())
        law = rest / mass if mass > 0.0 else rest  # 0 where x cannot be drafted: refused below
        if accept(float(p[x]), float(law[x]), source):
            return Choice(i, p)
        p = residual(p, law)
        rest = rest * (one_hot(x, len(p)) == 0.0)
    return Choice(None, p)


def match_children(
    children: Sequence[int] | Array, q: Array | None, p: Array, source: Source
) -> Choice:
    """Draw y from p as if there were no children; the first of them that is y stands.

    The baseline of Miao et al. 2023, 2305.09781, section 6.  Exact for any children, and Σ p (1 −
    (1 − q)ᵏ) of k i.i.d. ones stand.  What is left is y and nothing else.

    Args:
        children: (k,).
        q: not read.
        p: (V,) the target's law.
        source: the choices: one token.
    """
    tokens, _, p = _node(children, None, p)
    y = source.categorical(p)
    return Choice(tokens.index(y) if y in tokens else None, one_hot(y, len(p)))


def deterministic_children(
    children: Sequence[int] | Array, q: Array | None, p: Array, source: Source
) -> Choice:
    """For children that were chosen, not drawn: accept x with what it has of the rest of p.

    ``multi_step`` where the law of each child is one-hot.  Σ p(x) over the children stand, so the
    best k of them are ``top_children`` of q, if q ranks as p does.  A repeated child never stands.

    Args:
        children: (k,), a function of the text so far: n-grams, retrieval, the top k of a head.
        q: not read.
        p: (V,) the target's law.
        source: the choices: at most k coins.
    """
    tokens, _, p = _node(children, None, p)
    for i, x in enumerate(tokens):
        if x in tokens[:i]:
            continue
        if accept(float(p[x]), 1.0, source):
            return Choice(i, p)
        p = residual(p, one_hot(x, len(p)))
    return Choice(None, p)


def greedy_children(
    children: Sequence[int] | Array, q: Array | None, p: Array, source: Source
) -> Choice:
    """The first child that is argmax p; of tokens that tie, the lowest number is the argmax.

    Stern et al. 2018, 1811.03115, section 3, at a node.

    Args:
        children: (k,).
        q: not read.
        p: (V,) the target's law.
        source: not asked.
    """
    tokens, _, p = _node(children, None, p)
    y = int(p.argmax())
    return Choice(tokens.index(y) if y in tokens else None, one_hot(y, len(p)))


def k_seq(children: Sequence[int] | Array, q: Array | None, p: Array, source: Source) -> Choice:
    """SpecTr's rule for i.i.d. children: every one is tried against the same p/ρ.

    Z. Sun et al. 2023, 2310.15141.  1 − (1 − b)ᵏ of them stand, at least 1 − 1/e of the optimum.
    k = 1 is ``multi_step``.

    Args:
        children: (k,) drawn by ``draw_iid``.
        q: (V,) what they were drawn from.
        p: (V,) the target's law.
        source: the choices: at most k coins.
    """
    tokens, q, p = _node(children, q, p, reads_q=True)
    k = len(tokens)
    scale = k_seq_rho(p, q, k) if k else 1.0
    for i, x in enumerate(tokens):
        if accept(float(p[x]), scale * float(q[x]), source):
            return Choice(i, p)
    return Choice(None, _left_by_k_seq(p, q, k, scale) if k else p)


def k_seq_rho(p: Array, q: Array, k: int) -> float:
    """SpecTr's ρ in [1, k]: how much harder a child is to accept because it has k chances.

    Z. Sun et al. 2023, 2310.15141.  1 − (1 − b(ρ))ᵏ − ρ b(ρ), b = Σ min(q, p/ρ), falls from ≥ 0 at
    ρ = 1 to ≤ 0 at k, for ρ b rises and b falls; the root is found by halving, and what is returned
    is at most k 2⁻⁴⁰ above it.

    Args:
        p, q: (V,) host laws.
        k: how many children, ≥ 1.

    Returns:
        1 where p = q, where nothing of p is in q, and for k = 1.

    Raises:
        ValueError: k is below 1.
    """
    if k < 1:
        raise ValueError(f"k_seq_rho is of k ≥ 1 children, got {k}")
    low, high = 1.0, float(k)
    if _excess(p, q, k, low) <= 0.0:
        return low
    for _ in range(HALVINGS):
        middle = (low + high) / 2.0
        if _excess(p, q, k, middle) > 0.0:
            low = middle
        else:
            high = middle
    return high


def draw_iid(q: Array, k: int, source: Source) -> tuple[int, ...]:
    """k tokens from q, each without regard to the others: for ``multi_step`` and ``k_seq``.

    Args:
        q: (V,) a host law.
        k: how many, ≥ 0.
        source: the choices: k tokens.
    """
    law = laws("q", q[None])[0]
    return tuple(source.categorical(law) for _ in range(k))


def draw_without_replacement(q: Array, k: int, source: Source) -> tuple[int, ...]:
    """Up to k different tokens: each from q without the earlier ones, renormalised.

    For ``without_replacement``; in their order.  This is the law of the k largest of ln q + Gumbel
    noise (Kool, van Hoof & Welling 2019, 1903.06059), which Jeon et al. 2024 use.

    Args:
        q: (V,) a host law.
        k: how many, ≥ 0.
        source: the choices: one token each.

    Returns:
        Fewer than k if fewer have q > 0.
    """
    rest = laws("q", q[None])[0]
    drawn: list[int] = []
    while len(drawn) < k:
        mass = float(rest.sum())
        if not mass > 0.0:
            break
        rest = rest / mass
        drawn.append(source.categorical(rest))
        rest[drawn[-1]] = 0.0
    return tuple(drawn)


def top_children(q: Array, k: int) -> tuple[int, ...]:
    """The k tokens with the largest q (or logit), best first; of those that tie, the lowest.

    For the three rules that do not read q.

    Args:
        q: (V,) host numbers.
        k: how many, ≥ 0; all V if k is more.
    """
    return tuple(int(x) for x in (-q).argsort(kind="stable")[:k])


def optimal_acceptance(p: Array, q: Array, k: int, replacement: bool = True) -> float:
    """The largest probability with which one of k drafts from q can stand, for any exact rule.

    Z. Sun et al. 2023, 2310.15141: the value of an optimal transport from k-tuples of drafts to
    tokens.  By max-flow = min-cut it is the least of 1 − p(S) + Pr[a draft is in S] over all sets S
    of tokens; by Hu et al. 2025, 2502.18779, one of the V + 1 sets of largest p/q is among the
    least.  With replacement that is at once clear, for the value is concave in (p(S), q(S)), and
    the corners of these are such sets.

    Args:
        p, q: (V,) host laws.
        k: how many drafts, ≥ 0; none gives 0.
        replacement: whether they are i.i.d. or ``draw_without_replacement``.  The latter costs of
            the order of Vᵏ⁻¹ steps, for all sets of drafts are gone through.

    Raises:
        ValueError: p and q are no laws over one vocabulary, or k is negative.
    """
    if k < 0:
        raise ValueError(f"optimal_acceptance is of k ≥ 0 drafts, got {k}")
    _, q, p = _node((), q, p, reads_q=True)
    wanted, drafted = p.tolist(), q.tolist()
    ratio = [a / b if b > 0.0 else math.inf for a, b in zip(wanted, drafted, strict=True)]
    order = sorted(range(len(wanted)), key=lambda x: -ratio[x])
    outside = [1.0 - math.fsum(wanted[x] for x in order[:n]) for n in range(len(order) + 1)]
    if replacement:
        hit = [
            1.0 - max(0.0, math.fsum(drafted[x] for x in order[n:])) ** k
            for n in range(len(order) + 1)
        ]
    else:
        hit = _hits([drafted[x] for x in order], k)
    return min(1.0, max(0.0, min(a + b for a, b in zip(outside, hit, strict=True))))


def _hits(q: list[float], k: int) -> list[float]:
    """Of each n: the probability that k draws without replacement meet the first n tokens."""
    sets: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(min(k, sum(x > 0.0 for x in q))):
        longer: dict[tuple[int, ...], float] = {}
        for members, chance in sets.items():
            rest = [x for x in range(len(q)) if q[x] > 0.0 and x not in members]
            mass = math.fsum(q[x] for x in rest)
            for x in rest:
                grown = tuple(sorted((*members, x)))
                longer[grown] = longer.get(grown, 0.0) + chance * q[x] / mass
        sets = longer
    first = [0.0] * (len(q) + 1)  # of a set: its lowest number, which the first n meet if n > it
    for members, chance in sets.items():
        first[members[0] if members else len(q)] += chance
    return [math.fsum(first[:n]) for n in range(len(q) + 1)]


def _excess(p: Array, q: Array, k: int, scale: float) -> float:
    scaled = float(of(p).minimum(scale * q, p).sum())  # ρ b, without V divisions
    return _any_of(min(1.0, scaled / scale), k) - scaled


def _left_by_k_seq(p: Array, q: Array, k: int, scale: float) -> Array:
    taken = of(p).minimum(q, p / scale)
    b = min(1.0, float(taken.sum()))
    return residual(p, taken * (_any_of(b, k) / b if b > 0.0 else float(k)))


def _any_of(b: float, k: int) -> float:
    """1 − (1 − b)ᵏ, also for small b."""
    return 1.0 if b >= 1.0 else -math.expm1(k * math.log1p(-b))


def _node(
    children: Sequence[int] | Array, q: Array | None, p: Array, reads_q: bool = False
) -> tuple[tuple[int, ...], Any, Array]:
    """The arguments of a rule, checked: tokens as integers, rows as laws."""
    shape, drafted = getattr(p, "shape", None), getattr(q, "shape", None)
    lacking = q is None and reads_q and len(children) > 0
    if shape is None or len(shape) != 1 or (q is not None and drafted != shape) or lacking:
        raise ValueError(
            f"a node has one law p (V,) and one q of that shape, got {shape} and {drafted}: give a "
            "rule the host arrays of its node; only the rules for chosen children (match, "
            "deterministic, greedy) do without q"
        )
    tokens = tuple(operator.index(x) for x in children)
    if not all(0 <= x < len(p) for x in tokens):
        raise ValueError(f"children are tokens 0 … {len(p) - 1}, got {tokens}")
    return tokens, laws("q", q[None])[0] if q is not None else None, laws("p", p[None])[0]
