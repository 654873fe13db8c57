"""The study ``speculative``: what it counts, and that no scheme changes a text."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mini_nn import Rng
from models import __main__ as program
from models.gpt import GPT, GPTConfig
from models.studies import speculative as study
from models.studies.session import Session
from tests.support import assert_close, host

TINY = study.SpeculativeConfig(steps=6, prompts=2, prompt_tokens=8, drafts=3, rows=4)


def model(seed: int, layers: int) -> GPT:
    made = GPT(GPTConfig(256, 48, 8, layers, 2), Rng(seed)).astype("float64").eval()
    for p in made.parameters():
        p.data[...] = p.data + 0.3 * Rng(seed + 1).normal(p.shape, dtype="float64")
    return made


@pytest.fixture
def pair(xp: Any) -> tuple[GPT, GPT]:
    return model(0, 4), model(5, 1)


def test_every_scheme_is_tried_and_leaves_the_text(pair: Any) -> None:
    prompts = [[*b"to be, or"], [*b"not to be"]]
    found = study.greedy_schemes(*pair, prompts, [*b"to be, or not to be"], TINY)
    assert {*found} == {*study.schemes(*pair, [1, 2]), "lookahead"}
    for row in found.values():
        assert 1.0 <= row["tokens"] <= TINY.drafts + 1 or row["tokens"] <= 6
        assert row["speed"] > 0


def test_a_text_that_was_changed_stops_the_study(pair: Any) -> None:
    plain = pair[0].generate([[1, 2, 3]], 4, temperature=0)
    text = plain.numpy()[0].tolist()
    study.check("same", text, plain)
    with pytest.raises(RuntimeError, match="changed the greedy text"):
        study.check("other", [*text[:-1], (text[-1] + 1) % 256], plain)


def test_laws_are_those_of_the_model(pair: Any) -> None:
    text = [5, 3, 8, 1, 9, 2]
    found = study.laws_of(pair[0], text, 3)
    logits = host(pair[0]([text]))[0]
    want = np.exp(logits - logits.max(axis=-1, keepdims=True))
    want = (want / want.sum(axis=-1, keepdims=True))[2:5]
    assert_close(found, want, rtol=1e-9, atol=1e-12)


def test_a_draft_like_the_target_always_stands(pair: Any) -> None:
    alpha, rows = study.by_length(pair[0], pair[0], [[1, 2, 3]], replace(TINY, steps=10))
    assert_close(alpha, 1.0, rtol=1e-9)
    for length, counted, formula in rows:
        assert_close(formula, length + 1, rtol=1e-6)
        assert_close(counted, 10 / math.ceil(10 / (length + 1)), rtol=1e-9)


def test_more_candidates_stand_more_often_and_never_more_than_possible(pair: Any) -> None:
    found = study.candidates(*pair, [[*b"to be, or not to be"]], replace(TINY, rows=8))
    most = found.pop("the most possible")
    # 320 draws: five standard errors are 0.14
    for name, values in found.items():
        assert values[-1] > values[0] - 0.05, name
        if name != "without replacement":
            assert all(v <= m + 0.14 for v, m in zip(values, most, strict=True)), name


def test_a_run_of_other_checkpoints(
    pair: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, one in zip(("target", "draft"), pair, strict=True):
        one.astype("float32").save_pretrained(tmp_path / name)
    config = replace(TINY, target=str(tmp_path / "target"), draft=str(tmp_path / "draft"))
    result = study.run(config, Session("speculative", tmp_path))
    assert len(result.figure.axes) == 3
    assert result.metrics["target_parameters"] == pair[0].num_parameters()
    options = ["--target", config.target, "--draft", config.draft, "--steps", "6"]
    out = ["--out", str(tmp_path / "runs")]
    assert program.main(["run", "speculative", *options, *out]) == 0
    assert "tokens per call" in capsys.readouterr().out
    assert program.main(["run", "gpt", *options, *out]) == 2
    assert "has no --target" in capsys.readouterr().err


def test_alpha_is_what_both_models_share_on_the_targets_own_text(pair: Any) -> None:
    config, prompts = replace(TINY, steps=8), [[1, 2, 3], [7, 7, 2]]
    alpha, _ = study.by_length(*pair, prompts, config)
    shares = []
    for k, prompt in enumerate(prompts):
        text = host(pair[0].generate([prompt], 8, rng=Rng(config.seed + 10 + k)))[0]
        for i in range(3, 11):  # the places of the new tokens
            p, q = (np.exp(host(one([text[:i].tolist()]))[0, -1]) for one in pair)
            shares.append(np.minimum(p / p.sum(), q / q.sum()).sum())
    assert_close(alpha, float(np.mean(shares)), rtol=1e-9)
    assert alpha < 0.9
