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
WRAPPERS: dict[str, Callable[[], Any]] = {
    "plain": lambda: plain,
    "post_norm": lambda: post_norm,
    "pre_norm": lambda: pre_norm,
    "Sandwich": lambda: Sandwich(D),
    "DeepNorm": lambda: DeepNorm(1.7),
    "ReZero": lambda: ReZero(0.3),
    "SkipInit": lambda: SkipInit(0.3),
    "ScheduledAlpha": lambda: ScheduledAlpha(4),
    "LayerScale": lambda: LayerScale(D, 0.1),
    "Fixup": Fixup,
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
        "SkipInit": lambda: x + 0.3 * f(n(x)),
        "ScheduledAlpha": lambda: x + 0.0 * f(x),
        "LayerScale": lambda: x + 0.1 * f(n(x)),
        "Fixup": lambda: x + f(x),
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
    q, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(d, depth + 2)) - 0.0)
    basis = q - q.mean(axis=0)
    basis, _ = np.linalg.qr(basis)
    vectors = [math.sqrt(d) * v[None] for v in basis.T[: depth + 1]]
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


def test_small_branches_grow_by_less_than_e() -> None:
    x, _, d = stream(SmallBranch(12), 12)
    assert_close(x @ x / d, 1 + 12 / 12, rtol=1e-12)  # orthogonal; dependent ones reach (1+ε)^2N


@pytest.mark.parametrize("depth", [1, 4, 9])
def test_on_the_way_past_the_branches_post_norm_halves_the_gradient(xp: Any, depth: int) -> None:
    _, vectors, d = stream(post_norm, depth)
    g = np.random.default_rng(1).normal(size=d)
    for v in [np.ones(d), *vectors]:  # what the norms themselves would take away
        g = g - v * (g @ v) / (v @ v)
    for wrapper, share in ((post_norm, 2 ** (-depth / 2)), (pre_norm, 1.0)):
        start = Tensor(xp.asarray(vectors[0][None]), requires_grad=True)
        x: Any = start
        for v in vectors[1:]:
            x = wrapper(
                x, lambda x: F.layer_norm(x, d, eps=0.0), lambda x, v=v: xp.asarray(v[None])
            )
        (down,) = grad(x, start, xp.asarray(g[None]))
        assert_close(host(down)[0], share * g, rtol=1e-9, atol=1e-12)


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
    down, alpha, *rest = grad(y, [x, wrapper.alpha, *linear.parameters()], g, retain_graph=True)
    assert (host(down) == host(g)).all()
    assert all((host(r) == 0).all() for r in rest)
    fed = norm(x) if name == "SkipInit" else x
    assert_close(alpha, float((host(linear(fed)) * host(g)).sum()), rtol=1e-5)
    wrapper.alpha.grad = alpha
    SGD([wrapper.alpha], lr=0.1).step()
    later = grad(wrapper(x, norm, linear), [*linear.parameters()], g)
    assert all((host(r) != 0).any() for r in later)


def test_weight_decay_pulls_alpha_back_unless_it_is_left_out(xp: Any) -> None:
    """At 0 decay does nothing; once α has left it, a step without a gradient shrinks it."""
    alphas = []
    for groups in ([{"params": "all", "weight_decay": 0.5}], None):
        wrapper = ReZero()
        used = decay_groups(wrapper.parameters(), 0.5) if groups is None else [
            {"params": [*wrapper.parameters()], "weight_decay": 0.5}
        ]  # fmt: skip
        optimizer = AdamW(used, lr=0.1)
        wrapper.alpha.grad = xp.zeros((), "float32")
        optimizer.step()
        assert float(host(wrapper.alpha)) == 0.0
        wrapper.alpha.data[...] = 1.0
        wrapper.alpha.grad = xp.zeros((), "float32")
        optimizer.step()
        alphas.append(float(host(wrapper.alpha)))
    assert alphas[0] < 0.96
    assert alphas[1] == 1.0


def test_fixup_starts_as_the_identity_and_trains_its_zero_layer_first(xp: Any) -> None:
    wrapper = Fixup()
    inner = nn.Sequential(nn.Linear(D, D, bias=False), nn.ReLU(), nn.Linear(D, D, bias=False))
    schemes.fixup_([[inner[0].weight, inner[2].weight]], rng=Rng(0))
    x = Tensor(Rng(1).normal((8, D)), requires_grad=True)
    y = wrapper(x, norm, inner)
    assert (host(y) == host(x)).all()
    names = [name for name, _ in wrapper.named_parameters()]
    parameters = [*wrapper.parameters(), inner[0].weight, inner[2].weight]
    found = grad(ops.sum(ops.sin(y)), parameters, allow_unused=True)
    moved = {
        name: g is not None and bool((host(g) != 0).any())
        for name, g in zip([*names, "first", "last"], found, strict=True)
    }
    assert moved == {
        "scale": False, "bias_in": False, "bias_out": True, "first": False, "last": True,
    }  # fmt: skip


def test_a_scheduled_alpha_is_not_trained_and_ends_as_the_plain_net(xp: Any, tmp_path: Any) -> None:
    wrapper, x = ScheduledAlpha(4), Rng(0).normal((3, D))
    assert [*wrapper.parameters()] == []
    assert [*wrapper.state_dict()] == ["step"]
    for step in range(7):
        share = min(1.0, step / 4)
        want = host(x) + np.float32(share) * host(branch(x))
        assert_close(wrapper(x, norm, branch), want, rtol=1e-6)
        wrapper.advance()
    assert (host(wrapper(x, norm, branch)) == host(plain(x, norm, branch))).all()
    io.save_file(wrapper.state_dict(), tmp_path / "alpha.safetensors")
    again = ScheduledAlpha(4)
    again.load_state_dict(io.load_file(tmp_path / "alpha.safetensors"))
    assert int(host(again.step)) == 7


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
def test_updates_do_not_grow_with_depth_if_lambda_fits(xp: Any, optimizer: str) -> None:
    """How far one step moves the output, for N layers of two branches of two maps each.

    Flat with Su's pairs (α, λ), where a branch's weights start λ times as large; with λ = 1 it
    grows as √N.
    """
    d, depths = 32, (4, 8, 16, 32)

    def moved(layers: int, fitted: bool, seed: int) -> float:
        alpha, lam = schemes.optimizer_residual_constants(optimizer, layers)
        std, rng = (lam if fitted else 1.0) / math.sqrt(d), Rng(seed)
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

    slopes = {}
    for fitted in (True, False):
        sizes = [np.mean([moved(n, fitted, seed) for seed in range(3)]) for n in depths]
        slopes[fitted] = np.polyfit(np.log(depths), np.log(sizes), 1)[0]
    assert abs(slopes[True]) < 0.15
    assert slopes[False] > 0.35


# in a Transformer


TINY = GPTConfig(17, 12, D, 2, 2)


def gpt(name: str) -> GPT:
    norms = nn.Identity if name in ("plain", "ReZero", "ScheduledAlpha", "Fixup") else None
    blocks = [
        Block(TINY, Rng(k), residuals=(WRAPPERS[name](), WRAPPERS[name]()), norm=norms)
        for k in range(2)
    ]
    model = GPT(TINY, Rng(5), blocks)
    for p in model.parameters():
        p.data[...] = p.data + Rng(9).normal(p.shape, std=0.2)
    for block in model.transformer.h:
        for wrapper in (block.attn_residual, block.mlp_residual):
            if isinstance(wrapper, ScheduledAlpha):
                wrapper.advance()
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


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="positive"):
        DeepNorm(0.0)
    with pytest.raises(ValueError, match="at least 1"):
        ScheduledAlpha(0)
    with pytest.raises(ValueError, match="at least 1"):
        SmallBranch(0)
