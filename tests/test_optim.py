"""Optimisers against torch's goldens, their own equations, and closed forms on quadratics."""

from __future__ import annotations

import json
import math
import tracemalloc
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mini_nn import Tensor, backend, grad, io, optim
from mini_nn.optim import base
from tests.support import assert_close, host

GOLDEN = Path(__file__).parent / "golden" / "optim.safetensors"
ABOUT = json.loads(io.load_metadata(GOLDEN)["about"])
OPTIMISERS: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"lr": 0.05}),
    ("SGD", {"lr": 0.05, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.1}),
    ("SGD", {"lr": 0.05, "momentum": 0.8, "weight_decay": 0.1, "nesterov": True}),
    ("Adam", {"lr": 0.01}),
    ("Adam", {"lr": 0.01, "betas": (0.7, 0.9), "eps": 1e-3, "weight_decay": 0.1}),
    ("AdamW", {"lr": 0.01}),
    ("AdamW", {"lr": 0.01, "betas": (0.0, 0.5), "weight_decay": 0.2}),
]


def leaf(xp: Any, values: Any, dtype: str = "float64") -> Tensor:
    """A parameter on the backend under test."""
    return Tensor(xp.asarray(np.array(values, dtype=dtype)), requires_grad=True)


def make(name: str, params: Any, options: dict[str, Any]) -> Any:
    return getattr(optim, name)(params, **options)


def descend(optimizer: Any, p: Tensor, curvature: Any, steps: int) -> Any:
    """The iterates on f(x) = Σ λ x²/2, the start included."""
    seen = [host(p).copy()]
    for _ in range(steps):
        p.grad = p.data * curvature
        optimizer.step()
        seen.append(host(p).copy())
    return np.stack(seen)


def twin(name: str, p: Any, grads: list[Any], options: dict[str, Any]) -> Any:
    """The same steps by the equations, in NumPy's float64."""
    first = second = np.zeros_like(p)
    for t, g in enumerate(grads, 1):
        if name == "SGD":
            p, first = optim.sgd_step(p, g, first, t, **options)
        else:
            step = optim.adam_step if name == "Adam" else optim.adamw_step
            p, first, second = step(p, g, first, second, t, **options)
    return p


# Oracles


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("case", list(ABOUT["cases"]))
def test_torchs_steps(xp: Any, case: str, dtype: str) -> None:
    stored, about = io.load_file(GOLDEN), ABOUT["cases"][case]
    params = [leaf(xp, host(stored[f"start.{i}"]), dtype) for i in range(3)]
    groups: Any = params
    if "groups" in about:
        groups = [{**g, "params": [params[i] for i in g["params"]]} for g in about["groups"]]
    optimizer = make(about["class"], groups, about["options"])
    tolerance = {"rtol": 3e-6, "atol": 3e-7} if dtype == "float32" else {"rtol": 1e-12}
    for step in range(ABOUT["steps"]):
        for i, p in enumerate(params):
            skipped = step in ABOUT["skipped"].get(str(i), [])
            p.grad = None if skipped else stored[f"grads.{i}"][step].astype(dtype)
        optimizer.step()
        for i, p in enumerate(params):
            assert p.dtype == dtype
            assert_close(p, stored[f"{case}.{dtype}.{i}"][step], **tolerance)


@pytest.mark.parametrize("layout", ["C", "strided gradient", "transposed parameter"])
@given(
    case=st.sampled_from(OPTIMISERS),
    shape=st.sampled_from([(), (0,), (1,), (7,), (8,), (3, 5), (2, 0), (4, 3, 2)]),
    seed=st.integers(0, 2**32 - 1),
)
@example(case=OPTIMISERS[1], shape=(3, 5), seed=0)
@example(case=OPTIMISERS[6], shape=(3, 5), seed=0)
def test_in_place_steps_are_the_equations(
    xp: Any, layout: str, case: tuple[str, dict[str, Any]], shape: Any, seed: int
) -> None:
    name, options = case
    rng = np.random.default_rng(seed)
    start = rng.standard_normal(shape)
    grads = [rng.standard_normal(shape) for _ in range(4)]
    p = leaf(xp, start)
    if layout == "transposed parameter":
        p = Tensor(xp.asarray(start.T.copy()).T, requires_grad=True)
    with mock.patch.object(base, "BLOCK", 7):  # several blocks, the last one shorter
        optimizer = make(name, [p], options)
        for g in grads:
            given_gradient = xp.asarray(g)
            if layout == "strided gradient":
                given_gradient = xp.asarray(g.T.copy()).T
            p.grad = given_gradient
            optimizer.step()
            assert_close(given_gradient, g, rtol=0, atol=0)  # only read
    assert_close(p, twin(name, start, grads, options), rtol=1e-12, atol=1e-13)


def test_the_equations_can_be_differentiated(xp: Any) -> None:
    # one SGD step on λx²/2 is x (1 - ηλ), so d/dx of the loss after it is λ x (1 - ηλ)²
    curvature, lr = 3.0, 0.1
    x = leaf(xp, [1.0, -2.0])
    (g,) = grad((x * x * (curvature / 2)).sum(), x, create_graph=True)
    after, _ = optim.sgd_step(x, g, 0.0, 1, lr)
    (meta,) = grad((after * after * (curvature / 2)).sum(), x)
    assert_close(meta, curvature * (1 - lr * curvature) ** 2 * host(x), rtol=1e-12)
    (g,) = grad((x * x * (curvature / 2)).sum(), x, create_graph=True)
    after, _, _ = optim.adamw_step(x, g, 0.0, 0.0, 1, lr, eps=1e-8, weight_decay=0.5)
    (meta,) = grad(after.sum(), x)  # the first step of Adam has a constant size: only decay is felt
    assert_close(meta, [1 - lr * 0.5] * 2, rtol=1e-6)


# Closed forms


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_on_a_quadratic_is_a_linear_recurrence(xp: Any, nesterov: bool) -> None:
    curvature, lr, mu = np.array([0.05, 1.0, 4.0]), 0.3, 0.6
    p = leaf(xp, [1.0, -2.0, 3.0])
    optimizer = optim.SGD([p], lr, momentum=mu, nesterov=nesterov)
    seen = descend(optimizer, p, xp.asarray(curvature), 30)

    def closed_form(follow_nesterov: bool) -> Any:
        shrink = 1 - lr * curvature
        # roots of r² = a r - b; the iterate is c₁ r₁ᵗ + c₂ r₂ᵗ
        a, b = (1 + mu) * shrink, mu * shrink
        if not follow_nesterov:
            a, b = mu + shrink, np.full(3, mu)
        root = np.sqrt((a * a - 4 * b).astype(complex))
        r1, r2 = (a + root) / 2, (a - root) / 2
        c1 = (seen[1] - r2 * seen[0]) / (r1 - r2)
        t = np.arange(31)[:, None]
        return (c1 * r1**t + (seen[0] - c1) * r2**t).real

    assert_close(seen, closed_form(nesterov), rtol=1e-9, atol=1e-9)
    with pytest.raises(AssertionError):
        assert_close(seen, closed_form(not nesterov), rtol=1e-3, atol=1e-3)


def test_polyaks_choice_converges_at_his_rate(xp: Any) -> None:
    low, high = 1.0, 100.0
    mu = ((math.sqrt(high / low) - 1) / (math.sqrt(high / low) + 1)) ** 2
    lr = 4 / (math.sqrt(low) + math.sqrt(high)) ** 2

    def rate(momentum: float, lr: float) -> float:
        p = leaf(xp, [1.0, 1.0])
        seen = descend(optim.SGD([p], lr, momentum), p, xp.asarray([low, high]), 300)
        size = np.abs(seen).max(axis=1)
        return float((size[300] / size[150]) ** (1 / 150))

    assert rate(mu, lr) == pytest.approx(math.sqrt(mu), abs=0.01)
    # without momentum the best step gives (κ - 1) / (κ + 1)
    assert rate(0.0, 2 / (low + high)) == pytest.approx(99 / 101, abs=1e-3)


def test_dampening_spares_the_first_gradient(xp: Any) -> None:
    p = leaf(xp, [0.0])
    optimizer = optim.SGD([p], lr=1.0, momentum=0.5, dampening=0.75)
    seen = []
    for _ in range(3):
        p.grad = xp.asarray(np.array([1.0]))
        optimizer.step()
        seen.append(float(host(p)[0]))
    assert seen == [-1.0, -1.75, -2.375]  # b = 1, then 1/2 b + 1/4


@given(st.lists(st.floats(1e-12, 1e12), min_size=1, max_size=5), st.integers(1, 20))
def test_adam_under_a_constant_gradient_walks_evenly(
    xp: Any, sizes: list[float], steps: int
) -> None:
    g = np.array(sizes) * np.where(np.arange(len(sizes)) % 2, -1.0, 1.0)
    lr, eps = 0.25, 1e-8
    p = leaf(xp, np.zeros(len(sizes)))
    optimizer = optim.Adam([p], lr, eps=eps)
    for _ in range(steps):
        p.grad = xp.asarray(g)
        optimizer.step()
    assert_close(p, -steps * lr * g / (np.abs(g) + eps), rtol=1e-9)


def test_without_bias_correction_the_first_step_would_differ(xp: Any) -> None:
    p = leaf(xp, [0.0, 0.0])
    p.grad = xp.asarray(np.array([1e-5, -1e5]))
    optim.Adam([p], lr=1.0, eps=0.0).step()
    assert_close(p, [-1.0, 1.0], rtol=1e-12)
    raw = (1 - 0.9) / math.sqrt(1 - 0.999)  # m / √v with the moments as they stand
    assert raw > 3


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_adam_does_not_feel_the_gradients_scale(xp: Any, name: str) -> None:
    rng = np.random.default_rng(3)
    start, grads = rng.standard_normal(50), rng.standard_normal((10, 50))

    def end(optimiser: str, scale: float, **options: Any) -> Any:
        p = leaf(xp, start, "float32")
        optimizer = make(optimiser, [p], {"lr": 0.01, **options})
        for g in grads:
            p.grad = xp.asarray((g * scale).astype("float32"))
            optimizer.step()
        return host(p)

    # by powers of two nothing is rounded differently
    np.testing.assert_array_equal(end(name, 1.0, eps=0.0), end(name, 2.0**30, eps=0.0))
    assert np.abs(end(name, 1.0, eps=1.0) - end(name, 2.0**30, eps=1.0)).max() > 1e-3
    assert np.abs(end("SGD", 1.0) - end("SGD", 2.0)).max() > 1e-3


def test_decay_of_adamw_is_decoupled_and_that_of_adam_is_not(xp: Any) -> None:
    start, lr, decay, steps = np.array([4.0, -8.0, 0.5]), 0.05, 0.2, 5

    def end(name: str) -> Any:
        p = leaf(xp, start)
        return descend(make(name, [p], {"lr": lr, "weight_decay": decay}), p, 0.0, steps)[-1]

    shrunk = start * (1 - lr * decay) ** steps
    assert_close(end("AdamW"), shrunk, rtol=1e-12)
    assert_close(end("SGD"), shrunk, rtol=1e-12)
    # L2 goes through the denominator: every weight moves by about η, however large it is
    assert_close(np.abs(end("Adam") - start), np.full(3, steps * lr), rtol=2e-2)
    with pytest.raises(AssertionError):
        assert_close(end("Adam"), shrunk, rtol=1e-2)


# Groups, skipping, dtypes, memory


def test_groups_have_their_own_hyperparameters(xp: Any) -> None:
    a, b, c = leaf(xp, [1.0]), leaf(xp, [1.0]), leaf(xp, [1.0])
    optimizer = optim.SGD([{"params": [a]}, {"params": b, "lr": 0.5}], lr=0.1)
    optimizer.add_param_group({"params": [c], "weight_decay": 1.0})
    for p in (a, b, c):
        p.grad = xp.asarray(np.array([1.0]))
    optimizer.step()
    assert_close(np.stack([host(p)[0] for p in (a, b, c)]), [0.9, 0.5, 0.8], rtol=1e-12)


@pytest.mark.parametrize(("name", "options"), OPTIMISERS)
def test_a_parameter_without_gradient_is_left_alone(
    xp: Any, name: str, options: dict[str, Any]
) -> None:
    trained, idle, frozen = leaf(xp, [1.0]), leaf(xp, [1.0]), leaf(xp, [1.0])
    frozen.requires_grad = False
    optimizer = make(name, [trained, idle, frozen], options)
    trained.grad = xp.asarray(np.array([1.0]))
    optimizer.step()
    assert host(trained)[0] != 1.0
    assert host(idle)[0] == host(frozen)[0] == 1.0  # decay, too, is of trained parameters only
    assert [*optimizer.state] == [trained]
    optimizer.zero_grad()
    assert trained.grad is None


def test_zero_grad_may_keep_the_arrays(xp: Any) -> None:
    p = leaf(xp, [1.0, 2.0])
    p.grad = kept = xp.asarray(np.array([3.0, 4.0]))
    optim.SGD([p]).zero_grad(set_to_none=False)
    assert p.grad is kept
    assert_close(kept, [0.0, 0.0], rtol=0, atol=0)


@pytest.mark.parametrize(("name", "options"), OPTIMISERS)
def test_float32_stays_float32(xp: Any, name: str, options: dict[str, Any]) -> None:
    values = np.random.default_rng(1).standard_normal(1000)

    def end(number: Any) -> Any:
        p = leaf(xp, values, "float32")
        before = p.data
        optimizer = make(name, [p], {**options, "lr": number(0.1)})
        for lr in (0.1, 0.2):
            optimizer.param_groups[0]["lr"] = number(lr)
            p.grad = p.data * 2
            optimizer.step()
        assert p.data is before  # written in place
        state = optimizer.state[p].values()
        assert {str(x.dtype) for x in state if hasattr(x, "dtype")} <= {"float32"}
        return host(p)

    # a float64 scalar would have its operation done in float64 and rounded once less
    np.testing.assert_array_equal(end(np.float64), end(float))


@pytest.mark.parametrize(("name", "options"), OPTIMISERS)
def test_a_step_makes_no_temporaries(name: str, options: dict[str, Any]) -> None:
    with backend.using("numpy"):
        size = 1 << 20
        p = Tensor(np.ones(size, "float32"), requires_grad=True)
        p.grad = np.ones(size, "float32")
        optimizer = make(name, [p], options)
        optimizer.step()
        tracemalloc.start()
        try:
            optimizer.step()
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.reset_peak()
            twin(name, p.data, [p.grad], options)
            naive = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak < 0.02 * 4 * size
    assert naive > 4 * size  # the readable form does


def test_a_step_does_not_wait_for_the_device() -> None:
    device = pytest.importorskip("tests.device")
    device.register()
    with backend.using("strict") as strict:
        p = leaf(strict.xp, np.ones((3, 2)), "float32")
        p.grad = p.data * 3
        steps = [make(name, [p], options) for name, options in OPTIMISERS]
        average = optim.EMA([p])
        with device.no_sync():
            norm = optim.clip_grad_norm_([p], 1.0)
            for optimizer in steps:
                optimizer.step()
            average.update()
        assert isinstance(norm, strict.array_type)
        assert np.isfinite(host(p)).all()


@pytest.mark.parametrize(
    ("build", "error", "says"),
    [
        (lambda p: optim.SGD([]), ValueError, "at least one"),
        (lambda p: optim.SGD(p), TypeError, r"write \[x\]"),
        (lambda p: optim.SGD({p}), TypeError, "set"),
        (lambda p: optim.SGD([p.data]), TypeError, "parameter 0"),
        (lambda p: optim.SGD([("w", p)]), TypeError, "tuple"),
        (lambda p: optim.SGD([p * 2]), ValueError, "leaves"),
        (lambda p: optim.SGD([p, p]), ValueError, "twice"),
        (lambda p: optim.SGD([{"params": p}, {"params": p}]), ValueError, "twice"),
        (lambda p: optim.SGD([{"lr": 1.0}]), TypeError, "'params'"),
        (lambda p: optim.SGD([{"params": p, "weigth_decay": 1.0}]), ValueError, "weigth_decay"),
        (lambda p: optim.SGD([p], lr=-1.0), ValueError, "lr"),
        (lambda p: optim.SGD([p], lr="fast"), TypeError, "lr"),
        (lambda p: optim.SGD([p], lr=math.nan), ValueError, "lr"),
        (lambda p: optim.SGD([p], nesterov=True), ValueError, "momentum"),
        (lambda p: optim.SGD([p], 1, 0.9, 0.1, 0, True), ValueError, "dampening"),
        (lambda p: optim.Adam([p], betas=(0.9, 1.0)), ValueError, "beta"),
        (lambda p: optim.Adam([p], betas=(0.9,)), ValueError, "two"),
        (lambda p: optim.Adam([{"params": p, "eps": -1.0}]), ValueError, "eps"),
        (lambda p: optim.EMA([p], decay=1.5), ValueError, "decay"),
        (lambda p: optim.EMA([p.data]), TypeError, "Tensors"),
        (lambda p: optim.clip_grad_norm_([p], -1.0), ValueError, "max_norm"),
        (lambda p: optim.clip_grad_norm_([p], 1.0, 0), ValueError, "norm_type"),
        (lambda p: optim.clip_grad_value_([p], -1.0), ValueError, "clip_value"),
        (lambda p: optim.Schedule(optim.SGD([p]), [abs, abs]), ValueError, "1 groups"),
        (lambda p: optim.warmup_cosine(-1, 1, 2), ValueError, "step -1"),
        (lambda p: optim.warmup_cosine(0, 3, 2), ValueError, "warmup 3"),
        (lambda p: optim.noam(0, 0), ValueError, "d_model 0"),
    ],
)
def test_wrong_use_is_refused(xp: Any, build: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        build(leaf(xp, [1.0]))


# Saving


def train(
    xp: Any, name: str, options: dict[str, Any], steps: range, state: Any = None
) -> tuple[Any, Any]:
    """Two groups under a schedule and an average; returns what was reached and its state."""
    rng = np.random.default_rng(5)
    a, b = (leaf(xp, rng.standard_normal(shape), "float32") for shape in ((3, 2), ()))
    idle = leaf(xp, [1.0], "float32")
    optimizer = make(name, [{"params": [a, idle]}, {"params": [b], "lr": 0.2}], options)
    schedule = optim.Schedule(optimizer, partial(optim.warmup_cosine, warmup=3, total=9))
    ema = optim.EMA([a, b], decay=0.9, warmup=True)
    parts = {"optimizer": optimizer, "schedule": schedule, "ema": ema}
    if state is not None:
        for key, part in parts.items():
            part.load_state_dict(state[key])
        for p, values in zip((a, b), state["params"], strict=True):
            p.data[...] = values
    for step in steps:
        for i, p in enumerate((a, b)):
            p.grad = p.data * (1.0 + 0.1 * step + i)
        optimizer.step()
        schedule.step()
        ema.update()
    state = {key: part.state_dict() for key, part in parts.items()}
    return state | {"params": [a.data, b.data]}, optimizer


def through_a_file(xp: Any, path: Path, state: dict[str, Any]) -> dict[str, Any]:
    """Arrays by safetensors, the rest by JSON."""
    loaded = {}
    for part in ("optimizer", "schedule", "ema"):
        arrays = {key: x for key, x in state[part].items() if hasattr(x, "dtype")}
        rest = {key: x for key, x in state[part].items() if not hasattr(x, "dtype")}
        io.save_file(arrays, path)
        loaded[part] = {**io.load_file(path), **json.loads(json.dumps(rest))}
    return {**loaded, "params": [xp.asarray(host(x)) for x in state["params"]]}


@pytest.mark.parametrize(("name", "options"), OPTIMISERS)
def test_saved_and_continued_is_uninterrupted(
    xp: Any, tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    whole, _ = train(xp, name, options, range(8))
    half, _ = train(xp, name, options, range(3))
    state = through_a_file(xp, tmp_path / "half.safetensors", half)
    resumed, _ = train(xp, name, options, range(3, 8), state)
    for part in ("optimizer", "schedule", "ema"):
        assert whole[part].keys() == resumed[part].keys()
        for key, value in whole[part].items():
            if hasattr(value, "dtype"):
                np.testing.assert_array_equal(host(value), host(resumed[part][key]))
    for one, other in zip(whole["params"], resumed["params"], strict=True):
        np.testing.assert_array_equal(host(one), host(other))
    assert json.dumps(whole["optimizer"]["steps"]) == "[8, 0, 8]"
    # forgetting the optimiser's state is the classic bug
    if "momentum" in options or name != "SGD":
        state["optimizer"]["steps"] = [0, 0, 0]
        for key in [k for k in state["optimizer"] if "." in k]:
            del state["optimizer"][key]
        forgetful, _ = train(xp, name, options, range(3, 8), state)
        assert (host(forgetful["params"][0]) != host(whole["params"][0])).any()


def test_loading_restores_the_hyperparameters(xp: Any) -> None:
    options = {"lr": 0.3, "betas": (0.5, 0.6), "eps": 1e-3, "weight_decay": 0.7}
    saved = optim.AdamW([leaf(xp, [1.0])], **options).state_dict()
    fresh = optim.AdamW([leaf(xp, [1.0])])
    fresh.load_state_dict(json.loads(json.dumps(saved)))
    (group,) = fresh.param_groups
    assert {name: group[name] for name in options} == options
    assert type(group["params"][0]) is Tensor


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s["param_groups"].pop(), "build it as it was"),
        (lambda s: s["param_groups"][0]["params"].reverse(), "build it as it was"),
        (lambda s: s["steps"].pop(), "build it as it was"),
        (lambda s: s["param_groups"][0].pop("eps"), "same kind"),
        (lambda s: s["param_groups"][0].update(lr=-1.0), "lr"),
        (lambda s: s.pop("0.exp_avg"), "0.exp_avg is missing"),
        (lambda s: s.update({"1.exp_avg": s["0.exp_avg"]}), "1.exp_avg is unexpected"),
        (lambda s: s.update({"0.exp_avg": s["2.exp_avg"]}), r"\(\) but its parameter \(3, 2\)"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(xp: Any, change: Any, says: str) -> None:
    _, optimizer = train(xp, "Adam", {}, range(2))
    before = optimizer.state_dict()
    wrong = {**before, "steps": [*before["steps"]]}
    wrong["param_groups"] = json.loads(json.dumps(before["param_groups"]))
    change(wrong)
    with pytest.raises(ValueError, match=says):
        optimizer.load_state_dict(wrong)
    after = optimizer.state_dict()
    assert after.keys() == before.keys()
    assert all(after[key] is before[key] for key in before if "." in key)
    assert after["param_groups"] == before["param_groups"]


def test_another_optimisers_state_is_refused(xp: Any) -> None:
    state = train(xp, "SGD", {"momentum": 0.9}, range(2))[0]["optimizer"]
    _, adam = train(xp, "Adam", {}, range(1))
    with pytest.raises(ValueError, match="same kind of optimiser"):
        adam.load_state_dict(state)


# Clipping


@pytest.mark.parametrize("order", [1.0, 2.0, 3.0, math.inf])
def test_torchs_clipping(xp: Any, order: float) -> None:
    stored = io.load_file(GOLDEN)
    grads = [stored[f"grads.{i}"][0] for i in range(3)]
    params = [leaf(xp, np.zeros(g.shape)) for g in grads]
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    norm = optim.clip_grad_norm_(params, 0.7, order)
    assert norm.shape == ()
    assert_close(norm, stored[f"norm.{order}"], rtol=1e-12)
    for i, p in enumerate(params):
        assert_close(p.grad, stored[f"clipped.{order}.{i}"], rtol=1e-12)


@given(st.integers(0, 2**32 - 1), st.floats(0.01, 100.0), st.sampled_from([1.0, 2.0, math.inf]))
def test_clipping_is_a_projection_along_the_ray(
    xp: Any, seed: int, limit: float, order: float
) -> None:
    rng = np.random.default_rng(seed)
    params = [leaf(xp, np.zeros(shape)) for shape in ((3, 4), (2,), (), (0,))]
    for p in params:
        p.grad = xp.asarray(rng.standard_normal(p.shape) * rng.choice([0.01, 1.0, 100.0]))
    before = np.concatenate([host(p.grad).reshape(-1) for p in params])
    norm = float(host(optim.clip_grad_norm_(params, limit, order)))
    after = np.concatenate([host(p.grad).reshape(-1) for p in params])
    assert norm == pytest.approx(float(np.linalg.norm(before, order)), rel=1e-12)
    assert np.linalg.norm(after, order) <= limit
    if norm <= limit - 1e-6:
        np.testing.assert_array_equal(after, before)
    else:
        assert_close(after * norm, before * limit, rtol=1e-3)  # norm + 1e-6 is divided by


def test_clipping_in_half_precision_does_not_overflow(xp: Any) -> None:
    p = leaf(xp, [0.0, 0.0], "float16")
    p.grad = xp.asarray(np.array([3000.0, 4000.0], "float16"))
    assert float(host(optim.clip_grad_norm_(p, 5.0))) == 5000.0
    assert p.grad.dtype == "float16"
    assert_close(p.grad, np.array([3.0, 4.0], "float16"), rtol=2e-3)


def test_a_single_number_can_be_clipped_after_two_passes(xp: Any) -> None:
    p = leaf(xp, 3.0)
    for _ in range(2):
        (p * p).backward()
    norm = optim.clip_grad_norm_(p, 1.0)
    assert_close(norm, 12.0, rtol=1e-12)
    assert_close(p.grad, 1.0, rtol=1e-6)


def test_clipping_nothing_and_nonsense(xp: Any) -> None:
    p = leaf(xp, [1.0])
    assert host(optim.clip_grad_norm_([p], 1.0)) == 0.0
    p.grad = xp.asarray(np.array([math.nan]))
    assert math.isnan(host(optim.clip_grad_norm_([p], 1.0)))
    p.grad = xp.asarray(np.array([-7.0]))
    optim.clip_grad_value_([p], 2.0)
    assert_close(p.grad, [-2.0], rtol=0, atol=0)


# Schedules


@given(st.integers(0, 50), st.integers(1, 200), st.floats(0.0, 1.0))
def test_warmup_and_cosine(warmup: int, down: int, low: float) -> None:
    total = warmup + down
    ratio = [optim.warmup_cosine(t, warmup, total, low) for t in range(total + 3)]
    assert ratio[:warmup] == [(t + 1) / warmup for t in range(warmup)]
    assert ratio[warmup] == pytest.approx(1.0, abs=1e-15)
    assert ratio[total:] == [low] * 3
    assert all(a >= b for a, b in zip(ratio[warmup:], ratio[warmup + 1 :], strict=False))
    for k in range(down + 1):  # the cosine is odd about its middle
        assert ratio[warmup + k] + ratio[total - k] == pytest.approx(1.0 + low, abs=1e-12)


@given(st.integers(1, 1024), st.integers(1, 500))
def test_noam_peaks_at_the_end_of_its_warm_up(d_model: int, warmup: int) -> None:
    rates = [optim.noam(t, d_model, warmup) for t in range(2 * warmup + 1)]
    assert max(rates) == rates[warmup - 1] == pytest.approx((d_model * warmup) ** -0.5)
    assert rates[0] == pytest.approx(rates[warmup - 1] / warmup)
    assert rates[2 * warmup - 1] == pytest.approx(rates[warmup - 1] / math.sqrt(2))


def test_a_schedule_scales_each_groups_first_rate(xp: Any) -> None:
    groups = [{"params": leaf(xp, [1.0]), "lr": 0.1}, {"params": leaf(xp, [1.0]), "lr": 4.0}]
    optimizer = optim.SGD(groups)
    schedule = optim.LambdaLR(optimizer, [lambda t: 1 / (1 + t), lambda t: 0.5**t])
    seen = [schedule.get_last_lr()]
    for _ in range(2):
        schedule.step()
        seen.append(schedule.get_last_lr())
    assert seen == [[0.1, 4.0], [0.05, 2.0], [0.1 * (1 / 3), 1.0]]
    # a schedule made from an optimiser whose rate has moved finds the first one in its state
    late = optim.LambdaLR(optimizer, [lambda t: 1 / (1 + t), lambda t: 0.5**t])
    late.load_state_dict(json.loads(json.dumps(schedule.state_dict())))
    assert late.get_last_lr() == seen[-1]
    with pytest.raises(ValueError, match="1 groups"):
        late.load_state_dict({"steps": 1, "base_lrs": [1.0]})


# Averages


@given(st.floats(0.0, 1.0), st.booleans(), st.integers(0, 12))
def test_an_average_has_exponential_weights(xp: Any, decay: float, warmup: bool, n: int) -> None:
    rng = np.random.default_rng(n)
    values = rng.standard_normal((n + 1, 3))
    p = leaf(xp, values[0])
    ema = optim.EMA([p], decay, warmup)
    for x in values[1:]:
        p.data[...] = xp.asarray(x)
        ema.update()
    decays = [min(decay, (1 + t) / (10 + t)) if warmup else decay for t in range(n)]
    tails = [math.prod(decays[k:]) for k in range(n + 1)]  # what the later updates leave of it
    weights = [tails[0]] + [(1 - d) * tail for d, tail in zip(decays, tails[1:], strict=True)]
    assert sum(weights) == pytest.approx(1.0)
    assert_close(ema.averages[0], np.array(weights) @ values, rtol=1e-9, atol=1e-12)


def test_an_average_of_a_constant_stays_exactly(xp: Any) -> None:
    values = np.random.default_rng(0).standard_normal(1000).astype("float32")
    p = leaf(xp, values, "float32")
    ema = optim.EMA([p], 0.9)
    naive = values.copy()
    for _ in range(50):
        ema.update()
        naive = 0.9 * naive + (1 - 0.9) * values
    np.testing.assert_array_equal(host(ema.averages[0]), values)
    assert (naive != values).any()  # d e + (1 - d) θ, rounded, drifts
    assert ema.averages[0].dtype == "float32"


def test_averages_are_applied_and_taken_back(xp: Any) -> None:
    p = leaf(xp, [1.0, 2.0])
    ema = optim.EMA([p], decay=0.5)
    own = p.data
    p.data[...] = xp.asarray(np.array([3.0, 6.0]))
    ema.update()
    with ema.applied():
        assert p.data is own
        assert_close(p, [2.0, 4.0], rtol=0, atol=0)
    assert_close(p, [3.0, 6.0], rtol=0, atol=0)
    with pytest.raises(KeyError), ema.applied():
        raise KeyError
    assert_close(p, [3.0, 6.0], rtol=0, atol=0)
    assert_close(ema.averages[0], [2.0, 4.0], rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"shapes .*\(3,\)"):
        ema.load_state_dict({"0": np.zeros(3), "updates": 1})
