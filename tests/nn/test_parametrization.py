"""The same layer in other coordinates: equal functions, and predicted paths of training."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_nn import Rng, Tensor, grad, nn, ops
from mini_nn.nn import functional as F
from mini_nn.nn.parametrization import (
    MupRule,
    Parametrized,
    Scaled,
    equalized,
    mup,
    mup_rules,
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


def pair(seed: int, m: int = M) -> tuple[nn.Linear, Parametrized]:
    """A layer and its NTK form; c = 1/√16 is a power of two: multiplying by it rounds nothing."""
    plain = nn.Linear(m, OUT, bias=False, rng=Rng(seed)).astype("float64")
    return plain, ntk(plain, redraw=False)


def data(seed: int, m: int = M) -> tuple[Any, Any]:
    rng = Rng(seed + 100)
    return rng.normal((7, m), dtype="float64"), rng.normal((7, OUT), dtype="float64")


@given(st.integers(0, 2**32), st.floats(1e-3, 2.0))
def test_sgd_on_the_raw_weight_is_sgd_with_a_smaller_rate(xp: Any, seed: int, lr: float) -> None:
    """lr on w is lr/m on W = w/√m, at every step, with a difference of 0."""
    plain, raw = pair(seed)
    x, target = data(seed)
    one = train(plain, SGD(plain.parameters(), lr=lr / M), x, target, 5)
    two = train(raw, SGD(raw.parameters(), lr=lr), x, target, 5)
    assert all((a == b).all() for a, b in zip(one, two, strict=True))


def test_where_the_multiplier_rounds_sgd_is_the_same_up_to_rounding(xp: Any) -> None:
    plain, raw = pair(2, 11)
    x, target = data(2, 11)
    one = train(plain, SGD(plain.parameters(), lr=0.5 / 11), x, target, 20)
    two = train(raw, SGD(raw.parameters(), lr=0.5), x, target, 20)
    assert_close(two[-1], one[-1], rtol=1e-12, atol=1e-14)
    plain, _ = pair(2, 11)  # the rate of Adam's rule, lr/√m, is not SGD's
    wrong = train(plain, SGD(plain.parameters(), lr=0.5 / math.sqrt(11)), x, target, 1)
    assert abs(wrong[0] - two[0]).max() > 1e-3


@given(st.integers(0, 2**32))
def test_adam_on_the_raw_weight_is_adam_with_the_root_of_that_rate(xp: Any, seed: int) -> None:
    """lr on w is lr/√m on W, with a difference of 0 if ε is 0."""
    plain, raw = pair(seed)
    x, target = data(seed)
    one = train(plain, Adam(plain.parameters(), lr=0.05 / math.sqrt(M), eps=0.0), x, target, 5)
    two = train(raw, Adam(raw.parameters(), lr=0.05, eps=0.0), x, target, 5)
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
    outer = AdamW(plain.parameters(), lr=lr * c, weight_decay=decay / c)
    one = train(plain, outer, x, target, 4)
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


@pytest.mark.parametrize("m", [16, 256, 1024])
def test_the_first_step_of_adam_changes_a_raw_weight_by_the_rate_at_every_width(
    xp: Any, m: int
) -> None:
    """1% of a weight of size 1 for lr = 0.01; of the plain weight, of size 1/√m, it is √m times."""
    lr, (x, target) = 0.01, data(1, m)
    linear = nn.Linear(m, OUT, bias=False).astype("float64")
    raw = ntk(linear, rng=Rng(3))
    plain = raw.remove()
    weights = {"raw": raw.rule.raw, "plain": plain.weight}
    relative = {}
    for model, (name, weight) in zip((raw, plain), weights.items(), strict=True):
        before = host(weight).copy()
        train(model, Adam(model.parameters(), lr=lr, eps=0.0), x, target, 1)
        change = host(weight) - before
        assert_close(abs(change), np.full(before.shape, lr), rtol=1e-9)
        relative[name] = np.sqrt((change**2).mean() / (before**2).mean())
    assert relative["raw"] == pytest.approx(lr, rel=5 / math.sqrt(2 * m * OUT))
    assert relative["plain"] / relative["raw"] == pytest.approx(math.sqrt(m), rel=1e-9)


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
    # eq. 3 of the paper: ∇g = ∇W · v / ‖v‖ and ∇v = g / ‖v‖ ∇W − g ∇g / ‖v‖² v
    weight = Tensor(layer.weight.data, requires_grad=True)
    (full,) = grad(ops.sum(ops.sin(F.linear(x, weight, layer.bias))), weight)
    length = np.linalg.norm(host(made.rule.v), axis=1, keepdims=True)
    unit = host(made.rule.v) / length
    assert_close(g, (host(full) * unit).sum(axis=1, keepdims=True), rtol=1e-10)
    want = host(made.rule.g) / length * (host(full) - host(g) * unit)
    assert_close(v, want, rtol=1e-10, atol=1e-12)
    # so a step of gradient descent makes v longer, by Pythagoras
    made.rule.v.grad = v
    SGD([made.rule.v], lr=0.3).step()
    grown = np.linalg.norm(host(made.rule.v), axis=1, keepdims=True) ** 2
    step = 0.09 * (host(v) ** 2).sum(axis=1, keepdims=True)
    assert_close(grown, length**2 + step, rtol=1e-12)


def test_one_length_for_all_and_axes_from_the_end(xp: Any) -> None:
    layer, x, _ = layers()["linear"]
    for dim, shape in ((None, (1, 1)), (-2, (OUT, 1)), (-1, (1, M))):
        made = weight_norm(layer, dim=dim)
        assert made.rule.g.shape == shape
        assert_close(made(x), layer(x), rtol=1e-12, atol=1e-13)


def test_the_rows_of_an_embedding_have_a_length_each(xp: Any) -> None:
    table = nn.Embedding(7, 4, rng=Rng(0)).astype("float64")
    made = weight_norm(table)
    ids = xp.asarray([[3, 0], [6, 3]])
    assert_close(made(ids), table(ids), rtol=1e-12)
    made.rule.g.data[...] = 1.0
    assert_close(np.linalg.norm(host(made(ids)), axis=-1), np.ones((2, 2)), rtol=1e-12)


# what every reparametrisation is


def test_the_layer_itself_is_left_alone_and_can_be_had_back(xp: Any) -> None:
    layer, x, _ = layers()["linear"]
    before = host(layer.weight).copy()
    made = ntk(layer, rng=Rng(1))
    assert [*layer.state_dict()] == ["weight", "bias"]
    assert (host(layer.weight) == before).all()
    assert [*made.state_dict()] == ["layer.bias", "rule.raw"]
    again = made.remove()
    assert type(again) is nn.Linear
    assert [name for name, _ in again.named_parameters()] == ["bias", "weight"]
    assert (host(again(x)) == host(made(x))).all()
    assert [name for name, _ in made.named_parameters()] == ["layer.bias", "rule.raw"]


def test_what_is_frozen_stays_frozen(xp: Any) -> None:
    layer, _, _ = layers()["linear"]
    layer.weight.requires_grad = False
    for made in (ntk(layer), weight_norm(layer)):
        assert [n for n, p in made.named_parameters() if p.requires_grad] == ["layer.bias"]
        assert not made.remove().weight.requires_grad


def test_float32_stays_float32(xp: Any) -> None:
    x = Tensor(Rng(0).normal((3, M)), requires_grad=True)
    for made in (ntk(nn.Linear(M, OUT)), weight_norm(nn.Linear(M, OUT))):
        y = made(x)
        found = grad(ops.sum(y), [x, *made.parameters()])
        assert {str(t.dtype) for t in (y, *found)} == {"float32"}


def reparametrised(model: GPT, make: Any) -> GPT:
    """Each layer of GPT-2's layout (in, out) replaced by what ``make`` makes of it."""
    for module in [*model.modules()]:
        for name, child in [*module.named_children()]:
            if type(child).__name__ == "Conv1D":
                setattr(module, name, make(child))
    return model


@pytest.mark.parametrize("kind", ["ntk", "weight_norm"])
def test_a_transformer_of_such_layers_is_the_same_and_decodes_from_its_cache(
    xp: Any, kind: str
) -> None:
    make = {
        "ntk": lambda layer: ntk(layer, layout="in_out", redraw=False),
        "weight_norm": lambda layer: weight_norm(layer, dim=1),
    }[kind]
    ids = xp.asarray([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    plain, made = (GPT(GPTConfig(11, 8, M, 2, 2), Rng(0)).astype("float64") for _ in range(2))
    made = reparametrised(made, make)
    assert sum(isinstance(m, Parametrized) for m in made.modules()) == 8
    whole = made(ids)
    assert_close(whole, plain(ids), rtol=1e-9, atol=1e-12)
    cache = made.new_cache(8)
    parts = [made(ids[:, :2], cache=cache), made(ids[:, 2:], cache=cache)]
    assert_close(ops.concatenate(parts, axis=1), whole, rtol=1e-9, atol=1e-12)
    # the view on arrays sees what the raw parameters are now
    for parameter in made.parameters():
        parameter.data[...] = parameter.data * 1.5
    assert_close(made(ids, cache=made.new_cache(8)), made(ids), rtol=1e-9, atol=1e-12)


def test_it_has_a_view_on_arrays_and_moves(xp: Any) -> None:
    layer, x, _ = layers()["linear"]
    for made in (ntk(layer), weight_norm(layer)):
        out = on_arrays(made)(x)
        assert not isinstance(out, Tensor)
        assert_close(out, made(x), rtol=1e-12)
        assert made.astype("float32").rule().dtype == "float32"


def test_what_cannot_be_reparametrised_is_refused() -> None:
    with pytest.raises(ValueError, match="has no Parameter 'weight'"):
        ntk(nn.ReLU())
    with pytest.raises(ValueError, match="no fans"):
        ntk(nn.LayerNorm(4))
    with pytest.raises(ValueError, match="Embedding"):
        equalized(nn.Embedding(4, 3))
    with pytest.raises(ValueError, match="no axis 2"):
        weight_norm(nn.Linear(3, 2), dim=2)
    zero = nn.Linear(3, 2)
    zero.weight.data[...] = 0.0
    with pytest.raises(ValueError, match="direction"):
        weight_norm(zero)


# μP


BASE, WIDTHS = 64, (64, 128, 256, 512, 1024)


class Mlp(nn.Module):
    """From a fixed size to the width and back, with one hidden layer."""

    def __init__(self, width: int, rules: dict[str, MupRule], rng: Rng) -> None:
        self.first = nn.Linear(8, width, rng=rng)
        self.hidden = nn.Linear(width, width, rng=rng)
        last = nn.Linear(width, 4, rng=rng)
        for role, layer in (("input", self.first), ("hidden", self.hidden), ("output", last)):
            std = rules[role].std / math.sqrt(layer.weight.shape[1])
            layer.weight.data[...] = rng.normal(layer.weight.shape, std=std)
            layer.bias.data[...] = 0.0
        self.last = Parametrized(last, Scaled(last.weight, rules["output"].multiplier))

    def states(self, x: Any) -> list[Any]:
        h = F.relu(self.first(x))
        h2 = F.relu(self.hidden(h))
        return [h, h2, self.last(h2)]

    def roles(self) -> dict[str, list[nn.Parameter]]:
        return {
            "input": [self.first.weight],
            "hidden": [self.hidden.weight],
            "output": [self.last.rule.raw],
            "vector": [self.first.bias, self.hidden.bias],
            "scalar": [self.last.layer.bias],
        }

    def fit(self, optimizer: Any, x: Any, y: Any, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            F.mse_loss(self.states(x)[-1], y).backward()
            optimizer.step()


def slopes(rules: Any, make: Any, lr: float) -> Any:
    """Of the logs of how far three steps move each activation, over those of the widths."""
    sizes = []
    for width in WIDTHS:
        of_seeds = []
        for seed in range(4):
            rng = Rng(seed)
            model = Mlp(width, rules(width), rng)
            model.last.rule.raw.data[...] = 0.0
            x, y = rng.normal((16, 8)), rng.normal((16, 4))
            before = [host(h).copy() for h in model.states(x)]
            model.fit(make(mup(model.roles(), rules(width), lr), lr=lr), x, y, 3)
            after = model.states(x)
            of_seeds.append([abs(host(b) - a).mean() for a, b in zip(before, after, strict=True)])
        sizes.append(np.mean(of_seeds, axis=0))
    return np.polyfit(np.log(WIDTHS), np.log(sizes), 1)[0]


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_coordinates_move_alike_at_every_width(xp: Any, optimizer: str) -> None:
    """The coordinate check of the paper's appendix D.1: flat in the width, and steep without μP.

    The output starts at 0, which the paper advises in D.2: what the untrained network says would
    fade with the width, and with it a part of the error.
    """
    make, lr = (Adam, 2e-3) if optimizer == "adam" else (SGD, 0.1)
    fitted = slopes(lambda width: mup_rules(width, BASE, optimizer), make, lr)
    assert abs(fitted).max() < 0.15
    standard = slopes(lambda width: mup_rules(BASE, BASE, optimizer), make, lr)
    assert standard.max() > 0.5


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_both_tables_take_the_same_path(xp: Any, optimizer: str) -> None:
    make = partial(SGD, lr=0.01) if optimizer == "sgd" else partial(Adam, lr=0.01, eps=1e-30)
    ends = []
    for table in (3, 8):
        rules = mup_rules(64, 4, optimizer, table)  # all factors are powers of two: none rounds
        rng = Rng(0)
        model = Mlp(64, rules, rng).astype("float64")
        x, y = (rng.normal((16, n), dtype="float64") for n in (8, 4))
        model.fit(make(mup(model.roles(), rules, 0.01)), x, y, 4)
        ends.append(host(model.states(x)[-1]))
    assert (ends[0] == ends[1]).all()


def test_the_bias_of_a_fixed_size_is_no_vector(xp: Any) -> None:
    """Its gradient does not depend on the width; the rate of those that do would make it move r×"""
    moves: dict[str, list[Any]] = {"scalar": [], "vector": []}
    for role, seen in moves.items():
        for width in (64, 256):
            rules, rng = mup_rules(width, 64, "sgd"), Rng(0)
            x, y = rng.normal((16, 8)), rng.normal((16, 4))
            model = Mlp(width, rules, rng)
            model.last.rule.raw.data[...] = 0.0
            bias = model.last.layer.bias
            model.fit(SGD(mup({role: [bias]}, rules, 0.1), lr=0.1), x, y, 1)
            seen.append(host(bias))
    assert_close(moves["scalar"][1], moves["scalar"][0], rtol=1e-6)
    assert_close(moves["vector"][1], 4 * moves["vector"][0], rtol=1e-6)


def test_mup_at_the_base_width_changes_nothing() -> None:
    for optimizer in ("adam", "sgd"):
        for table in (3, 8):
            rules = mup_rules(96, 96, optimizer, table)
            assert set(rules.values()) == {MupRule(1.0, 1.0, 1.0)}
    p = nn.Parameter(Rng(0).normal((2,)))
    groups = mup({"hidden": [p], "output": []}, mup_rules(128, 32), 0.1)
    assert [(group["params"], group["lr"]) for group in groups] == [([p], 0.025), ([], 0.025)]


def test_mup_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="'lion'"):
        mup_rules(2, 1, "lion")
    with pytest.raises(ValueError, match="tables 3 and 8"):
        mup_rules(2, 1, table=4)
    with pytest.raises(ValueError, match="at least 1"):
        mup_rules(0, 1)
    with pytest.raises(ValueError, match="no rule for inner"):
        mup({"inner": []}, mup_rules(2, 1), 0.1)
