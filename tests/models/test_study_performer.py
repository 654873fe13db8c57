"""The study ``performer``: its estimates, its planted mistakes and its crossing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mini_nn import Rng
from mini_nn.attention import chi_norms, favor_attention, jittered_norms, quantile_norms
from models.studies import performer as study
from models.studies.measure import as_name
from models.studies.session import Session
from tests.support import assert_close, host

TINY = study.PerformerConfig(
    steps=2, kernel_draws=20, bias_rows=640, tokens=16, most_features=16, longest=512
)


def test_pairs_have_the_lengths_and_angles_that_label_them(xp: Any) -> None:
    query, key = (host(x) for x in study.pairs())
    assert query.shape == (len(study.NORMS), len(study.ANGLES), study.D)
    for i, norm in enumerate(study.NORMS):
        assert_close(np.linalg.norm(query[i], axis=-1), norm * np.ones(len(study.ANGLES)))
        assert_close(np.linalg.norm(key[i], axis=-1), norm * np.ones(len(study.ANGLES)))
        cosines = (query[i] * key[i]).sum(axis=-1) / norm**2
        assert_close(cosines, np.cos(np.radians(study.ANGLES)), rtol=1e-9, atol=1e-9)


def test_the_measured_error_is_the_one_of_theory(xp: Any) -> None:
    """Where ‖q + k‖² is small enough for a sample to have seen the tail."""
    maps = study.kernel_errors(study.PerformerConfig(steps=1, kernel_draws=1500), Rng(0))
    query, key = (host(x) for x in study.pairs())
    small = ((query + key) ** 2).sum(axis=-1) < 0.7
    for name, found in maps.items():
        measured, theory = np.array(found["measured"]), np.array(found["theory"])
        seen = small & (theory > -6)
        assert abs(np.median((measured - theory)[seen])) < 0.1, name


@pytest.mark.parametrize("deviation", [0.25, 3.0])
def test_logits_have_the_deviation_of_the_label_and_features_are_counted(
    xp: Any, monkeypatch: pytest.MonkeyPatch, deviation: float
) -> None:
    logits, sizes = [], []

    def exact(query: Any, key: Any, value: Any) -> Any:
        logits.append(host(query) @ host(key).T / study.D**0.5)
        return value

    def estimate(query: Any, key: Any, value: Any, w: Any, feature: str) -> Any:
        sizes.append(w.shape[0] * study.FEATURES[feature])
        return value * 1.5

    monkeypatch.setattr(study, "softmax_attention", exact)
    monkeypatch.setattr(study, "favor_attention", estimate)
    config = study.PerformerConfig(steps=2, tokens=400, most_features=32)
    found = study.attention_errors(deviation, config, Rng(0))
    assert abs(logits[0].std() / deviation - 1) < 0.05
    assert sizes == [m for _ in found for m in (8, 8, 16, 16, 32, 32)]
    for rows in found.values():
        assert_close(np.array(rows), np.array([[m, 0.5, 0.5, 0.5] for m in (8, 16, 32)]), rtol=1e-5)


def test_raw_directions_are_orthogonal_and_not_haar(xp: Any) -> None:
    """What is planted is the bias of the mean, not some other mistake."""
    d = 8
    rows = host(study.raw_qr_directions(4000 * d, d, Rng(0))).reshape(4000, d, d)
    assert_close(rows @ rows.swapaxes(1, 2), np.broadcast_to(np.eye(d), rows.shape), atol=1e-9)
    diagonal = rows.mean(axis=0).diagonal()
    # Householder makes R negative but for its last entry: E Qⱼⱼ = −E|uⱼ| at first, 0.29 for d = 8
    expected = -math.gamma(d / 2) / (math.sqrt(math.pi) * math.gamma((d + 1) / 2))
    assert abs(diagonal[0] - expected) < 5 / math.sqrt(4000 * d)


def test_lengths_that_depend_on_each_other_do_so_within_a_block(xp: Any) -> None:
    d, rows = 8, 80
    tiled = study.row_lengths(quantile_norms, rows, d, Rng(0)).reshape(-1, d)
    assert (tiled == tiled[0]).all() and len({*tiled[0]}) == d
    drawn = study.row_lengths(jittered_norms, rows, d, Rng(0)).reshape(-1, d)
    edges = np.sort(host(quantile_norms(d - 1, d, Rng(0))))  # i / d for i = 1 … d − 1
    for block in drawn:
        assert [*np.searchsorted(edges, np.sort(block))] == [*range(d)]
    assert len({*study.row_lengths(chi_norms, rows, d, Rng(0))}) == rows


def test_the_bias_is_seen(xp: Any) -> None:
    found = study.biases(study.PerformerConfig(steps=1, bias_rows=40_000), Rng(0))
    at_8 = {name: ratios[0] for name, ratios in found.items()}
    # the relative standard error is √((e⁴ − 1) / 40,000) = 0.037 for independent rows
    assert abs(at_8["orthogonal"] - 1) < 5 * 0.037
    assert at_8["raw QR, u > 0"] < 0.8
    assert at_8["raw QR, u < 0"] > 1.15
    assert at_8["all of length √d"] < 0.9


def test_one_maximum_of_all_keys_looks_ahead_and_a_running_one_does_not(xp: Any) -> None:
    found = study.leaks(Rng(0))
    assert found["running maximum"] == [(factor, 0.0) for factor in study.FACTORS]
    (_, unchanged), *changed = found["one maximum of all keys"]
    assert unchanged == 0.0
    assert max(change for _, change in changed) > 0.1


def test_both_stabilisers_compute_the_same_attention(xp: Any) -> None:
    """Without ε: so the leak comes from the stabiliser, not from another formula."""
    query, key, value = (Rng(1).normal((3, 20, study.D), dtype="float64")) * 0.3
    w = study.orthogonal_matrix(32, study.D, Rng(2), dtype="float64")
    ours = favor_attention(query, key, value, w, is_causal=True)
    assert_close(study.with_one_maximum(query, key, value, w, eps=0.0), ours, rtol=1e-8, atol=1e-9)


def test_where_two_costs_cross(xp: Any) -> None:
    fast = [(n, 10.0 * n) for n in (1, 4, 16, 64)]
    slow = [(n, 1.0 * n**2) for n in (1, 4, 16, 64)]
    assert_close(study.crossing(slow, fast), 10.0)
    assert study.crossing(fast, slow) == math.inf
    assert study.crossing([(1, 2.0), (2, 3.0)], [(1, 1.0), (2, 1.0)]) == 1.0


@pytest.mark.parametrize("name", ["positive, orthogonal", "raw QR, u > 0", "all of length √d"])
def test_labels_become_names(name: str) -> None:
    assert as_name(name).isidentifier()


def test_a_run_has_all_its_parts(xp: Any, tmp_path: Path) -> None:
    result = study.run(TINY, Session("performer", tmp_path))
    assert {*result.series} == {"kernel", "attention", "bias", "leak", "cost"}
    assert len(result.figure.axes) == 11  # ten panels and the bar of colours
    for lines in result.series["attention"].values():
        for rows in lines.values():
            assert [m for m, *_ in rows] == [8, 16]
            assert all(0 < low <= middle <= high for _, low, middle, high in rows)
    assert [n for n, _ in result.series["cost"]["softmax"]] == [256, 512]
