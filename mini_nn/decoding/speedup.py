"""What speculation gains: acceptance, tokens per target call, speed-up, the best draft length.

With p the target's law of a position and q the draft's, α = E Σ min(p, q), g drafts in a round, and
c the time of one draft step in units of one target call (ĉ: of arithmetic, per token):

===============================================  ==========================  =====================
β = Σ min(p, q) = 1 − TV(p, q)                   Leviathan, Kalman & Matias  ``acceptance``
                                                 2022, 2211.17192, thm 3.5
E tokens = (1 − α^{g+1})/(1 − α) = 1 + … + α^g   there, (1)                  ``expected_tokens``
1 + β₁ + β₁β₂ + …                                the same, β by position     ``expected_tokens_``
                                                                             ``chain``
E tokens / (g c + 1)                             there, theorem 3.8          ``speedup``
(g ĉ + g + 1) / E tokens                         there, theorem 3.11         ``operations``
the g with the largest speed-up                  there, 3.5                  ``best_gamma``
P(same token) = Σₓ 1 / Σ_y max(p_y/pₓ, q_y/qₓ)   derived below               ``gumbel_match``
(1 − TV)/(1 + TV) ≤ P(same token) ≤ 1 − TV       Daliri, Musco & Suresh      ``coupling_bounds``
                                                 2024, 2408.07978
===============================================  ==========================  =====================

**Estimating α.**  The formulas take acceptance to be one number, the same everywhere and
independent of what was accepted before.  Text has easy and hard places, and a later draft is judged
only where all earlier ones stood: in the easy ones.  So the share of accepted drafts among those
judged, and the mean of β over them, are too large for α.  Estimate it from the first draft of each
round (``Acceptance.alpha``), or as the mean of ``acceptance(p, q)`` over all positions of a text
that the target wrote; by depth there is ``Acceptance.betas``, for ``expected_tokens_chain``.

Deviations: the geometric sum is added up, term by term: nothing is 0/0 at α = 1.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable

from .. import ops
from ..backend import Array
from ..ops.elementwise import of
from ..shapes import shapes

__all__ = [
    "Acceptance", "acceptance", "best_gamma", "coupling_bounds", "expected_tokens",
    "expected_tokens_chain", "gumbel_match", "operations", "speedup",
]  # fmt: skip


@shapes("... v, ... v -> ...")
def acceptance(p: Array, q: Array) -> Array:
    """Σ min(p, q) = 1 − TV(p, q): how often speculative sampling keeps a draft from q.

    Leviathan et al. 2022, 2211.17192, theorem 3.5.  It is symmetric, 1 only for p = q and 0 only
    for disjoint supports.  Differentiable: its gradient is that of a distillation by TV.

    Args:
        p, q: (…, V) probabilities, arrays or Tensors of any backend.

    Returns:
        (…).
    """
    return ops.sum(ops.minimum(p, q), axis=-1)


def expected_tokens(alpha: float, gamma: int) -> float:
    """1 + α + … + α^γ: the tokens of one target call with γ drafts; from 1 to γ + 1.

    Leviathan et al. 2022, 2211.17192, (1).

    Args:
        alpha: α in [0, 1]; see the top of this file for how to estimate it.
        gamma: γ ≥ 0.

    Raises:
        ValueError: α or γ is out of its range.
    """
    _check(alpha, gamma)
    return expected_tokens_chain(itertools.repeat(alpha, gamma))


def expected_tokens_chain(betas: Iterable[float]) -> float:
    """1 + β₁ + β₁β₂ + …: the tokens of one target call, each draft with an acceptance of its own.

    Exact if β_j is the chance of draft j to stand *given that all before it stand*.  The mean of
    Σ min(p, q) over what the draft writes is another number: it visits rejected beginnings too.

    Args:
        betas: one number in [0, 1] for each draft.

    Raises:
        ValueError: a number is not in [0, 1].
    """
    total = reached = 1.0
    for beta in betas:
        _check(beta, 0)
        reached *= beta
        total += reached
    return total


def speedup(alpha: float, gamma: int, c: float) -> float:
    """E tokens / (γ c + 1): how many times as fast as one target call for each token.

    Leviathan et al. 2022, 2211.17192, theorem 3.8.  A call on γ + 1 tokens is taken to last as long
    as one on a single token, and nothing else to cost time.  γ = 0 is 1.  Some γ gains if and only
    if α > c, and γ = 1 then gains (1 + α)/(1 + c).

    Args:
        alpha: α in [0, 1].
        gamma: γ ≥ 0.
        c: time of a draft step ÷ time of a target call, ≥ 0.

    Raises:
        ValueError: an argument is out of its range.
    """
    return expected_tokens(alpha, gamma) / _cost(gamma, c)


def operations(alpha: float, gamma: int, c: float) -> float:
    """(γ ĉ + γ + 1) / E tokens: by what the arithmetic of one token grows, since some is wasted.

    Leviathan et al. 2022, 2211.17192, theorem 3.11.

    Args:
        alpha: α in [0, 1].
        gamma: γ ≥ 0.
        c: ĉ, operations of the draft ÷ operations of the target for one token, ≥ 0.

    Raises:
        ValueError: an argument is out of its range.
    """
    return (_cost(gamma, c) + gamma) / expected_tokens(alpha, gamma)


def best_gamma(alpha: float, c: float, most: int = 64) -> int:
    """The γ of the largest ``speedup``; the smallest of those that tie, so 0 if α ≤ c.

    The speed-up rises up to it and then falls: its numerator is concave in γ and its denominator
    linear.  At α = 1, and at c = 0 for α > 0, it rises for ever and ``most`` is returned, or as far
    as floating-point numbers see it rise.

    Args:
        alpha: α in [0, 1].
        c: time of a draft step ÷ time of a target call, ≥ 0.
        most: the largest γ that is tried.

    Raises:
        ValueError: an argument is out of its range.
    """
    _check(alpha, most)
    return max(range(most + 1), key=lambda gamma: speedup(alpha, gamma, c))


@shapes("v, v -> ()")
def gumbel_match(p: Array, q: Array) -> Array:
    """P(argmax(ln p + G) = argmax(ln q + G)): how often ``GumbelCoupled`` keeps a draft from q.

    With E = exp(−G) standard exponential, both choose x iff E_y ≥ Eₓ max(p_y/pₓ, q_y/qₓ) for all y;
    integrating over Eₓ gives Σₓ 1/Σ_y max(p_y/pₓ, q_y/qₓ), x over the tokens that both have.

    Args:
        p, q: (V,) probabilities, arrays of one backend; V² numbers are made.

    Returns:
        A 0-d array, within ``coupling_bounds``.
    """
    xp = of(p)
    common = xp.minimum(p, q) > 0.0
    safe_p, safe_q = xp.where(common, p, 1.0), xp.where(common, q, 1.0)
    ratios = xp.maximum(p[None, :] / safe_p[:, None], q[None, :] / safe_q[:, None])
    return xp.where(common, 1.0 / xp.where(common, ratios.sum(axis=1), 1.0), 0.0).sum()


def coupling_bounds(p: Array, q: Array) -> tuple[Array, Array]:
    """(1 − TV)/(1 + TV) and 1 − TV: between these a draft with shared Gumbel noise stands.

    Daliri, Musco & Suresh 2024, 2408.07978.  The upper bound holds for every coupling and is what
    speculative sampling attains, whose text depends on the draft.

    Args:
        p, q: (…, V) probabilities.

    Returns:
        Two arrays (…).
    """
    same = acceptance(p, q)
    return same / (2.0 - same), same


class Acceptance:
    """Counts of what was accepted, round by round, from which α can be estimated without bias.

    The share of all judged drafts that stood is no such estimate: see the top of this file.
    """

    def __init__(self) -> None:
        self.rounds = 0
        self.drafted = 0
        self.accepted = 0
        self.judged: list[int] = []
        """At each depth, the rounds in which all drafts before it stood."""
        self.stood: list[int] = []
        """At each depth, the rounds in which its draft stood too."""

    def add(self, drafted: int, accepted: int) -> None:
        """Count one round.

        Args:
            drafted: g ≥ 0.
            accepted: how many of them stood.

        Raises:
            ValueError: not 0 ≤ accepted ≤ drafted.
        """
        if not 0 <= accepted <= drafted:
            raise ValueError(f"of {drafted} drafts 0 … {drafted} are accepted, got {accepted}")
        self.rounds += 1
        self.drafted += drafted
        self.accepted += accepted
        missing = drafted - len(self.judged)
        self.judged += [0] * missing
        self.stood += [0] * missing
        for depth in range(min(accepted + 1, drafted)):
            self.judged[depth] += 1
            self.stood[depth] += depth < accepted

    @property
    def emitted(self) -> int:
        """The tokens of all rounds: the accepted ones and one correction or bonus for each."""
        return self.accepted + self.rounds

    @property
    def alpha(self) -> float:
        """The share of first drafts that stood; nan before there was one."""
        return self.stood[0] / self.judged[0] if self.judged and self.judged[0] else math.nan

    @property
    def betas(self) -> list[float]:
        """For each depth that was reached, the share that stood of those that were judged.

        Rounds of fewer drafts are no witnesses against greater depths.
        """
        pairs = zip(self.stood, self.judged, strict=True)
        return [stood / judged for stood, judged in pairs if judged]

    @property
    def tokens_per_call(self) -> float:
        """Emitted tokens for each target call; nan before there was one."""
        return self.emitted / self.rounds if self.rounds else math.nan


def _check(alpha: float, gamma: int) -> None:
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"an acceptance rate is between 0 and 1, got {alpha}")
    if gamma < 0:
        raise ValueError(f"a round has gamma ≥ 0 drafts, got {gamma}")


def _cost(gamma: int, c: float) -> float:
    if not c >= 0.0:
        raise ValueError(f"a draft step costs c ≥ 0 target calls, got {c}")
    return gamma * c + 1.0
