"""Initialisations of whole models: each paper's constants, and what they are for.

Statistics are within 5 standard errors at fixed seeds: false alarms below 1e-6.
"""

from __future__ import annotations

import json
import math
import re
import textwrap
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import scipy.linalg
from hypothesis import given
from hypothesis import strategies as st

import mini_nn
from mini_nn import Rng, Tensor, manual_seed, nn, ops
from mini_nn.nn import Parameter, schemes
from models.gpt import GPT, GPTConfig
from tests.nn.test_init import KEPT_STD, has_moments
from tests.support import assert_close, host

with safetensors.safe_open(
    Path(__file__).parents[1] / "golden" / "init.safetensors", framework="np"
) as _file:
    T5 = json.loads(_file.metadata()["t5"])

layers = st.integers(1, 1000)


def empty(xp: Any, *shape: int, dtype: str = "float32") -> Any:
    return xp.full(shape, xp.nan, dtype)


def spread_of(weights: list[Any]) -> float:
    """√ mean w² over some weights."""
    return math.sqrt(np.mean(np.concatenate([host(w).ravel() for w in weights]) ** 2))


def is_normal(weight: Any, std: float) -> None:
    has_moments(weight, 0.0, std, 3.0)


# A standard deviation for each role


def test_bert(xp: Any) -> None:
    """0.02 truncated is 0.0176, half of LeCun's for width 768."""
    w, b = empty(xp, 768, 100), empty(xp, 10)
    schemes.bert_([w], [b], rng=Rng(0))
    has_moments(w, 0.0, 0.0175925, 2.3655)
    assert float(abs(w).max()) <= 0.04 and bool((b == 0.0).all())
    assert 0.0175925 * math.sqrt(768) == pytest.approx(0.4876, abs=1e-4)
    schemes.bert_([w], corrected=True, rng=Rng(0))
    has_moments(w, 0.0, 0.02, 2.3655)
    assert pytest.approx(0.0175925, abs=1e-7) == 0.02 * KEPT_STD


def test_gpt2(xp: Any) -> None:
    """As the model's own constructor has it; the stream grows by one branch over all layers."""
    config = GPTConfig(vocab_size=64, n_positions=32, n_embd=64, n_layer=6, n_head=4)
    model = GPT(config, Rng(0))
    blocks = list(model.transformer.h)
    ends = [w for b in blocks for w in (b.attn.c_proj.weight, b.mlp.c_proj.weight)]
    table = model.transformer
    inner = [w for b in blocks for w in (b.attn.c_attn.weight, b.mlp.c_fc.weight)]
    others = [table.wte.weight, table.wpe.weight, *inner]
    for reset in (False, True):
        if reset:
            for p in model.parameters():
                p.data[...] = 9.0
            biases = [b for n, b in model.named_parameters() if n.endswith("bias")]
            schemes.gpt2_(others, ends, biases, layers=6, rng=Rng(1))
            assert all(bool((b.data == 0.0).all()) for b in biases)
        joined = np.concatenate([host(w).ravel() for w in ends])
        is_normal(joined, 0.02 / math.sqrt(12))
        is_normal(np.concatenate([host(w).ravel() for w in others]), 0.02)
    with pytest.raises(ValueError, match="layers"):
        schemes.gpt2_(others, ends, layers=0)


def named(role: str) -> str:
    """Our role for the end of a name in transformers' T5."""
    return {"shared": "embedding", "relative_attention_bias": "relative"}.get(role, role)


def test_t5_is_transformers() -> None:
    c = T5["config"]
    stds = schemes.t5_stds(c["d_model"], c["d_kv"], c["num_heads"], c["d_ff"])
    seen = {named(name.split(".")[-2]): std for name, std in T5["stds"].items()}
    assert set(seen) == set(stds)
    for name, std in T5["stds"].items():
        assert std == pytest.approx(stds[named(name.split(".")[-2])], rel=1e-15), name


@pytest.mark.parametrize("allocation", ["query", "both", "neither"])
def test_t5_needs_no_scale(xp: Any, allocation: str) -> None:
    """E (q · k)² = 1 for inputs of mean square 1, and d_kv for weights that LeCun would draw."""
    d_model, d_kv, heads = 16, 8, 4000
    stds = schemes.t5_stds(d_model, d_kv, heads, 7, "both" if allocation == "both" else "query")
    if allocation == "neither":
        stds["q"] = stds["k"]
    w = {role: [empty(xp, heads * d_kv, d_model)] for role in "qk"}
    schemes.t5_(w, stds, rng=Rng(4))
    x = np.random.default_rng(0).uniform(0.0, 1.0, (2, d_model))
    x *= 1.0 / np.sqrt((x * x).mean(1, keepdims=True))
    q, k = ((host(w[role][0]) @ x[i]).reshape(heads, d_kv) for i, role in enumerate("qk"))
    squares = ((q * k).sum(1) ** 2) / (d_kv if allocation == "neither" else 1)
    # fourth moments of Gaussians: E (q · k)⁴ = 3 (1 + 2/d)
    assert abs(squares.mean() - 1.0) < 5 * math.sqrt((2.0 + 6.0 / d_kv) / heads)


def test_t5_roles(xp: Any) -> None:
    stds = schemes.t5_stds(64, 8, 4, 256)
    both = schemes.t5_stds(64, 8, 4, 256, "both")
    assert stds["q"] * stds["k"] == pytest.approx(both["q"] * both["k"], rel=1e-14)
    assert {r: both[r] for r in ("v", "o", "wi", "wo")} == {
        r: stds[r] for r in ("v", "o", "wi", "wo")
    }
    roles = {role: [empty(xp, 200, 200)] for role in stds}
    schemes.t5_(roles, stds, 0.5, rng=Rng(0))
    for role, (w,) in roles.items():
        is_normal(w, 0.5 * stds[role])
    with pytest.raises(ValueError, match="lm_head"):
        schemes.t5_({"lm_head": []}, stds)
    with pytest.raises(ValueError, match="allocation"):
        schemes.t5_stds(1, 1, 1, 1, "key")
    with pytest.raises(ValueError, match="d_kv"):
        schemes.t5_stds(1, 0, 1, 1)


# Gains that depend on the depth


@given(layers)
def test_deepnorm_bounds_the_update(n: int) -> None:
    """2N (v² + w²) / α² = 1 with v = w = β for the 2N branches, 3M for a decoder with encoder."""
    for alone in ({"encoder": n}, {"decoder": n}):
        alpha, beta = schemes.deepnorm_constants(**alone)
        assert 2 * n * 2 * beta**2 / alpha**2 == pytest.approx(1.0)
    alpha, beta = schemes.deepnorm_constants(7, n, "decoder")
    assert 3 * n * 2 * beta**2 / alpha**2 == pytest.approx(1.0)
    alpha, beta = schemes.deepnorm_constants(n, 7, "encoder")
    assert alpha * beta == pytest.approx(0.81 * 0.87)


def test_deepnorm_constants_of_torchscale() -> None:
    """Numbers that its encoder.py and decoder.py give; it writes 1/1.15 for the paper's 0.87."""
    assert schemes.deepnorm_constants(encoder=8) == pytest.approx((2.0, 8**-0.5))
    assert schemes.deepnorm_constants(decoder=8) == pytest.approx((2.0, 8**-0.5))
    assert schemes.deepnorm_constants(16, 27, "decoder") == pytest.approx((3.0, 324**-0.25))
    alpha, beta = schemes.deepnorm_constants(16, 16, "encoder")
    assert alpha == pytest.approx(0.81 * 2.0**1.25)
    assert beta == pytest.approx(2.0**-1.25 / 1.15, rel=1e-3)
    wrong: list[tuple[Any, ...]] = [(), (0, 0), (-1, 3), (2, 2), (2, 2, "both"), (2, 0, "middle")]
    for arguments in wrong:
        for constants in (schemes.deepnorm_constants, schemes.sub_ln_gain):
            with pytest.raises(ValueError):
                constants(*arguments)


def test_deepnorm_and_sub_ln_weights(xp: Any) -> None:
    gains = [("deepnorm_", "beta", schemes.deepnorm_constants(decoder=50)[1])]
    gains += [("sub_ln_", "gain", schemes.sub_ln_gain(decoder=50))]
    for name, word, gain in gains:
        scaled, plain = [empty(xp, 300, 100)], [empty(xp, 100, 300)]
        getattr(schemes, name)(scaled, plain, rng=Rng(0), **{word: gain})
        is_normal(scaled[0], gain * math.sqrt(2.0 / 400))
        is_normal(plain[0], math.sqrt(2.0 / 400))


def test_sub_ln_gain_of_torchscale() -> None:
    assert schemes.sub_ln_gain(encoder=12) == pytest.approx(math.sqrt(math.log(24)))
    assert schemes.sub_ln_gain(decoder=12) == pytest.approx(math.sqrt(math.log(24)))
    assert schemes.sub_ln_gain(12, 6, "decoder") == pytest.approx(math.sqrt(math.log(18)))
    assert schemes.sub_ln_gain(12, 6, "encoder") == pytest.approx(
        math.sqrt(math.log(18) * math.log(24) / 3)
    )


@given(layers)
def test_optimizer_constants_cancel_the_depth(n: int) -> None:
    """The loss falls by what 2N branches add up to: each optimiser's sum is 1."""
    total = {
        "sgd": lambda alpha, gain: 2 * n * (gain / alpha) ** 2,
        "adam": lambda alpha, gain: 2 * n * gain / alpha,
        "lamb": lambda alpha, gain: 2 * n * gain**2 / alpha,
    }
    for name, of in total.items():
        assert of(*schemes.optimizer_residual_constants(name, n)) == pytest.approx(1.0)
    sgd = schemes.optimizer_residual_constants("sgd", n)
    assert total["adam"](*sgd) == pytest.approx(math.sqrt(2 * n))  # too large for Adam's steps
    with pytest.raises(ValueError, match="adagrad"):
        schemes.optimizer_residual_constants("adagrad", n)


def test_t_fixup(xp: Any) -> None:
    """The factors of the authors' code, for Xavier's uniform weights and N(0, 1/d) embeddings."""
    for part, factor in (("encoder", 0.67 * 6**-0.25), ("decoder", 54**-0.25)):
        scaled, plain, table = empty(xp, 300, 100), empty(xp, 200, 200), empty(xp, 400, 100)
        schemes.t_fixup_([scaled], [plain], [table], layers=6, part=part, rng=Rng(0))
        has_moments(scaled, 0.0, factor * math.sqrt(2.0 / 400), 1.8)
        has_moments(plain, 0.0, math.sqrt(2.0 / 400), 1.8)
        is_normal(table, 54**-0.25 / 10.0)
    with pytest.raises(ValueError, match="part"):
        schemes.t_fixup_([], layers=6, part="cross")
    with pytest.raises(ValueError, match="layers"):
        schemes.t_fixup_([], layers=0)


def test_the_roles_of_a_gpt(xp: Any) -> None:
    """The example in the module's docstring runs, and reaches every weight of the blocks."""
    example = re.search(r"::\n\n((?:    .*\n)+)", str(schemes.__doc__))
    assert example is not None
    gpt = GPT(GPTConfig(vocab_size=9, n_positions=8, n_embd=32, n_layer=3, n_head=4), Rng(0))
    for b in gpt.transformer.h:
        for p in (b.attn.c_attn, b.attn.c_proj, b.mlp.c_fc, b.mlp.c_proj):
            p.weight.data[...] = xp.nan
    names: dict[str, Any] = {"gpt": gpt, **vars(schemes)}
    manual_seed(3)
    exec(textwrap.dedent(example[1]), names)
    beta = 24**-0.25
    assert names["beta"] == pytest.approx(beta)
    joint = np.stack([host(b.attn.c_attn.weight) for b in gpt.transformer.h])
    is_normal(joint[..., :64], 1 / math.sqrt(32))
    is_normal(joint[..., 64:], beta / math.sqrt(32))
    for part, width in (("c_fc", 128), ("c_proj", 128)):
        w = np.stack([host(getattr(b.mlp, part).weight) for b in gpt.transformer.h])
        is_normal(w, beta * math.sqrt(2.0 / (32 + width)))
    assert np.isfinite(host(gpt(xp.zeros((1, 4), "int64")))).all()


# Branches that start at zero


def fixup_net(xp: Any, branches: int, m: int, width: int = 16) -> tuple[list[list[Any]], Any]:
    weights = [
        [Parameter(xp.ones((width, width), "float64")) for _ in range(m)] for _ in range(branches)
    ]
    return weights, Parameter(xp.ones((3, width), "float64"))


def run(branches: list[list[Any]], head: Any, x: Any) -> Any:
    for first, *rest in branches:
        change = ops.linear(x, first)
        for w in rest:
            change = ops.linear(ops.relu(change), w)
        x = x + change
    return ops.linear(x, head)


def test_fixup_starts_as_the_identity(xp: Any) -> None:
    """At first only the zero weights learn: the head's, and with a head those that end branches."""
    branches, head = fixup_net(xp, 5, 2)
    schemes.fixup_(branches, [head], rng=Rng(0))
    x = Rng(1).normal((4, 16), dtype="float64")
    weights = [w for branch in branches for w in branch]
    gradients = mini_nn.grad(loss(run(branches, head, x)), [head, *weights])
    assert [bool((g != 0.0).any()) for g in gradients] == [True] + 10 * [False]
    init = nn.init.orthogonal_(head, rng=Rng(2))
    assert np.array_equal(host(run(branches, init, x)), host(ops.linear(x, head)))
    gradients = mini_nn.grad(loss(run(branches, head, x)), weights)
    assert [bool((g != 0.0).any()) for g in gradients] == 5 * [False, True]


def test_fixup_scales_by_depth(xp: Any) -> None:
    """L^(−1/(2m−2)) times He's deviation, for L branches of m layers."""
    for count, m in ((9, 2), (16, 3), (8, 4)):
        branches, head = fixup_net(xp, count, m, 40)
        schemes.fixup_(branches, [head], rng=Rng(0))
        inner = np.concatenate([host(w).ravel() for branch in branches for w in branch[:-1]])
        is_normal(inner, count ** (-1.0 / (2 * m - 2)) * math.sqrt(2.0 / 40))
        assert all(not host(branch[-1]).any() for branch in branches) and not host(head).any()
    (only,), _ = fixup_net(xp, 1, 1)
    schemes.fixup_([only])
    assert not host(only[0]).any()
    wide, last = empty(xp, 60, 30, 3, 3), empty(xp, 60, 60, 3, 3)
    schemes.fixup_([[wide, last]] * 4, mode="fan_out", rng=Rng(0))  # as fixup_resnet_cifar.py
    is_normal(wide, math.sqrt(2.0 / (60 * 9)) * 4**-0.5)
    with pytest.raises(ValueError, match="at least one"):
        schemes.fixup_([[wide], []])


def loss(y: Any) -> Any:
    return ((y - 1.0) * (y - 1.0)).sum()


@pytest.mark.parametrize(("outputs", "inputs"), [(4, 4), (3, 5), (8, 3), (6, 4), (7, 1), (1, 1)])
def test_zero(xp: Any, outputs: int, inputs: int) -> None:
    """Against SciPy's Hadamard matrix; the input's norm is kept, where sizes allow it."""
    w = host(schemes.zero_(empty(xp, outputs, inputs, dtype="float64")))
    if outputs <= inputs:
        assert np.array_equal(w, np.eye(outputs, inputs))
    else:
        size = 2 ** math.ceil(math.log2(outputs))
        assert_close(w, scipy.linalg.hadamard(size)[:outputs, :inputs] / math.sqrt(size))
        assert np.linalg.matrix_rank(w) == inputs
        if outputs == size:
            assert_close(w.T @ w, np.eye(inputs), atol=1e-12)
    conv = host(schemes.zero_(empty(xp, outputs, inputs, 3, 2, dtype="float64")))
    assert np.array_equal(conv[:, :, 1, 1], w)
    assert np.count_nonzero(conv) == np.count_nonzero(w)
    with pytest.raises(ValueError, match="kernel"):
        schemes.zero_(xp.ones(3))


def test_zero_wakes_every_hidden_unit(xp: Any) -> None:
    """relu(W x) with W (8, 2): behind a padded identity 6 of the 8 units are 0 for every input."""
    x = xp.abs(Rng(0).normal((50, 2), dtype="float64"))
    alive = []
    for w in (schemes.zero_(empty(xp, 8, 2, dtype="float64")), nn.init.eye_(xp.ones((8, 2)))):
        hidden = host(ops.relu(ops.linear(x, w)))
        alive.append(int((hidden > 0).any(0).sum()))
    assert alive == [8, 2]


# Weights that look at data


def test_admin_gives_post_norm_the_weights_of_pre_norm(xp: Any) -> None:
    """With orthogonal branches, x_l ∝ x₀ + Σ f_j exactly; plain post-norm is dominated by the last.

    Branches are constants of different size here, so nothing depends on what came before.
    """
    depth = 8
    sizes = [0.5 + 0.25 * i for i in range(depth)]
    raw = np.random.default_rng(0).standard_normal((64, depth + 1))
    raw -= raw.mean(0)
    parts = np.linalg.qr(raw)[0].T * 8.0  # orthogonal, of mean 0 and variance 1
    x, *directions = (xp.asarray(p) for p in parts)
    branches = [
        lambda _, size=size, direction=direction: size * direction
        for size, direction in zip(sizes, directions, strict=True)
    ]
    norms = [lambda x: x / xp.sqrt((x * x).mean())] * depth
    omegas = [Parameter(xp.zeros(64, "float64")) for _ in sizes]
    schemes.admin_(branches, norms, omegas, x)
    total = 1.0 + np.cumsum([0.0, *(s * s for s in sizes)])
    stream, plain = x, x
    for i, (branch, norm, omega) in enumerate(zip(branches, norms, omegas, strict=True)):
        assert_close(omega, np.full(64, math.sqrt(total[i])))
        stream = norm(omega.data * stream + branch(stream))
        plain = norm(plain + branch(plain))
    wanted = np.asarray([1.0, *sizes]) / math.sqrt(total[-1])
    assert_close(parts @ host(stream) / 64, wanted)
    assert (parts @ host(plain) / 64)[0] < 0.2 * wanted[0]
    with pytest.raises(ValueError):
        schemes.admin_(branches, norms, omegas[:-1], x)


def test_admin_of_modules(xp: Any) -> None:
    """It takes modules, float32 stays float32, and nothing of the pass is recorded."""
    branches = [nn.Linear(6, 6, rng=Rng(i)) for i in range(3)]
    omegas = [Parameter(xp.zeros((), "float32")), *(empty(xp, 6) for _ in range(2))]
    schemes.admin_(branches, [nn.LayerNorm(6)] * 3, omegas, Rng(9).normal((50, 6)))
    values = [float(host(o).ravel()[0]) for o in omegas]
    assert values[0] == 1.0 and values == sorted(values) and values[2] > 1.1
    assert all(o.dtype == "float32" for o in omegas)


def test_lsuv(xp: Any) -> None:
    """Every layer's output has variance 1, after any activation; LeCun's shrink behind tanh."""
    sizes = (10, 30, 20, 20, 5)
    net: list[Any] = []
    for i, (m, n) in enumerate(pairwise(sizes)):
        net += [nn.Linear(m, n, rng=Rng(i)), nn.Tanh()]
    x = 3.0 * Rng(0).normal((200, 10)) + 1.0

    def variances() -> list[float]:
        seen, y = [], Tensor(x)
        for layer in net:
            y = layer(y)
            if isinstance(layer, nn.Linear):
                seen.append(float(host(y).astype("float64").var()))
        return seen

    schemes.lsuv_(net, x, rng=Rng(1))
    assert variances() == pytest.approx([1.0] * 4, abs=1e-5)
    first = host(net[0].weight)
    assert_close(first.T @ first, np.eye(10) * (first**2).sum() / 10, atol=1e-5)
    assert not host(net[0].bias).any()
    for layer in net[::2]:
        nn.init.lecun_normal_(layer.weight, rng=Rng(1))
    assert max(abs(v - 1.0) for v in variances()) > 0.3


def test_lsuv_edges(xp: Any) -> None:
    """A dead input divides by nothing, a convolution counts as a layer, a norm does not."""
    dead = nn.Linear(4, 3)
    schemes.lsuv_([dead], xp.zeros((5, 4), "float32"), rng=Rng(0))
    assert_close(host(dead.weight) @ host(dead.weight).T, np.eye(3, dtype="float32"), atol=1e-5)
    net = [nn.Conv2d(3, 4, 3, bias=False, rng=Rng(0)), nn.GroupNorm(2, 4)]
    x = Rng(1).normal((2, 3, 8, 8))
    schemes.lsuv_(net, x, rng=Rng(0))
    assert host(net[0](x)).std() == pytest.approx(1.0, abs=1e-5)
    assert bool((net[1].weight.data == 1.0).all()) and net[0].weight.dtype == "float32"
