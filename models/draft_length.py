"""How many tokens to draft: policies that look at what stood, and rules that stop at a doubt.

===========================================  ============================  =====================
two more after a block that stood whole,     Gante 2023, *Assisted         ``PlusTwoMinusOne``
one fewer otherwise                          Generation* (code of
                                             Hugging Face's ``generate``)
stop behind a draft that is improbable       J. Zhang et al. 2023,         ``Confidence``,
                                             2309.08168                    ``Stopping``
stop where 1 − √(γ H(q)) < λ                 Agrawal, Jeon & Lee 2024,     ``EntropyBound``
                                             *AdaEDL*, 2410.18351
λ ← β₂ λ + (1 − β₂)(λ ± ε), + where the      2309.08168                    ``Stop.after``
share that stands, averaged with β₁, is at
most α
===========================================  ============================  =====================

The length changes the speed only, as long as no token that was drawn is thrown away for what it is:
a token in whose stead nothing is judged leaves the law biased against it.  So a draft may end
behind any token, but that token stays.

Deviations: what makes the draft stop is looked at after the token is drawn, and it is kept; a law
that says stop could as well keep the token from being drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

from mini_nn import backend
from mini_nn.backend import Array
from mini_nn.decoding import Source, TokenTree, Warper
from mini_nn.decoding.draft import Draft, Proposal

from .cached import shared

__all__ = [
    "Confidence", "Constant", "EntropyBound", "Lengths", "PlusTwoMinusOne", "Stop", "Stopping",
    "model_seconds",
]  # fmt: skip


class Lengths(Protocol):
    """A policy of draft lengths: a value, so that every row has a state of its own."""

    @property
    def first(self) -> int:
        """How many drafts to ask for in the first round."""

    def after(self, count: int, accepted: int) -> int:
        """How many drafts to ask for, when ``count`` were asked for and ``accepted`` stood."""


@dataclass(frozen=True)
class Constant:
    """Always as many."""

    first: int = 4

    def after(self, count: int, accepted: int) -> int:
        """``first`` again."""
        return self.first


@dataclass(frozen=True)
class PlusTwoMinusOne:
    """Hugging Face's heuristic: two more if all stood, else one fewer, but at least one.

    Args:
        first: how many in the first round.
        most: how many at most.
    """

    first: int = 5
    most: int = 64

    def after(self, count: int, accepted: int) -> int:
        """A block that the draft cut short counts as one that did not stand, as there."""
        return min(count + 2, self.most) if accepted == count else max(count - 1, 1)


@dataclass(frozen=True)
class Stop:
    """Whether a draft ends behind a token, by comparison of a number with a threshold.

    Args:
        threshold: λ.
        aim: α, the share of drafts that should stand; None leaves λ as it is.
        rate: the average share so far; None before the first round.
        step: ε.
        rate_memory: β₁.
        memory: β₂.
    """

    threshold: float
    aim: float | None = None
    rate: float | None = None
    step: float = 0.01
    rate_memory: float = 0.5
    memory: float = 0.9

    def __call__(self, law: Array, token: int) -> bool:
        """Whether nothing is drafted behind ``token``, which was drafted from ``law`` (V,)."""
        raise NotImplementedError(f"{type(self).__name__} does not say when to stop")

    def after(self, drafted: int, accepted: int) -> Self:
        """With λ moved by what became of a round; 2309.08168, 3.3."""
        if self.aim is None or not drafted:
            return self
        rate = accepted / drafted
        if self.rate is not None:
            rate = self.rate_memory * self.rate + (1.0 - self.rate_memory) * rate
        moved = self.threshold + (self.step if rate <= self.aim else -self.step)
        threshold = self.memory * self.threshold + (1.0 - self.memory) * moved
        return replace(self, rate=rate, threshold=threshold)


class Confidence(Stop):
    """Stop where the draft gave its token less than λ; 2309.08168, 3.3."""

    def __call__(self, law: Array, token: int) -> bool:
        return float(law[token]) < self.threshold


@dataclass(frozen=True)
class EntropyBound(Stop):
    """Stop where 1 − √(γ H), a bound on the acceptance, is below λ; 2410.18351.

    Args:
        gamma: γ, 0.2 in the paper; H is in nats.
        Otherwise as ``Stop``.
    """

    gamma: float = 0.2

    def __call__(self, law: Array, token: int) -> bool:
        entropy = -sum(x * math.log(x) for x in law.tolist() if x > 0.0)
        return 1.0 - math.sqrt(self.gamma * entropy) < self.threshold


class Stopping:
    """A draft that asks another for one token after the other, until a rule says stop.

    The token that made it stop stays: whether a token is judged never depends on itself, so that
    the law of the text is as it was.

    Args:
        draft: proposes chains, with the laws that it draws from.
        stop: see ``Confidence`` and ``EntropyBound``.
        law: what the rule reads for the token after a text, (V,) host probabilities; None for q.
            At temperature 0 q is one-hot and says nothing: pass the draft's softmax.

    Raises:
        TypeError: the draft proposes a tree, or no q where ``law`` is None.
    """

    def __init__(
        self, draft: Draft, stop: Stop, law: Callable[[Sequence[int]], Array] | None = None
    ) -> None:
        self.draft, self.stop, self.law = draft, stop, law
        self._before: tuple[int, list[int]] = (0, [])

    @property
    def seconds(self) -> float:
        """What the draft spent in its model."""
        return model_seconds(self.draft)

    def propose(self, text: Sequence[int], count: int, warper: Warper, source: Source) -> Proposal:
        """As every draft; fewer tokens where it stops."""
        known = list(text)
        length, drafts = self._before
        self.stop = self.stop.after(len(drafts), shared(known[length:], drafts))
        start, rows = len(known), list[Array]()
        while len(known) - start < count:
            offer = self.draft.propose(known, 1, warper, source)
            if isinstance(offer.tokens, TokenTree) or (offer.q is None and self.law is None):
                raise TypeError(
                    "Stopping reads the law of each token of a chain: pass `law` where the draft "
                    "has no q; a tree cannot be stopped"
                )
            if not offer.tokens:
                break
            seen = self.law(known) if self.law is not None else offer.q[0]  # type: ignore[index]
            rows.append(offer.q)
            known += offer.tokens
            if self.stop(seen, known[-1]):
                break
        self._before = (start, known[start:])
        if any(row is None for row in rows) or not rows:
            return Proposal(known[start:], None)
        return Proposal(known[start:], backend.of(rows[0]).concatenate(rows, axis=0))


def model_seconds(draft: Any) -> float:
    """Time that a draft, or the model that it has, spent in passes; 0 where it does not say."""
    own = getattr(draft, "seconds", None)
    return float(getattr(getattr(draft, "model", None), "seconds", 0.0) if own is None else own)
