"""Speculation with real models: caches as if fresh, texts and laws as in plain decoding."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from mini_nn import Rng
from mini_nn.decoding import (
    RngSource,
    TokenTree,
    Warper,
    block_verification,
    draw_iid,
    draw_without_replacement,
    k_seq,
    match_children,
    multi_step,
    sample_match,
    top_children,
)
from mini_nn.decoding.draft import NoDraft, PromptLookup, Proposal
from models.cached import CachedBatch, CachedModel, shared
from models.draft_length import Confidence, EntropyBound, PlusTwoMinusOne, Stop, Stopping
from models.gpt import GPT, GPTConfig
from models.speculative import NoiseSource, Speculated, speculative_generate
from tests.decoding.enumerate import distance, law, total
from tests.support import assert_close, host

GREEDY = Warper(temperature=0)


@cache
def tiny(seed: int, vocabulary: int = 11, spread: float = 1.2) -> GPT:
    """A model whose weights are large enough for its continuations to differ."""
    config = GPTConfig(
        vocab_size=vocabulary,
        n_positions=32,
        n_embd=8,
        n_layer=2,
        n_head=2,
        initializer_range=spread,
    )
    return GPT(config, Rng(seed)).astype("float64").eval()


class Small:
    """Draws a chain from a model: one call of it per token."""

    def __init__(self, model: GPT) -> None:
        self.model = CachedModel(model)

    def law(self, text: Sequence[int], warper: Warper) -> Any:
        return warper(self.model.logits(text, 1), text)[0]

    def propose(self, text: Sequence[int], count: int, warper: Warper, source: Any) -> Proposal:
        known, rows = list(text), []
        for _ in range(count):
            rows.append(self.law(known, warper))
            known.append(source.categorical(rows[-1]))
        return Proposal(known[len(text) :], np.stack(rows) if rows else None)


class Bushy(Small):
    """Draws ``width`` children below every node."""

    def __init__(self, model: GPT, draw: Callable[..., Any] | None, width: int = 2) -> None:
        super().__init__(model)
        self.draw, self.width = draw, width

    def propose(self, text: Sequence[int], count: int, warper: Warper, source: Any) -> Proposal:
        tree, level, rows = TokenTree((text[-1],), (-1,)), [0], {}
        for _ in range(count):
            for node in level:
                way = [tree.tokens[step] for step in tree.path(node)]
                rows[node] = self.law([*text, *way], warper)
                if self.draw is None:
                    children = top_children(rows[node], self.width)
                else:
                    children = self.draw(rows[node], self.width, source)
                tree = tree.extend(node, children)
            level = [*range(max(level) + 1, len(tree))]
        if self.draw is None:
            return Proposal(tree, None)
        unread = np.full(self.model.model.config.vocab_size, np.nan)
        return Proposal(tree, np.stack([rows.get(node, unread) for node in range(len(tree))]))


class Scripted:
    """Proposes what it was told, whatever the text: a chain, or several as a tree."""

    def __init__(self, *chains: Sequence[int]) -> None:
        self.chains = chains

    def propose(self, text: Sequence[int], count: int, warper: Warper, source: Any) -> Proposal:
        chains = [list(chain[:count]) for chain in self.chains]
        if len(chains) == 1:
            return Proposal(chains[0], None)
        return Proposal(TokenTree.from_chains(text[-1], chains), None)


def plain(model: GPT, text: Sequence[int], new: int, **options: Any) -> list[int]:
    """The greedy text of plain decoding."""
    return host(model.generate([[*text]], new, temperature=0, **options))[0].tolist()


def plain_law(
    model: GPT, text: list[int], new: int, warper: Warper, ends: Sequence[int] = ()
) -> dict[tuple[int, ...], float]:
    """The law of the new tokens, by the product of the model's own probabilities."""
    found: dict[tuple[int, ...], float] = {}
    open_texts: list[tuple[tuple[int, ...], float]] = [((), 1.0)]
    while open_texts:
        tokens, mass = open_texts.pop()
        if len(tokens) == new or (tokens and tokens[-1] in ends):
            found[tokens] = mass
            continue
        known = [*text, *tokens]
        for token, chance in enumerate(warper(host(model([known]))[0, -1:], known)[0].tolist()):
            if chance > 0.0:
                open_texts.append(((*tokens, token), mass * chance))
    return found


# The cache of one text


def assert_fresh(model: CachedModel) -> None:
    """What is held is what a new model would hold after the same tokens, row for row."""
    assert model.cache.length >= len(model.tokens)
    if not model.tokens:
        return
    fresh = CachedModel(model.model)
    fresh.logits(model.tokens, 1)
    count = len(model.tokens)
    for held, wanted in zip(model.cache.layers, fresh.cache.layers, strict=True):
        assert_close(held.keys[:, :, :count], wanted.keys[:, :, :count], 1e-9, 1e-10)
        assert_close(held.values[:, :, :count], wanted.values[:, :, :count], 1e-9, 1e-10)


class Rounds(RuleBasedStateMachine):
    """Any sequence of rounds on a target, a draft and a batch that all follow one text.

    ``Target`` is the class under test, so that a planted bug has the same machine against it.
    """

    Target: type[CachedModel] = CachedModel

    def __init__(self) -> None:
        super().__init__()
        self.target, self.draft = self.Target(tiny(0)), CachedModel(tiny(1))
        self.batch = CachedBatch(tiny(0), 2)
        self.text, self.other = [1], [2, 3]

    tokens = st.integers(0, 10)

    def fits(self, more: int) -> bool:
        if len(self.text) + more > 32:
            self.text = self.text[:4]  # another request with the same beginning
        return True

    @rule(drafts=st.lists(tokens, max_size=5), accepted=st.integers(0, 5), token=tokens)
    def chain(self, drafts: list[int], accepted: int, token: int) -> None:
        self.fits(len(drafts) + 1)
        for known in range(len(drafts)):  # the draft never sees its last token
            self.draft.logits([*self.text, *drafts[:known]], 1)
        whole = [*self.text, *drafts]
        got = self.target.logits(whole, len(drafts) + 1)
        assert_close(got, host(tiny(0)([whole]))[0, len(self.text) - 1 :], 1e-9, 1e-9)
        self.text = [*self.text, *drafts[: min(accepted, len(drafts))], token]

    @rule(
        chains=st.lists(st.lists(tokens, min_size=1, max_size=3), min_size=1, max_size=3),
        data=st.data(),
        kept=st.booleans(),
    )
    def tree(self, chains: list[list[int]], data: Any, kept: bool) -> None:
        self.fits(4)
        tree = TokenTree.from_chains(self.text[-1], chains)
        got = self.target.tree_logits(self.text, tree)
        for node in range(len(tree)):
            way = [*self.text, *(tree.tokens[step] for step in tree.path(node))]
            assert_close(got[node], host(tiny(0)([way]))[0, -1], 1e-9, 1e-9)
        path = tree.path(data.draw(st.integers(0, len(tree) - 1)))
        if kept:
            self.target.keep(self.text, path)
            assert self.target.cache.length == len(self.text) + len(path)
            self.text = [*self.text, *(tree.tokens[node] for node in path)]
            assert self.target.tokens == self.text
        self.text = [*self.text, data.draw(self.tokens)]

    @rule(cut=st.integers(1, 6))
    def rollback(self, cut: int) -> None:
        self.text = self.text[: max(1, len(self.text) - cut)]
        self.target.rollback(self.text)
        assert self.text[: len(self.target.tokens)] == self.target.tokens

    @rule(
        drafts=st.lists(tokens, max_size=4), more=st.lists(tokens, max_size=3), both=st.booleans()
    )
    def together(self, drafts: list[int], more: list[int], both: bool) -> None:
        self.fits(len(drafts))
        if len(self.other) + len(more) > 32:
            self.other = self.other[:2]
        self.other = [*self.other, *more]
        texts, rows = [[*self.text, *drafts], self.other], [len(drafts) + 1, int(both)]
        found = self.batch.logits(texts, rows)
        for text, count, got in zip(texts, rows, found, strict=True):
            assert len(got) == count
            if count:
                assert_close(got, host(tiny(0)([text]))[0, -count:], 1e-9, 1e-9)

    @invariant()
    def caches_are_those_of_fresh_models(self) -> None:
        assert_fresh(self.target)
        assert_fresh(self.draft)


def test_after_any_rounds_the_caches_are_those_of_fresh_models(xp: Any) -> None:
    run_state_machine_as_test(Rounds, settings=settings(max_examples=15, stateful_step_count=12))


class Stale(CachedModel):
    """The classic bug: one row of what was rejected stays in front of what is fed next."""

    def _cut(self, length: int) -> None:
        before = self.cache.length
        super()._cut(length)
        for layer in self.cache.layers:
            layer.length = min(before, length + 1)


class Uncompacted(CachedModel):
    """The classic bug: the first rows of a tree are taken for its accepted path."""

    def keep(self, text: Sequence[int], path: Sequence[int]) -> None:
        tree = self._tree
        super().keep(text, ())
        assert tree is not None
        self.tokens = [*text, *(tree.tokens[node] for node in path)]
        for layer in self.cache.layers:
            layer.length = len(self.tokens)


@pytest.mark.parametrize("bug", [Stale, Uncompacted])
def test_a_stale_row_is_noticed(xp: Any, bug: type[CachedModel]) -> None:
    machine = type("Buggy", (Rounds,), {"Target": bug})
    with pytest.raises(AssertionError):
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=60, stateful_step_count=12, derandomize=True, phases=[Phase.generate]
            ),
        )


@given(st.lists(st.integers(0, 1), max_size=9), st.lists(st.integers(0, 1), max_size=9))
def test_shared_is_the_length_of_the_common_beginning(a: list[int], b: list[int]) -> None:
    count = 0
    while count < min(len(a), len(b)) and a[count] == b[count]:
        count += 1
    assert shared(a, b) == count


def test_a_cached_model_feeds_only_what_is_new(xp: Any) -> None:
    model = CachedModel(tiny(0))
    model.logits([1, 2, 3, 4, 5], 3)
    assert (model.calls, model.fed) == (1, 5)
    model.logits([1, 2, 3, 6], 1)  # two taken back, one is new
    assert (model.calls, model.fed) == (2, 6)
    model.logits([1, 2, 3, 6], 1)  # nothing is new, but a row is asked for
    assert (model.calls, model.fed) == (3, 7)
    model.tree_logits([1, 2, 3, 6, 7], TokenTree.from_chains(7, [[1, 2], [3]]))
    assert (model.calls, model.fed) == (4, 11)
    model.keep([1, 2, 3, 6, 7], (1, 3))  # breadth first: 1 and 3 are the nodes of [1, 2]
    model.logits([1, 2, 3, 6, 7, 1, 2, 9], 1)
    assert (model.calls, model.fed) == (5, 12)
    assert model.seconds > 0.0


def test_a_pass_that_fails_leaves_a_cache_that_can_be_used(xp: Any) -> None:
    model = CachedModel(tiny(0))
    model.logits([1, 2, 3], 1)
    with pytest.raises(IndexError):
        model.logits([1, 2, 99], 1)
    assert_fresh(model)
    assert_close(model.logits([1, 2, 3, 4], 2), host(tiny(0)([[1, 2, 3, 4]]))[0, -2:], 1e-9, 1e-9)


def test_a_cached_model_refuses_what_makes_no_sense(xp: Any) -> None:
    model = CachedModel(tiny(0))
    for tokens, rows in (([], 1), ([1, 2], 3), ([1, 2], 0)):
        with pytest.raises(ValueError, match=f"got rows={rows}"):
            model.logits(tokens, rows)
    with pytest.raises(ValueError, match="33 tokens do not fit into the 32 positions"):
        model.logits([1] * 33, 1)
    with pytest.raises(ValueError, match="node 0 of a tree, 4, is the last token"):
        model.tree_logits([1, 2], TokenTree((4,), (-1,)))
    chain = TokenTree.from_chains(1, [[2, 3]])
    with pytest.raises(ValueError, match="a text of 31 tokens and 2 drafts do not fit"):
        model.tree_logits([1] * 31, chain)
    assert model.tree_logits([1] * 30, chain).shape == (3, 11)  # to the last position
    with pytest.raises(ValueError, match="no path from node 0"):
        model.keep([1] * 30, (2,))
    model.keep([1] * 30, (1, 2))
    with pytest.raises(ValueError, match="just before"):
        model.keep([1] * 30, ())
    batch = CachedBatch(tiny(0), 2)
    with pytest.raises(ValueError, match="this is a batch of 2, got 1 texts"):
        batch.logits([[1]], [1])
    with pytest.raises(ValueError, match="got 1 tokens and rows=2"):
        batch.logits([[1], [1]], [1, 2])
    assert [len(rows) for rows in batch.logits([[1], [1]], [0, 0])] == [0, 0]


def test_a_batch_closes_its_gaps(xp: Any) -> None:
    batch, rng = CachedBatch(tiny(0), 3), np.random.default_rng(0)
    texts = [[1], [2, 3], [4, 5, 6]]
    for _ in range(60):  # five drafts a round, of which the rows keep different numbers
        asked = [text + rng.integers(0, 11, 5).tolist() for text in texts]
        found = batch.logits(asked, [6] * 3)
        for text, rows in zip(asked, found, strict=True):
            assert_close(rows, host(tiny(0)([text]))[0, -6:], 1e-9, 1e-9)
        texts = [text[: len(text) - int(rng.integers(0, 6))] for text in asked]
        texts = [text if len(text) < 25 else text[:3] for text in texts]
    assert batch.cache.length < 80


# Greedy texts


DRAFTS: dict[str, Callable[[], Any]] = {
    "nothing": NoDraft,
    "the model itself": lambda: Small(tiny(0)),
    "another model": lambda: Small(tiny(1)),
    "lookup": lambda: PromptLookup(2),
    "a tree of drawn children": lambda: Bushy(tiny(1), draw_without_replacement),
    "a tree of the best": lambda: Bushy(tiny(1), None, 3),
    "a tree of the model itself": lambda: Bushy(tiny(0), None, 2),
    "rubbish": lambda: Scripted([3, 3, 3, 3]),
    "a tree of rubbish": lambda: Scripted([3, 3], [1, 2, 4], [3, 1]),
    "stopped early": lambda: Stopping(Small(tiny(1)), Confidence(0.9)),
}


@pytest.mark.parametrize("name", DRAFTS)
@pytest.mark.parametrize("count", [0, 1, 3, PlusTwoMinusOne(2)])
def test_greedy_texts_are_those_of_plain_decoding(xp: Any, name: str, count: Any) -> None:
    for prompt in ([1, 2, 3], [5]):
        found = speculative_generate(
            tiny(0), DRAFTS[name](), [prompt], 14, count=count, warper=GREEDY
        )
        assert found.texts == [plain(tiny(0), prompt, 14)]
        check_counts(found, 14)


def check_counts(found: Speculated, new: int) -> None:
    for counts in found.counts:
        assert 0 < counts.emitted <= new and counts.rounds <= counts.emitted
        assert counts.corrections + counts.bonuses <= counts.rounds
    if len(found.counts) == 1:
        assert found.target_calls == found.counts[0].rounds
    assert found.seconds >= found.target_seconds > 0.0 and 0.0 <= found.overhead < 1.0


class LastRowTwice:
    """The classic bug: the bonus token from the row before its own."""

    def __init__(self, model: GPT) -> None:
        self.model = CachedModel(model)
        self.calls, self.seconds = 0, 0.0

    def logits(self, tokens: Sequence[int], rows: int = 1) -> Any:
        found = self.model.logits(tokens, rows).copy()
        if rows > 1:
            found[-1] = found[-2]
        return found


@pytest.mark.parametrize("bug", [LastRowTwice, Stale])
def test_a_wrong_row_changes_the_greedy_text(xp: Any, bug: Any) -> None:
    wanted = [plain(tiny(0), [1, 2, 3], 20)]
    for draft in (Small(tiny(0)), Small(tiny(1))):
        right = speculative_generate(CachedModel(tiny(0)), draft, [[1, 2, 3]], 20, warper=GREEDY)
        assert right.texts == wanted
    wrong = [
        speculative_generate(bug(tiny(0)), draft, [[1, 2, 3]], 20, warper=GREEDY).texts
        for draft in (Small(tiny(0)), Small(tiny(1)))
    ]
    assert wrong != [wanted, wanted]


def test_a_perfect_draft_needs_the_fewest_calls(xp: Any) -> None:
    found = speculative_generate(tiny(0), Small(tiny(0)), [[1, 2]], 15, count=4, warper=GREEDY)
    assert found.target_calls == 3  # of 5 tokens each
    assert (found.counts[0].accepted, found.counts[0].bonuses) == (12, 3)
    assert found.counts[0].acceptance.alpha == 1.0
    nothing = speculative_generate(tiny(0), NoDraft(), [[1, 2]], 15, warper=GREEDY)
    assert nothing.target_calls == 15 == nothing.counts[0].bonuses


def test_a_target_keeps_its_cache_from_one_request_to_the_next(xp: Any) -> None:
    target, prompt = CachedModel(tiny(0)), [1, 2, 3, 4, 5, 6]
    first = speculative_generate(target, Small(tiny(1)), [prompt], 5, warper=GREEDY)
    assert target.tokens == first.texts[0][: len(target.tokens)]  # nothing that was rejected
    fed = target.fed
    again = speculative_generate(target, NoDraft(), [[*prompt, 9]], 1, warper=GREEDY)
    assert target.fed - fed == 1 and again.target_calls == 1
    assert again.texts == [plain(tiny(0), [*prompt, 9], 1)]


# The law of the text


TWO = (2, 0.9)
CHAINS: dict[str, tuple[Callable[[], Any], Any]] = {
    "speculative sampling": (lambda: Small(tiny(1, *TWO)), None),
    "block verification": (lambda: Small(tiny(1, *TWO)), block_verification),
    "sample match": (lambda: Small(tiny(1, *TWO)), sample_match),
    "chosen drafts": (lambda: Scripted([1, 1, 0]), None),
    "stopped by confidence": (
        lambda: Stopping(Small(tiny(1, *TWO)), Confidence(0.5, aim=0.6, step=0.3)), None,
    ),
    "stopped by entropy": (lambda: Stopping(Small(tiny(1, *TWO)), EntropyBound(0.65)), None),
}  # fmt: skip
TREES: dict[str, tuple[Callable[[], Any], Any]] = {
    "i.i.d.": (lambda: Bushy(tiny(1, *TWO), draw_iid), multi_step),
    "k-SEQ": (lambda: Bushy(tiny(1, *TWO), draw_iid), k_seq),
    "i.i.d. children, each once": (lambda: Bushy(tiny(1, *TWO), draw_iid), None),
    "without replacement": (lambda: Bushy(tiny(1, *TWO), draw_without_replacement), None),
    "chosen": (lambda: Bushy(tiny(1, *TWO), None, 1), None),
    "match": (lambda: Bushy(tiny(1, *TWO), None, 2), match_children),
    "chosen, unequal": (lambda: Scripted([1, 0], [0]), None),
}


def law_of(draft: Callable[[], Any], new: int, **options: Any) -> dict[Any, float]:
    """The law of the new tokens, over every choice of draft and verifier."""
    target = CachedModel(tiny(0, *TWO))  # its cache too goes from one branch to the next

    def run(source: Any) -> tuple[int, ...]:
        found = speculative_generate(target, draft(), [[1, 0]], new, rng=source, **options)
        return tuple(found.texts[0][2:])

    found = law(run)
    assert abs(total(found) - 1.0) < 1e-12
    return found


@pytest.mark.parametrize("name", CHAINS)
def test_the_law_through_the_whole_loop_is_the_targets(xp: Any, name: str) -> None:
    draft, chosen = CHAINS[name]
    warper = Warper(temperature=0.8, repetition_penalty=1.2)
    for new, ends in ((3, ()), (3, (0,))):
        wanted = plain_law(tiny(0, *TWO), [1, 0], new, warper, ends)
        got = law_of(draft, new, rule=chosen, count=2, warper=warper, eos=ends)
        assert distance(got, wanted) < 1e-12


@pytest.mark.parametrize("name", TREES)
def test_the_law_with_trees_is_the_targets(xp: Any, name: str) -> None:
    draft, chosen = TREES[name]
    for warper, ends in ((Warper(), ()), (Warper(0.7, repetition_penalty=0.8), (1,))):
        wanted = plain_law(tiny(0, *TWO), [1, 0], 3, warper, ends)
        got = law_of(draft, 3, node_rule=chosen, count=1, warper=warper, eos=ends)
        assert distance(got, wanted) < 1e-12


def test_two_levels_of_a_tree_keep_the_law(xp: Any) -> None:
    wanted = plain_law(tiny(0, *TWO), [1, 0], 3, Warper())
    got = law_of(lambda: Scripted([1, 0], [0, 1]), 3, count=2)
    assert distance(got, wanted) < 1e-12


class Discarding(Stopping):
    """The classic bug: a token that makes the draft stop is itself taken back."""

    def propose(self, text: Sequence[int], count: int, warper: Warper, source: Any) -> Proposal:
        tokens, q = super().propose(text, count, warper, source)
        if tokens and self.stop(q[len(tokens) - 1], tokens[-1]):
            return Proposal(tokens[:-1], q[:-1])
        return Proposal(tokens, q)


class WarpedAlone(Small):
    """The classic bug: what the draft says it drew from is not what it drew from."""

    def propose(self, text: Sequence[int], count: int, warper: Warper, source: Any) -> Proposal:
        tokens, _ = super().propose(text, count, Warper(0.4), source)
        rows = [self.law([*text, *tokens[:i]], warper) for i in range(len(tokens))]
        return Proposal(tokens, np.stack(rows) if rows else None)


@pytest.mark.parametrize(
    "draft",
    [
        lambda: Discarding(Small(tiny(1, *TWO)), Confidence(0.5)),
        lambda: WarpedAlone(tiny(1, *TWO)),
    ],
)
def test_a_biased_draft_is_noticed(xp: Any, draft: Any) -> None:
    wanted = plain_law(tiny(0, *TWO), [1, 0], 3, Warper())
    assert distance(law_of(draft, 3, count=2), wanted) > 5e-3


def test_a_bonus_from_the_row_before_is_noticed_in_the_law(xp: Any) -> None:
    wanted = plain_law(tiny(0, *TWO), [1, 0], 3, Warper())
    draft = Small(tiny(1, *TWO))

    def run(source: Any, target: Any) -> tuple[int, ...]:
        found = speculative_generate(target, draft, [[1, 0]], 3, count=1, rng=source)
        return tuple(found.texts[0][2:])

    assert distance(law(lambda source: run(source, CachedModel(tiny(0, *TWO)))), wanted) < 1e-12
    assert distance(law(lambda source: run(source, LastRowTwice(tiny(0, *TWO)))), wanted) > 1e-2


def test_rows_of_a_batch_have_independent_laws(xp: Any) -> None:
    prompts = [[1, 0], [0]]
    rows = [plain_law(tiny(0, *TWO), prompt, 2, Warper()) for prompt in prompts]
    wanted = {(a, b): rows[0][a] * rows[1][b] for a, b in itertools.product(rows[0], rows[1])}

    def run(source: Any) -> Any:
        found = speculative_generate(
            tiny(0, *TWO), [Small(tiny(1, *TWO)), Small(tiny(1, *TWO))], prompts, 2, rng=source
        )
        return tuple(
            tuple(text[len(prompt) :]) for text, prompt in zip(found.texts, prompts, strict=True)
        )

    assert distance(law(run), wanted) < 1e-12


def test_shared_noise_gives_one_text_whatever_the_draft(xp: Any) -> None:
    noise = np.random.default_rng(0).gumbel(size=(20, 11))
    options: dict[str, Any] = {"rule": sample_match, "rng": NoiseSource(noise)}
    plain_text = speculative_generate(tiny(0), NoDraft(), [[1, 2]], 18, **options)
    drafts = (Small(tiny(1)), Small(tiny(0)), PromptLookup(1), Scripted([3, 8, 8]))
    for draft, count in itertools.product(drafts, (1, 2, 5)):
        found = speculative_generate(tiny(0), draft, [[1, 2]], 18, count=count, **options)
        assert found.texts == plain_text.texts
    same = speculative_generate(tiny(0), Small(tiny(0)), [[1, 2]], 18, count=5, **options)
    assert same.counts[0].accepted == 15 and same.counts[0].corrections == 0
    # the twin: draws that do not know their position
    free = speculative_generate(
        tiny(0), Small(tiny(0)), [[1, 2]], 18, count=5, rule=sample_match, rng=Rng(0)
    )
    assert free.counts[0].accepted < 15
    with pytest.raises(TypeError, match="pass rule=sample_match"):
        speculative_generate(tiny(0), Small(tiny(1)), [[1, 2]], 18, rng=NoiseSource(noise))
    with pytest.raises(ValueError, match="token 20 of a text needs row 20"):
        speculative_generate(tiny(0), NoDraft(), [[1, 2]], 19, **options)


# Ends and budgets


def greedy_text(prompt: Sequence[int], new: int) -> list[int]:
    return plain(tiny(0), prompt, new)[len(prompt) :]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("form", ["chain", "tree"])
def test_a_text_ends_with_its_first_eos_wherever_that_is_in_a_block(
    xp: Any, count: int, form: str
) -> None:
    prompt = [1, 2, 3]
    new = greedy_text(prompt, 12)
    for end in sorted({*new}):
        target = CachedModel(tiny(0))
        draft = Small(tiny(0)) if form == "chain" else Bushy(tiny(0), None, 1)
        ends = (end, 99)  # several, of which one never comes
        found = speculative_generate(
            target, draft, [prompt], 12, count=count, warper=GREEDY, eos=ends
        )
        wanted = new[: new.index(end) + 1]
        assert found.texts == [[*prompt, *wanted]]
        assert found.counts[0].emitted == len(wanted)
        text = found.texts[0]
        assert target.tokens == text[: len(target.tokens)]  # the cache is cut as well
        assert target.cache.length == len(target.tokens) >= len(text) - 1
        assert_fresh(target)
    both = sorted({*new})[:2]
    found = speculative_generate(tiny(0), Small(tiny(1)), [prompt], 12, warper=GREEDY, eos=both)
    first = min(new.index(end) for end in both)
    assert found.texts == [[*prompt, *new[: first + 1]]]


def test_where_an_eos_counts(xp: Any) -> None:
    prompt, new = [1, 2, 3], greedy_text([1, 2, 3], 12)
    fresh = next(i for i in range(1, 6) if new[i] not in new[:i])  # ends nothing earlier
    for count, kind in ((fresh, "bonus"), (fresh + 1, "draft")):
        found = speculative_generate(
            tiny(0), Scripted(new), [prompt], 12, count=count, warper=GREEDY, eos=[new[fresh]]
        )
        counts = found.counts[0]
        assert (counts.accepted, counts.bonuses) == (
            (fresh, 1) if kind == "bonus" else (fresh + 1, 0)
        )
        assert counts.corrections == 0 and counts.rounds == 1
    wrong = [*new[:fresh], (new[fresh] + 1) % 11]
    found = speculative_generate(
        tiny(0), Scripted(wrong), [prompt], 12, count=9, warper=GREEDY, eos=[new[fresh]]
    )
    assert (found.counts[0].accepted, found.counts[0].corrections) == (fresh, 1)


def test_a_budget_in_the_middle_of_a_block_clips_the_draft(xp: Any) -> None:
    asked = []

    class Noting(Small):
        def propose(self, text: Sequence[int], count: int, warper: Warper, source: Any) -> Proposal:
            asked.append(count)
            return super().propose(text, count, warper, source)

    for new in range(1, 9):
        asked.clear()
        draft = Noting(tiny(0))
        found = speculative_generate(tiny(0), draft, [[1, 2, 3]], new, count=4, warper=GREEDY)
        assert found.texts == [plain(tiny(0), [1, 2, 3], new)]
        wanted = {1: [], 2: [1], 3: [2], 4: [3], 5: [4], 6: [4], 7: [4, 1], 8: [4, 2]}
        assert asked == wanted[new]  # one token left: the target alone
    none = speculative_generate(tiny(0), draft, [[1, 2, 3]], 0, warper=GREEDY)
    assert none.texts == [[1, 2, 3]] and none.target_calls == none.counts[0].emitted == 0
    whole = speculative_generate(tiny(0), draft, [[1, 2, 3]], 29, count=6, warper=GREEDY)
    assert whole.texts == [plain(tiny(0), [1, 2, 3], 29)]  # to the last position


def test_impossible_requests_are_refused(xp: Any) -> None:
    model, draft = tiny(0), NoDraft()
    for texts, new in (([[1, 2]], 31), ([[1], []], 3), ([], 3), ([[1]], -1)):
        with pytest.raises(ValueError, match="fit, with the new ones, into the 32 positions"):
            speculative_generate(model, draft, texts, new)
    with pytest.raises(ValueError, match="count is at least 0"):
        speculative_generate(model, draft, [[1]], 3, count=-1)
    with pytest.raises(ValueError, match="2 texts have a draft each, or share one, got 3"):
        speculative_generate(model, [draft] * 3, [[1], [2]], 3)
    with pytest.raises(ValueError, match="2 texts have a generator each, got 1"):
        speculative_generate(model, draft, [[1], [2]], 3, rng=[Rng(0)])
    with pytest.raises(ValueError, match="a CachedModel holds one text, got 2"):
        speculative_generate(CachedModel(model), draft, [[1], [2]], 3)

    class Greedier:
        def propose(self, *_: Any) -> Proposal:
            return Proposal([1, 2, 3], None)

    with pytest.raises(ValueError, match="Greedier was asked for 2 tokens, got 3"):
        speculative_generate(model, Greedier(), [[1]], 9, count=2)


# Batches


@given(data=st.data())
@settings(max_examples=10)
def test_rows_that_accept_different_numbers_are_as_they_are_alone(xp: Any, data: Any) -> None:
    token = st.integers(0, 10)
    prompts = data.draw(st.lists(st.lists(token, min_size=1, max_size=9), min_size=2, max_size=4))
    ends = data.draw(st.lists(token, max_size=2))
    count = data.draw(st.sampled_from([1, 3, PlusTwoMinusOne(2)]))
    warper = data.draw(st.sampled_from([GREEDY, Warper(0.7), Warper(1.0, top_k=4)]))
    # where q = p, rounding decides whether a coin is tossed, and so which numbers are left
    drafts = sorted({*DRAFTS} - ({"the model itself"} if warper is not GREEDY else set()))
    kinds = data.draw(
        st.lists(st.sampled_from(drafts), min_size=len(prompts), max_size=len(prompts))
    )
    options: dict[str, Any] = {"count": count, "warper": warper, "eos": ends}
    together = speculative_generate(
        tiny(0), [DRAFTS[kind]() for kind in kinds], prompts, 12,
        rng=[Rng(seed) for seed in range(len(prompts))], **options,
    )  # fmt: skip
    check_counts(together, 12)
    for row, (prompt, kind) in enumerate(zip(prompts, kinds, strict=True)):
        alone = speculative_generate(tiny(0), DRAFTS[kind](), [prompt], 12, rng=Rng(row), **options)
        assert together.texts[row] == alone.texts[0]
        counts, others = together.counts[row], alone.counts[0]
        assert (counts.accepted, counts.corrections, counts.bonuses, counts.rounds) == (
            others.accepted, others.corrections, others.bonuses, others.rounds,
        )  # fmt: skip


def test_a_batch_is_fed_in_common_calls(xp: Any) -> None:
    prompts = [[1, 2, 3], [4], [5, 6]]
    found = speculative_generate(
        tiny(0), [Small(tiny(seed)) for seed in (0, 1, 2)], prompts, 16, warper=GREEDY
    )
    assert found.texts == [plain(tiny(0), prompt, 16) for prompt in prompts]
    rounds = [counts.rounds for counts in found.counts]
    assert len({*rounds}) > 1 and found.target_calls == max(rounds)


# How many drafts


def test_lengths_follow_hugging_faces_heuristic() -> None:
    policy = PlusTwoMinusOne(5, most=8)
    assert [policy.after(5, accepted) for accepted in (5, 4, 0)] == [7, 4, 4]
    assert (policy.after(7, 7), policy.after(1, 0)) == (8, 1)


@given(seed=st.integers(0, 1000), lam=st.floats(0.0, 1.0))
def test_a_draft_stops_behind_the_first_doubt(xp: Any, seed: int, lam: float) -> None:
    whole = Small(tiny(1)).propose([1], 6, Warper(), RngSource(Rng(seed)))
    for stop in (Confidence(lam), EntropyBound(lam, gamma=0.3)):
        found = Stopping(Small(tiny(1)), stop).propose([1], 6, Warper(), RngSource(Rng(seed)))
        count = len(found.tokens)
        assert found.tokens == whole.tokens[:count] and len(found.q) == count
        assert_close(found.q, whole.q[:count], 1e-12, 1e-12)
        doubts = [doubt_of(stop, q, x) for q, x in zip(whole.q, whole.tokens, strict=True)]
        assert count == (doubts.index(True) + 1 if True in doubts else 6)


def doubt_of(stop: Stop, q: Any, token: int) -> bool:
    if isinstance(stop, EntropyBound):
        return bool(1 - np.sqrt(stop.gamma * -(q * np.log(q)).sum()) < stop.threshold)
    return bool(q[token] < stop.threshold)


def test_thresholds_move_towards_the_rate_that_is_aimed_at() -> None:
    stop = Confidence(0.5, aim=0.8, step=0.1, rate_memory=0.5, memory=0.9)
    assert stop.after(0, 0) == stop and Confidence(0.5).after(4, 0) == Confidence(0.5)
    worse = stop.after(4, 1)
    assert worse.rate == 0.25 and abs(worse.threshold - 0.51) < 1e-15
    better = worse.after(2, 2)
    assert better.rate == 0.625 and better.threshold > worse.threshold
    best = better.after(2, 2).after(2, 2)
    assert best.rate == 0.90625 and best.threshold < better.after(2, 2).threshold


def test_a_stopping_draft_learns_what_stood_from_the_next_text(xp: Any) -> None:
    draft = Stopping(Small(tiny(1)), Confidence(0.0, aim=0.5, step=1.0))
    source = RngSource(Rng(0))
    tokens = draft.propose([1, 2], 3, Warper(), source).tokens
    assert len(tokens) == 3 and draft.stop.rate is None
    other = (tokens[2] + 1) % 11
    draft.propose([1, 2, *tokens[:2], other], 3, Warper(), source)
    assert draft.stop.rate is not None and abs(draft.stop.rate - 2 / 3) < 1e-15


def test_a_confident_law_stops_greedy_drafts_too(xp: Any) -> None:
    small = Small(tiny(1))
    plain_softmax = Warper()
    draft = Stopping(small, Confidence(1.0), law=lambda text: small.law(text, plain_softmax))
    assert len(draft.propose([1, 2], 5, GREEDY, RngSource(Rng(0))).tokens) == 1
    blind = Stopping(small, Confidence(1.0))  # one-hot: nothing is below 1
    assert len(blind.propose([1, 2], 5, GREEDY, RngSource(Rng(0))).tokens) == 5
    found = speculative_generate(tiny(0), draft, [[1, 2]], 10, warper=GREEDY)
    assert found.texts == [plain(tiny(0), [1, 2], 10)]
    assert found.draft_seconds > 0.0


def test_what_cannot_be_stopped_is_refused(xp: Any) -> None:
    for draft in (Scripted([1, 2]), Scripted([1], [2])):
        with pytest.raises(TypeError, match="reads the law of each token of a chain"):
            Stopping(draft, Confidence(0.5)).propose([1], 3, Warper(), RngSource(Rng(0)))
    assert Stopping(NoDraft(), Confidence(0.5), law=lambda _: None).propose(
        [1], 3, Warper(), RngSource(Rng(0))
    ) == Proposal([], None)
