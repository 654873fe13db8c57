"""Verification of a chain of drafts: how many stand, and which token follows them.

A draft proposes x₁ … x_g, and one call of the target gives g + 1 rows: what it thinks of each of
them, and of the token after the last.  With p the target's law of a position, q the draft's (both
after the same temperature and filters) and r = norm((p − q)₊):

===========================================  ============================  =====================
accept x with min(1, p(x)/q(x)), else draw   Leviathan, Kalman & Matias    ``speculative_``
r; exact: min(p, q) + (1 − Σ min(p, q)) r    2022, 2211.17192, alg. 1; C.  ``sampling``
= p                                          Chen et al. 2023, 2302.01318
accept while x = argmax p                    Stern, Shazeer & Uszkoreit    ``greedy``
                                             2018, 1811.03115, 3
πᵢ = min(1, πᵢ₋₁ pᵢ/qᵢ); the last i whose    Z. Sun et al. 2024, *Block    ``block_``
coin hᵢ = A/(A + 1 − πᵢ) falls well, where   Verification Accelerates      ``verification``
A = Σ (πᵢ pᵢ₊₁ − qᵢ₊₁)₊; exact               Speculative Decoding*,
                                             2403.10444, alg. 2
q one-hot: accept x with p(x), else draw     2211.17192, alg. 1            ``deterministic``
from p without x; exact
draw y from p, accept while y = x; exact     Miao et al. 2023, *SpecInfer* ``sample_match``
                                             2305.09781, its baseline
y = argmax(ln p + noise), x drawn with the   Daliri, Musco & Suresh 2024,  ``GumbelCoupled``
same noise; accept while y = x; exact, and   *Coupling without Communica-
the text does not depend on the draft        tion*, 2408.07978
l q in the place of q; no token gets more    2211.17192, A.5               ``Lenient``
than p/l
accept x of the β best if ln p(x) is within  Xia et al. 2022, *Speculative ``Relaxed``
τ of the best                                Decoding*, 2203.16487
===========================================  ============================  =====================

All have one signature, ``rule(tokens, q, p, source)``: tokens (g,) integers, q (g, V), p (g + 1, V)
host arrays of probabilities, g ≥ 0, and a ``Source`` of choices; they return a ``Verdict`` and
change nothing.  Rows are divided by their sums in float64.  Rules that do not read q take None.

Each raises a ValueError if the shapes do not fit, a token is not in 0 … V − 1, a row is no law, or
(where q is read) a token has q = 0, hence cannot have been drafted from it: an argmax draft's law
is one-hot, whatever its softmax was.

Deviations: a coin is accepted strictly below its probability, so what has p = 0 is never emitted;
the residual falls back to p where rounding leaves nothing of it (see ``residual``).  2403.10444
tosses the coins from the first to the last and keeps the last that fell well; from the last to the
first, stopping at it, is the same law with fewer coins.  With
lenience the residual is norm((p − l q)₊): l q stands in the place of q there too.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..backend import Array
from ..ops.elementwise import of
from .source import Source, Verdict, accept, laws, one_hot, ratio, residual

__all__ = [
    "GumbelCoupled", "Lenient", "Relaxed", "Rule", "block_verification", "deterministic",
    "greedy", "gumbel_token", "sample_match", "speculative_sampling",
]  # fmt: skip


class Rule(Protocol):
    """A verifier of chains; see the top of this file for the arguments."""

    def __call__(
        self, tokens: Sequence[int] | Array, q: Array | None, p: Array, source: Source
    ) -> Verdict:
        """How many of the tokens stand, and what follows them."""


def speculative_sampling(
    tokens: Sequence[int] | Array, q: Array | None, p: Array, source: Source
) -> Verdict:
    """Accept x with probability min(1, p(x)/q(x)); draw the first rejected one anew from r.

    Leviathan et al. 2022, 2211.17192, algorithm 1.  The emitted tokens have the target's law.  With
    p = q all stand; with disjoint supports none does.  At temperature 0 (p one-hot) it is
    ``greedy``.

    Args:
        tokens: (g,), each drawn from its row of q.
        q: (g, V) what they were drawn from.
        p: (g + 1, V) the target's rows.
        source: the choices: at most g coins and one token.
    """
    drafts, q, p = _block(tokens, q, p)
    for i, x in enumerate(drafts):
        if not accept(float(p[i, x]), float(q[i, x]), source):
            return Verdict(i, source.categorical(residual(p[i], q[i])))
    return Verdict(len(drafts), source.categorical(p[-1]))


@dataclass(frozen=True)
class Lenient:
    """``speculative_sampling`` with l q in the place of q: more is accepted, and less is exact.

    Leviathan et al. 2022, 2211.17192, A.5.  No token gets more than p/l.  l = 1 is exact; l = 0
    accepts everything, which is the draft's own law.

    Args:
        lenience: l in [0, 1].

    Raises:
        ValueError: l is not in [0, 1].
    """

    lenience: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.lenience <= 1.0:
            raise ValueError(f"lenience is between 0 and 1 (exact), got {self.lenience}")

    def __call__(
        self, tokens: Sequence[int] | Array, q: Array | None, p: Array, source: Source
    ) -> Verdict:
        drafts, q, p = _block(tokens, q, p)
        for i, x in enumerate(drafts):
            drafted = float(q[i, x])
            # l = 0 asks for nothing but that the token can have been drafted
            wanted = float(p[i, x]) / self.lenience if self.lenience > 0.0 else math.inf
            if not accept(wanted, drafted, source):
                return Verdict(i, source.categorical(residual(p[i], self.lenience * q[i])))
        return Verdict(len(drafts), source.categorical(p[-1]))


def block_verification(
    tokens: Sequence[int] | Array, q: Array | None, p: Array, source: Source
) -> Verdict:
    """Judge the block as a whole: exact, and never fewer tokens on average than one by one.

    Z. Sun et al. 2024, 2403.10444, algorithm 2.  πᵢ is the chance of the first i drafts to be kept;
    unlike the product of min(1, p/q) it lets a token that the target likes make up for an earlier
    one that it does not.  g = 1 is ``speculative_sampling``.

    Args:
        tokens: (g,), each drawn from its row of q.
        q: (g, V) what they were drawn from.
        p: (g + 1, V) the target's rows.
        source: the choices: at most g coins and one token.
    """
    drafts, q, p = _block(tokens, q, p)
    g = len(drafts)
    kept = [1.0]
    for i, x in enumerate(drafts):
        kept.append(min(1.0, ratio(kept[i] * float(p[i, x]), float(q[i, x]))))
    if accept(kept[g], 1.0, source):
        return Verdict(g, source.categorical(p[g]))
    for i in range(g - 1, 0, -1):
        left = float(of(p).maximum(kept[i] * p[i] - q[i], 0.0).sum())
        # 0/0 only if p = q and nothing was lost before: then g is reached, up to rounding
        if left > 0.0 and accept(left, left + (1.0 - kept[i]), source):
            return Verdict(i, source.categorical(residual(kept[i] * p[i], q[i])))
    return Verdict(0, source.categorical(residual(p[0], q[0])))


def deterministic(
    tokens: Sequence[int] | Array, q: Array | None, p: Array, source: Source
) -> Verdict:
    """For drafts that were chosen, not drawn: accept x with probability p(x), else draw another.

    ``speculative_sampling`` with q one-hot (2211.17192, algorithm 1): for n-grams, retrieval, an
    argmax, whatever is a function of the text so far.  p(x) = 1 always stands and p(x) = 0 never
    does.  Since whatever x is, what is emitted has the law p, it is exact for drawn drafts too; but
    of these only Σ p q stand, where ``speculative_sampling`` keeps Σ min(p, q).

    Args:
        tokens: (g,).
        q: not read.
        p: (g + 1, V) the target's rows.
        source: the choices: at most g coins and one token.
    """
    drafts, _, p = _block(tokens, None, p, reads_q=False)
    for i, x in enumerate(drafts):
        if not accept(float(p[i, x]), 1.0, source):
            return Verdict(i, source.categorical(residual(p[i], one_hot(x, p.shape[1]))))
    return Verdict(len(drafts), source.categorical(p[-1]))


def sample_match(
    tokens: Sequence[int] | Array, q: Array | None, p: Array, source: Source
) -> Verdict:
    """Draw y from p as if there were no draft, and go on while it is what was drafted.

    The baseline of Miao et al. 2023, 2305.09781.  Exact for any drafts.  Σ p q of the
    drawn ones stand, fewer than Σ min(p, q); of chosen ones p(x), which is as many as any exact
    rule can keep.

    Args:
        tokens: (g,).
        q: not read.
        p: (g + 1, V) the target's rows.
        source: the choices: at most g + 1 tokens.
    """
    drafts, _, p = _block(tokens, None, p, reads_q=False)
    return _while_equal(drafts, (source.categorical(row) for row in p))


def greedy(tokens: Sequence[int] | Array, q: Array | None, p: Array, source: Source) -> Verdict:
    """Accept while the draft is the target's best token; of those that tie, the lowest number.

    Stern et al. 2018, 1811.03115, section 3.  The text is that of greedy decoding with the same
    rule for ties, for any drafts.

    Args:
        tokens: (g,).
        q: not read.
        p: (g + 1, V) the target's rows; logits will do.
        source: not asked.

    Raises:
        ValueError: the shapes do not fit, a token is not in 0 … V − 1, or a row has nan.
    """
    return _while_equal(_tokens(tokens, p), _best(p))


@dataclass(frozen=True)
class Relaxed:
    """SpecDec's verification: a draft need only be among the target's best, not the best.

    Xia et al. 2022, 2203.16487.  x stands if at most ``top`` − 1 tokens are more
    probable and ln p(x) ≥ ln max p − ``gap``; the first that does not is replaced by the best one.
    No law is kept.  ``top`` = 1, and ``gap`` = 0, are ``greedy`` up to ties: these stand too.

    Args:
        top: β ≥ 1.
        gap: τ ≥ 0, in nats; infinity leaves only the rank.

    Raises:
        ValueError: β is below 1 or τ below 0.
    """

    top: int
    gap: float

    def __post_init__(self) -> None:
        if self.top < 1 or not self.gap >= 0.0:
            raise ValueError(
                f"Relaxed accepts the top ≥ 1 best within a gap ≥ 0, got {self.top} and {self.gap}"
            )

    def __call__(
        self, tokens: Sequence[int] | Array, q: Array | None, p: Array, source: Source
    ) -> Verdict:
        """As every rule; neither q nor the source is used."""
        drafts, _, p = _block(tokens, None, p, reads_q=False)
        best = _best(p)
        for i, x in enumerate(drafts):
            least = float(p[i].max()) * math.exp(-self.gap)
            if int((p[i] > p[i, x]).sum()) >= self.top or p[i, x] < least or p[i, x] == 0.0:
                return Verdict(i, best[i])
        return Verdict(len(drafts), best[-1])


def gumbel_token(p: Array, noise: Array) -> int:
    """argmax(ln p + noise): a token with the law p, if the noise is standard Gumbel.

    The Gumbel-max trick (Gumbel 1954).  Target, draft and plain decoding that share the noise of a
    position call this, so that where their laws are equal so are their tokens.

    Args:
        p: (V,) numbers ≥ 0, host; any positive factor is allowed.
        noise: (V,) finite, host.

    Returns:
        Never a token with p = 0; the lowest of those that tie.

    Raises:
        ValueError: the shapes differ, or p has nan, a number below 0 or none above 0.
    """
    if p.ndim != 1 or p.shape != noise.shape or not ((p >= 0.0).all() and (p > 0.0).any()):
        raise ValueError(
            "gumbel_token takes probabilities (V,), of which one is positive, and noise of the "
            f"same shape, got {p.shape} and {noise.shape}"
        )
    xp, possible = of(p), p > 0.0
    logs = xp.log(xp.where(possible, p, 1.0))
    return int(xp.where(possible, logs + noise, -math.inf).argmax())


@dataclass(frozen=True, eq=False)
class GumbelCoupled:
    """``sample_match`` whose draws share their noise with the draft's: ``gumbel_token`` of both.

    Daliri, Musco & Suresh 2024, 2408.07978.  The emitted text is, token for token, that of plain
    decoding with the same noise, for any draft and any g, if the target's rows are the same.  A
    draft stands with a probability from (1 − TV)/(1 + TV) to 1 − TV, which ``speedup.gumbel_match``
    gives exactly.

    Args:
        noise: (n, V) standard Gumbel numbers, n ≥ g + 1, host: row i belongs to the position whose
            law is p[i].  A position keeps its row: where drafts were rejected, the next round uses
            the rows of their positions again.
    """

    noise: Array

    def __call__(
        self, tokens: Sequence[int] | Array, q: Array | None, p: Array, source: Source
    ) -> Verdict:
        """As every rule; neither q nor the source is used.

        Raises:
            ValueError: also if there are fewer rows of noise than of p, or of another length.
        """
        laws("p", p)
        drafts, rows = _tokens(tokens, p), self.noise
        if rows.ndim != 2 or len(rows) < len(p) or rows.shape[1] != p.shape[1]:
            raise ValueError(
                f"p {p.shape} needs a row of noise for each of its rows, got {rows.shape}: pass "
                "the noise from the first drafted position on"
            )
        # rows as they are, not divided by their sums: ties are then those of plain decoding
        return _while_equal(drafts, (gumbel_token(p[i], rows[i]) for i in range(len(p))))


def _while_equal(drafts: list[int], choices: Iterable[int]) -> Verdict:
    """The choices are asked for one by one, up to the first that is not its draft."""
    wanted: list[int | None] = [*drafts, None]  # the bonus is equal to nothing
    for i, (x, y) in enumerate(zip(wanted, choices, strict=False)):
        if x != y:
            return Verdict(i, y)
    raise AssertionError("there is a choice for each row")


def _best(p: Array) -> list[int]:
    """The first of the largest numbers of each row."""
    if bool((p != p).any()):
        raise ValueError(f"a row of {p.shape} has nan, which has no best token")
    return [int(best) for best in p.argmax(axis=1).tolist()]


def _block(
    tokens: Sequence[int] | Array, q: Array | None, p: Array, reads_q: bool = True
) -> tuple[list[int], Any, Any]:
    """Tokens, q and p as integers and laws, after a look at their shapes."""
    p = laws("p", p)
    drafts = _tokens(tokens, p)
    if not reads_q:
        return drafts, None, p
    wanted = (len(drafts), p.shape[1])
    if q is None or tuple(q.shape) != wanted:
        raise ValueError(
            f"q is what each draft was drawn from, here {wanted}, got "
            f"{None if q is None else q.shape}: for drafts without a law take deterministic or "
            "sample_match"
        )
    return drafts, laws("q", q), p


def _tokens(tokens: Sequence[int] | Array, p: Array) -> list[int]:
    """Tokens as integers: one fewer than rows of p, and each a column of it."""
    drafts = [operator.index(x) for x in tokens]
    if p.ndim != 2 or len(p) != len(drafts) + 1:
        raise ValueError(
            f"{len(drafts)} drafts need {len(drafts) + 1} rows of the target (…, V): one for each "
            f"and one for what follows the last, got {p.shape}"
        )
    if any(not 0 <= x < p.shape[1] for x in drafts):
        raise ValueError(f"drafts are tokens from 0 to {p.shape[1] - 1}, got {drafts}")
    return drafts
