"""Drafts with a model: what they propose, what they cost, and what they cannot change.

Early exits and skipped layers share the target's rows: those are compared with rows computed anew.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_nn import Rng, backend, grad, ops
from mini_nn.decoding import RngSource, TokenTree, Warper
from models.cached import CachedModel
from models.draft_length import Confidence, Stopping
from models.drafts import (
    BlockwiseDraft,
    BlockwiseHeads,
    EarlyExit,
    ExitAdapter,
    HiddenModel,
    Kangaroo,
    ModelDraft,
    SharedTokens,
    SkippedLayers,
    layer_states,
)
from models.gpt import GPT, GPTConfig
from models.speculative import speculative_generate
from tests.decoding.enumerate import distance, law, total
from tests.support import assert_close, host

SIZES = GPTConfig(13, 24, 8, 2, 2)
TEXT = [3, 1, 4, 1, 5]


def model(seed: int, layers: int = 2, **changes: Any) -> GPT:
    """Random weights, large enough to have opinions, in float64."""
    made = GPT(GPTConfig(13, 24, 8, layers, 2, **changes), Rng(seed)).astype("float64").eval()
    for p in made.parameters():
        p.data[...] = p.data + 0.5 * Rng(seed + 1).normal(p.shape, dtype="float64")
    return made


def test_proposals_are_the_models_greedy_text(xp: Any) -> None:
    small = model(0)
    tokens, q = ModelDraft(small).propose(TEXT, 6, Warper(0.0), RngSource(Rng(0)))
    whole = host(small.generate(xp.asarray([TEXT]), 6, temperature=0))[0].tolist()
    assert TEXT + tokens == whole
    assert q.shape == (6, 13)
    assert (q.argmax(axis=1) == np.array(tokens)).all()
    assert (q.max(axis=1) == 1).all()


def test_rows_of_q_are_the_laws_that_were_drawn_from(xp: Any) -> None:
    small, warper = model(0), Warper(0.8, top_k=5)
    tokens, q = ModelDraft(small).propose(TEXT, 4, warper, RngSource(Rng(3)))
    logits = host(small(xp.asarray([TEXT + tokens])))[0]
    for i in range(4):
        row = warper(logits[len(TEXT) - 1 + i : len(TEXT) + i], TEXT + tokens[:i], [])[0]
        assert np.allclose(q[i], row, rtol=1e-10, atol=1e-12)
        assert q[i, tokens[i]] > 0


def test_a_draft_that_was_rejected_leaves_no_trace(xp: Any) -> None:
    small = model(0)
    used, fresh = ModelDraft(small), ModelDraft(small)
    used.propose(TEXT, 5, Warper(0.0), RngSource(Rng(0)))
    other = [*TEXT, 12, 0]
    for one in (used, fresh):
        one.found = one.propose(other, 4, Warper(0.0), RngSource(Rng(1)))  # type: ignore[attr-defined]
    assert used.found.tokens == fresh.found.tokens  # type: ignore[attr-defined]
    assert used.model.tokens == fresh.model.tokens


@pytest.mark.parametrize("seed", [0, 7])
def test_greedy_text_is_the_targets_whatever_the_draft(xp: Any, seed: int) -> None:
    target, draft = model(5), model(seed, layers=1)
    plain = host(target.generate(xp.asarray([TEXT]), 15, temperature=0))[0].tolist()
    found = speculative_generate(target, draft, [TEXT], 15, warper=Warper(0.0))
    assert found.texts == [plain]
    assert found.target_calls <= 15
    same = speculative_generate(target, target, [TEXT], 15, warper=Warper(0.0))
    assert same.texts == [plain]
    assert same.target_calls == 3  # four drafts and a bonus each
    through = target.generate(xp.asarray([TEXT]), 15, temperature=0, draft=draft)
    assert host(through)[0].tolist() == plain


def test_at_the_last_position_it_proposes_less(xp: Any) -> None:
    long = [k % 13 for k in range(22)]
    tokens, _ = ModelDraft(model(0)).propose(long, 6, Warper(0.0), RngSource(Rng(0)))
    assert len(tokens) == 3  # at 24 tokens the last row still says what follows
    full = [k % 13 for k in range(24)]
    assert len(ModelDraft(model(0)).propose(full, 6, Warper(0.0), RngSource(Rng(0))).tokens) == 1


# Drafts that share what the target computes

GREEDY = Warper(0.0)
EXACT = {"rtol": 0.0, "atol": 1e-12}


@cache
def large(vocabulary: int = 13, layers: int = 4) -> GPT:
    made = GPT(GPTConfig(vocabulary, 40, 8, layers, 2), Rng(2)).astype("float64").eval()
    for i, p in enumerate(made.parameters()):
        p.data[...] = p.data + 0.4 * Rng(100 + i).normal(p.shape, dtype="float64")
    return made


@cache
def adapter() -> ExitAdapter:
    return ExitAdapter(large().config, Rng(7)).astype("float64")


@cache
def heads(count: int = 3, vocabulary: int = 13) -> BlockwiseHeads:
    made = BlockwiseHeads(8, count, rng=Rng(8)).astype("float64")
    made.weight.data[...] = Rng(9).normal(made.weight.shape, std=0.5, dtype="float64")
    return made


DRAFTS: dict[str, Callable[[GPT], Any]] = {
    "early exit 1": lambda model: EarlyExit(model, 1),
    "early exit 3": lambda model: EarlyExit(model, 3),
    "kangaroo": lambda model: Kangaroo(model, 2, adapter()),
    "nothing skipped": lambda model: SkippedLayers(model),
    "attention skipped": lambda model: SkippedLayers(model, attention=[0, 2]),
    "mlp skipped": lambda model: SkippedLayers(model, mlp=[1, 3]),
    "all skipped": lambda model: SkippedLayers(model, range(4), range(4)),
    "blockwise": lambda model: BlockwiseDraft(model, heads()),
}


def on_device(text: list[int]) -> Any:
    return backend.current().xp.asarray([text])


def fresh(model: GPT, text: list[int]) -> Any:
    """All rows of logits, computed in one pass without any cache."""
    return host(model([text]))[0]


def through(model: GPT, text: list[int], attention: Any = (), mlp: Any = ()) -> Any:
    """The logits of a model without these sublayers, on the tape and without a cache."""
    x, mask = model.transformer.embed(on_device(text))
    for number, block in enumerate(model.transformer.h):
        if number not in attention:
            x = block.attn_residual(x, block.ln_1, block.attn, mask, None)
        if number not in mlp:
            x = block.mlp_residual(x, block.ln_2, block.mlp)
    return host(model.lm_head(model.transformer.ln_f(x)))[0]


@pytest.mark.parametrize("name", DRAFTS)
@pytest.mark.parametrize("count", [1, 3])
def test_text_and_cache_are_those_of_plain_decoding(xp: Any, name: str, count: int) -> None:
    model = large()
    plain = host(model.generate(xp.asarray([TEXT]), 20, temperature=0))[0].tolist()
    draft = DRAFTS[name](model)
    found = speculative_generate(draft.target, draft, [TEXT], 20, count=count, warper=GREEDY)
    assert found.texts == [plain]
    held = draft.target.tokens
    assert held == plain[: len(held)]
    assert_close(draft.target.logits(plain, len(plain)), fresh(model, plain), **EXACT)
    # any other target of these weights judges the same
    again = speculative_generate(model, DRAFTS[name](model), [TEXT], 20, warper=GREEDY)
    assert again.texts == [plain]


class Recorded:
    """A target that checks each of its answers against a pass over the whole text."""

    def __init__(self, target: Any, model: GPT) -> None:
        self.target, self.model = target, model
        self.worst = 0.0
        self.calls, self.seconds = 0, 0.0

    def logits(self, tokens: Any, rows: int = 1) -> Any:
        got = self.target.logits(tokens, rows)
        gap = np.abs(got - fresh(self.model, [*tokens])[-rows:]).max()
        self.worst = max(self.worst, float(gap))
        return got


@pytest.mark.parametrize("name", DRAFTS)
def test_the_law_of_a_sampled_text_is_the_targets(xp: Any, name: str) -> None:
    """Every row that the target judges by is a fresh one's, whatever was drafted and rejected."""
    model = large()
    for seed in range(3):
        draft = DRAFTS[name](model)
        target = Recorded(draft.target, model)
        run = speculative_generate(target, draft, [TEXT], 25, rng=Rng(seed))
        assert len(run.texts[0]) == 30
        assert target.worst < 1e-12


@pytest.mark.parametrize("name", ["early exit 1", "attention skipped", "blockwise"])
def test_the_joint_law_by_enumeration(xp: Any, name: str) -> None:
    """Three tokens of a vocabulary of two: all branches use one cache, one after another."""
    model = large(2)
    draft = DRAFTS[name](model)
    text = [1, 0, 1]

    def run(source: Any) -> tuple[int, ...]:
        found = speculative_generate(draft.target, draft, [text], 3, count=2, rng=source)
        return tuple(found.texts[0][3:])

    found = law(run)
    wanted: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        wanted = {
            (*tokens, x): mass * float(ops.softmax(fresh(model, [*text, *tokens])[-1])[x])
            for tokens, mass in wanted.items()
            for x in (0, 1)
        }
    assert abs(total(found) - 1.0) < 1e-12
    assert distance(found, wanted) < 1e-12


# Early exits


def test_the_first_layers_and_then_the_others_are_the_whole_pass(xp: Any) -> None:
    model, text = large(), [*range(13)]
    for exit_layer in (1, 2, 3):
        draft = EarlyExit(model, exit_layer)
        states = [host(x)[0] for x in layer_states(model, xp.asarray([text]))]
        assert_close(draft.model.states(text, 13), states[exit_layer - 1], **EXACT)
        assert_close(draft.target.logits(text, 13), fresh(model, text), **EXACT)
        assert draft.model.fed == draft.target.fed == 13  # each token passes each layer once
        head, norm = model.lm_head, model.transformer.ln_f
        out = host(head(norm(xp.asarray(states[exit_layer - 1]))))
        assert_close(draft.rows(text, 13), out, **EXACT)
        assert draft.model.fed == 13


def test_an_exit_reuses_keys_and_values(xp: Any) -> None:
    """The rows of the first layers after drafts and rejections are those of a fresh pass."""
    model = large()
    draft = EarlyExit(model, 2)
    run = speculative_generate(draft.target, draft, [TEXT], 20, count=3, warper=GREEDY)
    text, rejected = draft.model.tokens, run.counts[0].corrections
    assert rejected > 0  # or nothing was rolled back here
    new = EarlyExit(model, 2)
    new.target.logits(text, 1)
    for used, other in ((draft.model, new.model), (draft.target, new.target)):
        n = min(len(used.tokens), len(other.tokens))
        assert n >= 20
        for a, b in zip(used.cache.layers, other.cache.layers, strict=True):
            assert_close(a.keys[:, :, :n], b.keys[:, :, :n], **EXACT)
            assert_close(a.values[:, :, :n], b.values[:, :, :n], **EXACT)
    # the saving: first layers were fed what plain decoding feeds, and drafts that fell
    assert draft.target.fed <= 25 + 3 * run.counts[0].rounds
    assert draft.model.fed == draft.target.fed


def test_states_of_a_rejected_text_would_be_noticed(xp: Any) -> None:
    """The classic bug: exit states that are not cut back with the text."""
    model = large()
    draft = EarlyExit(model, 2)
    draft.target.logits([1, 2, 3, 4], 1)
    good = draft.target.logits([1, 2, 5, 4], 2)
    assert_close(good, fresh(model, [1, 2, 5, 4])[-2:], **EXACT)
    stale = EarlyExit(model, 2)
    stale.target.logits([1, 2, 3, 4], 1)
    stale.model.tokens = [1, 2, 5, 4]  # as if its rows were those of the new text
    bad = stale.target.logits([1, 2, 5, 4], 2)
    assert float(np.abs(bad - good).max()) > 1e-3


def test_the_adapter_reads_the_exit(xp: Any) -> None:
    model, text = large(), [3, 1, 4, 1, 5, 9, 2, 6]
    draft = Kangaroo(model, 2, adapter())
    state = [*layer_states(model, xp.asarray([text]))][1]
    wanted = host(model.lm_head(adapter()(state)))[0]
    for stop in (3, 5, 8):
        assert_close(draft.rows(text[:stop], 1), wanted[stop - 1 : stop], **EXACT)
    assert_close(draft.rows([*text[:4], 0], 2)[0], wanted[3], **EXACT)
    assert_close(draft.rows(text, 8), wanted, **EXACT)
    assert draft.seconds > draft.model.seconds > 0.0


def test_a_second_exit_stops_at_a_doubt(xp: Any) -> None:
    model = large()
    plain = host(model.generate(xp.asarray([TEXT]), 16, temperature=0))[0].tolist()
    draft = Kangaroo(model, 2, adapter())
    stopping = Stopping(draft, Confidence(0.6), draft.law)
    run = speculative_generate(draft.target, stopping, [TEXT], 16, count=6, warper=GREEDY)
    assert run.texts == [plain]
    text = [*TEXT]
    tokens = stopping.propose(text, 6, GREEDY, RngSource(Rng(0))).tokens
    sure = [draft.law([*text, *tokens[:i]]).max() >= 0.6 for i in range(len(tokens))]
    assert all(sure[:-1])
    assert len(tokens) == 6 or not sure[-1]


# Skipped sublayers


def test_with_nothing_skipped_everything_stands(xp: Any) -> None:
    draft = SkippedLayers(large())
    run = speculative_generate(draft.target, draft, [TEXT], 24, count=5, warper=GREEDY)
    assert run.counts[0].corrections == 0
    assert run.target_calls == 4
    rows = draft.rows(TEXT, 5)
    assert_close(rows, fresh(large(), TEXT), **EXACT)
    sampled = speculative_generate(draft.target, draft, [TEXT], 24, rng=Rng(0))
    assert sampled.counts[0].corrections == 0


@pytest.mark.parametrize(
    ("attention", "mlp"), [((), (1,)), ((0,), ()), ((0, 1, 2, 3), ()), ((0, 3), (0, 2))]
)
def test_skipping_is_the_model_without_the_sublayers(xp: Any, attention: Any, mlp: Any) -> None:
    """While nothing is verified, for the draft then reads rows of its own only."""
    model, text = large(), [3, 1, 4, 1, 5, 9, 2, 6]
    wanted = through(model, text, attention, mlp)
    draft = SkippedLayers(model, attention, mlp)
    assert_close(draft.rows(text[:4], 4), wanted[:4], **EXACT)
    assert_close(draft.rows(text[:6], 1), wanted[5:6], **EXACT)
    assert_close(draft.rows([*text[:5], 0], 1), through(model, [*text[:5], 0], attention, mlp)[-1:])
    assert_close(draft.rows(text, 2), wanted[-2:], **EXACT)
    assert float(np.abs(wanted - fresh(model, text)).max()) > 1e-3  # it is another model


def test_the_draft_attends_to_the_targets_rows(xp: Any) -> None:
    """After a verification only the rows of what is drafted are the draft's own."""
    model, text = large(), [3, 1, 4, 1, 5, 9, 2, 6]
    draft = SkippedLayers(model, mlp=[0])
    draft.target.logits(text[:-1], 1)
    # oracle: the last token without MLP 0, over the whole model's keys and values
    oracle = CachedModel(model)
    oracle.logits(text[:-1], 1)
    x, _ = oracle.view.transformer.embed(xp.asarray([text[-1:]]), cache=oracle.cache)
    for number, block in enumerate(oracle.view.transformer.h):
        layer = oracle.cache.layers[number]
        x = block.attn_residual(x, block.ln_1, block.attn, None, layer)
        x = x if number == 0 else block.mlp_residual(x, block.ln_2, block.mlp)
    wanted = host(oracle.view.lm_head(oracle.view.transformer.ln_f(x)))[0]
    assert_close(draft.rows(text, 1), wanted, **EXACT)
    assert float(np.abs(wanted - through(model, text, (), [0])[-1:]).max()) > 1e-3
    assert draft.target.tokens == text[:-1]  # none of the draft's rows counts as the target's
    assert_close(draft.target.logits(text, 1), fresh(model, text)[-1:], **EXACT)


def test_rows_of_a_draft_do_not_outlive_a_verification(xp: Any) -> None:
    """Tokens repeat, so that a row written for the third place looks like one for the fourth."""
    model = large()
    used, new = SkippedLayers(model, mlp=[0]), SkippedLayers(model, mlp=[0])
    used.target.logits([3, 1], 1)
    used.rows([3, 1, 4], 1)
    for draft in (used, new):
        draft.target.logits([3, 1, 4], 1)
    assert_close(used.rows([3, 1, 4, 4, 5], 1), new.rows([3, 1, 4, 4, 5], 1), **EXACT)


def test_a_pass_that_fails_leaves_no_row_that_counts(
    xp: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = large()
    draft, new = SkippedLayers(model, mlp=[0]), SkippedLayers(model, mlp=[0])
    draft.rows([3, 1, 4, 1], 1)

    def fail(text: list[int], start: int) -> Any:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(draft.model, "_pass", fail)
        with pytest.raises(MemoryError):
            draft.rows([3, 1, 9, 9], 1)
    assert_close(draft.rows([3, 1, 4, 1, 5], 1), new.rows([3, 1, 4, 1, 5], 1), **EXACT)


@given(data=st.data())
def test_any_order_of_questions_gives_the_targets_rows(data: st.DataObject, xp: Any) -> None:
    """Drafts and targets are asked about texts that share what they like, in any order."""
    model = large()
    pairs = [EarlyExit(model, 2), SkippedLayers(model, [0, 1], [2])]
    text = [1]
    for _ in range(data.draw(st.integers(1, 5), label="questions")):
        keep = data.draw(st.integers(0, len(text)))
        new = data.draw(st.lists(st.integers(0, 12), min_size=int(keep == 0), max_size=4))
        text = [*text[:keep], *new]
        rows = data.draw(st.integers(1, len(text)))
        target = data.draw(st.booleans(), label="target")
        for draft in pairs:
            if target:
                got = draft.target.logits(text, rows)
                assert_close(got, fresh(model, text)[-rows:], **EXACT)
            elif isinstance(draft, EarlyExit):
                wanted = fresh_exit(model, text)[-rows:]
                assert_close(draft.rows(text, rows), wanted, **EXACT)
            else:
                got, other = draft.rows(text, rows), SkippedLayers(model, [0, 1], [2])
                if draft.target.tokens:  # what the target had verified, and nothing else
                    other.target.logits(draft.target.tokens, 1)
                assert_close(got, other.rows(text, rows), **EXACT)


def fresh_exit(model: GPT, text: list[int]) -> Any:
    state = [*layer_states(model, on_device(text))][1]
    return host(model.lm_head(model.transformer.ln_f(state)))[0]


# Heads


def test_heads_start_as_the_models_own(xp: Any) -> None:
    made = BlockwiseHeads(8, 3, hidden=5, rng=Rng(0)).astype("float64")
    h = Rng(1).normal((2, 4, 8), dtype="float64")
    assert_close(made(h), np.repeat(host(h)[:, :, None], 3, axis=2))
    made = heads()
    hidden = np.maximum(host(h) @ host(made.c_fc.weight).T + host(made.c_fc.bias), 0.0)
    out = hidden @ host(made.weight).T + host(made.bias)
    assert_close(made(h), host(h)[:, :, None] + out.reshape(2, 4, 3, 8))


def test_a_block_costs_one_call_of_the_target(xp: Any) -> None:
    """Proposals come from the state that gave the last token, which the verification has left."""
    model = large()
    draft = BlockwiseDraft(model, heads())
    run = speculative_generate(draft.target, draft, [TEXT], 20, count=3, warper=GREEDY)
    assert draft.target.calls == run.target_calls == run.counts[0].rounds + 1  # the prompt's
    text = run.texts[0]
    calls = draft.target.calls
    tokens, q = draft.propose(text, 5, Warper(), RngSource(Rng(0)))
    assert len(tokens) == 3  # as many as heads
    state = [*layer_states(model, xp.asarray([text[:-1]]))][-1][:, -1]
    logits = host(model.lm_head(heads()(model.transformer.ln_f(state))))[0]
    assert_close(q, ops.softmax(logits), **EXACT)
    assert draft.target.calls - calls <= 1
    assert draft.propose(text[:1], 3, Warper(), RngSource(Rng(0))).tokens == []


def test_states_follow_an_accepted_path(xp: Any) -> None:
    """After a tree and ``keep``, the states are those of the plain text."""
    model = large()
    one = HiddenModel(model)
    tree = TokenTree.from_chains(TEXT[-1], [[1, 2, 3], [1, 4], [6]])
    one.tree_logits(TEXT, tree)
    path = next(tree.path(n) for n in range(len(tree)) if tree.tokens[n] == 4)
    one.keep(TEXT, path)
    text = [*TEXT, 1, 4]
    calls = one.calls
    states = one.states(text, len(text))
    assert one.calls == calls
    assert_close(states, HiddenModel(model).states(text, len(text)), **EXACT)
    assert_close(one.logits(text, 3), fresh(model, text)[-3:], **EXACT)
    assert one.calls == calls


# Another vocabulary


def test_only_shared_tokens_are_drafted_and_the_text_stays_exact(xp: Any) -> None:
    """The draft has 11 tokens, of which eight are the target's under other numbers."""
    target, small = large(), model_of(11)
    numbers = [12, 3, -1, 0, 1, 5, -1, 9, 7, 4, -1]
    back = {number: own for own, number in enumerate(numbers) if number >= 0}
    asked: list[list[int]] = []

    def encode(text: Any) -> list[int]:
        asked.append([back.get(x, 2) for x in text])
        return asked[-1]

    draft = SharedTokens(small, numbers, 13, encode)
    tokens, q = draft.propose(TEXT, 6, Warper(0.7), RngSource(Rng(0)))
    assert set(tokens) <= set(back)
    assert q.shape == (6, 13)
    assert (q[:, [x for x in range(13) if x not in back]] == 0.0).all()
    own = host(small([asked[0]]))[0, -1] / 0.7
    weights = np.exp(own - own.max())
    for token, at in back.items():
        assert abs(q[0, token] - weights[at] / weights[[*back.values()]].sum()) < 1e-12
    plain = host(target.generate(xp.asarray([TEXT]), 20, temperature=0))[0].tolist()
    assert speculative_generate(target, draft, [TEXT], 20, warper=GREEDY).texts == [plain]
    for wrong in ([0, 0], [13], [-1]):
        with pytest.raises(ValueError, match="numbers has the target's number"):
            SharedTokens(small, wrong, 13, encode)


def test_shared_tokens_by_enumeration(xp: Any) -> None:
    """Token 2 of the target is never drafted, and has its probability all the same."""
    target, small = large(3, 1), model_of(2)
    draft = SharedTokens(small, [1, 0], 3, lambda text: [{0: 1, 1: 0}.get(x, 0) for x in text])

    def run(source: Any) -> tuple[int, ...]:
        return tuple(speculative_generate(target, draft, [[1]], 2, count=1, rng=source).texts[0])

    found = law(run)
    first = ops.softmax(fresh(target, [1])[-1])
    wanted = {
        (1, x, y): float(first[x] * ops.softmax(fresh(target, [1, x])[-1])[y])
        for x in range(3)
        for y in range(3)
    }
    assert distance(found, wanted) < 1e-12


@cache
def model_of(vocabulary: int) -> GPT:
    return GPT(GPTConfig(vocabulary, 40, 8, 1, 2, initializer_range=0.7), Rng(4)).astype("float64")


def test_exits_can_be_trained(xp: Any) -> None:
    """``layer_states`` is on the tape: an exit's loss reaches the first layers and no others."""
    made = model(0)
    states = [*layer_states(made, xp.asarray([TEXT]))]
    assert_close(made.lm_head(made.transformer.ln_f(states[-1])), made([TEXT]), **EXACT)
    loss = ops.sum(ops.square(states[0]))
    first, last = (made.transformer.h[i].mlp.c_proj.weight for i in (0, 1))
    gradients = grad(loss, [first, last], materialize_grads=True)
    assert float(np.abs(host(gradients[0])).max()) > 0.0
    assert float(np.abs(host(gradients[1])).max()) == 0.0


def test_wrong_layers_are_named(xp: Any) -> None:
    for exit_layer in (0, 4):
        with pytest.raises(ValueError, match=r"exits behind the layers 1 … 3"):
            EarlyExit(large(), exit_layer)
    with pytest.raises(ValueError, match=r"layers of this model are 0 … 3, got \[4\]"):
        SkippedLayers(large(), mlp=[4])
    draft = SkippedLayers(large())
    with pytest.raises(IndexError, match="tokens of this model"):
        draft.rows([13], 1)
    with pytest.raises(ValueError, match="40 positions"):
        draft.rows([0] * 41, 1)
    for one in (draft, EarlyExit(large(), 1)):
        with pytest.raises(ValueError, match="rows of logits"):
            one.rows([1], 2)
    with pytest.raises(ValueError, match="at least 1 proposal"):
        BlockwiseHeads(8, 0)
