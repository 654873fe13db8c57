"""LayerSkip's training: rates, weights, curricula; what is dropped is the identity, exactly."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_nn import Rng, Tensor, grad, nn, ops
from mini_nn.check import check_grads
from mini_nn.nn import functional as F
from mini_nn.nn.layer_drop import (
    LayerDropout,
    curriculum,
    early_exit_loss,
    early_exit_weights,
    gradual_exits,
    layer_drop_rates,
    rotational_exits,
)
from models.drafts import layer_states
from models.gpt import GPT, Block, GPTConfig
from tests.support import assert_close, host

CONFIG = GPTConfig(11, 16, 8, 3, 2)


# Rates


@given(n_layer=st.integers(2, 40), p_max=st.floats(0.0, 1.0), scale=st.floats(0.0, 1.0))
def test_rates_are_the_papers(n_layer: int, p_max: float, scale: float) -> None:
    rates = layer_drop_rates(n_layer, p_max, scale)
    assert rates[0] == 0.0
    assert rates[-1] == scale * p_max
    wanted = [math.exp(l * math.log(2.0) / (n_layer - 1)) - 1.0 for l in range(n_layer)]
    assert np.allclose(rates, np.array(wanted) * p_max * scale, rtol=1e-12, atol=1e-15)
    assert all(a <= b for a, b in itertools.pairwise(rates))


def test_the_curriculum_rises_from_nothing_to_all() -> None:
    assert curriculum(0, 100) == 0.0
    assert curriculum(99, 100) == 1.0
    assert abs(curriculum(33, 100) - (2.0 ** (1 / 3) - 1.0)) < 1e-15
    assert curriculum(0, 1) == 1.0
    assert layer_drop_rates(1, 0.5) == [0.0]
    with pytest.raises(ValueError, match="0 … 9, got 10"):
        curriculum(10, 10)
    for wrong in ((0, 0.1, 1.0), (3, 1.1, 1.0), (3, 0.1, -0.1)):
        with pytest.raises(ValueError, match="dropout of layers"):
            layer_drop_rates(*wrong)


# Dropout


class Doubled(nn.Module):
    def forward(self, x: Any, *context: Any) -> Any:
        return x * 2.0


def test_a_dropped_row_is_the_identity_and_a_kept_one_is_not_scaled(xp: Any) -> None:
    x = Rng(0).normal((400, 3, 2), dtype="float64")
    y = host(LayerDropout(Doubled(), 0.3, rng=Rng(1))(x))
    ratio = y / host(x)
    assert set(np.unique(ratio)) == {1.0, 2.0}
    assert (ratio == ratio[:, :1, :1]).all()  # a row is dropped as a whole
    dropped = float((ratio[:, 0, 0] == 1.0).mean())
    assert abs(dropped - 0.3) < 5.0 * math.sqrt(0.3 * 0.7 / 400)  # 6e-7 of false alarms


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_limits(xp: Any, p: float) -> None:
    """p = 0 is ordinary training, bit for bit and without a draw; p = 1 leaves only the input."""
    block = Block(CONFIG, Rng(0))
    x, rng = Rng(1).normal((2, 4, 8)), Rng(2)
    before = rng.state_dict()
    layer = LayerDropout(block, p, rng=rng)
    wanted = x if p else block(x)
    assert (host(layer(x)) == host(wanted)).all()
    assert p or rng.state_dict() == before
    assert (host(layer.eval()(x)) == host(block(x))).all()
    assert layer(x).dtype == "float32"


def test_gradients_pass_a_dropped_layer_untouched(xp: Any) -> None:
    block = Block(CONFIG, Rng(0)).astype("float64")
    x = Tensor(Rng(1).normal((6, 4, 8), dtype="float64"), requires_grad=True)
    g = Rng(3).normal((6, 4, 8), dtype="float64")
    weight = block.mlp.c_proj.weight
    dropping = LayerDropout(block, 0.5, rng=Rng(4))
    kept = host(Rng(4).bernoulli(0.5, (6, 1, 1)))[:, 0, 0]
    assert 0 < kept.sum() < 6
    got_x, got_w = (host(part) for part in grad(dropping(x), [x, weight], g))
    assert (got_x[~kept] == host(g)[~kept]).all()
    alone = Tensor(xp.asarray(host(x)[kept]), requires_grad=True)
    want_x, want_w = grad(block(alone), [alone, weight], xp.asarray(host(g)[kept]))
    assert_close(got_x[kept], host(want_x))
    assert_close(got_w, host(want_w))


def test_second_order(xp: Any) -> None:
    class Square(nn.Module):
        def forward(self, x: Any) -> Any:
            return x + ops.sin(x) * x

    def run(x: Any) -> Any:
        return LayerDropout(Square(), 0.5, rng=Rng(0))(x)

    check_grads(run, Rng(1).normal((5, 3), dtype="float64"))


def test_a_model_with_dropped_layers_trains_and_evaluates_as_itself(xp: Any) -> None:
    rates = layer_drop_rates(3, 0.9)
    blocks = [Block(CONFIG, Rng(i)) for i in range(3)]
    plain = GPT(CONFIG, Rng(9), blocks=blocks)
    dropped = [LayerDropout(b, p, rng=Rng(5)) for b, p in zip(blocks, rates, strict=True)]
    made = GPT(CONFIG, Rng(9), blocks=dropped)
    ids = xp.asarray([[1, 2, 3, 4]] * 5)
    for module in (made, plain):
        module.eval()
    assert (host(made(ids)) == host(plain(ids))).all()
    made.train()
    assert (host(made(ids)) != host(plain(ids))).any()
    assert {f"{x.block}" for x in made.transformer.h} == {f"{b}" for b in blocks}
    with pytest.raises(ValueError, match="probability p in"):
        LayerDropout(blocks[0], 1.5)


# Exits


@given(
    n_layer=st.integers(1, 30),
    scale=st.floats(0.0, 5.0),
    data=st.data(),
)
def test_weights_sum_to_one_and_rise(n_layer: int, scale: float, data: st.DataObject) -> None:
    weights = early_exit_weights(n_layer, scale)
    assert abs(math.fsum(weights) - 1.0) < 1e-12
    assert all(a <= b for a, b in itertools.pairwise(weights))
    on = [*data.draw(st.lists(st.booleans(), min_size=n_layer - 1, max_size=n_layer - 1)), True]
    some = early_exit_weights(n_layer, scale, on)
    assert abs(math.fsum(some) - 1.0) < 1e-12
    assert all(w == 0.0 for w, enabled in zip(some, on, strict=True) if not enabled)


def test_weights_are_the_papers() -> None:
    """e(l) by sums written out: 0, s, 3 s, and 3 + 3 s for the last of four layers."""
    s = 0.4
    raw = [0.0, s, s * (1 + 2), 3 + s * (0 + 1 + 2)]
    assert np.allclose(early_exit_weights(4, s), np.array(raw) / sum(raw), rtol=1e-14)
    assert early_exit_weights(4, 0.0) == [0.0, 0.0, 0.0, 1.0]
    assert early_exit_weights(1, 0.7) == [1.0]
    with pytest.raises(ValueError, match="positive weight"):
        early_exit_weights(3, 1.0, [True, False, False])
    with pytest.raises(ValueError, match="2 booleans"):
        early_exit_weights(3, 1.0, [True, False])


@given(n_layer=st.integers(1, 12), every=st.integers(1, 6), start=st.integers(0, 50))
def test_in_turns_every_layer_is_met(n_layer: int, every: int, start: int) -> None:
    """In any R steps each layer has its loss once, and the last one always."""
    rounds = [rotational_exits(n_layer, every, t) for t in range(start, start + every)]
    assert all(one[-1] for one in rounds)
    for l in range(n_layer - 1):
        assert sum(one[l] for one in rounds) == 1


def test_gradually_all_layers_are_opened() -> None:
    total, layers = 80, 4
    rounds = [gradual_exits(layers, t, total) for t in range(total)]
    assert rounds[0] == [False, False, False, True]
    assert rounds[9] == rounds[0]
    assert rounds[10] == [False, False, True, True]  # T / 2L = 10 steps each
    assert rounds[40] == rounds[-1] == [True] * 4
    for a, b in itertools.pairwise(rounds):
        assert all(y or not x for x, y in zip(a, b, strict=True))  # none closes again
    with pytest.raises(ValueError, match="0 … 9"):
        gradual_exits(3, 10, 10)
    with pytest.raises(ValueError, match="both ≥ 1"):
        rotational_exits(3, 0, 1)


def exits(model: GPT) -> Callable[[Any], Any]:
    return lambda state: model.lm_head(model.transformer.ln_f(state))


def test_the_loss_is_the_weighted_sum_of_the_exits(xp: Any) -> None:
    model = GPT(CONFIG, Rng(0)).astype("float64")
    ids, target = xp.asarray([[1, 2, 3], [4, 5, 6]]), xp.asarray([[2, 3, 7], [5, 6, 0]])
    weights = early_exit_weights(3, 0.5)
    loss = early_exit_loss(layer_states(model, ids), exits(model), target, weights)
    wanted = 0.0
    for state, weight in zip(layer_states(model, ids), weights, strict=True):
        logits = host(exits(model)(state)).reshape(6, -1)
        log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        wanted -= weight * log_p[np.arange(6), host(target).reshape(-1)].mean()
    assert_close(loss, np.asarray(wanted))
    # with all weight on the last layer it is ordinary training, gradients included
    last = early_exit_loss(layer_states(model, ids), exits(model), target, [0.0, 0.0, 1.0])
    plain = F.cross_entropy(model(ids).reshape(-1, 11), target.reshape(-1))
    assert_close(last, plain)
    parameters = [*model.parameters()]
    pairs = zip(grad(last, parameters), grad(plain, parameters), strict=True)
    for a, b in pairs:
        assert_close(a, host(b), rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match="one exit has a positive weight"):
        early_exit_loss(layer_states(model, ids), exits(model), target, [0.0] * 3)


def test_a_layer_of_weight_zero_costs_no_head(xp: Any) -> None:
    asked = []

    def head(state: Any) -> Any:
        asked.append(state)
        return state

    states = [Rng(i).normal((2, 3, 5), dtype="float64") for i in range(4)]
    target = xp.asarray([[0, 1, 2], [3, 4, 0]])
    early_exit_loss(states, head, target, [0.0, 0.5, 0.0, 0.5])
    assert [x is states[1] or x is states[3] for x in asked] == [True, True]
    with pytest.raises(ValueError, match="zip"):
        early_exit_loss(states, head, target, [1.0])


def test_gradients_of_the_loss(xp: Any) -> None:
    target = xp.asarray([[0, 1], [3, 4]])

    def run(a: Any, b: Any, w: Any) -> Any:
        weights = early_exit_weights(2, 0.7)
        return early_exit_loss([a, b], lambda x: ops.matmul(x, w), target, [0.25, *weights[1:]])

    a, b = (Rng(i).normal((2, 2, 3), dtype="float64") for i in range(2))
    check_grads(run, a, b, Rng(5).normal((3, 5), dtype="float64"))
