"""Scans are loops: any associative operator, any length, and the diagonal RNN on top of them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_nn import Rng, Tensor, grad, ops
from mini_nn.attention.scan import (
    LRU,
    Complex,
    _compose_complex,
    associative_scan,
    compose_affine,
    hillis_steele_scan,
    linear_scan,
    lru,
)
from mini_nn.check import check_grads
from tests.support import assert_close, host

SCANS = [associative_scan, hillis_steele_scan]


def drawn(seed: int, *shapes: tuple[int, ...], dtype: str = "float64") -> list[Any]:
    rng = Rng(seed)
    return [rng.normal(shape, dtype=dtype) for shape in shapes]


def loop(decay: Any, update: Any, initial: Any = None) -> Any:
    """xₜ = aₜ xₜ₋₁ + bₜ over the axis before the last, as it stands."""
    a, b = np.broadcast_arrays(host(decay), host(update))
    x = np.zeros_like(b[..., 0, :]) if initial is None else host(initial)
    states = []
    for t in range(b.shape[-2]):
        x = a[..., t, :] * x + b[..., t, :]
        states.append(x)
    return np.stack(states, axis=-2)


# Scans


@given(st.integers(0, 2**32), st.sampled_from([compose_affine, _compose_complex]))
def test_composition_is_associative(xp: Any, seed: int, combine: Any) -> None:
    count = 2 if combine is compose_affine else 4
    first, then, last = (tuple(drawn(seed + i, *[(5,)] * count)) for i in range(3))
    left = combine(combine(first, then), last)
    right = combine(first, combine(then, last))
    for one, other in zip(left, right, strict=True):
        assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_composition_is_of_maps(xp: Any) -> None:
    """First (a, b), then (a′, b′), at a point: the other order is another map."""
    a, b, c, d, x = drawn(0, *[(4,)] * 5)
    p, q = compose_affine((a, b), (c, d))
    assert_close(p * x + q, c * (a * x + b) + d, rtol=1e-12)
    p, q = compose_affine((c, d), (a, b))
    assert abs(host(p * x + q - (c * (a * x + b) + d))).max() > 0.1


@pytest.mark.parametrize("scan", SCANS)
@given(n=st.integers(1, 40), seed=st.integers(0, 2**32))
def test_scan_is_the_loop(xp: Any, scan: Any, n: int, seed: int) -> None:
    a, b = drawn(seed, (n, 3), (n, 3))
    _, states = scan(compose_affine, (a, b))
    assert_close(states, loop(a, b), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("n", range(1, 12))
def test_operators_that_do_not_commute(xp: Any, scan: Any, n: int) -> None:
    """Products of matrices, in order; reversed they are others."""
    (m,) = drawn(n, (n, 2, 2))
    (found,) = scan(lambda x, y: (x[0] @ y[0],), (m,), axis=-3)
    product, wanted = np.eye(2), []
    for each in host(m):
        product = product @ each
        wanted.append(product)
    assert_close(found, np.stack(wanted), rtol=1e-10, atol=1e-11)
    (wrong,) = scan(lambda x, y: (y[0] @ x[0],), (m,), axis=-3)
    assert n == 1 or abs(host(wrong)[-1] - wanted[-1]).max() > 1e-6


@pytest.mark.parametrize("axis", [-1, -2, -3])
def test_along_any_axis(xp: Any, axis: int) -> None:
    (x,) = drawn(0, (5, 6, 7))
    for scan in SCANS:
        (y,) = scan(lambda x, y: (x[0] + y[0],), (x,), axis=axis)
        assert_close(y, host(x).cumsum(axis=axis), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("n", [1, 2, 3, 64, 100, 127, 129])
def test_how_much_work_and_how_deep(xp: Any, n: int) -> None:
    """A tree: fewer than 2n compositions in 2 log₂ n calls; doubling: log₂ n calls, n log₂ n."""
    sizes: list[int] = []

    def counted(x: Any, y: Any) -> Any:
        sizes.append(x[0].shape[-1])
        return (x[0] + y[0],)

    rounds = math.ceil(math.log2(n))
    associative_scan(counted, (xp.ones(n),), axis=-1)
    assert len(sizes) <= 2 * rounds and sum(sizes) < 2 * n
    sizes.clear()
    hillis_steele_scan(counted, (xp.ones(n),), axis=-1)
    assert len(sizes) == rounds and sum(sizes) == sum(n - 2**k for k in range(rounds))


@given(
    n=st.integers(1, 33),
    t=st.integers(0, 33),
    shapes=st.sampled_from([((), ()), ((2,), ()), ((), (2,)), ((3, 1), (1, 2))]),
)
def test_linear_scan(xp: Any, n: int, t: int, shapes: Any) -> None:
    """With a first state and leading axes that broadcast; in two parts, it is one."""
    a, b = drawn(n, (*shapes[0], n, 3), (*shapes[1], n, 3))
    lead = np.broadcast_shapes(*shapes)
    (x0,) = drawn(n + 1, (*lead, 3))
    states = linear_scan(a, b, x0)
    assert_close(states, loop(a, b, x0), rtol=1e-9, atol=1e-10)
    assert_close(linear_scan(a, b), loop(a, b), rtol=1e-9, atol=1e-10)
    t = min(t, n - 1)
    before = linear_scan(a[..., :t, :], b[..., :t, :], x0)
    after = linear_scan(a[..., t:, :], b[..., t:, :], states[..., t - 1, :] if t else x0)
    both = xp.concatenate([before, after], axis=-2)
    assert_close(both, states, rtol=1e-9, atol=1e-10)


def test_nothing_to_scan(xp: Any) -> None:
    a = xp.zeros((2, 0, 3))
    assert linear_scan(a, a, xp.zeros((2, 3))).shape == (2, 0, 3)
    for scan in SCANS:
        assert [x.shape for x in scan(compose_affine, (a, a))] == [(2, 0, 3)] * 2


def test_decays_that_multiply_to_nothing(xp: Any) -> None:
    """2,000 steps: the scan of the maps is exact; cumulated sums over 1/Π a are inf and nan."""
    n = 2000
    a = Rng(0).uniform((n, 2), 0.5, 0.9, dtype="float64")
    (b,) = drawn(1, (n, 2))
    wanted = loop(a, b)
    assert_close(linear_scan(a, b), wanted, rtol=1e-9, atol=1e-11)
    with np.errstate(all="ignore"):
        total = host(a).cumprod(axis=0)
        planted = total * (host(b) / total).cumsum(axis=0)
    assert -np.log(host(a)).sum(axis=0).max() > 709  # beyond float64
    assert not np.allclose(planted, wanted, rtol=1e-3)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_gradients_of_the_scan(xp: Any, n: int) -> None:
    a, b, x0 = drawn(n, (n, 2), (2, n, 2), (2, 2))
    check_grads(linear_scan, a, b, x0)
    check_grads(lambda a, b: hillis_steele_scan(compose_affine, (a, b))[1], a, b[0])


def test_refusals(xp: Any) -> None:
    a, b = drawn(0, (3, 2), (4, 2))
    with pytest.raises(ValueError, match=r"\(3, 2\), \(4, 2\)"):
        linear_scan(a, b)
    with pytest.raises(ValueError, match="counted from the end"):
        associative_scan(compose_affine, (a, a), axis=0)
    with pytest.raises(ValueError, match="one length"):
        hillis_steele_scan(compose_affine, (a, a[0]), axis=-2)


# The linear recurrent unit


def complex_loop(u: Any, lam: Any, gamma: Any, x: Any) -> Any:
    states = []
    for t in range(u.shape[-2]):
        x = lam * x + gamma * u[..., t, :]
        states.append(x)
    return np.stack(states, axis=-2)


@given(st.integers(0, 2**32), st.integers(1, 20), st.integers(0, 20))
def test_lru_is_the_complex_recurrence(xp: Any, seed: int, n: int, t: int) -> None:
    re, im, x, y = drawn(seed, (2, n, 3), (2, n, 3), (2, 3), (2, 3))
    nu, theta = (Rng(seed + i).uniform((3,), 0.01, 2.0, dtype="float64") for i in (1, 2))
    lam = np.exp(-host(nu) + 1j * host(theta))
    gamma = np.sqrt(1 - abs(lam) ** 2)
    u = host(re) + 1j * host(im)
    wanted = complex_loop(u, lam, gamma, host(x) + 1j * host(y))
    found, last = lru(Complex(re, im), nu, theta, state=Complex(x, y))
    assert_close(host(found.real) + 1j * host(found.imag), wanted, rtol=1e-9, atol=1e-10)
    assert_close(host(last.real) + 1j * host(last.imag), wanted[:, -1], rtol=1e-9, atol=1e-10)
    t = min(t, n)
    parts = [Complex(re[:, :t], im[:, :t]), Complex(re[:, t:], im[:, t:])]
    first, state = lru(parts[0], nu, theta, state=())
    rest, end = lru(parts[1], nu, theta, state=state)
    whole = lru(Complex(re, im), nu, theta)
    assert_close(xp.concatenate([first.real, rest.real], axis=1), whole.real, 1e-9, 1e-10)
    assert_close(xp.concatenate([first.imag, rest.imag], axis=1), whole.imag, 1e-9, 1e-10)
    assert_close(end.real, whole.real[:, -1], 1e-9, 1e-10)


@pytest.mark.parametrize("radius", [0.5, 0.9, 0.99])
def test_gamma_keeps_the_variance(xp: Any, radius: float) -> None:
    """The state's variance is γ² Σ |λ|^{2t} times that of white input: 1, for every |λ| and angle.

    Σ over the impulse response, so nothing is sampled.  Without γ it is 1 / (1 − |λ|²).
    """
    n = 4000
    impulse = xp.zeros((n, 1))
    impulse[0] = 1.0
    nu, theta = xp.asarray([-math.log(radius)]), xp.asarray([0.7])
    for gamma, wanted in ((None, 1.0), (xp.ones(1), 1 / (1 - radius**2))):
        x = lru(Complex(impulse, 0.0 * impulse), nu, theta, gamma)
        assert_close(float((host(x.real) ** 2 + host(x.imag) ** 2).sum()), wanted, rtol=1e-9)


def test_lambda_one_over_a_real_line_is_a_cumulative_sum(xp: Any) -> None:
    (u,) = drawn(0, (9, 2))
    zero = xp.zeros(2)
    x = lru(Complex(u, 0.0 * u), zero, zero, xp.ones(2))
    assert_close(x.real, host(u).cumsum(axis=0), rtol=1e-12, atol=1e-12)
    assert (host(x.imag) == 0).all()


def test_a_layer_starts_on_its_ring(xp: Any) -> None:
    """|λ|² uniform between r_min² and r_max², angles below max_phase, γ = √(1 − |λ|²)."""
    layer = LRU(2, 4000, r_min=0.4, r_max=0.9, max_phase=0.5, rng=Rng(0))
    square = np.exp(-2 * np.exp(host(layer.nu_log).astype("float64")))
    assert square.min() >= 0.16 - 1e-6 and square.max() <= 0.81 + 1e-6
    # the mean of 4,000 uniform numbers: 6 standard errors
    assert abs(square.mean() - 0.485) < 6 * 0.65 / math.sqrt(12 * 4000)
    angles = np.exp(host(layer.theta_log))
    assert angles.min() > 0 and angles.max() <= 0.5
    assert_close(np.exp(host(layer.gamma_log)), np.sqrt(1 - square).astype("float32"), rtol=1e-5)
    whole = LRU(2, 50, rng=Rng(1))  # the whole disc: no infinite parameter
    assert all(np.isfinite(host(p)).all() for p in whole.parameters())


def test_a_layer_starts_with_dense_maps_of_variance_one(xp: Any) -> None:
    """B from N(0, 1/2d) and C from N(0, 1/N): 8,192 numbers, 6 standard errors of a deviation."""
    layer = LRU(64, 128, rng=Rng(2))
    near = 6 / math.sqrt(2 * 8192)
    for weight, std in (
        (layer.B_re, 128**-0.5),
        (layer.B_im, 128**-0.5),
        (layer.C_re, 128**-0.5),
        (layer.C_im, 128**-0.5),
    ):
        assert_close(float(host(weight).std()), std, rtol=near)
    assert_close(float(host(LRU(8, 1024, rng=Rng(2)).C_re).std()), 1 / 32, rtol=near)
    assert_close(float(host(LRU(8, 1024, rng=Rng(2)).B_re).std()), 1 / 4, rtol=near)


@given(st.integers(1, 12), st.integers(0, 12))
def test_the_layer(xp: Any, n: int, t: int) -> None:
    """Re(C x) + D u with x of B u; a sequence in two parts is one; nothing looks ahead."""
    layer = LRU(3, 5, rng=Rng(n)).astype("float64")
    (u,) = drawn(n, (2, n, 3))
    p = {name: host(x) for name, x in layer.state_dict().items()}
    lam = np.exp(-np.exp(p["nu_log"]) + 1j * np.exp(p["theta_log"]))
    states = complex_loop(
        host(u) @ (p["B_re"] + 1j * p["B_im"]).T, lam, np.exp(p["gamma_log"]), np.zeros((2, 5))
    )
    wanted = (states @ (p["C_re"] + 1j * p["C_im"]).T).real + p["D"] * host(u)
    y = layer(u)
    assert_close(y, wanted, rtol=1e-9, atol=1e-10)
    t = min(t, n)
    first, state = layer(u[:, :t], ())
    rest, _ = layer(u[:, t:], state)
    assert_close(ops.concatenate([first, rest], axis=1), y, rtol=1e-9, atol=1e-10)
    leaf = Tensor(u, requires_grad=True)
    (g,) = grad(ops.sum(layer(leaf)[:, : max(t, 1)]), leaf)
    assert (host(g)[:, max(t, 1) :] == 0).all()


def test_gradients_of_the_unit(xp: Any) -> None:
    re, im, x, y = drawn(0, (2, 4, 2), (2, 4, 2), (2, 2), (2, 2))
    nu, theta = xp.asarray([0.3, 1.0]), xp.asarray([0.5, 2.0])

    def unit(*args: Any) -> Any:
        states, last = lru(Complex(*args[:2]), *args[2:4], state=args[4:])
        return *states, *last

    check_grads(unit, re, im, nu, theta, x, y)


def test_float32_and_refusals(xp: Any) -> None:
    layer = LRU(3, 4, rng=Rng(0))
    y, state = layer(Rng(1).normal((2, 5, 3)), ())
    assert y.dtype == state.real.dtype == state.imag.dtype == "float32"
    for options in ({"r_min": 0.5, "r_max": 0.5}, {"r_max": 1.1}, {"max_phase": 0.0}):
        with pytest.raises(ValueError, match="LRU takes"):
            LRU(3, 4, **options)
    u = xp.zeros((5, 3))
    with pytest.raises(ValueError, match=r"nu \(d,\)"):
        lru(Complex(u, u), xp.zeros(2), xp.zeros(3))
    with pytest.raises(ValueError, match=r"theta \(d,\)"):
        lru(Complex(u, u), xp.zeros(3), xp.zeros(1))


def test_no_tokens_leave_the_state(xp: Any) -> None:
    """Of a batch, whether it is the first one or that of an earlier call."""
    (u, x) = drawn(1, (2, 0, 3), (2, 3))
    ones = xp.ones(3)
    _, first = lru(Complex(u, u), ones, ones, state=())
    assert_close(first.real, xp.zeros((2, 3)))
    assert_close(first.imag, xp.zeros((2, 3)))
    _, again = lru(Complex(u, u), ones, ones, state=Complex(x, 2.0 * x))
    assert_close(again.real, x)
    assert_close(again.imag, 2.0 * x)


def test_the_input_decides_the_dtype(xp: Any) -> None:
    """Not ν and θ in float64; float16 is summed in float32, where 8,000 steps of 8 have room."""
    (u,) = drawn(2, (5, 3), dtype="float32")
    x, state = lru(Complex(u, u), xp.ones(3), xp.ones(3), state=())
    assert {part.dtype.name for part in (*x, *state)} == {"float32"}
    ones = xp.full((8000, 1), 8.0, "float16")
    zero, gamma = xp.zeros(1, "float16"), xp.ones(1, "float16")
    x, state = lru(Complex(ones, 0.0 * ones), zero, zero, gamma, ())
    assert {part.dtype.name for part in x} == {"float16"}
    assert_close(x.real[-1].astype("float64"), 64000.0, rtol=1e-3)
    assert_close(state.real, xp.full((1,), 64000.0, "float32"))
