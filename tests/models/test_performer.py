"""A GPT whose attention is the Performer's: its weights, its limit, its cache, its training."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mini_nn import Rng, no_grad
from mini_nn.attention.performer import (
    favor_attention,
    generalized_kernel_attention,
    released_favor_attention,
)
from mini_nn.attention.performer_layer import PerformerAttention
from mini_nn.nn import functional as F
from mini_nn.optim import AdamW
from models.gpt import GPT, GPTConfig
from models.performer import PerformerEncoder, performer, redraw
from tests.support import assert_close, host

FOLDER = Path(__file__).parents[1] / "golden" / "gpt2"
TINY = GPTConfig(vocab_size=17, n_positions=12, n_embd=8, n_layer=2, n_head=2)
IDS = np.random.default_rng(0).integers(0, 17, (2, 9))


def scaled(model: Any, factor: float) -> Any:
    """In evaluation and float64, with weights large enough that attention is not uniform."""
    model = model.astype("float64").eval()
    for p in model.parameters():
        if p.ndim > 1:
            p.data *= factor
    return model


def test_a_gpts_checkpoint_loads(xp: Any) -> None:
    """The names are a GPT's but for the projections, and what is loaded is all it has."""
    gpt = GPT.from_pretrained(FOLDER, dtype="float64")
    model = performer(gpt.config, Rng(1), 32).astype("float64").eval()
    found = model.load_state_dict(gpt.state_dict(), strict=False)
    names = [f"transformer.h.{i}.attn.attention.projection" for i in range(2)]
    assert found.missing_keys == names and not found.unexpected_keys and not found.misshaped_keys
    for name, array in gpt.state_dict().items():
        assert_close(model.state_dict()[name], array, rtol=0, atol=0)


def test_with_many_features_it_is_the_gpt(xp: Any) -> None:
    """The logits come nearer with the number of features; with larger logits of attention, farther.

    Both are what the papers say of loaded weights: nothing is lost in the limit, and much is at the
    usual number of features.
    """
    gaps = {}
    for factor, counts in ((4.0, (8, 2048)), (12.0, (8,))):
        gpt = scaled(GPT(TINY, Rng(0)), factor)
        want = host(gpt(IDS))
        for count in counts:
            model = performer(TINY, Rng(1), count).astype("float64").eval()
            model.load_state_dict(gpt.state_dict(), strict=False)
            gaps[factor, count] = np.abs(host(model(IDS)) - want).mean() / np.abs(want).mean()
    assert gaps[4.0, 2048] < 0.1 * gaps[4.0, 8]
    assert gaps[12.0, 8] > 2.0 * gaps[4.0, 8]


def test_logits_do_not_depend_on_what_is_later(xp: Any) -> None:
    model = scaled(performer(TINY, Rng(0)), 8.0)
    other = IDS.copy()
    other[:, 5:] = (other[:, 5:] + 1) % 17
    assert_close(model(other)[:, :5], host(model(IDS))[:, :5], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", ["positive", "generalized"])
def test_generation_with_a_cache_is_generation(xp: Any, kind: str) -> None:
    attention = favor_attention if kind == "positive" else generalized_kernel_attention
    model = scaled(performer(TINY, Rng(0), attention=attention), 8.0)
    cache = model.new_cache(9)
    parts = [model(IDS[:, :4], cache=cache)]
    parts += [model(IDS[:, i : i + 1], cache=cache) for i in range(4, 9)]
    assert_close(np.concatenate([host(x) for x in parts], 1), model(IDS), rtol=1e-9, atol=1e-11)
    assert model.generate(IDS[:, :3], 5, temperature=0).shape == (2, 8)


def test_pads_are_refused_and_the_remedy_named(xp: Any) -> None:
    with pytest.raises(ValueError, match="key_mask"):
        performer(TINY)(IDS, attention_mask=np.ones_like(IDS))


def test_training_with_projections_that_are_drawn_anew(xp: Any) -> None:
    """One batch is learned by heart although every third step has other features."""
    model = performer(TINY, Rng(0), 16, redraw_interval=3)
    optimizer = AdamW(model.parameters(), lr=1e-2)
    ids, losses, seen = xp.asarray(IDS), [], set()
    for _ in range(40):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(ids[:, :-1]).reshape(-1, 17), ids[:, 1:].reshape(-1))
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
        seen.add(float(model.transformer.h[0].attn.attention.projection[0, 0]))
    assert losses[-1] < 0.3 * losses[0]
    assert len(seen) == 14


@pytest.mark.parametrize("make", [performer, PerformerEncoder])
def test_options_reach_every_layer(xp: Any, make: Any) -> None:
    model = make(TINY, Rng(0), 5, generalized_kernel_attention, 7)
    layers = [m for m in model.modules() if isinstance(m, PerformerAttention)]
    found = {(m.num_features, m.attention, m.redraw_interval) for m in layers}
    assert len(layers) == 2 and found == {(5, generalized_kernel_attention, 7)}
    default = [m for m in make(TINY).modules() if isinstance(m, PerformerAttention)]
    found = {(m.num_features, m.attention, m.redraw_interval) for m in default}
    assert found == {(16, favor_attention, None)}


@pytest.mark.parametrize("make", [performer, PerformerEncoder])
def test_unknown_features_are_refused_when_the_model_is_made(xp: Any, make: Any) -> None:
    with pytest.raises(ValueError, match="got 'cosine'"):
        make(TINY, attention=partial(favor_attention, feature="cosine"))
    with pytest.raises(TypeError, match="got 'hyperbolic'"):
        make(TINY, attention="hyperbolic")
    assert make(TINY, attention=partial(favor_attention, feature="hyperbolic"))


def test_the_released_form_is_for_encoders(xp: Any) -> None:
    """With pads as well; a language model would see the future through it."""
    model = scaled(PerformerEncoder(TINY, Rng(0), attention=released_favor_attention), 8.0)
    x = np.random.default_rng(1).standard_normal((1, 7, 8))
    real = np.arange(7) < 5
    want = host(model(xp.asarray(x[:, :5])))
    found = model(xp.asarray(np.where(real[:, None], x, 9.0)), xp.asarray(real[None]))
    assert_close(host(found)[:, :5], want, rtol=1e-9, atol=1e-11)
    with pytest.raises(ValueError, match="whole sequence"):
        performer(TINY, attention=released_favor_attention)(IDS)


def test_redraw_reaches_every_layer(xp: Any) -> None:
    for model in (performer(TINY, Rng(0)), PerformerEncoder(TINY, Rng(0))):
        before = {name: host(x).copy() for name, x in model.named_buffers()}
        redraw(model)
        assert len(before) == 2
        for name, x in model.named_buffers():
            assert (host(x) != before[name]).all()


def test_the_encoder_has_no_order_and_no_pads(xp: Any) -> None:
    model = scaled(PerformerEncoder(TINY, Rng(0), attention=partial(favor_attention)), 8.0)
    x = np.random.default_rng(1).standard_normal((2, 7, 8))
    order = np.array([3, 0, 6, 1, 2, 5, 4])
    with no_grad():
        y = host(model(xp.asarray(x)))
        assert_close(model(xp.asarray(x[:, order])), y[:, order], rtol=1e-9, atol=1e-11)
        real = np.arange(7) < np.array([[5], [7]])
        short = host(model(xp.asarray(x[:1, :5])))
        for noise in (0.0, 9.0):
            padded = xp.asarray(x + np.where(real, 0.0, noise)[..., None])
            found = host(model(padded, xp.asarray(real)))
            assert_close(found[:1, :5], short, rtol=1e-9, atol=1e-11)
            assert_close(found[1], y[1], rtol=1e-9, atol=1e-11)
