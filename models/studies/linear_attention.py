"""Does attention need a softmax?  What leaving it out saves, and what it loses.

Without softmax attention is a product of three matrices, and their order is free: Q (Kᵀ V) takes
time and memory that grow as the length of the text (Katharopoulos et al. 2020, arXiv:2006.16236;
J. Su 2020, kexue.fm 7546).  What is lost is capacity: a state of d × d numbers holds d pairs of key
and value, where a softmax that is sharp enough looks up any number.  Rules that erase before they
write buy a part of it back (Schlag et al. 2021, arXiv:2102.11174; Yang et al. 2024,
arXiv:2412.06464; von Oswald et al. 2025, arXiv:2506.05233).  Measured: growth of time and memory,
recall of random pairs, the spectra of the matrices, and small GPTs on real text.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

import mini_nn
from mini_nn import Rng, backend, nn, ops
from mini_nn.attention import (
    GatedDeltaNet,
    PerformerAttention,
    blockwise_attention,
    delta_rule,
    linear_attention,
    linear_attention_weights,
    mesa,
    softmax_attention,
    unnormalized_attention,
)
from mini_nn.attention.feature_maps import cosine_features, softmax_features
from mini_nn.backend import Array

from ..data import corpus, split
from ..generation import on_arrays
from ..gpt import GPTConfig
from ..recurrent import RecurrentGPT, SelfAttention
from . import baselines
from .base import Result, Study
from .linear_attention_figure import CAPTION, draw
from .measure import (
    as_name,
    growth,
    lengths,
    milliseconds,
    peak_mebibytes,
    there_and_back,
)
from .session import Session
from .text import BYTES, TextConfig, Training, by_position, codes, score

D = 64
"""The size of keys and values where time, memory and recall are measured."""

DENSE_UP_TO = 4096
"""Tokens; the dense softmax of 8,192 needs a gigabyte."""

RECALL_SCALE = 16.0
"""A factor of the logits with which the softmax picks one of unit keys; 1/√d leaves all alike."""


RECALLED = (32, 64, 128)
"""Numbers of pairs whose errors are metrics."""


@dataclass(frozen=True, kw_only=True)
class LinearAttentionConfig(TextConfig):
    """Sizes of all parts; ``steps`` are those of each of the four GPTs.

    Args:
        longest: tokens, up to which time and memory are measured: a power of 2.
        pairs: the largest number of pairs to recall, at least 32.
        trials: how many sets of pairs.
        longest_text: tokens, up to which the time of the next one is measured: a power of 2.
        scored: bytes of the held-out text that are scored.
    """

    longest: int = 16384
    pairs: int = 256
    trials: int = 20
    longest_text: int = 4096
    scored: int = 16384


# growth


def passes() -> dict[str, Callable[..., Any]]:
    """The forms of causal attention whose time and memory are compared, by name."""
    return {
        "softmax, dense": partial(softmax_attention, is_causal=True),
        "softmax, in blocks": partial(blockwise_attention, is_causal=True),
        "linear, in chunks": partial(linear_attention, is_causal=True),
    }


def costs(longest: int, rng: Rng) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Of forward and backward for one head: ``milliseconds`` and ``mebibytes``, by (form, n)."""
    found: dict[str, dict[str, list[tuple[int, float]]]] = {"milliseconds": {}, "mebibytes": {}}
    traced = backend.current().name == "numpy"  # the memory of a device is not traced
    for name, attention in passes().items():
        for n in lengths(128, min(longest, DENSE_UP_TO) if "dense" in name else longest):
            call = there_and_back(attention, [rng.normal((n, D)) for _ in range(3)])
            took = milliseconds(call, 2 if n > 4096 else 4)
            found["milliseconds"].setdefault(name, []).append((n, took))
            if traced:
                found["mebibytes"].setdefault(name, []).append((n, peak_mebibytes(call)))
    return found


# recall


def read_back(key: Array, value: Array) -> dict[str, Any]:
    """What each rule returns for the keys (…, n, d) after all pairs have been written in turn.

    Recurrences read their last state; the softmax and its kind look at all pairs.
    """
    everything = {
        "softmax × 16": softmax_attention(key, key, value, scale=RECALL_SCALE),
        "softmax": softmax_attention(key, key, value),
        "ELU + 1": linear_attention(key, key, value),
        "linear": unnormalized_attention(key, key, value),
    }
    _, state = delta_rule(key, key, value, is_causal=True, state=())
    everything["delta rule"] = ops.matmul(key, state.matrix)
    _, (gram, moment) = mesa(key, key, value, ridge=1e-6, is_causal=True, state=())
    solved = ops.solve(gram + 1e-6 * backend.of(gram).eye(gram.shape[-1]), moment)
    everything["mesa"] = ops.matmul(key, solved)
    return everything


def recall(config: LinearAttentionConfig, rng: Rng) -> dict[str, dict[str, list[Any]]]:
    """Root mean square error over the values' deviation, by rule: [(pairs, error), …].

    ``written`` once; ``rewritten`` with new values for the same keys, which are then to be read.
    """
    found: dict[str, dict[str, list[Any]]] = {"written": {}, "rewritten": {}}
    for n in lengths(4, config.pairs):
        key = rng.normal((config.trials, n, D), dtype="float64")
        key = key / (key * key).sum(axis=-1, keepdims=True) ** 0.5
        old, new = (rng.normal((config.trials, n, D), dtype="float64") for _ in range(2))
        xp = backend.of(key)
        twice = xp.concatenate([key, key], axis=1), xp.concatenate([old, new], axis=1)
        for what, pairs, wanted in (("written", (key, old), old), ("rewritten", twice, new)):
            for name, got in read_back(*pairs).items():
                gap = got[:, -n:] - wanted
                error = float(backend.to_host((gap * gap).mean())) ** 0.5
                found[what].setdefault(name, []).append((n, error))
    return found


# spectra


def spectra(rng: Rng, n: int = 200, d: int = 8) -> dict[str, list[float]]:
    """The singular values of the matrices of weights for the same queries and keys, largest = 1."""
    query, key = (rng.normal((n, d), dtype="float64") for _ in range(2))
    eye = backend.of(query).eye(n)
    double = (softmax_features, softmax_over_keys)
    matrices = {
        "softmax": softmax_attention(query, key, eye),
        "ELU + 1": linear_attention_weights(query, key),
        "1 + cosine": linear_attention_weights(query, key, cosine_features),
        "double softmax": linear_attention_weights(query, key, double),
        "ELU + 1, causal": linear_attention_weights(query, key, is_causal=True),
    }
    found = {}
    for name, matrix in matrices.items():
        values = np.linalg.svd(backend.to_host(matrix), compute_uv=False)
        found[name] = [float(v) for v in values / values[0]]
    return found


def softmax_over_keys(key: Array) -> Array:
    """softmax over the tokens: the keys' side of efficient attention."""
    return ops.softmax(key, axis=-2)


def rank(values: list[float]) -> int:
    """How many singular values are more than rounding."""
    return sum(v > 1e-10 for v in values)


# real text


def softmax_mixer(config: GPTConfig, rng: Rng) -> nn.Module:
    """GPT-2's own attention."""
    return SelfAttention(config, rng, softmax_attention)


def linear_mixer(config: GPTConfig, rng: Rng) -> nn.Module:
    """ELU + 1 in place of the softmax."""
    return SelfAttention(config, rng, linear_attention)


def performer_mixer(config: GPTConfig, rng: Rng) -> nn.Module:
    """The softmax by positive random features, drawn anew every 100 steps."""
    attention = PerformerAttention(config.n_embd // config.n_head, redraw_interval=100, rng=rng)
    return SelfAttention(config, rng, attention)


def gated_delta_mixer(config: GPTConfig, rng: Rng) -> nn.Module:
    """The gated delta rule with its short convolutions and gates."""
    return GatedDeltaNet(config.n_embd, config.n_head, rng=rng)


MIXERS = {
    "softmax": softmax_mixer, "ELU + 1": linear_mixer, "Performer": performer_mixer,
    "gated delta": gated_delta_mixer,
}  # fmt: skip


def next_token_times(mixer: Any, config: LinearAttentionConfig) -> list[tuple[int, float]]:
    """Milliseconds of one more token after so many, for an untrained model of these sizes."""
    sizes = GPTConfig(BYTES, config.longest_text + 64, config.n_embd, config.n_layer, config.n_head)
    model = on_arrays(RecurrentGPT(sizes, mixer, Rng(0)))
    cache = model.new_cache(sizes.n_positions)
    text = codes(corpus(config.corpus))[None]
    found = []
    for n in lengths(64, config.longest_text):
        while cache.length < n:
            more = min(cache.length + 256, n)
            model.next_logits(text[:, cache.length : more], None, cache)
        one = partial(model.next_logits, text[:, n : n + 1], None)
        copies = iter([cache.fork() for _ in range(5)])
        found.append((n, milliseconds(lambda: one(next(copies)), 5)))  # noqa: B023 - called at once
    return found


def run(config: LinearAttentionConfig, session: Session) -> Result:
    """All parts, and the figure."""
    mini_nn.tune_allocator()
    rngs = Rng(config.seed).split(5)
    with session.timed("growth"):
        cost = costs(config.longest, rngs[0])
    with session.timed("recall"):
        recalled = recall(config, rngs[1])
    with session.timed("spectra"):
        singular = spectra(rngs[2])
    with session.timed("next token"):
        times = {name: next_token_times(mixer, config) for name, mixer in MIXERS.items()}
    train, held_out = split(corpus(config.corpus))
    held_out = held_out[: config.scored]
    texts, parameters = {}, {}
    for name, mixer in MIXERS.items():
        model = RecurrentGPT(config.sizes(), mixer, Rng(config.seed))
        batches = Rng(config.seed + 1)  # the same windows for all
        training = Training(model, train, config, batches)
        loop = session.loop(config.steps, name=f"text-{name}", **training.parts())
        with session.timed("text"):
            for step in loop:
                loss = training.step()
                if (step + 1) % 50 == 0:
                    loop.record(step=step + 1, loss=loss)
            texts[name] = score(model, train, held_out)
        parameters[name] = model.num_parameters()
    series = {
        "cost": cost,
        "recall": recalled,
        "spectra": singular,
        "next_token": times,
        "text": {name: by_position(bits, config.context) for name, bits in texts.items()},
    }
    metrics = metrics_of(series, texts, parameters)
    counts = {
        "unigram": baselines.unigram_bits(train, held_out),
        "bigram": baselines.bigram_bits(train, held_out),
    }
    metrics |= {f"{name}_bits_per_character": bits for name, bits in counts.items()}
    return Result(
        headline=headline(metrics),
        metrics=metrics,
        figure=draw(series, {name: float(bits.mean()) for name, bits in texts.items()}, counts),
        caption=CAPTION.format(**{**vars(config), "pairs_kept": D, **metrics}),
        series=series,
    )


def metrics_of(
    series: dict[str, Any], texts: dict[str, Any], parameters: dict[str, int]
) -> dict[str, float | int | str]:
    """What the page quotes."""
    found: dict[str, float | int | str] = {}
    for unit, word in (("milliseconds", "time"), ("mebibytes", "memory")):
        for name, points in series["cost"][unit].items():
            found[f"{as_name(name)}_{word}_exponent"] = growth(points)
            for n, value in points:
                if n in (1024, 4096, 16384):
                    found[f"{as_name(name)}_{unit}_at_{n}"] = value
    for what, rules in series["recall"].items():
        for name, points in rules.items():
            for n, error in points:
                if n in RECALLED:
                    found[f"{as_name(name)}_error_of_{n}_{what}_pairs"] = error
    for n in RECALLED:
        found[f"theory_linear_error_of_{n}_pairs"] = math.sqrt((n - 1) / D)
    for name, values in series["spectra"].items():
        found[f"{as_name(name)}_rank"] = rank(values)
    for name, bits in texts.items():
        found[f"{as_name(name)}_bits_per_character"] = float(bits.mean())
        found[f"{as_name(name)}_parameters"] = parameters[name]
        for n, value in (series["next_token"][name][0], series["next_token"][name][-1]):
            found[f"{as_name(name)}_milliseconds_of_a_token_after_{n}"] = value
    return found


def headline(metrics: dict[str, Any]) -> str:
    """The exponents and what is recalled, in one line."""
    dense = metrics["softmax_in_blocks_time_exponent"]
    linear = metrics["linear_in_chunks_time_exponent"]
    names = ("linear", "delta_rule", "mesa")
    errors = ", ".join(f"{metrics[f'{k}_error_of_{RECALLED[0]}_written_pairs']:.2f}" for k in names)
    return (
        f"time grows as n^{dense:.2f} (softmax) and n^{linear:.2f} (linear); error of recalling "
        f"{RECALLED[0]} pairs: {errors} (linear, delta, mesa)"
    )


STUDY = Study(
    name="linear_attention",
    title="Attention without a softmax",
    about="What it saves and what it loses: how time and memory grow with the text, how many "
    "random pairs of key and value can be read back, the rank of the matrices, and four small "
    "GPTs that differ in their attention only, trained on real text.",
    quick=LinearAttentionConfig(
        steps=120, context=128, batch=8, longest=2048, pairs=64, trials=5, longest_text=512,
        scored=2048,
    ),
    full=LinearAttentionConfig(steps=420, context=256, batch=8),
    run=run,
)  # fmt: skip
