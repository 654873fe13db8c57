"""Arguments reach what they are handed on to, at sizes where it shows."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest

from mini_nn import Rng, nn
from mini_nn.nn import functional as F
from mini_nn.nn import init, schemes
from mini_nn.nn.functional.norm import instance_rms_norm, modulated_conv2d
from mini_nn.nn.functional.norm import weight_norm as normed_weight
from mini_nn.nn.gaussian import correlation_map
from mini_nn.nn.parametrization import ntk, weight_norm
from mini_nn.nn.residual import Sandwich, decay_groups
from mini_nn.nn.truncated import truncated_moments
from tests.support import assert_close, host


def test_groups_count_in_the_law(xp: Any) -> None:
    one, four = (
        init.variance_scaling_(
            xp.zeros((600, 30, 3)), 1.0, "fan_out", "normal", groups=groups, rng=Rng(0)
        )
        for groups in (1, 4)
    )
    assert_close(four, 2 * host(one), rtol=1e-12)


def test_the_dual_of_lecun_looks_at_the_outputs(xp: Any) -> None:
    weight = init.fan_out_normal_(xp.zeros((400, 100)), rng=Rng(0))
    # five standard errors of the std of 40,000 numbers are 1.8 %
    assert abs(host(weight).std() * 20 - 1) < 0.018


@pytest.mark.parametrize(
    ("f", "want"), [(lambda z: z, -1.0), (np.sign, -1.0), (F.relu, 0.0), (np.square, 1.0)]
)
def test_opposite_signals(f: Any, want: float) -> None:
    assert_close(correlation_map(f, -1.0), want, rtol=1e-9, atol=1e-12)


def test_a_sandwich_has_its_epsilon(xp: Any) -> None:
    x = Rng(0).normal((3, 6))
    found = Sandwich(6, eps=1.0)(x, nn.Identity(), lambda y: 0.01 * y)
    want = host(x) + host(F.layer_norm(0.01 * x, 6, eps=1.0))
    assert_close(found, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("given", [list, iter], ids=["list", "generator"])
def test_decay_groups_leave_no_parameter_out(xp: Any, given: Any) -> None:
    parameters = [nn.Parameter(xp.zeros(s, "float32")) for s in ((), (3,), (3, 3), (2, 3, 3, 3))]
    handed: Iterable[Any] = given(parameters)
    decayed, plain = decay_groups(handed, 0.1)
    assert [p.ndim for p in decayed["params"]] == [2, 4]
    assert [p.ndim for p in plain["params"]] == [0, 1]


def test_admin_counts_variances_behind_the_weights_that_are_set(xp: Any) -> None:
    """Branches that depend on the stream and have a mean: 2x + 3."""

    def norm(x: Any) -> Any:
        return x / (x * x).mean() ** 0.5

    omegas = [nn.Parameter(xp.zeros((), "float64")) for _ in range(4)]
    x = Rng(0).normal((4000,), dtype="float64")
    stream = (x - x.mean()) / x.std()
    schemes.admin_([lambda x: 2.0 * x + 3.0] * 4, [norm] * 4, omegas, stream)
    total, state = 1.0, host(stream)
    for omega in omegas:
        assert_close(float(host(omega)), math.sqrt(total), rtol=1e-10)
        added = 2.0 * state + 3.0
        state = math.sqrt(total) * state + added
        state = state / math.sqrt((state * state).mean())
        total += added.var()


def test_deepnet_draws_normal_and_t_fixup_uniform_numbers(xp: Any) -> None:
    weight, bound = xp.zeros((300, 300)), math.sqrt(3 / 300)
    schemes.deepnorm_([weight], beta=1.0, rng=Rng(0))
    assert abs(host(weight)).max() > 1.01 * bound
    schemes.t_fixup_([], [weight], layers=3, rng=Rng(0))
    assert abs(host(weight)).max() <= bound


def test_a_generator_decides_the_raw_weight(xp: Any) -> None:
    one, two = (ntk(nn.Linear(4, 4), rng=Rng(5)) for _ in range(2))
    assert (host(one.rule.raw) == host(two.rule.raw)).all()


def test_a_call_leaves_no_weight_behind(xp: Any) -> None:
    made = ntk(nn.Linear(4, 4))
    made(Rng(0).normal((2, 4)))
    assert not hasattr(made.layer, "weight")


def test_what_was_half_frozen_is_trained_as_a_whole(xp: Any) -> None:
    made = weight_norm(nn.Linear(4, 4))
    made.rule.g.requires_grad = False
    assert made.remove().weight.requires_grad


def test_one_axis_has_its_epsilon_too(xp: Any) -> None:
    x, layer = 1e-2 * Rng(0).normal((4, 6)), nn.LayerNorm(6, eps=1.0)
    assert_close(layer(x), F.layer_norm(x, 6, eps=1.0), rtol=1e-6)
    assert abs(host(layer(x))).max() < 0.1


def test_demodulation_can_be_left_out_and_has_an_epsilon(xp: Any) -> None:
    """The gain 1/√fan_in = 1/6 cancels where the weight is normalised, not otherwise."""
    x, style = Rng(1).normal((2, 4, 5, 5)), Rng(2).normal((2, 4))
    for options in ({"demodulate": False}, {"eps": 10.0}):
        layer = nn.ModulatedConv2d(4, 6, 3, **options, rng=Rng(0))
        want = modulated_conv2d(x, layer.weight.data / 6.0, style, **options)
        assert_close(layer(x, style), want, rtol=1e-4, atol=1e-5)


def test_dyt_starts_at_the_slope_asked_for(xp: Any) -> None:
    assert float(host(nn.DyT(3, alpha0=0.25).alpha)[0]) == 0.25


def test_instance_norm_without_a_momentum_keeps_its_statistics(xp: Any) -> None:
    layer = nn.InstanceNorm2d(2, momentum=None, track_running_stats=True)
    layer(Rng(0).normal((2, 2, 4, 4)) + 5)
    assert (host(layer.running_mean) == 0).all()


def test_statistics_of_halves_do_not_overflow(xp: Any) -> None:
    x = (Rng(0).normal((2, 2, 4, 4)) * 3000).astype("float16")
    mean, var = xp.zeros(2, "float32"), xp.ones(2, "float32")
    F.instance_norm(x, mean, var, momentum=1.0)
    wide = host(x).astype("float64")
    assert_close(var, wide.var(axis=(2, 3), ddof=1).mean(axis=0), rtol=1e-4)
    y = instance_rms_norm(x)
    assert y.dtype == "float16"
    assert_close((host(y).astype("float64") ** 2).mean(axis=(2, 3)), np.ones((2, 2)), rtol=1e-2)


def test_an_axis_may_be_counted_from_the_end(xp: Any) -> None:
    v, g = Rng(0).normal((3, 4, 2), dtype="float64"), xp.ones((1, 1, 2))
    assert_close(normed_weight(v, g, -1), normed_weight(v, g, 2), rtol=0, atol=0)


def test_a_narrow_interval_is_uniform() -> None:
    _, std = truncated_moments(0.0, 1.0, 0.0, 0.001)
    assert_close(std, 0.001 / math.sqrt(12), rtol=1e-7)
