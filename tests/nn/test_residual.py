"""Residual wrappers: what a stream remembers, what starts as the identity, what gets gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_nn import Rng, Tensor, grad, io, nn, ops
from mini_nn.check import check_grads
from mini_nn.engine import data_of
from mini_nn.nn import functional as F
from mini_nn.nn import schemes
from mini_nn.nn.residual import (
    Admin,
    DeepNorm,
    Fixup,
    LayerScale,
    ReZero,
    Sandwich,
    ScheduledAlpha,
    SkipInit,
    SmallBranch,
    decay_groups,
    plain,
    post_norm,
    pre_norm,
)
from mini_nn.optim import SGD, Adam, AdamW
from models.gpt import GPT, Block, GPTConfig
from tests.support import assert_close, host

D = 6


def trained(wrapper: Any, **values: float) -> Any:
    """As after some training: parameters or buffers with other numbers than at the start."""
    for name, value in values.items():
        data_of(getattr(wrapper, name))[...] = value
    return wrapper


WRAPPERS: dict[str, Callable[[], Any]] = {
    "plain": lambda: plain,
    "post_norm": lambda: post_norm,
    "pre_norm": lambda: pre_norm,
    "Sandwich": lambda: Sandwich(D),
    "DeepNorm": lambda: DeepNorm(1.7),
    "ReZero": lambda: trained(ReZero(), alpha=0.3),
    "SkipInit": lambda: SkipInit(0.3),
    "ScheduledAlpha": lambda: trained(ScheduledAlpha(4), step=1),
    "LayerScale": lambda: LayerScale(D, 0.1),
    "Fixup": lambda: trained(Fixup(), scale=1.25, bias_in=0.5, bias_out=-0.75),
    "Admin": lambda: Admin(D, 1.3),
    "SmallBranch": lambda: SmallBranch(4),
}
IDENTITIES = {"ReZero": ReZero, "SkipInit": SkipInit}


def norm(x: Any) -> Any:
    return F.layer_norm(x, D, eps=0.0)


def branch(x: Any) -> Any:
    return ops.sin(3.0 * x + 0.5)


def stated(name: str, x: Any) -> Any:
    """Each wrapper once more, as the ledger has it, by NumPy on the host."""

    def n(x: Any) -> Any:
        return (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)

    def f(x: Any) -> Any:
        return np.sin(3.0 * x + 0.5)

    def n_eps(x: Any) -> Any:
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)

    return {
        "plain": lambda: x + f(x),
        "post_norm": lambda: n(x + f(x)),
        "pre_norm": lambda: x + f(n(x)),
        "Sandwich": lambda: x + n_eps(f(n(x))),
        "DeepNorm": lambda: n(1.7 * x + f(x)),
        "ReZero": lambda: x + 0.3 * f(x),
        "SkipInit": lambda: x + 0.3 * f(x),
        "ScheduledAlpha": lambda: x + 0.25 * f(x),
        "LayerScale": lambda: x + 0.1 * f(n(x)),
        "Fixup": lambda: x + 1.25 * f(x + 0.5) - 0.75,
        "Admin": lambda: n(1.3 * x + f(x)),
        "SmallBranch": lambda: x + 0.5 * f(n(x)),
    }[name]()


@pytest.mark.parametrize("name", WRAPPERS)
def test_it_is_what_the_ledger_says(xp: Any, name: str) -> None:
    wrapper = WRAPPERS[name]()
    if isinstance(wrapper, nn.Module):
        wrapper.astype("float64")
    x = Rng(1).normal((3, D), dtype="float64")
    assert_close(wrapper(x, norm, branch), stated(name, host(x)), rtol=1e-6, atol=1e-7)

    def f(x: Any) -> Any:
        if isinstance(wrapper, nn.Module):  # complex numbers are those of the complex step
            wrapper.astype(x.dtype if x.dtype.kind == "f" else "float64")
        return wrapper(x, norm, branch)

    check_grads(f, x)


@pytest.mark.parametrize("name", WRAPPERS)
def test_the_context_goes_to_the_branch(xp: Any, name: str) -> None:
    seen = []

    def listening(x: Any, *context: Any) -> Any:
        seen.append(context)
        return x

    WRAPPERS[name]()(Rng(0).normal((2, D)), norm, listening, "mask", None)
    assert seen == [("mask", None)]


# what a stream remembers


def stream(wrapper: Any, depth: int, d: int = 64) -> tuple[Any, list[Any], Any]:
    """Branches that put out fixed, mutually orthogonal vectors of mean 0 and mean square 1."""
    drawn = np.random.default_rng(0).normal(size=(d, depth + 1))
    basis, _ = np.linalg.qr(drawn - drawn.mean(axis=0))
    vectors = [math.sqrt(d) * v[None] for v in basis.T]
    x: Any = vectors[0]
    for v in vectors[1:]:
        x = wrapper(x, lambda x: F.layer_norm(x, d, eps=0.0), lambda x, v=v: v)
    return host(x)[0], [v[0] for v in vectors], d


@pytest.mark.parametrize("depth", [1, 5, 12])
def test_post_norm_forgets_by_halves(depth: int) -> None:
    x, vectors, d = stream(post_norm, depth)
    found = [x @ v / d for v in vectors]
    want = [2 ** (-depth / 2), *(2 ** (-(depth - t + 1) / 2) for t in range(1, depth + 1))]
    assert_close(np.array(found), np.array(want), rtol=1e-12)


@pytest.mark.parametrize("depth", [1, 5, 12])
def test_pre_norm_remembers_all_and_grows(depth: int) -> None:
    x, vectors, d = stream(pre_norm, depth)
    assert_close(np.array([x @ v / d for v in vectors]), np.ones(depth + 1), rtol=1e-12)
    assert_close(x @ x / d, depth + 1, rtol=1e-12)
    y, vectors, _ = stream(plain, depth)
    assert_close(x, y, rtol=1e-12)


def test_random_linear_branches_are_nearly_the_orthogonal_ones(xp: Any) -> None:
    d, rng = 512, Rng(0)
    start = rng.normal((64, d))
    x = start
    for depth in range(1, 6):
        w = rng.normal((d, d), std=1 / math.sqrt(d))
        x = post_norm(x, lambda x: F.rms_norm(x, d), lambda x, w=w: x @ w)
        dots = (
            host((x * start).sum(axis=-1)) / host((x * x).sum(-1) * (start * start).sum(-1)) ** 0.5
        )
        assert abs(dots.mean() - 2 ** (-depth / 2)) < 0.01


def test_small_branches_grow_by_less_than_e(xp: Any) -> None:
    x, _, d = stream(SmallBranch(12), 12)
    assert_close(x @ x / d, 1 + 12 / 12, rtol=1e-12)  # branches that do not look at the stream
    # independent linear branches: (1 + ε²)^n on the way up and down, in the mean over them; one
    # draw of 64 of them has a standard deviation of 5% (measured), so this is 5 standard errors
    for depth in (8, 64):
        d, rng, wrapper = 128, Rng(1), SmallBranch(depth)
        growth = []
        for _ in range(8):
            start = Tensor(rng.normal((16, d)), requires_grad=True)
            y: Any = start
            for _ in range(depth):
                w = rng.normal((d, d), std=1 / math.sqrt(d))
                y = wrapper(y, lambda x: x, lambda x, w=w: x @ w)
            g = rng.normal((16, d))
            (down,) = grad(y, start, g)
            growth.append([
                (host(end) ** 2).sum() / (host(begin) ** 2).sum()
                for end, begin in ((y, start), (down, g))
            ])  # fmt: skip
        want = (1 + 1 / depth) ** depth
        assert want < math.e
        assert_close(np.mean(growth, axis=0) / want, np.ones(2), rtol=0.1)


@pytest.mark.parametrize("depth", [1, 4, 9])
def test_on_the_way_past_the_branches_post_norm_shrinks_the_gradient(xp: Any, depth: int) -> None:
    """By 1/√2 each; DeepNorm by α/√(α² + 1); Admin with ω² = 1, 2, 3 … as pre-norm by 1/√(l + 1) in
    all, which is what the norm at a pre-norm stream's end takes."""
    _, vectors, d = stream(post_norm, depth)
    g = np.random.default_rng(1).normal(size=d)
    for v in [np.ones(d), *vectors]:  # what the norms themselves would take away
        g = g - v * (g @ v) / (v @ v)
    admins = [Admin(d, math.sqrt(l + 1)).astype("float64") for l in range(depth)]
    shares: list[tuple[list[Any], float]] = [
        ([post_norm] * depth, 2 ** (-depth / 2)),
        ([pre_norm] * depth, 1.0),
        ([DeepNorm(3.0)] * depth, 0.9 ** (depth / 2)),
        (admins, 1 / math.sqrt(depth + 1)),
    ]
    for wrappers, share in shares:
        start = Tensor(xp.asarray(vectors[0][None]), requires_grad=True)
        x: Any = start
        for wrapper, v in zip(wrappers, vectors[1:], strict=True):
            x = wrapper(
                x, lambda x: F.layer_norm(x, d, eps=0.0), lambda x, v=v: xp.asarray(v[None])
            )
        (down,) = grad(x, start, xp.asarray(g[None]))
        rtol = 1e-6 if wrappers is admins else 1e-9  # ω is float32 when it is set
        assert_close(host(down)[0], share * g, rtol=rtol, atol=1e-12)


def test_the_last_branch_learns_less_the_deeper_a_pre_norm_stack_is(xp: Any) -> None:
    """Xiong et al. 2020, theorem 1: its gradient falls as 1/√L; in post-norm it does not."""
    depths, d, slopes = (4, 8, 16, 32), 64, {}
    for wrapper in (pre_norm, post_norm):
        sizes = []
        for depth in depths:
            squares = []
            for seed in range(8):
                rng = Rng(seed)
                weights = [
                    Tensor(rng.normal((d, d), std=1 / math.sqrt(d)), requires_grad=True)
                    for _ in range(depth)
                ]
                x: Any = rng.normal((4, d))
                for w in weights:
                    x = wrapper(x, lambda x: F.layer_norm(x, d), lambda x, w=w: x @ w)
                (g,) = grad(F.layer_norm(x, d), weights[-1], rng.normal((4, d)))
                squares.append(float((host(g) ** 2).sum()))
            sizes.append(math.sqrt(np.mean(squares)))
        slopes[wrapper] = np.polyfit(np.log(depths), np.log(sizes), 1)[0]
    assert abs(slopes[pre_norm] + 0.5) < 0.12
    assert abs(slopes[post_norm]) < 0.12


# identities at the start


@pytest.mark.parametrize("name", IDENTITIES)
def test_a_branch_times_zero_is_the_identity_and_wakes_up(xp: Any, name: str) -> None:
    wrapper, linear = IDENTITIES[name](), nn.Linear(D, D, rng=Rng(0))
    x = Tensor(Rng(1).normal((3, D)), requires_grad=True)
    y = wrapper(x, norm, linear)
    assert (host(y) == host(x)).all()
    g = Rng(2).normal((3, D))
    down, alpha, *rest = grad(y, [x, wrapper.alpha, *linear.parameters()], g)
    assert (host(down) == host(g)).all()
    assert all((host(r) == 0).all() for r in rest)
    assert_close(alpha, float((host(linear(x)) * host(g)).sum()), rtol=1e-5)
    assert float(host(alpha)) != 0.0
    wrapper.alpha.grad = alpha
    SGD([wrapper.alpha], lr=0.1).step()
    later = grad(wrapper(x, norm, linear), [*linear.parameters()], g)
    assert all((host(r) != 0).any() for r in later)


@pytest.mark.parametrize("left_out", [True, False])
def test_weight_decay_pulls_alpha_back_unless_it_is_left_out(xp: Any, left_out: bool) -> None:
    """At 0 decay does nothing; once α has left it, a step without a gradient shrinks it."""
    wrapper, linear = ReZero(), nn.Linear(D, D, bias=False, rng=Rng(0))
    parameters = [wrapper.alpha, linear.weight]
    groups = decay_groups(parameters, 0.5)
    if not left_out:
        groups = [{"params": parameters, "weight_decay": 0.5}]
    optimizer = AdamW(groups, lr=0.1)

    def step_without_gradient() -> None:
        for p in parameters:
            p.grad = xp.zeros(p.shape, "float32")
        optimizer.step()

    before = host(linear.weight).copy()
    step_without_gradient()
    assert float(host(wrapper.alpha)) == 0.0
    wrapper.alpha.data[...] = 1.0
    step_without_gradient()
    assert float(host(wrapper.alpha)) == pytest.approx(1.0 if left_out else 0.95)
    assert_close(linear.weight, before * 0.95**2, rtol=1e-5)  # matrices decay in both


def test_layer_scale_learns_from_the_first_step(xp: Any) -> None:
    wrapper, linear = LayerScale(D, 1e-2), nn.Linear(D, D, rng=Rng(0))
    x, g = Rng(1).normal((3, D)), Rng(2).normal((3, D))
    (weight,) = grad(wrapper(x, norm, linear), linear.weight, g)
    (whole,) = grad(pre_norm(x, norm, linear), linear.weight, g)
    assert_close(weight, 0.01 * host(whole), rtol=1e-4, atol=1e-7)
    (gamma,) = grad(wrapper(x, norm, linear), wrapper.gamma, g)
    assert_close(gamma, (host(linear(norm(x))) * host(g)).sum(axis=0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("zero_head", [False, True])
def test_fixup_starts_as_the_identity_and_trains_its_zero_layer_first(
    xp: Any, zero_head: bool
) -> None:
    """With the paper's head of 0 nothing below it gets a gradient at the first step."""
    wrapper, head = Fixup(), nn.Linear(D, 4, rng=Rng(3))
    inner = nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, D, bias=False))
    inner[0].bias.data[...] = 0.0
    schemes.fixup_(
        [[inner[0].weight, inner[2].weight]],
        [head.weight, head.bias] if zero_head else [],
        rng=Rng(0),
    )
    x = Tensor(Rng(1).normal((8, D)), requires_grad=True)
    y = wrapper(x, norm, inner)
    assert (host(y) == host(x)).all()
    parameters = {
        **dict(wrapper.named_parameters()),
        "first": inner[0].weight,
        "bias": inner[0].bias,
        "last": inner[2].weight,
        "head": head.weight,
    }
    loss = F.cross_entropy(head(y), xp.asarray([0, 1, 2, 3, 0, 1, 2, 3]))
    found = zip(parameters, grad(loss, [*parameters.values()]), strict=True)
    moved = {name for name, g in found if bool((host(g) != 0).any())}
    assert moved == ({"head"} if zero_head else {"head", "bias_out", "last"})


def test_a_scheduled_alpha_is_not_trained_and_ends_as_the_plain_net(xp: Any, tmp_path: Any) -> None:
    wrapper, x = ScheduledAlpha(4), Rng(0).normal((3, D))
    assert [*wrapper.parameters()] == []
    assert [*wrapper.state_dict()] == ["step"]
    for step in range(7):
        share = min(1.0, step / 4)
        want = host(x) + np.float32(share) * host(branch(x))
        assert_close(wrapper(x, norm, branch), want, rtol=1e-6)
        assert step != 0 or (host(wrapper(x, norm, branch)) == host(x)).all()
        wrapper.advance()
        if step >= 4:
            assert (host(wrapper(x, norm, branch)) == host(plain(x, norm, branch))).all()
    io.save_file(wrapper.state_dict(), tmp_path / "alpha.safetensors")
    again = ScheduledAlpha(4)
    again.load_state_dict(io.load_file(tmp_path / "alpha.safetensors"))
    assert int(host(again.step)) == 7


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_scheduled_alpha_of_many_steps_ends_at_one_in_every_dtype(xp: Any, dtype: str) -> None:
    wrapper, x = ScheduledAlpha(100_000), Rng(0).normal((3, D), dtype=dtype)
    wrapper.step[...] = 100_000
    assert wrapper(x, norm, branch).dtype == dtype
    assert (host(wrapper(x, norm, branch)) == host(plain(x, norm, branch))).all()


@given(st.floats(0.5, 8.0), st.integers(0, 2**32))
def test_deep_norm_moves_alpha_into_epsilon(xp: Any, alpha: float, seed: int) -> None:
    rng = Rng(seed)
    x, f = (0.01 * rng.normal((3, D), dtype="float64") for _ in range(2))
    eps = 1e-5
    one = DeepNorm(alpha)(x, lambda x: F.layer_norm(x, D, eps=eps), lambda x: f)
    other = F.layer_norm(x + f / alpha, D, eps=eps / alpha**2)
    assert_close(one, other, rtol=1e-9, atol=1e-10)
    if abs(alpha - 1.0) > 0.3:  # the same ε in both is another function
        assert abs(host(one) - host(F.layer_norm(x + f / alpha, D, eps=eps))).max() > 1e-3


# the size of updates


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_updates_do_not_grow_with_depth_if_alpha_and_lambda_fit(xp: Any, optimizer: str) -> None:
    """How far one step moves the loss, for N layers of two branches of two maps each.

    Flat in N with Su's pairs (α, λ), where a branch's weights start λ times as large; ∼ √N with
    their α but λ = 1, and ∼ N with neither.
    """
    d, depths = 32, (4, 8, 16, 32)

    def moved(layers: int, alpha: float, lam: float, seed: int) -> float:
        std, rng = lam / math.sqrt(d), Rng(seed)
        weights = [
            nn.Parameter(rng.normal((d, d), std=std, dtype="float64")) for _ in range(4 * layers)
        ]
        start, g = rng.normal((8, d), dtype="float64"), rng.normal((8, d), dtype="float64")

        def model() -> Any:
            x: Any = start
            for first, second in zip(weights[::2], weights[1::2], strict=True):
                x = DeepNorm(alpha)(
                    x,
                    lambda x: F.rms_norm(x, d, eps=0.0),
                    lambda x, first=first, second=second: x @ first @ second,
                )
            return ops.sum(x * g) / 8

        optimize = (SGD if optimizer == "sgd" else Adam)(weights, lr=1e-7)
        before = model()
        before.backward()
        optimize.step()
        return abs(float(host(model())) - float(host(before)))

    def slope(pair: Callable[[float, float], tuple[float, float]]) -> float:
        pairs = [pair(*schemes.optimizer_residual_constants(optimizer, n)) for n in depths]
        sizes = [
            np.mean([moved(n, *constants, seed) for seed in range(3)])
            for n, constants in zip(depths, pairs, strict=True)
        ]
        return float(np.polyfit(np.log(depths), np.log(sizes), 1)[0])

    assert abs(slope(lambda alpha, lam: (alpha, lam))) < 0.15
    assert abs(slope(lambda alpha, lam: (alpha, 1.0)) - 0.5) < 0.15
    assert abs(slope(lambda alpha, lam: (1.0, 1.0)) - 1.0) < 0.15


# in a Transformer


TINY = GPTConfig(17, 12, D, 2, 2)


NORM_FREE = ("plain", "ReZero", "SkipInit", "ScheduledAlpha", "Fixup")


def gpt(name: str, norms: Callable[[], nn.Module] | None = None) -> GPT:
    if name in NORM_FREE:
        norms = norms or nn.Identity
    blocks = [
        Block(TINY, Rng(k), residuals=(WRAPPERS[name](), WRAPPERS[name]()), norm=norms)
        for k in range(2)
    ]
    model = GPT(TINY, Rng(5), blocks)
    for p in model.parameters():
        p.data[...] = p.data + Rng(9).normal(p.shape, std=0.2)
    return model


@pytest.mark.parametrize("name", WRAPPERS)
def test_cached_decoding_is_the_uncached(xp: Any, name: str) -> None:
    model = gpt(name)
    ids = xp.asarray([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    whole = model(ids)
    cache = model.new_cache(8)
    parts = [model(ids[:, :2], cache=cache), model(ids[:, 2:], cache=cache)]
    assert_close(ops.concatenate(parts, axis=1), whole, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("name", WRAPPERS)
def test_every_parameter_of_a_model_is_used(xp: Any, name: str) -> None:
    model = gpt(name)
    loss = ops.sum(ops.sin(model(xp.asarray([[3, 1, 4, 1]]))))
    found = grad(loss, [*model.parameters()], allow_unused=True)
    unused = [n for (n, _), g in zip(model.named_parameters(), found, strict=True) if g is None]
    assert unused == []


@pytest.mark.parametrize("name", NORM_FREE)
def test_norms_that_a_wrapper_leaves_out_would_be_parameters_without_a_use(
    xp: Any, name: str
) -> None:
    model = gpt(name, lambda: nn.LayerNorm(D))
    loss = ops.sum(ops.sin(model(xp.asarray([[3, 1, 4, 1]]))))
    found = grad(loss, [*model.parameters()], allow_unused=True)
    unused = [n for (n, _), g in zip(model.named_parameters(), found, strict=True) if g is None]
    assert len(unused) == 8
    assert all(".ln_" in name for name in unused)


def test_one_schedule_may_wrap_every_branch(xp: Any) -> None:
    shared = ScheduledAlpha(2)
    blocks = [Block(TINY, Rng(k), residuals=(shared, shared), norm=nn.Identity) for k in range(2)]
    model = GPT(TINY, Rng(5), blocks, norm=nn.Identity)
    assert [m for m in model.modules() if isinstance(m, ScheduledAlpha)] == [shared]
    ids = xp.asarray([[3, 1, 4, 1]])
    stream = model.transformer.wte(ids) + model.transformer.wpe.weight[:4]
    assert (host(model(ids)) == host(model.lm_head(stream))).all()
    for _ in range(2):
        shared.advance()
    other = [Block(TINY, Rng(k), residuals=(plain, plain), norm=nn.Identity) for k in range(2)]
    same = GPT(TINY, Rng(5), other, norm=nn.Identity)
    assert (host(model(ids)) == host(same(ids))).all()


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="positive"):
        DeepNorm(0.0)
    with pytest.raises(ValueError, match="at least 1"):
        ScheduledAlpha(0)
    with pytest.raises(ValueError, match="at least 1"):
        SmallBranch(0)
