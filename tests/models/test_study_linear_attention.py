"""The study ``linear_attention``: what it measures is what it says it measures."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mini_nn import Rng, Tensor, grad
from models.gpt import GPT
from models.recurrent import RecurrentGPT
from models.studies import linear_attention as study
from models.studies import measure
from models.studies.session import Session
from tests.support import assert_close, host

TINY = study.LinearAttentionConfig(
    steps=2, context=16, batch=2, n_layer=1, n_head=2, n_embd=16, longest=256, pairs=16, trials=2,
    longest_text=128, scored=64,
)  # fmt: skip


def unit_keys(n: int, d: int = 64, trials: int = 30) -> tuple[Any, Any]:
    key, value = Rng(n).normal((2, trials, n, d), dtype="float64")
    return key / (key * key).sum(axis=-1, keepdims=True) ** 0.5, value


@pytest.mark.parametrize("n", [8, 32, 128])
def test_linear_recall_is_off_by_what_theory_says(xp: Any, n: int) -> None:
    """v̂ − v is a sum of n − 1 values, each times k·k′ of variance 1/d."""
    key, value = unit_keys(n)
    error = host(study.read_back(key, value)["linear"]) - host(value)
    # Σ (k·k′)² over 30 n (n − 1) / 2 pairs, each of relative variance 2: 5 standard errors; the
    # values add as much again at most
    assert abs((error**2).mean() / ((n - 1) / 64) - 1) < 10 * math.sqrt(4 / (30 * n * (n - 1)))


def test_what_is_read_back_is_what_each_rule_keeps(xp: Any) -> None:
    """The state that is read equals the last state of a loop; softmax and mesa find each value."""
    key, value = unit_keys(12, d=16, trials=2)
    k, v = host(key), host(value)
    state = np.zeros((2, 16, 16))
    for t in range(12):
        read = np.einsum("bd,bde->be", k[:, t], state)
        state += k[:, t, :, None] * (v[:, t] - read)[:, None, :]
    found = study.read_back(key, value)
    assert_close(found["delta rule"], k @ state, rtol=1e-9, atol=1e-10)
    assert_close(found["linear"], k @ (k.swapaxes(1, 2) @ v), rtol=1e-9, atol=1e-10)
    assert abs(host(found["mesa"]) - v).max() < 1e-3
    sharp, usual = (abs(host(found[name]) - v).max() for name in ("softmax × 16", "softmax"))
    assert sharp < 1.0 < usual  # the keys have 16 numbers here, and 12 of them are not orthogonal
    again = study.read_back(xp.concatenate([key, key], 1), xp.concatenate([0 * value, value], 1))
    # of one key twice the sum returns v + v′ and a least-squares fit their mean
    assert abs(host(again["mesa"])[:, -12:] - v / 2).max() < 1e-3


def test_the_last_of_two_values_is_what_the_delta_rule_returns(xp: Any) -> None:
    key, value = unit_keys(2, trials=3)
    key[:, 1] = key[:, 0]
    found = {name: host(y)[:, 0] for name, y in study.read_back(key, value).items()}
    assert_close(found["delta rule"], value[:, 1], rtol=1e-9, atol=1e-10)
    assert_close(found["linear"], value[:, 0] + value[:, 1], rtol=1e-9, atol=1e-10)


def test_of_a_key_written_twice_the_new_value_is_asked_for(xp: Any) -> None:
    found = study.recall(TINY, Rng(0))
    written, rewritten = (dict(found[what]["delta rule"]) for what in ("written", "rewritten"))
    assert rewritten[4] < 0.5  # against the old values it is √2 and more
    assert written[4] < 0.5
    assert abs(dict(found["rewritten"]["mesa"])[4] - 0.5**0.5) < 0.1  # both values, half of each
    assert [n for n, _ in found["written"]["linear"]] == [4, 8, 16]


def test_every_time_of_a_token_is_after_the_same_text(
    xp: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    answer = RecurrentGPT.next_logits

    def recorded(self: RecurrentGPT, ids: Any, mask: Any, cache: Any) -> Any:
        if ids.shape[1] == 1:
            seen.append(cache.length)
        return answer(self, ids, mask, cache)

    monkeypatch.setattr(RecurrentGPT, "next_logits", recorded)
    times = study.next_token_times(study.softmax_mixer, TINY)
    assert [n for n, _ in times] == [64, 128]
    assert seen == [64] * 5 + [128] * 5


def test_ranks(xp: Any) -> None:
    found = study.spectra(Rng(0), n=40, d=4)
    ranks = {name: study.rank(values) for name, values in found.items()}
    assert ranks == {
        "softmax": 40, "ELU + 1": 4, "1 + cosine": 5, "double softmax": 4, "ELU + 1, causal": 40,
    }  # fmt: skip
    for values in found.values():
        assert values[0] == 1.0
        assert values == sorted(values, reverse=True)


def test_the_double_softmax_is_efficient_attention(xp: Any) -> None:
    from mini_nn.attention import efficient_attention, linear_attention_weights

    q, k, v = Rng(1).normal((3, 12, 4), dtype="float64")
    maps = (study.softmax_features, study.softmax_over_keys)
    assert_close(linear_attention_weights(q, k, maps) @ v, efficient_attention(q, k, v))


def test_all_four_texts_are_read_by_a_model_that_sees_no_later_token(xp: Any) -> None:
    ids = Rng(0).integers(0, 256, (1, 12))
    for name, mixer in study.MIXERS.items():
        model = RecurrentGPT(TINY.sizes(), mixer, Rng(0)).astype("float64").eval()
        before = host(model(ids))
        changed = ids.copy()
        changed[0, 8] = (changed[0, 8] + 1) % 256
        after = host(model(changed))
        assert abs(after - before)[:, :8].max() < 1e-12, name
        assert abs(after - before)[:, 8:].max() > 1e-9, name


def test_the_softmax_one_is_the_gpt(xp: Any) -> None:
    ids = Rng(0).integers(0, 256, (2, 12))
    ours, gpt = RecurrentGPT(TINY.sizes(), study.softmax_mixer, Rng(3)), GPT(TINY.sizes(), Rng(4))
    names = {name.replace(".mixer.", "."): x for name, x in ours.state_dict().items()}
    gpt.load_state_dict(names)
    assert_close(ours(ids), gpt(ids), rtol=1e-5, atol=1e-6)


def test_measures(xp: Any) -> None:
    assert_close(measure.slope([(n, 3.0 * n**1.7) for n in (2, 5, 9, 40)]), 1.7)
    with pytest.raises(ValueError, match="two points"):
        measure.slope([(1, 1)])
    bent = [(n, float(n)) for n in (128, 256, 512)] + [(n, float(n) ** 2) for n in (1024, 4096)]
    assert_close(measure.growth(bent), 2.0)
    assert_close(measure.growth(bent[:3]), 1.0)
    assert [*measure.lengths(4, 40)] == [4, 8, 16, 32]
    assert measure.as_name("ELU + 1, causal") == "elu_plus_1_causal"
    assert measure.as_name("raw QR, u < 0") == "raw_qr_u_negative"
    held = measure.peak_mebibytes(lambda: np.zeros(2**20, "uint8"))
    assert 1.0 <= held < 1.1
    arrays = Rng(0).normal((3, 6, 4), dtype="float64")
    call = measure.there_and_back(study.passes()["linear, in chunks"], arrays)
    leaves = [Tensor(x, requires_grad=True) for x in arrays]
    y = study.passes()["linear, in chunks"](*leaves)
    assert_close(call(), grad(y, leaves, arrays[2])[0])


def test_the_shortest_of_all_runs_is_taken(xp: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 5.0, 10.0, 12.0, 20.0, 23.0])
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))
    runs: list[int] = []

    def call() -> Any:
        runs.append(1)
        return xp.zeros(1)

    assert measure.milliseconds(call, 3) == 2000.0
    assert len(runs) == 3


def test_a_run_has_all_its_parts(xp: Any, tmp_path: Path) -> None:
    result = study.run(replace(TINY, steps=30, pairs=32), Session("linear_attention", tmp_path))
    assert len(result.figure.axes) == 6
    assert {*result.series["text"]} == {*study.MIXERS} == {*result.series["next_token"]}
    for points in result.series["cost"]["milliseconds"].values():
        assert [n for n, _ in points] == [128, 256]
    for name in study.MIXERS:
        bits = result.metrics[f"{measure.as_name(name)}_bits_per_character"]
        assert isinstance(bits, float)
        assert 4.0 < bits < 7.5  # untrained: about 8
    found = [result.metrics[f"{measure.as_name(n)}_bits_per_character"] for n in study.MIXERS]
    assert len({*found}) == 4
    assert result.metrics["gated_delta_parameters"] != result.metrics["softmax_parameters"]
    assert_close(result.metrics["theory_linear_error_of_32_pairs"], (31 / 64) ** 0.5)
    train, held_out = study.split(study.corpus("shakespeare"))
    counted = study.baselines.bigram_bits(train, held_out[: TINY.scored])
    assert result.metrics["bigram_bits_per_character"] == counted
