"""models.studies.text: the recipe of training is the one that is written down, and so is the score.

What its windows, batches and means are is in ``test_studies``.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from mini_nn import Rng, Tensor, ops
from mini_nn.nn import Dropout
from models.gpt import GPT
from models.studies import text as texts
from tests.support import assert_close, host

TINY = texts.TextConfig(
    steps=20,
    n_layer=1,
    n_head=1,
    n_embd=8,
    context=6,
    batch=2,
    lr=1e-2,
    warmup=0.5,
    weight_decay=0.3,
)
TEXT = b"to be, or not to be: that is the question"


def training(config: texts.TextConfig = TINY, **options: Any) -> texts.Training:
    return texts.Training(GPT(config.sizes(), Rng(1)), TEXT, config, Rng(2), **options)


def test_the_optimizer_is_adamw_with_the_recipes_numbers(xp: Any) -> None:
    """β₂ = 0.99 for few steps; the decay is that of the config, and of matrices only."""
    decayed, plain = training().optimizer.param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    assert decayed["betas"] == plain["betas"] == (0.9, 0.99)
    assert {p.ndim for p in decayed["params"]} == {2}


@pytest.mark.parametrize("options", [{}, {"min_ratio": 0.5}])
def test_the_rate_rises_in_a_line_and_falls_as_a_cosine(xp: Any, options: Any) -> None:
    """Every step has the rate of its number: half of 20 steps up, the others down to a tenth."""
    run, last = training(**options), options.get("min_ratio", 0.1)
    rates = []
    for _ in range(20):
        rates.append(run.optimizer.param_groups[0]["lr"])
        run.step()
    rates.append(run.optimizer.param_groups[0]["lr"])
    up = [(t + 1) / 10 for t in range(10)]
    down = [last + (1 - last) * (1 + math.cos(math.pi * t / 10)) / 2 for t in range(11)]
    assert_close(np.array(rates), 1e-2 * np.array(up + down), rtol=1e-12)


def test_gradients_are_clipped_to_length_one(xp: Any) -> None:
    """A loss a thousand times as large gives gradients of norm 1, a small one its own."""

    def scaled(factor: float) -> Any:
        return lambda model, inputs, targets: factor * texts.on_text(model, inputs, targets)

    norms = []
    for factor in (1e3, 1e-3):
        run = training(loss=scaled(factor))
        run.step()
        grads = [host(p.grad).astype("float64") for p in run.model.parameters()]
        norms.append(math.sqrt(sum(float((g * g).sum()) for g in grads)))
    assert_close(norms[0], 1.0, rtol=1e-4)
    assert norms[1] < 0.1


def test_the_loss_is_the_mean_cross_entropy_before_the_step(xp: Any) -> None:
    run, twin = training(), training()
    assert run.loss is texts.on_text
    inputs, targets = texts.batches(twin.text, TINY, twin.rng)
    log_p = host(ops.log_softmax(twin.model(inputs))).astype("float64")
    picked = np.take_along_axis(log_p, host(targets)[..., None], axis=-1)
    assert_close(run.step(), -float(picked.mean()), rtol=1e-5)


def test_a_step_is_that_of_adamw(xp: Any) -> None:
    """The first one: θ (1 − η λ) − η sign(g) for gradients that are not small, at η = lr / 10."""
    run = training()
    matrix = run.model.transformer.wte.weight
    before = host(matrix).copy()
    run.step()
    g = host(matrix.grad)
    clear = abs(g) > 1e-5  # of ε = 10⁻⁸
    assert clear.any()
    wanted = before * (1 - 1e-3 * 0.3) - 1e-3 * np.sign(g)
    assert_close(host(matrix)[clear], wanted[clear], rtol=0.0, atol=3e-6)


def test_dropout_is_that_of_the_config(xp: Any) -> None:
    """After the embeddings and after each branch; without one there is none."""
    config = texts.TextConfig(steps=1, n_layer=1, n_head=1, n_embd=8, context=6, dropout=0.25)
    sizes = config.sizes()
    assert (sizes.embd_pdrop, sizes.resid_pdrop, sizes.attn_pdrop) == (0.25, 0.25, 0.0)
    rates = [m.p for m in GPT(sizes).modules() if isinstance(m, Dropout)]
    assert rates and {*rates} == {0.25}
    assert (TINY.sizes().embd_pdrop, TINY.sizes().resid_pdrop) == (0.0, 0.0)


def test_a_score_is_without_dropout_and_leaves_the_mode(xp: Any) -> None:
    config = texts.TextConfig(steps=1, n_layer=1, n_head=1, n_embd=8, context=6, dropout=0.5)
    model = GPT(config.sizes(), Rng(3))
    model.transformer.drop.eval()
    first, second = (texts.score(model, b"a", TEXT) for _ in range(2))
    assert (first == second).all()
    assert model.training and not model.transformer.drop.training
    model.eval()
    assert (texts.score(model, b"a", TEXT) == first).all()
    assert not any(module.training for module in model.modules())
    model.train()
    with pytest.raises(ValueError, match="at least one byte"):
        texts.score(model, b"a", b"")
    assert all(module.training for module in model.modules())
    noisy = [host(model(Tensor(texts.codes(TEXT[:6])[None]))) for _ in range(2)]
    assert (noisy[0] != noisy[1]).any()  # so the test can tell


def test_texts_that_are_too_short(xp: Any) -> None:
    """A window and the byte after it: 7 of them for a context of 6."""
    inputs, targets = texts.batches(texts.codes(b"abcdefg"), TINY, Rng(0))
    assert (host(targets)[:, -1] == ord("g")).all() and inputs.shape == (2, 6)
    for text in (b"abcdef", b""):
        with pytest.raises(ValueError, match=f"6 bytes .* text of {len(text)}"):
            texts.batches(texts.codes(text), TINY, Rng(0))
    for train, text in ((b"", b"abc"), (b"abc", b"")):
        with pytest.raises(ValueError, match=f"{len(train)} of train and {len(text)} of text"):
            [*texts.windows(train, text, 6)]
