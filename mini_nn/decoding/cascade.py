"""Two models on one text, other than draft and verify: stages, fallback, routing, overlap.

===========================================  ============================  =====================
the draft is itself drafted and verified     Spector & Ré 2023, *Staged    ``StagedDraft``
                                             Speculative Decoding*,
                                             2308.04623, 3.2; Z. Chen et
                                             al. 2023, 2312.11462
the small model writes until its best token  Kim et al. 2023, *Speculative ``Fallback``
has less than a                              Decoding with Big Little
                                             Decoder*, 2302.07863, 3.3
the large one takes back from the first      there, 3.4                    ``Rollback``
token on whose −ln p is above b
drafting goes on while the target verifies   T. Liu et al. 2024, *PEARL*,  ``pearl``
                                             2408.11850, 4
one model per query, chosen beforehand       the contrast                  ``Router``
===========================================  ============================  =====================

Stages and PEARL are exact: what they emit has the target's law.  BiLD and routing are not: the
first bounds how far each kept token is from the target, the second gives up on some texts.

Deviations: BiLD lets the small model write on without a limit, here it is at most ``count`` tokens,
after which the large model looks at them.  PEARL has two kinds of phases, verifying only the first
token of a block (*pre-verify*) or the block before it (*post-verify*); here a phase verifies
whatever is pending and the first fresh token, which is both of them.  Its time is that of a clock
which charges what it is told, for there is one processor here: nothing really overlaps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .. import backend
from ..backend import Array
from .draft import Draft, Proposal, Rows, draw_chain
from .processors import Warper
from .source import Source, Verdict, accept, laws, residual
from .tree import TokenTree
from .verify import greedy, speculative_sampling

__all__ = ["Fallback", "Rollback", "Router", "StagedDraft", "Timed", "pearl"]


@dataclass(frozen=True)
class StagedDraft:
    """A draft model that decodes speculatively itself, with a cheaper draft of chains below it.

    Spector & Ré 2023, 2308.04623, section 3.2.  The tokens have the law of ``rows``, as if they had
    been drawn from it one by one, and that is their q; only the number of its calls is smaller.

    Args:
        rows: the draft's model.
        inner: what drafts for it; another ``StagedDraft`` will do.
        count: how many tokens it is asked for at a time, ≥ 0.

    Raises:
        ValueError: ``count`` is negative.
    """

    rows: Rows
    inner: Draft
    count: int = 4

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ValueError(f"a stage asks the one below for count ≥ 0 tokens, got {self.count}")

    def propose(self, text: Sequence[int], count: int, warper: Warper, source: Source) -> Proposal:
        """As every draft; all ``count`` tokens, with q.

        Raises:
            TypeError: the inner draft proposes trees.
        """
        known, found = list(text), list[Array]()
        while (left := count - (len(known) - len(text))) > 0:
            offer = self.inner.propose(known, min(self.count, left - 1), warper, source)
            if isinstance(offer.tokens, TokenTree):
                raise TypeError("a stage verifies chains, but the draft below it proposes trees")
            logits = self.rows([*known, *offer.tokens], len(offer.tokens) + 1)
            p = laws("q", warper(logits, known, offer.tokens))
            verdict = speculative_sampling(offer.tokens, offer.laws(p.shape[1]), p, source)
            known += [*offer.tokens[: verdict.accepted], verdict.token]
            found.append(p[: verdict.accepted + 1])
        q = backend.get("numpy").xp.concatenate(found) if found else None
        return Proposal(known[len(text) :], q)


@dataclass(frozen=True)
class Fallback:
    """BiLD's small model: its best tokens, as long as it is confident.

    Kim et al. 2023, 2302.07863, section 3.3.  The token whose probability is below the threshold is
    not offered: the large model writes it.  That is no bias, for the tokens are chosen, not drawn.

    Args:
        rows: the small model.
        threshold: a; 0 offers ``count`` tokens always, and anything above 1 none.
    """

    rows: Rows
    threshold: float

    def propose(self, text: Sequence[int], count: int, warper: Warper, source: Source) -> Proposal:
        """As every draft; a function of the text, so q is None."""
        known = list(text)
        while len(known) < len(text) + count:
            law = laws("q", warper(self.rows(known, 1), known))[0]
            best = int(law.argmax())
            if law[best] < self.threshold:
                break
            known.append(best)
        return Proposal(known[len(text) :], None)


@dataclass(frozen=True)
class Rollback:
    """BiLD's verification: tokens stand up to the first one that the large model finds improbable.

    Kim et al. 2023, 2302.07863, section 3.4.  The distance of a token is its cross-entropy
    −ln p(x).  A ``Rule``: no law is kept, and the token that follows is the large model's best one.

    Args:
        threshold: b ≥ 0, in nats.  Infinity keeps every token, even with p = 0; at 0 only what has
            p = 1 stands.  With temperature 0 any finite b is ``greedy``.

    Raises:
        ValueError: b is negative or nan.
    """

    threshold: float

    def __post_init__(self) -> None:
        if not self.threshold >= 0.0:
            raise ValueError(f"a rollback threshold is ≥ 0 nats, got {self.threshold}")

    def __call__(
        self, tokens: Sequence[int] | Array, q: Array | None, p: Array, source: Source
    ) -> Verdict:
        """As every rule; neither q nor the source is used."""
        p = laws("p", p)
        greedy(tokens, None, p, source)  # looks at the shapes
        best = p.argmax(axis=1)
        for i, x in enumerate(tokens):
            distance = -math.log(p[i, x]) if p[i, x] > 0.0 else math.inf
            if distance > self.threshold:
                return Verdict(i, int(best[i]))
        return Verdict(len(tokens), int(best[-1]))


@dataclass(frozen=True)
class Router:
    """One of two models for a whole text, chosen by its prompt: what speculation is not.

    The small model's texts have the small model's law.  What is saved does not depend on how
    alike the two are, and neither is anything corrected.

    Args:
        small, large: the models.
        score: of a prompt, how hard it is.
        threshold: harder ones than this go to the large model.
    """

    small: Rows
    large: Rows
    score: Callable[[Sequence[int]], float]
    threshold: float

    def choose(self, prompt: Sequence[int]) -> Rows:
        """The model that is to write all of the text after this prompt."""
        return self.large if self.score(prompt) > self.threshold else self.small

    def cost(self, prompts: Sequence[Sequence[int]], c: float) -> float:
        """The mean time of a token in units of the large model's, the small model's being c.

        Raises:
            ValueError: there is no prompt.
        """
        if not prompts:
            raise ValueError("the mean cost of no prompt is not defined")
        hard = sum(self.score(prompt) > self.threshold for prompt in prompts) / len(prompts)
        return hard + (1.0 - hard) * c


class Timed(NamedTuple):
    """What a run on a clock did."""

    tokens: list[int]
    time: float
    """In units of one call of the target."""
    calls: int
    """Of the target."""


def pearl(
    target: Rows,
    draft: Rows,
    text: Sequence[int],
    count: int,
    ahead: int,
    c: float,
    warper: Warper,
    source: Source,
) -> Timed:
    """Decode with a draft that writes on while the target verifies what it wrote before.

    T. Liu et al. 2024, 2408.11850, section 4.  In a phase, which lasts as long as the longer of
    the two, the draft writes ``ahead`` fresh tokens after those that are pending, and the target
    is called for text and pending tokens: its rows judge these, and the first fresh one.  If all
    stand, the other fresh ones are pending next; else they are thrown away.  With drafts that
    always stand each phase but the first, which has nothing pending and gives one token, gives
    ``ahead`` in the time max(1, c · ahead), where verifying in turn gives ``ahead`` + 1 in 1 + c ·
    ahead.  With drafts that never do it gives 1.

    Args:
        target, draft: the models.
        text: at least one token.
        count: how many tokens; the last phase may have had more, which are dropped.
        ahead: how many tokens the draft writes in a phase, ≥ 1; about 1/c is best.
        c: the time of one draft step.
        warper: makes the laws of both.
        source: the choices.

    Raises:
        ValueError: ``ahead`` is below 1 or c is negative.
    """
    if ahead < 1 or not c >= 0.0:
        raise ValueError(f"pearl drafts ahead ≥ 1 tokens in c ≥ 0 each, got {ahead} and {c}")
    known, pending, q, calls = list(text), list[int](), list[Array](), 0
    while len(known) < len(text) + count:
        fresh = draw_chain(draft, [*known, *pending], ahead, warper, source)
        assert isinstance(fresh.tokens, list) and fresh.q is not None
        logits = target([*known, *pending], len(pending) + 1)
        p = laws("p", warper(logits, known, pending))
        calls += 1
        drafts, drafted = [*pending, *fresh.tokens], [*q, *fresh.q]
        pending, q = drafts[len(p) :], drafted[len(p) :]
        for i, x in enumerate(drafts[: len(p)]):
            if not accept(float(p[i, x]), float(drafted[i][x]), source):
                known.append(source.categorical(residual(p[i], drafted[i])))
                pending, q = [], []
                break
            known.append(x)
    return Timed(known[len(text) : len(text) + count], calls * max(1.0, c * ahead), calls)
