"""A small model as a draft: what it proposes, what it costs, and what it cannot change."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mini_nn import Rng
from mini_nn.decoding import RngSource, Warper
from models.drafts import ModelDraft
from models.gpt import GPT, GPTConfig
from models.speculative import speculative_generate
from tests.support import host

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
