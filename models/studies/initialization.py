"""Why a deep network starts alive: what initialisation, norms and residual wrappers do to signals.

Four questions, each asked of the layers that the library has and answered beside the theory.  How
does the second moment travel through 60 layers?  What share of a residual stream does each branch
have?  Which 24-layer Transformers start to learn?  When does softmax attention saturate?
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np

import mini_nn
from mini_nn import Rng, backend, nn, ops
from mini_nn.analysis import MeanField, signals, watching
from mini_nn.attention.scale import sensitivity
from mini_nn.backend import Array
from mini_nn.engine import data_of
from mini_nn.nn import functional as F
from mini_nn.nn import init
from mini_nn.nn.gaussian import gain
from mini_nn.nn.residual import DeepNorm, ReZero, post_norm, pre_norm
from mini_nn.nn.schemes import deepnorm_constants
from mini_nn.optim import Adam, Schedule

from ..data import corpus, split
from ..gpt import GPT, Block, GPTConfig
from . import baselines
from .base import Config, Result, Study
from .initialization_figure import CAPTION, draw
from .session import Session
from .text import BYTES, batches, codes

DIMENSIONS = (16, 64, 256, 1024)
"""Of the heads whose attention is looked at."""

SCALES = [0.1 * 1.25**k for k in range(22)]
"""Standard deviations of attention logits."""

SENSITIVE = 10_000
"""Queries whose sensitivities are averaged; few would not show the plateau of the mean."""

SPAN = 10
"""Training steps whose mean loss is one point of a curve."""


@dataclass(frozen=True, kw_only=True)
class InitializationConfig(Config):
    """How much is measured and trained; ``steps`` are those of each training run.

    Args:
        width, depth, samples: of the network whose signals are followed.
        draws: how many initial weights are drawn, of which the median counts.
        residual_width, residual_depth: of the linear residual network.
        queries, keys: of the attention that is looked at.
        seeds: training runs of each Transformer, of which the median counts.
        n_layer, n_head, n_embd, context, batch: of the Transformer.
        lr: of Adam, for all of them.
        warmup: steps over which it grows, where it does.
    """

    width: int = 256
    depth: int = 60
    samples: int = 64
    draws: int = 3
    residual_width: int = 512
    residual_depth: int = 12
    queries: int = 256
    keys: int = 128
    seeds: int = 3
    n_layer: int = 24
    n_head: int = 2
    n_embd: int = 32
    context: int = 32
    batch: int = 8
    lr: float = 1.5e-3
    warmup: int = 100

    @property
    def corpus(self) -> str:
        """What the Transformers read."""
        return "shakespeare"


# 1. signals


@dataclass(frozen=True)
class Network:
    """x ← W f(x), repeated: an activation and the variance of W."""

    label: str
    f: Callable[[Any], Any]
    weight_variance: float
    """fan_in · Var W."""

    normalised: bool = False
    start: float = 1.0
    """The second moment of the input."""


def networks() -> list[Network]:
    """What is compared: the laws of LeCun and He, and activations divided by √(E f²)."""

    def corrected(name: str, f: Callable[[Any], Any]) -> Network:
        return Network(f"{name}, corrected", f, gain(f) ** 2)

    return [
        Network("ReLU, 1/n (LeCun)", F.relu, 1.0),
        Network("ReLU, 2/n (He)", F.relu, 2.0),
        corrected("tanh", F.tanh),
        corrected("sigmoid", F.sigmoid),
        Network("SELU, 1/n", F.selu, 1.0),
        replace(corrected("GELU", F.gelu), label="GELU from 1.5", start=1.5),
        replace(corrected("GELU", F.gelu), label="GELU from 0.67", start=1 / 1.5),
        Network("GELU, RMS norm", F.gelu, 1.0, normalised=True),
    ]


class Stack(nn.Module):
    """``depth`` linear layers with an activation, and perhaps a norm, between two of them."""

    def __init__(self, network: Network, config: InitializationConfig, rng: Rng) -> None:
        n = config.width
        self.network = network
        self.layers = nn.ModuleList(
            nn.Linear(n, n, bias=False, rng=rng) for _ in range(config.depth)
        )
        for place, layer in enumerate(self.layers):
            scale = network.weight_variance if place else 1.0
            init.variance_scaling_(layer.weight, scale, distribution="normal", rng=rng)

    def forward(self, x: Any) -> Any:
        """(samples, width) to the same."""
        for place, layer in enumerate(self.layers):
            if place:
                x = self.network.f(x)
                if self.network.normalised:
                    x = F.rms_norm(x, x.shape[-1], eps=0.0)
            x = layer(x)
        return x


def follow(
    network: Network, config: InitializationConfig, rng: Rng
) -> dict[str, dict[str, list[float]]]:
    """Second moments and cosines after each layer: medians over draws, and what is predicted."""
    runs = []
    for one in rng.split(config.draws):
        x = one.normal((config.samples, config.width), std=math.sqrt(network.start))
        runs.append(signals(Stack(network, config, one), x))
    measured = {
        what: [median(getattr(row, what) for row in layer) for layer in zip(*runs, strict=True)]
        for what in ("second_moment", "cosine")
    }
    depth = config.depth
    if network.normalised:  # the norm puts the second moment at 1, whatever the weights do
        theory = MeanField(network.f, gain(network.f) ** 2)
        cosines = theory.cosines(depth, measured["cosine"][0])
        return {"measured": measured, "predicted": {"cosine": cosines}}
    theory = MeanField(network.f, network.weight_variance)
    start = measured["second_moment"][0], measured["cosine"][0]
    return {
        "measured": measured,
        "predicted": {
            "second_moment": theory.second_moments(depth, start[0]),
            "cosine": theory.cosines(depth, start[1], start[0]),
        },
    }


# 2. shares of a residual stream


def shares(wrapper: Callable[..., Any], config: InitializationConfig, rng: Rng) -> list[float]:
    """The coefficient of the input and of each branch's output in the last state of a stream.

    The branches are random linear maps, so their outputs are almost orthogonal to one another, and
    the coefficients are read off by least squares.
    """
    d = config.residual_width
    norm = nn.LayerNorm(d, elementwise_affine=False, eps=0.0)
    branches = [nn.Linear(d, d, bias=False, rng=rng) for _ in range(config.residual_depth)]
    for branch in branches:
        init.lecun_normal_(branch.weight, rng=rng)
    start = norm(rng.normal((1, d)))
    state = start
    with watching({str(t): branch for t, branch in enumerate(branches)}) as seen:
        for branch in branches:
            state = wrapper(state, norm, branch)
    parts = np.stack([_row(start), *(_row(output) for _, output in seen)], axis=1)
    found, *_ = np.linalg.lstsq(parts, _row(state), rcond=None)
    return [float(share) for share in found]


def _row(x: Any) -> Any:
    return backend.to_host(data_of(x)).reshape(-1).astype("float64")


# 3. training


@dataclass(frozen=True)
class Arm:
    """A Transformer that is trained: how a branch is wrapped, and its weights' scale."""

    label: str
    wrapper: Callable[[int], Any]
    """From the number of layers to one branch's wrapper."""

    gain: float
    """Of a matrix, as a multiple of LeCun's standard deviation."""

    warmup: bool = False
    norms: bool = True
    """Whether the wrapper uses the norms of a block."""

    residual_gain: Callable[[int], float] = lambda layers: 1.0
    """DeepNorm's β: another factor for values, output projections and MLPs."""


BERT_GAIN = 0.02 * math.sqrt(768)
"""BERT's standard deviation, 0.02 at width 768, as a multiple of LeCun's."""

ARMS = (
    Arm("post-norm", lambda layers: post_norm, BERT_GAIN),
    Arm("post-norm, warm-up", lambda layers: post_norm, BERT_GAIN, warmup=True),
    Arm("pre-norm", lambda layers: pre_norm, BERT_GAIN),
    Arm("ReZero", lambda layers: ReZero(), BERT_GAIN, norms=False),
    Arm(
        "DeepNorm",
        lambda layers: DeepNorm(deepnorm_constants(decoder=layers)[0]),
        1.0,
        residual_gain=lambda layers: deepnorm_constants(decoder=layers)[1],
    ),
)


def transformer(arm: Arm, config: InitializationConfig, rng: Rng) -> GPT:
    """The untrained model of an arm: its wrappers and its weights."""
    sizes = GPTConfig(BYTES, config.context, config.n_embd, config.n_layer, config.n_head)
    layers, d = config.n_layer, config.n_embd
    norm = None if arm.norms else nn.Identity
    blocks = [
        Block(sizes, rng, residuals=(arm.wrapper(layers), arm.wrapper(layers)), norm=norm)
        for _ in range(layers)
    ]
    model = GPT(sizes, rng, blocks)
    beta = arm.residual_gain(layers)
    for block in blocks:
        maps = (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj)
        for linear in maps:
            init.lecun_normal_(linear.weight, layout="in_out", rng=rng)
            linear.weight.data[...] *= arm.gain
        for part in (block.attn.c_attn.weight.data[:, 2 * d :], *(m.weight.data for m in maps[1:])):
            part[...] *= beta
    for table in (model.transformer.wte, model.transformer.wpe):
        init.normal_(table.weight, std=1.0 / math.sqrt(d), rng=rng)
    return model


def train(
    arm: Arm, seed: int, text: Array, config: InitializationConfig, session: Session
) -> list[float]:
    """The loss of every step, in bits per character."""
    weights_rng, batch_rng = Rng(seed).split(2)
    model = transformer(arm, config, weights_rng)
    optimizer = Adam(model.parameters(), config.lr)
    slow = config.warmup if arm.warmup else 1
    schedule = Schedule(optimizer, lambda step: min(1.0, (step + 1) / slow))
    loop = session.loop(
        config.steps,
        model,
        optimizer,
        name=f"{arm.label} {seed}".replace(" ", "-").replace(",", ""),
        schedule=schedule,
        rngs={"batches": batch_rng},
    )
    for _ in loop:
        inputs, targets = batches(text, config, batch_rng)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs).reshape(-1, BYTES), targets.reshape(-1))
        loss.backward()
        optimizer.step()
        schedule.step()
        loop.record(bits=baselines.bits(float(backend.to_host(loss.data))))
    return [row["bits"] for row in loop.history]


def smoothed(losses: list[float], span: int) -> list[float]:
    """The means of ``span`` steps each."""
    return [float(np.mean(losses[start : start + span])) for start in range(0, len(losses), span)]


# 4. attention


def saturation(d: int, scaled: bool, config: InitializationConfig, rng: Rng) -> list[float]:
    """The largest weight of each query, for random queries and keys of unit variance."""
    query, key = rng.normal((config.queries, d)), rng.normal((config.keys, d))
    logits = query @ key.T * (1.0 / math.sqrt(d) if scaled else 1.0)
    return [float(p) for p in backend.to_host(ops.softmax(logits).max(axis=-1))]


def sensitivities(scales: list[float], config: InitializationConfig, rng: Rng) -> list[float]:
    """Half the sum of |∂p/∂s| over one query's weights, mean over queries, by the scale."""
    logits = rng.normal((SENSITIVE, config.keys), dtype="float64")
    return [float(backend.to_host(sensitivity(logits, a)).mean()) for a in scales]


def run(config: InitializationConfig, session: Session) -> Result:
    """All four, and the figure."""
    mini_nn.tune_allocator()
    signal_rng, share_rng, attention_rng = Rng(config.seed).split(3)
    with session.timed("training"):
        text = codes(split(corpus(config.corpus))[0])
        losses = {
            arm.label: [train(arm, seed, text, config, session) for seed in range(config.seeds)]
            for arm in ARMS
        }
    with session.timed("signals"):
        followed = {net.label: follow(net, config, signal_rng) for net in networks()}
    with session.timed("shares"):
        wrappers = {"post-norm": post_norm, "pre-norm": pre_norm, "ReZero": ReZero()}
        parts = {name: shares(wrapper, config, share_rng) for name, wrapper in wrappers.items()}
    with session.timed("attention"):
        largest = {
            str(d): [saturation(d, scaled, config, attention_rng) for scaled in (False, True)]
            for d in DIMENSIONS
        }
        slopes = sensitivities(SCALES, config, attention_rng)
    curves = {
        label: [median(step) for step in zip(*(smoothed(run, SPAN) for run in runs), strict=True)]
        for label, runs in losses.items()
    }
    ends = {label: curve[-1] for label, curve in curves.items()}
    unigram = baselines.unigram_bits(*split(corpus(config.corpus)))
    metrics: dict[str, float | int | str] = {
        **{f"{_word(label)}_bits_per_character": end for label, end in ends.items()},
        "unigram_bits_per_character": unigram,
        **{
            f"{_word(label)}_second_moment_at_the_end": found["measured"]["second_moment"][-1]
            for label, found in followed.items()
        },
    }
    series = {
        "losses": curves,
        "signals": followed,
        "shares": parts,
        "largest_weights": largest,
        "sensitivities": [*zip(SCALES, slopes, strict=True)],
    }
    stalled = [label for label, end in ends.items() if end > unigram - 0.25]
    return Result(
        headline=f"{config.n_layer} layers: {', '.join(stalled) or 'nothing'} stalls; "
        + ", ".join(f"{name} {end:.2f}" for name, end in ends.items() if name not in stalled)
        + " bits per character",
        metrics=metrics,
        figure=draw(config, series, unigram, SPAN),
        caption=CAPTION.format(**vars(config)),
        series=series,
    )


def _word(label: str) -> str:
    """A label as a part of a metric's name."""
    kept = "".join(c if c.isalnum() else " " for c in label.lower())
    return "_".join(kept.split())


STUDY = Study(
    name="initialization",
    title="Why a deep network starts alive",
    about="What happens to a signal on its way through 60 random layers under each law of "
    "initialisation; which share of a residual stream belongs to which branch; which of five "
    "24-layer Transformers start to learn a text at one learning rate; and when softmax attention "
    "looks at one place only. Measured on the library's own layers, beside the theory.",
    quick=InitializationConfig(steps=110, context=16, seeds=1, draws=1, warmup=40),
    full=InitializationConfig(steps=270),
    run=run,
)
