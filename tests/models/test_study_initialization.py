"""The study ``initialization``: it measures what theory says, and every arm is what it says."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mini_nn import Rng, nn
from mini_nn.nn.residual import ReZero, post_norm, pre_norm
from models.studies import initialization as study
from models.studies.session import Session
from tests.support import assert_close, host

TINY = study.InitializationConfig(
    steps=3, seeds=1, draws=1, width=32, depth=5, samples=8, n_layer=2, n_embd=8, context=8,
    batch=2, residual_width=128, residual_depth=4, queries=16, keys=16, warmup=2,
)  # fmt: skip


def test_shares_are_those_of_theory(xp: Any) -> None:
    config = replace(TINY, residual_width=1024, residual_depth=6)
    found = study.shares(post_norm, config, Rng(0))
    want = [2**-3.0, *(2 ** (-(6 - t + 1) / 2) for t in range(1, 7))]
    # 1/√d = 0.03 of overlap between random directions, twice of it
    assert_close(np.array(found), np.array(want), rtol=0, atol=0.07)
    assert_close(np.array(study.shares(pre_norm, config, Rng(0))), np.ones(7), rtol=1e-4)
    identity = study.shares(ReZero(), config, Rng(0))
    assert_close(np.array(identity), np.array([1.0, *[0.0] * 6]), rtol=0, atol=1e-6)


def test_signals_follow_the_prediction_where_there_is_one(xp: Any) -> None:
    config = replace(TINY, width=256, depth=6, draws=3)
    for network in study.networks():
        found = study.follow(network, config, Rng(1))
        measured = found["measured"]
        assert_close(measured["second_moment"][0], network.start, rtol=0.2)
        if network.normalised:
            assert all(0.8 < q < 1.25 for q in measured["second_moment"])
            cosines = np.array(found["predicted"]["cosine"])
            assert_close(np.array(measured["cosine"]), cosines, rtol=0, atol=0.06)
            continue
        predicted = found["predicted"]
        assert_close(
            np.array(measured["second_moment"]), np.array(predicted["second_moment"]), rtol=0.35
        )
        assert_close(np.array(measured["cosine"]), np.array(predicted["cosine"]), rtol=0, atol=0.06)


def test_lecun_alone_halves_relus_signal(xp: Any) -> None:
    found = study.follow(study.networks()[0], replace(TINY, width=256, depth=8), Rng(2))
    first = found["measured"]["second_moment"][0]
    assert_close(found["predicted"]["second_moment"][-1], first / 128, rtol=1e-6)


@pytest.mark.parametrize("arm", study.ARMS, ids=lambda arm: arm.label)
def test_weights_of_an_arm_have_its_scale(xp: Any, arm: Any) -> None:
    config = replace(TINY, n_embd=64)
    model = study.transformer(arm, config, Rng(0))
    beta = (8 * 2) ** -0.25 if arm.label == "DeepNorm" else 1.0
    for block in model.transformer.h:
        joint = host(block.attn.c_attn.weight)
        parts = {
            "query, key": (joint[:, :128], 1.0),
            "value": (joint[:, 128:], beta),
            "attention": (host(block.attn.c_proj.weight), beta),
            "first": (host(block.mlp.c_fc.weight), beta),
            "second": (host(block.mlp.c_proj.weight), beta),
        }
        for name, (weight, factor) in parts.items():
            std = arm.gain * factor / math.sqrt(weight.shape[0])
            # 4,096 numbers or more: five standard errors of their std are 6 %
            assert abs(weight.std() / std - 1) < 0.06, name
        uses_norm = arm.label != "ReZero"
        assert isinstance(block.ln_1, nn.LayerNorm) == uses_norm


def test_only_the_arm_with_a_warm_up_starts_slowly(xp: Any, tmp_path: Path) -> None:
    text = study.codes(b"a small text that is read again and again" * 3)
    firsts = {}
    for arm in study.ARMS:
        folder = tmp_path / arm.label
        folder.mkdir()
        losses = study.train(
            arm, 0, text, replace(TINY, lr=1e-2, warmup=10**6), Session("x", folder)
        )
        assert len(losses) == TINY.steps
        firsts[arm.label] = losses
    warm, cold = firsts["post-norm, warm-up"], firsts["post-norm"]
    assert warm[0] == cold[0]
    assert warm[1] != cold[1]


def test_attention_saturates_without_the_scale(xp: Any) -> None:
    config = replace(TINY, queries=200, keys=128)
    raw, scaled = (study.saturation(256, s, config, Rng(0)) for s in (False, True))
    assert np.mean(raw) > 0.8
    assert np.mean(scaled) < 0.12
    low, high = study.sensitivities([1e-3, 3.0], config, Rng(0))
    assert_close(low, 1e-3 * (1 - 1 / 128), rtol=1e-4)
    assert high > 1.5


def test_smoothing_takes_means(xp: Any) -> None:
    assert study.smoothed([1.0, 3.0, 5.0, 7.0, 8.0], 2) == [2.0, 6.0, 8.0]


def test_a_run_has_all_its_parts(xp: Any, tmp_path: Path) -> None:
    result = study.run(TINY, Session("initialization", tmp_path))
    assert {*result.series} == {
        "losses", "signals", "shares", "largest_weights", "sensitivities",
    }  # fmt: skip
    assert len(result.figure.axes) == 6
    assert all(math.isfinite(v) for v in result.metrics.values() if isinstance(v, float))
    assert [*result.series["losses"]] == [arm.label for arm in study.ARMS]


def test_the_budgets_differ_in_work_only() -> None:
    quick, full = study.STUDY.quick, study.STUDY.full
    assert quick.n_layer == full.n_layer >= 24
    assert (quick.seeds, full.seeds) == (1, 3)
