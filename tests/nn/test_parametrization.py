"""The same layer in other coordinates: equal functions, and predicted paths of training."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_nn import Rng, Tensor, grad, nn, ops
from mini_nn.nn import functional as F
from mini_nn.nn.parametrization import (
    Parametrized,
    Scaled,
    equalized,
    mup,
    mup_stds,
    ntk,
    weight_norm,
)
from mini_nn.optim import SGD, Adam, AdamW
from models.generation import on_arrays
from models.gpt import GPT, GPTConfig
from tests.support import assert_close, host

M, OUT = 16, 5


def layers() -> dict[str, tuple[nn.Module, Any, str]]:
    """A layer of each layout, an input, and the layout's name."""
    rng = Rng(0)
    linear = nn.Linear(M, OUT, rng=rng).astype("float64")
    conv = nn.Conv2d(4, OUT, (2, 3), rng=rng).astype("float64")
    gpt = GPT(GPTConfig(11, 8, M, 1, 2), rng).astype("float64")
    return {
        "linear": (linear, rng.normal((3, M), dtype="float64"), "out_in"),
        "conv": (conv, rng.normal((2, 4, 4, 5), dtype="float64"), "out_in"),
        "gpt": (gpt.transformer.h[0].mlp.c_fc, rng.normal((3, M), dtype="float64"), "in_out"),
    }


FAN_IN = {"linear": M, "conv": 24, "gpt": M}
KINDS = pytest.mark.parametrize("kind", FAN_IN)


@KINDS
@pytest.mark.parametrize("squared", [1.0, 2.0])
def test_the_multiplier_is_that_of_the_fan_in(xp: Any, kind: str, squared: float) -> None:
    layer, x, layout = layers()[kind]
    make = ntk if squared == 1.0 else equalized
    kept = make(layer, layout=layout, redraw=False)
    assert_close(kept(x), layer(x), rtol=1e-12, atol=1e-13)
    raw = host(layer.weight) * math.sqrt(FAN_IN[kind] / squared)
    assert_close(kept.rule.raw, raw, rtol=1e-12)


def test_a_drawn_weight_is_standard_normal_and_the_output_keeps_the_second_moment(xp: Any) -> None:
    layer = nn.Linear(400, 300, bias=False)
    for make, want in ((ntk, 1.0), (equalized, 2.0)):
        made = make(layer, rng=Rng(3))
        raw = host(made.rule.raw)
        # five standard errors of 120,000 numbers: 5/√N for the mean, 5√2/√N for the variance
        assert abs(raw.mean()) < 5 / math.sqrt(raw.size)
        assert abs(raw.var() - 1) < 5 * math.sqrt(2 / raw.size)
        y = host(made(xp.ones((1, 400), "float32")))
        assert abs((y**2).mean() / want - 1) < 5 * math.sqrt(2 / 300)


def train(model: nn.Module, optimizer: Any, x: Any, target: Any, steps: int) -> list[Any]:
    """The weight that the layer uses after each step."""
    seen = []
    for _ in range(steps):
        optimizer.zero_grad()
        F.mse_loss(model(x), target).backward()
        optimizer.step()
        used = model.rule() if isinstance(model, Parametrized) else model.weight
        seen.append(host(used).copy())
    return seen


def pair(seed: int, exact: bool = True) -> tuple[nn.Linear, Parametrized]:
    """A layer and its NTK form; c = 1/4 is a power of two, so multiplying by it rounds nothing."""
    rng = Rng(seed)
    plain = nn.Linear(M, OUT, bias=False, rng=rng).astype("float64")
    return plain, ntk(plain, redraw=False)


def data(seed: int) -> tuple[Any, Any]:
    rng = Rng(seed + 100)
    return rng.normal((7, M), dtype="float64"), rng.normal((7, OUT), dtype="float64")


@given(st.integers(0, 2**32), st.floats(1e-3, 2.0))
def test_sgd_on_the_raw_weight_is_sgd_with_a_smaller_rate(xp: Any, seed: int, lr: float) -> None:
    """lr on w is lr/m on W = w/√m, at every step, with a difference of 0."""
    plain, raw = pair(seed)
    x, target = data(seed)
    one = train(plain, SGD(plain.parameters(), lr=lr / M), x, target, 5)
    two = train(raw, SGD(raw.parameters(), lr=lr), x, target, 5)
    assert all((a == b).all() for a, b in zip(one, two, strict=True))


@given(st.integers(0, 2**32))
def test_adam_needs_its_epsilon_scaled(xp: Any, seed: int) -> None:
    plain, raw = pair(seed)
    x, target = data(seed)
    lr, c = 0.05, 1 / math.sqrt(M)
    one = train(plain, Adam(plain.parameters(), lr=lr * c, eps=1e-3), x, target, 5)
    two = train(raw, Adam(raw.parameters(), lr=lr, eps=1e-3 * c), x, target, 5)
    assert all(np.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in zip(one, two, strict=True))
    plain, raw = pair(seed)
    one = train(plain, Adam(plain.parameters(), lr=lr * c, eps=1e-1), x, target, 5)
    two = train(raw, Adam(raw.parameters(), lr=lr, eps=1e-1), x, target, 5)
    assert abs(one[-1] - two[-1]).max() > 1e-6  # the same ε is another path


@given(st.integers(0, 2**32))
def test_decoupled_decay_is_the_same_and_a_penalty_is_not(xp: Any, seed: int) -> None:
    lr, c, decay = 0.1, 1 / math.sqrt(M), 0.3
    plain, raw = pair(seed)
    x, target = data(seed)
    # AdamW shrinks by lr·λ: the same factor on both needs the same lr·λ
    one = train(
        plain,
        AdamW(plain.parameters(), lr=lr * c, weight_decay=decay / c),
        x,
        target,
        4,
    )
    two = train(raw, AdamW(raw.parameters(), lr=lr, weight_decay=decay, eps=1e-8 * c), x, target, 4)
    assert_close(two[-1], one[-1], rtol=1e-8, atol=1e-10)
    # λ‖w‖² is λ/c² ‖W‖²
    plain, raw = pair(seed)
    one = train(plain, SGD(plain.parameters(), lr=lr / M, weight_decay=decay * M), x, target, 4)
    two = train(raw, SGD(raw.parameters(), lr=lr, weight_decay=decay), x, target, 4)
    assert_close(two[-1], one[-1], rtol=1e-10, atol=1e-12)
    plain, raw = pair(seed)
    same = train(plain, SGD(plain.parameters(), lr=lr / M, weight_decay=decay), x, target, 4)
    assert abs(same[-1] - two[-1]).max() > 1e-4


def test_the_first_step_of_adam_moves_every_raw_weight_by_the_rate(xp: Any) -> None:
    _, raw = pair(1)
    x, target = data(1)
    before = host(raw.rule.raw).copy()
    train(raw, Adam(raw.parameters(), lr=0.01, eps=0.0), x, target, 1)
    assert_close(abs(host(raw.rule.raw) - before), np.full(before.shape, 0.01), rtol=1e-9)


# weight norm


@KINDS
def test_weight_norm_keeps_the_function_and_splits_length_from_direction(
    xp: Any, kind: str
) -> None:
    layer, x, layout = layers()[kind]
    dim = 1 if layout == "in_out" else 0
    made = weight_norm(layer, dim=dim)
    assert_close(made(x), layer(x), rtol=1e-12, atol=1e-13)
    axes = tuple(a for a in range(layer.weight.ndim) if a != dim)
    made.rule.v.data[...] *= 3.7  # its length has no meaning
    assert_close(made(x), layer(x), rtol=1e-12, atol=1e-13)
    made.rule.g.data[...] *= 2.0
    length = np.sqrt((host(made.rule()) ** 2).sum(axis=axes))
    assert_close(length, 2 * np.sqrt((host(layer.weight) ** 2).sum(axis=axes)), rtol=1e-12)


def test_the_gradient_of_the_direction_is_orthogonal_to_it(xp: Any) -> None:
    layer, x, _ = layers()["linear"]
    made = weight_norm(layer)
    v, g = grad(ops.sum(ops.sin(made(x))), [made.rule.v, made.rule.g])
    dots = (host(v) * host(made.rule.v)).sum(axis=1)
    assert abs(dots).max() < 1e-12 * abs(host(v)).max()
    # eq. 3 of the paper: ∇g = ∇W · v / ‖v‖
    weight = Tensor(layer.weight.data, requires_grad=True)
    (full,) = grad(ops.sum(ops.sin(F.linear(x, weight, layer.bias))), weight)
    unit = host(made.rule.v) / np.linalg.norm(host(made.rule.v), axis=1, keepdims=True)
    assert_close(g, (host(full) * unit).sum(axis=1, keepdims=True), rtol=1e-10)


def test_one_length_for_all(xp: Any) -> None:
    layer, x, _ = layers()["linear"]
    made = weight_norm(layer, dim=-1)
    assert made.rule.g.shape == (1, 1)
    assert_close(made(x), layer(x), rtol=1e-12, atol=1e-13)


# what every reparametrisation is


def test_the_layer_itself_is_left_alone_and_can_be_had_back(xp: Any) -> None:
    layer, x, _ = layers()["linear"]
    before = host(layer.weight).copy()
    made = ntk(layer, rng=Rng(1))
    assert [*layer.state_dict()] == ["weight", "bias"]
    assert (host(layer.weight) == before).all()
    assert [*made.state_dict()] == ["layer.bias", "rule.raw"]
    again = made.plain()
    assert type(again) is nn.Linear
    assert [name for name, _ in again.named_parameters()] == ["bias", "weight"]
    assert_close(again(x), made(x), rtol=1e-12)


def test_it_has_a_view_on_arrays_and_moves(xp: Any) -> None:
    layer, x, _ = layers()["linear"]
    for made in (ntk(layer), weight_norm(layer)):
        view = on_arrays(made)
        out = view(x)
        assert not isinstance(out, Tensor)
        assert_close(out, made(x), rtol=1e-12)
        assert made.astype("float32").rule().dtype == "float32"


def test_what_cannot_be_reparametrised_is_refused() -> None:
    with pytest.raises(ValueError, match="has no Parameter 'weight'"):
        ntk(nn.ReLU())
    with pytest.raises(ValueError, match="no fans"):
        ntk(nn.LayerNorm(4))
    assert isinstance(ntk(nn.Linear(2, 2)).rule, Scaled)


# μP


class Mlp(nn.Module):
    """From a fixed size to the width and back, with one hidden layer."""

    def __init__(self, width: int, base: int | None, rng: Rng) -> None:
        self.first = nn.Linear(8, width, rng=rng)
        self.hidden = nn.Linear(width, width, rng=rng)
        self.last = nn.Linear(width, 4, rng=rng)
        roles = {"input": (self.first, 8), "hidden": (self.hidden, width)}
        for role, (layer, fan) in {**roles, "output": (self.last, width)}.items():
            std = mup_stds(fan, width, base or width, role)
            layer.weight.data[...] = rng.normal(layer.weight.shape, std=std)
            layer.bias.data[...] = 0.0

    def states(self, x: Any) -> list[Any]:
        h = F.relu(self.first(x))
        h2 = F.relu(self.hidden(h))
        return [h, h2, self.last(h2)]

    def roles(self) -> dict[str, Any]:
        layers = {"input": self.first, "hidden": self.hidden, "output": self.last}
        vectors = [layer.bias for layer in layers.values()]
        return {**{k: [layer.weight] for k, layer in layers.items()}, "vector": vectors}


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_coordinates_move_alike_at_every_width(xp: Any, optimizer: str) -> None:
    """The coordinate check of the paper's appendix D: flat with μP, growing or fading without."""
    widths = (128, 256, 512, 1024)
    make, lr = (Adam, 2e-3) if optimizer == "adam" else (SGD, 0.02)

    def changes(width: int, transfer: bool, seed: int) -> list[float]:
        rng = Rng(seed)
        model = Mlp(width, 128 if transfer else None, rng)
        # what the untrained network says fades with the width, and with it a part of the error
        model.last.weight.data[...] *= 0.1
        x, y = rng.normal((16, 8)), rng.normal((16, 4))
        groups: Any = [*model.parameters()]
        if transfer:
            groups = mup(model.roles(), width, 128, lr, optimizer)
        step = make(groups, lr=lr)
        before = [host(h).copy() for h in model.states(x)]
        for _ in range(3):
            step.zero_grad()
            F.mse_loss(model.states(x)[-1], y).backward()
            step.step()
        after = model.states(x)
        return [float(abs(host(b) - a).mean()) for a, b in zip(before, after, strict=True)]

    slopes = {}
    for transfer in (True, False):
        sizes = np.log([
            np.mean([changes(width, transfer, seed) for seed in range(4)], axis=0)
            for width in widths
        ])  # fmt: skip
        slopes[transfer] = np.polyfit(np.log(widths), sizes, 1)[0]
    assert abs(slopes[True]).max() < 0.15
    assert abs(slopes[False]).max() > 0.3


def test_mup_at_the_base_width_changes_nothing() -> None:
    p = nn.Parameter(np.ones(2))
    for optimizer in ("adam", "sgd"):
        groups = mup({"hidden": [p], "output": []}, 64, 64, 0.1, optimizer)
        assert [group["lr"] for group in groups] == [0.1, 0.1]
    assert mup_stds(64, 64, 64, "output") == 1 / 8


def test_mup_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="adam"):
        mup({}, 2, 1, 0.1, "lion")
    with pytest.raises(ValueError, match="hidden"):
        mup({"inner": []}, 2, 1, 0.1)
    with pytest.raises(ValueError, match="role"):
        mup_stds(4, 2, 1, "inner")
