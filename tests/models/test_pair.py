"""The shipped models are what their recipe says, and decode faster together, call by call."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mini_nn import Rng
from mini_nn.decoding import Warper
from models import data, pair
from models.gpt import GPT
from models.speculative import speculative_generate
from tests.support import assert_close, host

PROMPT = list(b"HAMLET\nThe king hath on him laid, ")


def test_they_are_the_files_that_the_readme_names() -> None:
    readme = (data.FOLDER / "README.md").read_text("utf-8")
    files = [pair.FOLDER / name / "model.safetensors" for name in ("target", "draft")]
    assert sum(path.stat().st_size for path in files) < 4 << 20
    for path in files:
        assert hashlib.sha256(path.read_bytes()).hexdigest() in readme


def test_their_sizes_are_the_recipes(xp: Any) -> None:
    for model, config in zip(pair.load(), (pair.TARGET, pair.DRAFT), strict=True):
        sizes = model.config
        assert (sizes.n_layer, sizes.n_head, sizes.n_embd, sizes.n_positions) == (
            config.n_layer, config.n_head, config.n_embd, config.context,
        )  # fmt: skip
        assert model.num_parameters() == GPT(config.sizes(), Rng(0)).num_parameters()


def test_the_draft_saves_two_calls_of_three_and_changes_nothing(xp: Any) -> None:
    target, draft = pair.load()
    plain = host(target.generate(xp.asarray([PROMPT]), 60, temperature=0))[0].tolist()
    found = speculative_generate(target, draft, [PROMPT], 60, count=6, warper=Warper(0.0))
    # float32: a pass over seven tokens may round otherwise than one; here no choice is that close
    assert found.texts == [plain]
    assert found.target_calls <= 20
    assert found.counts[0].emitted == 60


def test_the_recipe_trains_and_stores_what_loads(
    xp: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = replace(pair.TARGET, steps=3, n_layer=1, n_embd=8, n_head=2, context=8, batch=2)
    monkeypatch.setattr(pair, "TARGET", small)
    monkeypatch.setattr(pair, "DRAFT", replace(small, seed=4))
    monkeypatch.setattr(pair, "score", lambda model, train, text: host(xp.zeros(1)))
    pair.main([str(tmp_path)])
    again = GPT.from_pretrained(tmp_path / "draft")
    assert again.config.n_embd == 8


def test_distilling_pulls_towards_the_target(xp: Any) -> None:
    """The loss is the forward KL and the target's entropy: least for the target itself."""
    config = replace(pair.TARGET, n_layer=1, n_embd=8, n_head=2, context=8)
    target, other = GPT(config.sizes(), Rng(0)).eval(), GPT(config.sizes(), Rng(1)).eval()
    ids = xp.asarray([[1, 2, 3], [4, 5, 6]])
    loss = pair.on_target(target)
    assert float(host(loss(other, ids, ids))) > float(host(loss(target, ids, ids)))
    logits = host(target(ids)).astype("float64")
    logits = logits - logits.max(axis=-1, keepdims=True)
    entropy = 0.0
    for row in logits.reshape(-1, logits.shape[-1]):
        p = [math.exp(x) for x in row]
        total = sum(p)
        entropy -= sum(x / total * math.log(x / total) for x in p) / 6
    assert_close(float(host(loss(target, ids, ids))), entropy, rtol=1e-4)
