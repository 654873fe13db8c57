"""Drafts: what a verifier is offered, and the drafts that need no model.

===========================================  ============================  =====================
propose, verify, emit 1 … g + 1 tokens       Leviathan, Kalman & Matias    ``Draft``, ``Proposal``
                                             2022, 2211.17192, alg. 1
the longest end of the text, of at most N    Saxena 2023, *Prompt Lookup   ``PromptLookup``
tokens, that occurred before; what followed  Decoding* (code); N. Yang
it then                                      et al. 2023, *Inference with
                                             Reference*, 2304.04487, 2.1
(c(h x) + T(h) P(x | h′))/(c(h) + T(h))      Witten & Bell 1991; Chen &    ``NGramModel``,
                                             Goodman 1996,                 ``NGramDraft``
                                             cmp-lg/9606011, 2.4
===========================================  ============================  =====================

Every scheme of speculative decoding is a ``Draft`` and a verifier, and a model is a function
``rows(tokens, count)``: (count, V) host logits of the tokens that follow the last ``count`` of the
texts tokens[:1], tokens[:2] … tokens.  The draft is asked anew in each
round, for the whole text that is verified so far; whatever it keeps between the calls is a cache of
that text and changes its cost only.  So there is nothing to roll back.

c(h x) counts how often x followed h, c(h) is its sum over x, T(h) the number of different x among
them, h′ is h without its first token; below the empty history is the uniform law.

Deviations: none of prompt lookup in Hugging Face's ``generate``, where several places match: the
longest match, and of these the first; see ``PromptLookup``.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from .. import backend
from ..backend import Array
from .processors import Warper
from .source import Source, laws, one_hot
from .tree import TokenTree

__all__ = [
    "Draft", "NGramDraft", "NGramModel", "NoDraft", "PromptLookup", "Proposal", "Rows",
    "draw_chain",
]  # fmt: skip

Rows = Callable[[Sequence[int], int], Array]
"""``rows(tokens, count)``: row j, of ``count``, is the logits after the first len(tokens) − count +
1 + j tokens; a host array (count, V), 1 ≤ count ≤ len(tokens)."""


class Proposal(NamedTuple):
    """What a draft offers for one round."""

    tokens: list[int] | TokenTree
    """A chain of tokens, which may be empty, or a tree below the last token of the text."""
    q: Array | None
    """What they were drawn from, host float64: (g, V), or (nodes, V) of a tree, whose row u is the
    law of the children of node u.  None: they were not drawn but are a function of the text."""

    def laws(self, size: int) -> Array:
        """q for a rule that reads it: (g, V) or (nodes, V), one-hot where the draft has none.

        Args:
            size: V.

        Raises:
            ValueError: a node of a tree has several children but no law: no row says which comes
                first, so take a rule that does not read q.
        """
        if self.q is not None:
            return self.q
        rows = backend.get("numpy").xp.zeros
        if not isinstance(self.tokens, TokenTree):
            found = rows((len(self.tokens), size))
            for i, token in enumerate(self.tokens):
                found[i] = one_hot(token, size)
            return found
        found = rows((len(self.tokens), size))
        for node in range(len(self.tokens)):
            children = self.tokens.children(node)
            if len(children) > 1:
                raise ValueError(
                    f"node {node} has {len(children)} children that were chosen, and no one-hot row"
                    " is the law of them all: verify with deterministic_children, match_children "
                    "or greedy_children"
                )
            for child in children:
                found[node] = one_hot(self.tokens.tokens[child], size)
        return found


class Draft(Protocol):
    """A source of proposals."""

    def propose(self, text: Sequence[int], count: int, warper: Warper, source: Source) -> Proposal:
        """What may follow the text.

        Args:
            text: all that is verified so far, at least one token; it is not changed.
            count: how many tokens at most; the depth of a tree.  It may be 0.
            warper: makes the law of a drawn token; the same for all drafts of a round.
            source: the choices, if any are drawn.

        Returns:
            Perhaps fewer than ``count`` tokens, and perhaps none.
        """


class NoDraft:
    """Proposes nothing: one token per call of the target, which is plain decoding."""

    def propose(self, text: Sequence[int], count: int, warper: Warper, source: Source) -> Proposal:
        """As every draft; nothing is asked and nothing drawn."""
        return Proposal([], None)


@dataclass(frozen=True)
class PromptLookup:
    """The text continues as it did when its end occurred before.

    Saxena 2023 (code); 2304.04487, 2.1.  For n = N … 1 the last n tokens are looked for from the
    start of the text on; of the first n with a match, the first place is taken, and what follows it
    is proposed, up to the end of the text.  The end itself is no match, for nothing follows it, but
    a match may overlap it: "a a a" proposes "a".  This is the policy of Hugging Face's
    ``prompt_lookup_num_tokens``.

    Args:
        largest: N ≥ 1, the longest end that is looked for.
        ends: tokens that end a text; a proposal stops before the first of them.

    Raises:
        ValueError: N is below 1.
    """

    largest: int = 2
    ends: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.largest < 1:
            raise ValueError(f"prompt lookup matches at least 1 token, got {self.largest}")

    def propose(self, text: Sequence[int], count: int, warper: Warper, source: Source) -> Proposal:
        """As every draft; a function of the text, so q is None."""
        known = text if isinstance(text, list) else list(text)
        found = self._follower(known)
        if found is None or count < 1:
            return Proposal([], None)
        drafts = known[found : found + count]
        stops = [i for i, token in enumerate(drafts) if token in self.ends]
        return Proposal(drafts[: stops[0]] if stops else drafts, None)

    def _follower(self, text: list[int]) -> int | None:
        """Where what follows the best match begins."""
        last = len(text) - 1
        best, found, place = 0, None, -1
        while best < self.largest:
            try:  # from one occurrence of the last token to the next, at the speed of list.index
                place = text.index(text[last], place + 1, last)
            except (ValueError, IndexError):
                break
            length = 1
            while length < min(self.largest, place + 1) and (
                text[place - length] == text[last - length]
            ):
                length += 1
            if length > best:
                best, found = length, place + 1
        return found


class NGramModel:
    """P(x | the last ``order`` − 1 tokens), from counts: each order interpolated with the next.

    Witten & Bell 1991, as in Chen & Goodman 1996, cmp-lg/9606011, 2.4.  Every token has a positive
    probability, and without any text all have the same.

    Args:
        order: n ≥ 1; 1 ignores the history.
        size: V ≥ 1, the vocabulary.
        text: host integers that are counted; ``count`` adds more.

    Raises:
        ValueError: the order or the vocabulary is below 1, or a token is not in 0 … V − 1.
    """

    def __init__(self, order: int, size: int, text: Iterable[int] = ()) -> None:
        if order < 1 or size < 1:
            raise ValueError(
                f"an n-gram model has an order ≥ 1 and a vocabulary ≥ 1, got {order} and {size}"
            )
        self.order, self.size = order, size
        self.followers: dict[tuple[int, ...], dict[int, int]] = {}
        """Of each history of 0 … order − 1 tokens: how often each token followed it."""
        self.count(text)

    def count(self, text: Iterable[int]) -> None:
        """Count one more text, whose start follows nothing."""
        tokens = [operator.index(x) for x in text]
        if tokens and not 0 <= min(tokens) <= max(tokens) < self.size:
            raise ValueError(
                f"the tokens are 0 … {self.size - 1}, got {min(tokens)} … {max(tokens)}"
            )
        for i, token in enumerate(tokens):
            for length in range(min(self.order - 1, i) + 1):
                counts = self.followers.setdefault(tuple(tokens[i - length : i]), {})
                counts[token] = counts.get(token, 0) + 1

    def law(self, text: Sequence[int]) -> Array:
        """P(· | text): (V,) host float64, all positive; the text may be empty."""
        law = backend.get("numpy").xp.full(self.size, 1.0 / self.size)
        for length in range(min(self.order - 1, len(text)) + 1):
            counts = self.followers.get(tuple(text[len(text) - length :]))
            if counts is None:  # then no longer history occurred either
                break
            whole, kinds = float(sum(counts.values())), float(len(counts))
            law *= kinds / (whole + kinds)
            for token, times in counts.items():
                law[token] += times / (whole + kinds)
        return law

    def rows(self, tokens: Sequence[int], count: int) -> Array:
        """(count, V) logits, ln P: the model as ``Rows``."""
        xp, text = backend.get("numpy").xp, list(tokens)
        first = len(text) - count + 1
        return xp.log(xp.stack([self.law(text[: first + j]) for j in range(count)]))


@dataclass(frozen=True)
class NGramDraft:
    """Draws from an n-gram model, token by token; it costs no model call.

    Args:
        model: whose laws are warped as the target's are.
    """

    model: NGramModel

    def propose(self, text: Sequence[int], count: int, warper: Warper, source: Source) -> Proposal:
        """As every draft; q has the laws that were drawn from."""
        return draw_chain(self.model.rows, text, count, warper, source)


def draw_chain(
    rows: Rows,
    text: Sequence[int],
    count: int,
    warper: Warper,
    source: Source,
    stop: Callable[[int, Array], bool] | None = None,
) -> Proposal:
    """One token after another, each drawn from the warped row after the ones before it.

    Args:
        rows: the draft's model, called for one row per token.
        text: what is verified so far.
        count: how many tokens at most.
        warper: makes the laws.
        source: one choice per token.
        stop: asked after each draw, with the token and the law (V,) it was drawn from; true makes
            it the last one.  The token is offered all the same: to drop one that was drawn because
            of what it is would change its law, and make the verifier's output biased.

    Returns:
        q (g, V) has the laws that were drawn from, float64.
    """
    known = list(text)
    start = len(known)
    found: list[Array] = []
    while len(found) < count:
        law = laws("q", warper(rows(known, 1), known))
        token = source.categorical(law[0])
        known.append(token)
        found.append(law)
        if stop is not None and stop(token, law[0]):
            break
    return Proposal(known[start:], backend.get("numpy").xp.concatenate(found) if found else None)
