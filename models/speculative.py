"""Speculative decoding of whole texts: a draft proposes, the target judges in one call, repeat.

===========================================  ============================  =====================
g drafts and one call give 1 … g + 1 tokens  Leviathan, Kalman & Matias    ``speculative_``
                                             2022, 2211.17192, alg. 1;     ``generate``
                                             C. Chen et al. 2023,
                                             2302.01318, alg. 2
a tree of drafts, one call                   Miao et al. 2023, 2305.09781, the same, for drafts
                                             alg. 2                        that propose trees
rows that accept different numbers           Z. Sun et al. 2023,           ``CachedBatch``
                                             2310.15141
noise of each position that draft, target    Daliri, Musco & Suresh 2024,  ``NoiseSource``
and plain decoding share                     2408.07978
===========================================  ============================  =====================

The rules that judge are those of ``mini_nn.decoding``, which prove that the law of the text is the
target's; here is what is around them: caches, ends, budgets, counts.

Deviations: a prompt is fed together with the first drafts, so there are no calls of the target but
those of the rounds; a batch is given as texts of any lengths.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from mini_nn import Rng, default_rng
from mini_nn.backend import Array
from mini_nn.decoding import (
    Acceptance,
    NodeRule,
    RngSource,
    Rule,
    Source,
    TokenTree,
    Verdict,
    Warper,
    deterministic,
    deterministic_children,
    greedy,
    gumbel_token,
    speculative_sampling,
    tree_laws,
    verify_tree,
    verify_tree_greedily,
    without_replacement,
)
from mini_nn.decoding.draft import Draft, Proposal
from mini_nn.nn import Module

from .cached import CachedBatch, CachedModel
from .draft_length import Constant, Lengths, model_seconds

__all__ = [
    "CachedBatch", "CachedModel", "Counts", "NoiseSource", "Speculated", "Target",
    "speculative_generate",
]  # fmt: skip


class Target(Protocol):
    """What judges one text: a ``CachedModel``, or what can be asked in the same way.

    One that is asked about trees has ``tree_logits`` and ``keep`` too.
    """

    calls: int
    seconds: float

    def logits(self, tokens: Sequence[int], rows: int = 1) -> Array:
        """See ``CachedModel.logits``."""


class NoiseSource:
    """Choices that are a function of the position: the text does not depend on the draft at all.

    Daliri, Musco & Suresh 2024, 2408.07978.  As ``rng`` of ``speculative_generate``, with the rule
    ``sample_match``: the draft draws its tokens with the noise with which the target judges them,
    and every draft and every length give the text of plain decoding, ``NoDraft``.

    Args:
        noise: (n, V) standard Gumbel numbers, host; row i draws token i of the text, its prompt
            counted.
        start: the position that is drawn next.
    """

    def __init__(self, noise: Array, start: int = 0) -> None:
        self.noise, self.place = noise, start

    def at(self, start: int) -> NoiseSource:
        """The choices from this position on."""
        return NoiseSource(self.noise, start)

    def categorical(self, p: Array) -> int:
        """``gumbel_token`` with the next row.

        Raises:
            ValueError: there is no further row.
        """
        if self.place >= len(self.noise):
            raise ValueError(
                f"token {self.place} of a text needs row {self.place} of the noise, which has "
                f"{len(self.noise)}: prompt and new tokens need one each"
            )
        self.place += 1
        return gumbel_token(p, self.noise[self.place - 1])

    def bernoulli(self, a: float) -> bool:
        """Nothing here depends on coins."""
        raise TypeError("shared noise draws tokens, it tosses no coins: pass rule=sample_match")


@dataclass
class Counts:
    """What became of the drafts of one row."""

    accepted: int = 0
    """Drafts that were emitted."""
    corrections: int = 0
    """Tokens in the place of a draft that did not stand."""
    bonuses: int = 0
    """Tokens behind drafts that all stood, or behind none."""
    rounds: int = 0
    """Each is one call of the target."""
    acceptance: Acceptance = field(default_factory=Acceptance)
    """Verdicts as they were, also of drafts behind the end of the text."""

    @property
    def emitted(self) -> int:
        """All new tokens."""
        return self.accepted + self.corrections + self.bonuses


@dataclass
class Speculated:
    """Texts, and what they cost."""

    texts: list[list[int]]
    """Prompts with what follows them; where a row has ended, its EOS token is the last."""
    counts: list[Counts]
    target_calls: int
    """Calls for all rows together."""
    seconds: float
    target_seconds: float
    draft_seconds: float
    """Spent in the drafts' models, as far as the drafts say (an attribute ``seconds``)."""

    @property
    def overhead(self) -> float:
        """The share of the time that was spent outside of the models."""
        spent = self.target_seconds + self.draft_seconds
        return 1.0 - spent / self.seconds if self.seconds > 0.0 else 0.0


@dataclass
class _Settings:
    rule: Rule | None
    node_rule: NodeRule | None
    lengths: Lengths
    warper: Warper
    ends: frozenset[int]


class _Row:
    """One text on its way."""

    def __init__(
        self, text: list[int], left: int, draft: Draft, source: Source, settings: _Settings
    ) -> None:
        self.text, self.left, self.draft, self.source = text, left, draft, source
        self.settings, self.count, self.counts = settings, settings.lengths.first, Counts()

    def offer(self) -> Proposal:
        """What the draft proposes; never so much that the last token would be one too many."""
        most = min(self.count, self.left - 1)
        if most <= 0:
            return Proposal([], None)
        offer = self.draft.propose(self.text, most, self.settings.warper, self._source())
        drafts = offer.tokens
        depth = int(drafts.depths.max()) if isinstance(drafts, TokenTree) else len(drafts)
        if depth > most:
            raise ValueError(
                f"{type(self.draft).__name__} was asked for {most} tokens, got {depth}"
            )
        return offer

    def settle(self, offer: Proposal, logits: Array) -> Verdict:
        """Judge, and write down what is emitted."""
        logits = logits.astype("float64", copy=False)
        counts, settings = self.counts, self.settings
        if isinstance(offer.tokens, TokenTree):
            tree = offer.tokens
            verdict = self._judge_tree(tree, offer.q, logits)
            block = [tree.tokens[node] for node in verdict.path]
            whole = not tree.children(verdict.path[-1] if verdict.path else 0)
            drafted = verdict.accepted if whole else verdict.accepted + 1
        else:
            verdict = self._judge_chain(offer.tokens, offer, logits)
            block = offer.tokens[: verdict.accepted]
            drafted = len(offer.tokens)
            whole = verdict.accepted == drafted
        emitted = [*block, verdict.token]
        end = next((i for i, token in enumerate(emitted) if token in settings.ends), None)
        if end is not None:
            emitted = emitted[: end + 1]
        counts.rounds += 1
        counts.acceptance.add(drafted, verdict.accepted)
        counts.accepted += min(len(emitted), len(block))
        if len(emitted) > len(block):
            counts.bonuses += whole
            counts.corrections += not whole
        self.text = self.text + emitted  # a new list: a draft may have kept the old one
        self.left = self.left - len(emitted) if end is None else 0
        self.count = settings.lengths.after(self.count, verdict.accepted)
        return verdict

    def _judge_chain(self, drafts: list[int], offer: Proposal, logits: Array) -> Verdict:
        warper, rule = self.settings.warper, self.settings.rule
        p = warper(logits, self.text, drafts)
        q = offer.q
        if rule is not None:
            q = offer.laws(p.shape[1])
        elif warper.temperature == 0:
            rule = greedy
        else:
            rule = deterministic if q is None else speculative_sampling
        return rule(drafts, q, p, self._source())

    def _judge_tree(self, tree: TokenTree, q: Array | None, logits: Array) -> Verdict:
        p, rule = tree_laws(logits, self.text, tree, self.settings.warper), self.settings.node_rule
        if rule is None and self.settings.warper.temperature == 0:
            return verify_tree_greedily(tree, p)
        if rule is None:
            rule = deterministic_children if q is None else without_replacement
        return verify_tree(tree, q, p, rule, self._source())

    def _source(self) -> Source:
        """Where shared noise is the source, a position is drawn with its own, by either side."""
        return self.source.at(len(self.text)) if hasattr(self.source, "at") else self.source


class _Targets:
    """Calls of the target for those rows that go on."""

    def __init__(self, target: Any, batch: int) -> None:
        self.model: Any = target if isinstance(target, Module) else None
        if self.model is None and batch > 1:
            raise ValueError(
                f"a {type(target).__name__} holds one text, got {batch}: pass the model itself"
            )
        self.alone: dict[int, Any] = {} if self.model is not None else {0: target}
        self.batch = CachedBatch(target, batch) if batch > 1 else None
        self.before = (0, 0.0) if self.model is not None else (target.calls, target.seconds)

    def single(self, row: int) -> Any:
        """The target of one row: where it is the only one, and for trees."""
        if row not in self.alone:
            self.alone[row] = CachedModel(self.model)
        return self.alone[row]

    def logits(self, rows: list[_Row], offers: dict[int, Proposal]) -> dict[int, Array]:
        """The target's rows for each offer: all chains in one call, each tree in its own."""
        found: dict[int, Array] = {}
        chains = {}
        for i, offer in offers.items():
            if isinstance(offer.tokens, TokenTree):
                found[i] = self.single(i).tree_logits(rows[i].text, offer.tokens)
            else:
                chains[i] = rows[i].text + offer.tokens
        if self.batch is not None and chains:
            texts = [chains.get(i, []) for i in range(len(rows))]
            counts = [len(offers[i].tokens) + 1 if i in chains else 0 for i in range(len(rows))]
            answers = self.batch.logits(texts, counts)
            found |= {i: answers[i] for i in chains}
        else:
            for i, text in chains.items():
                found[i] = self.single(i).logits(text, len(offers[i].tokens) + 1)
        return found

    def spent(self) -> tuple[int, float]:
        """Calls and seconds since the beginning."""
        asked = [*self.alone.values(), *([] if self.batch is None else [self.batch])]
        calls = sum(one.calls for one in asked) - self.before[0]
        return calls, sum(one.seconds for one in asked) - self.before[1]


def speculative_generate(
    target: Any,
    draft: Any,
    texts: Sequence[Sequence[int]],
    max_new_tokens: int,
    rule: Rule | None = None,
    node_rule: NodeRule | None = None,
    count: int | Lengths = 4,
    warper: Warper | None = None,
    eos: Collection[int] = (),
    rng: Any = None,
) -> Speculated:
    """Continue texts with the target's law, or its greedy choice, in fewer calls of it.

    Rows that are continued together are fed in one call, each at its own length; a row that ends
    takes no further part.  Every row is continued as it would be alone with its generator, up to
    what the rounding of another shape of the same pass decides.  Trees are passed row by row.

    Args:
        target: a GPT; for one text also a ``Target``, whose cache then is used and kept.
        draft: a ``Draft`` or a GPT with the same vocabulary; or one of these for each text.  Rows
            may share a draft, but one with a cache then has to fill it anew for each.
        texts: host integers, at least one per text; they may have different lengths.
        max_new_tokens: how many to add to each at most.
        rule: for chains; None for ``greedy`` at temperature 0, else ``speculative_sampling``, or
            ``deterministic`` where there is no q.
        node_rule: for trees; None for ``verify_tree_greedily`` at temperature 0, else
            ``without_replacement``, or ``deterministic_children`` where there is no q.
        count: drafts per round, or a policy; fewer where fewer new tokens are left.  0 is plain
            decoding.
        warper: of both models; None for softmax as it is.
        eos: the tokens that end a text.
        rng: an ``Rng``, split among several rows, or one for each; a ``Source`` will do; None for
            ``default_rng()``.

    Raises:
        ValueError: a text is empty; it does not fit into ``n_positions`` with the new tokens; a
            number is out of its range; another number of drafts or generators than of texts.
    """
    began = time.perf_counter()
    prompts = [list(text) for text in texts]
    _check(target, prompts, max_new_tokens, count)
    drafts, sources = _drafts(draft, len(prompts)), _sources(rng, len(prompts))
    lengths: Lengths = Constant(count) if isinstance(count, int) else count
    settings = _Settings(rule, node_rule, lengths, warper or Warper(), frozenset(eos))
    rows = [
        _Row(prompt, max_new_tokens, one, source, settings)
        for prompt, one, source in zip(prompts, drafts, sources, strict=True)
    ]
    targets = _Targets(target, len(rows))
    models = {id(one): one for one in drafts}.values()
    before = sum(map(model_seconds, models))
    while going := [i for i, row in enumerate(rows) if row.left > 0]:
        offers = {i: rows[i].offer() for i in going}
        logits = targets.logits(rows, offers)
        for i, offer in offers.items():
            text = rows[i].text
            verdict = rows[i].settle(offer, logits[i])
            if isinstance(offer.tokens, TokenTree):
                targets.single(i).keep(text, verdict.path)
    for i, one in targets.alone.items():
        if isinstance(one, CachedModel):
            one.rollback(rows[i].text)
    calls, seconds = targets.spent()
    return Speculated(
        [row.text for row in rows],
        [row.counts for row in rows],
        calls,
        time.perf_counter() - began,
        seconds,
        sum(map(model_seconds, models)) - before,
    )


def _check(target: Any, prompts: list[list[int]], new: int, count: int | Lengths) -> None:
    owner = target
    while not hasattr(owner, "config") and hasattr(owner, "model"):
        owner = owner.model
    longest = owner.config.n_positions if hasattr(owner, "config") else math.inf
    if new < 0 or not prompts or any(not 1 <= len(x) <= longest - new for x in prompts):
        raise ValueError(
            f"texts have at least one token and fit, with the new ones, into the {longest} "
            f"positions of the model, got {[*map(len, prompts)]} tokens and {new} new ones"
        )
    if isinstance(count, int) and count < 0:
        raise ValueError(f"count is at least 0 drafts, got {count}")


def _drafts(draft: Any, batch: int) -> list[Draft]:
    drafts = [*draft] if isinstance(draft, Sequence) else [draft] * batch
    if len(drafts) != batch:
        raise ValueError(f"{batch} texts have a draft each, or share one, got {len(drafts)}")
    if any(isinstance(one, Module) for one in drafts):
        from .drafts import ModelDraft

        drafts = [ModelDraft(one) if isinstance(one, Module) else one for one in drafts]
    return drafts


def _sources(rng: Any, batch: int) -> list[Source]:
    rng = default_rng() if rng is None else rng
    if isinstance(rng, Rng):
        rng = [rng] if batch == 1 else rng.split(batch)
    sources = [*rng] if isinstance(rng, Sequence) else [rng] * batch
    if len(sources) != batch:
        raise ValueError(f"{batch} texts have a generator each, got {len(sources)}")
    return [RngSource(one) if isinstance(one, Rng) else one for one in sources]
