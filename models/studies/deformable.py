"""Does a convolution that moves its grid fit its receptive field to what it looks at?

Two tasks that need just that.  On made-up discs, every pixel of a disc has to name its radius, so
the network must see as far as the disc reaches.  On a real micrograph every pixel is background,
inside a nucleus, or on its edge.  The networks differ in two layers only: plain convolutions,
deformable ones (Dai et al. 2017, arXiv:1703.06211), or modulated ones (Zhu et al. 2018,
arXiv:1811.11168); the plain one is wider, so that none has more parameters.  On the discs
deformable attention (Zhu et al. 2020, arXiv:2010.04159) stands in for them, too; what it costs is
measured beside softmax attention, as the image grows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from scipy.stats import spearmanr

import mini_nn
from mini_nn import Rng, backend, ops
from mini_nn.backend import Array
from mini_nn.engine import data_of
from mini_nn.nn import functional as F
from mini_nn.optim import Adam
from mini_nn.vision import (
    effective_dilation,
    effective_receptive_field,
    ms_deform_attn,
    offset_groups,
)

from ..data import nuclei
from ..deformable import LAYERS, PixelNet
from .base import Config, Result, Study
from .deformable_figure import CAPTION, draw
from .measure import milliseconds
from .session import Session

Batch = Callable[[Rng], tuple[Array, Array]]
"""Draws images and the class of each pixel."""

RADII = (2.0, 4.0, 6.0, 8.0)
"""Pixels; a disc's radius is one of these, plus or minus at most ``SPREAD``."""

SPREAD, SIZE, NOISE = 0.6, 24, 0.3
CLASSES = ("background", "inside", "edge")
CONVOLUTIONS = ("conv", "dcn_v1", "dcn_v2")

OVERLAPS = ("nucleus", "inside", "edge")
"""What is compared: a nucleus is its inside and its edge."""

HELD_OUT = 128
"""The last columns of the micrograph, which are never trained on."""


@dataclass(frozen=True, kw_only=True)
class DeformableConfig(Config):
    """What is trained, and how; ``steps`` are those of each network on the discs.

    Args:
        batch: discs, or crops, per step.
        lr: of Adam.
        offset_lr: factor of the learning rate for what makes offsets and masks.
        channels: of the networks with deformable layers; the plain one has ``plain_channels``.
        plain_channels: as many as give it at least as many parameters.
        nuclei_steps: optimiser steps on the micrograph.
        crop: pixels, the side of the squares that are cut from it.
        test_discs: how many discs of each radius measure the accuracy.
    """

    batch: int = 8
    lr: float = 3e-3
    offset_lr: float = 0.3
    channels: int = 12
    plain_channels: int = 19
    nuclei_steps: int = 200
    crop: int = 48
    test_discs: int = 50


def network(kind: str, inputs: int, classes: int, config: DeformableConfig, rng: Rng) -> PixelNet:
    """The untrained network of one kind."""
    width = config.plain_channels if kind == "conv" else config.channels
    return PixelNet(kind, inputs, classes, width, rng)


# discs


def discs(radii: Array, rng: Rng) -> tuple[Array, Array]:
    """Noisy discs of these radii (n,) in random places, whole: images (n, 1, 24, 24) and masks."""
    xp = backend.of(radii)
    count = len(radii)
    room = (SIZE - 1 - 2 * radii)[:, None]
    centre = radii[:, None] + rng.uniform((count, 2)) * xp.maximum(room, 0.0)
    place = xp.arange(SIZE).astype("float32")
    y, x = centre[:, 0, None, None], centre[:, 1, None, None]
    inside = (place[:, None] - y) ** 2 + (place - x) ** 2 <= radii[:, None, None] ** 2
    image = inside.astype("float32") + NOISE * rng.normal((count, SIZE, SIZE))
    return image[:, None], inside


def disc_batch(bins: Array, rng: Rng) -> tuple[Array, Array, Array]:
    """Images, masks and the class of every pixel (−100 where there is no disc) for these bins."""
    xp = backend.of(bins)
    radii = xp.asarray(RADII, dtype="float32")[bins]
    radii = radii + rng.uniform(bins.shape, -SPREAD, SPREAD)
    image, inside = discs(radii, rng)
    return image, inside, xp.where(inside, bins[:, None, None], -100)


def pixel_loss(logits: Any, classes: Array) -> Any:
    """Mean cross-entropy of (n, c, h, w) with (n, h, w); −100 does not count."""
    rows = logits.transpose(0, 2, 3, 1).reshape(-1, logits.shape[1])
    return F.cross_entropy(rows, classes.reshape(-1))


def accuracies(net: PixelNet, config: DeformableConfig, rng: Rng) -> list[float]:
    """The part of disc pixels whose radius is named right, for each radius."""
    xp = backend.current().xp
    found = []
    for k in range(len(RADII)):
        image, inside, classes = disc_batch(xp.full((config.test_discs,), k), rng)
        with mini_nn.no_grad():
            right = data_of(net(image)).argmax(axis=1) == classes
        found.append(float(backend.to_host((right & inside).sum() / inside.sum())))
    return found


def dilations(net: PixelNet, config: DeformableConfig, rng: Rng) -> tuple[list[float], float]:
    """The mean effective dilation of the last layer's filters on discs of each radius.

    Returns:
        For each radius the mean over pixels of discs; and the rank correlation of radius and mean
        dilation over single discs.
    """
    xp = backend.current().xp
    means, radii_seen, single = [], [], []
    for k, radius in enumerate(RADII):
        image, inside, _ = disc_batch(xp.full((config.test_discs,), k), rng)
        with mini_nn.no_grad():
            spread = data_of(effective_dilation(net.offsets(image), 3))[:, 0]
        per_disc = (spread * inside).sum(axis=(1, 2)) / inside.sum(axis=(1, 2))
        per_disc = backend.to_host(per_disc)
        means.append(float(per_disc.mean()))
        single += [float(v) for v in per_disc]
        radii_seen += [radius] * len(per_disc)
    return means, float(spearmanr(radii_seen, single).statistic)


def train(
    net: PixelNet, name: str, steps: int, batch: Batch, config: DeformableConfig, session: Session
) -> PixelNet:
    """``net`` after ``steps`` steps of Adam on what ``batch`` draws."""
    rng = Rng(config.seed + 1)
    optimizer = Adam(offset_groups(net, config.lr, config.offset_lr), config.lr)
    loop = session.loop(steps, net, optimizer, name=name, rngs={"batches": rng})
    for step in loop:
        image, classes = batch(rng)
        optimizer.zero_grad()
        loss = pixel_loss(net(image), classes)
        loss.backward()
        optimizer.step()
        if (step + 1) % 20 == 0:
            loop.record(step=step + 1, loss=float(backend.to_host(loss.data)))
    return net


# nuclei


def tissue() -> tuple[Array, Array]:
    """The micrograph, brightness scaled to about 1, and its classes: both (512, 512).

    The edge of a nucleus are its pixels at most two away from what is not it.
    """
    xp = backend.current().xp
    image, labels = nuclei()
    inner = labels > 0
    for dy, dx in product(range(-2, 3), repeat=2):
        if dy * dy + dx * dx <= 4:
            inner &= np.roll(labels, (dy, dx), (0, 1)) == labels
    classes = np.where(inner, 1, np.where(labels > 0, 2, 0))
    bright = np.sqrt(image / 255.0)  # counts of photons: the square root evens out their noise
    return xp.asarray((bright - bright.mean()) / bright.std(), dtype="float32"), xp.asarray(classes)


def crops(image: Array, classes: Array, config: DeformableConfig, rng: Rng) -> tuple[Any, Any]:
    """Random squares of the part that is trained on: (n, 1, s, s) and (n, s, s)."""
    xp, side = backend.of(image), config.crop
    low = rng.integers(0, image.shape[0] - side + 1, (config.batch, 1, 1))
    left = rng.integers(0, image.shape[1] - HELD_OUT - side + 1, (config.batch, 1, 1))
    y, x = low + xp.arange(side)[:, None], left + xp.arange(side)
    return image[y, x][:, None], classes[y, x]


def overlaps(net: PixelNet, image: Array, classes: Array) -> tuple[list[float], Array]:
    """Intersection over union on the held-out columns, and what was said there.

    Returns:
        Of ``OVERLAPS``: whole nuclei, their insides, their edges.
    """
    part, truth = image[:, -HELD_OUT:], classes[:, -HELD_OUT:]
    with mini_nn.no_grad():
        said = data_of(net(part[None, None]))[0].argmax(axis=0)
    found = []
    for a, b in ((said > 0, truth > 0), (said == 1, truth == 1), (said == 2, truth == 2)):
        found.append(float(backend.to_host((a & b).sum() / (a | b).sum())))
    return found, backend.to_host(said)


# what is drawn


def attention_costs(rng: Rng) -> dict[str, list[tuple[int, float]]]:
    """Milliseconds of one forward pass over side² pixels, by side², the shortest of five."""
    costs: dict[str, list[tuple[int, float]]] = {"deformable": [], "softmax": []}
    for side in (8, 16, 24, 32, 48, 64):
        pixels = side * side
        query, key, value = (rng.normal((1, 1, pixels, 32)) for _ in range(3))
        rows = value.reshape(1, pixels, 1, 32)
        at = rng.uniform((1, pixels, 1, 1, 4, 2))
        weights = rng.uniform((1, pixels, 1, 1, 4))
        passes = {
            "deformable": lambda: ms_deform_attn(rows, [(side, side)], at, weights),  # noqa: B023
            "softmax": lambda: ops.scaled_dot_product_attention(query, key, value),  # noqa: B023
        }
        for name, run_once in passes.items():
            costs[name].append((pixels, milliseconds(run_once, 5)))
    return costs


def middle_disc(radius: float) -> Array:
    """A disc without noise in the middle of an image, (1, 1, 24, 24)."""
    xp = backend.current().xp
    place = xp.arange(SIZE).astype("float32") - (SIZE - 1) / 2
    return (place[:, None] ** 2 + place**2 <= radius**2).astype("float32")[None, None]


def sampled_from(net: PixelNet, image: Array) -> list[list[float]]:
    """Where the fourth layer reads for the middle pixel: nine (y, x) in pixels."""
    middle = SIZE // 2
    with mini_nn.no_grad():
        offset = data_of(net.offsets(image))[0, :, middle, middle]
    moved = backend.to_host(offset).reshape(9, 2)
    grid = [(middle + k // 3 - 1, middle + k % 3 - 1) for k in range(9)]
    return [[float(y + dy), float(x + dx)] for (y, x), (dy, dx) in zip(grid, moved, strict=True)]


def field_of(net: PixelNet, image: Array) -> Any:
    """How much each pixel matters to what is said in the middle: (24, 24), the largest is 1."""
    middle = SIZE // 2
    field = backend.to_host(
        effective_receptive_field(net, image, (0, slice(None), middle, middle))
    )[0]
    return field / field.max()


def run(config: DeformableConfig, session: Session) -> Result:
    """Both tasks with all three networks, and the figure."""
    mini_nn.tune_allocator()

    def some_discs(rng: Rng) -> tuple[Array, Array]:
        image, _, classes = disc_batch(rng.integers(0, len(RADII), (config.batch,)), rng)
        return image, classes

    image, classes = tissue()
    disc_nets, nuclei_nets = {}, {}
    for kind in LAYERS:
        weights = Rng(config.seed).split(2)
        with session.timed("discs"):
            net = network(kind, 1, len(RADII), config, weights[0])
            disc_nets[kind] = train(net, f"discs-{kind}", config.steps, some_discs, config, session)
        if kind not in CONVOLUTIONS:
            continue
        with session.timed("nuclei"):
            net = network(kind, 1, len(CLASSES), config, weights[1])
            nuclei_nets[kind] = train(
                net,
                f"nuclei-{kind}",
                config.nuclei_steps,
                lambda rng: crops(image, classes, config, rng),
                config,
                session,
            )
    with session.timed("measuring"):
        named = {k: accuracies(n, config, Rng(config.seed + 2)) for k, n in disc_nets.items()}
        moved = {
            k: dilations(n, config, Rng(config.seed + 3))
            for k, n in disc_nets.items()
            if k in ("dcn_v1", "dcn_v2")
        }
        found = {k: overlaps(n, image, classes) for k, n in nuclei_nets.items()}
        shown = {radius: middle_disc(radius) for radius in RADII}
        points = {str(r): sampled_from(disc_nets["dcn_v1"], disc) for r, disc in shown.items()}
        fields = {k: field_of(n, shown[RADII[2]]) for k, n in disc_nets.items()}
        costs = attention_costs(Rng(config.seed + 4))
    metrics: dict[str, float | int | str] = {}
    for kind, net in disc_nets.items():
        metrics[f"{kind}_parameters"] = net.num_parameters()
        metrics[f"{kind}_disc_accuracy"] = float(np.mean(named[kind]))
        for radius, part in zip(RADII, named[kind], strict=True):
            metrics[f"{kind}_disc_accuracy_at_{radius:.0f}"] = part
        for name, overlap in zip(OVERLAPS, found.get(kind, [[]])[0], strict=kind in found):
            metrics[f"{kind}_{name}_overlap"] = overlap
        if kind in moved:
            metrics[f"{kind}_rank_correlation_of_dilation_and_radius"] = moved[kind][1]
    series = {
        "accuracy": named,
        "dilation": {k: v[0] for k, v in moved.items()},
        "overlap": {k: v[0] for k, v in found.items()},
        "points": points,
        "costs": costs,
        "fields": {k: v.tolist() for k, v in fields.items()},
    }
    pictures = {
        "discs": {str(r): backend.to_host(disc)[0, 0] for r, disc in shown.items()},
        "tissue": backend.to_host(image)[:, -HELD_OUT:],
        "truth": backend.to_host(classes)[:, -HELD_OUT:],
        "said": {k: v[1] for k, v in found.items()},
    }
    return Result(
        headline="; ".join(
            f"{kind}: discs {metrics[f'{kind}_disc_accuracy']:.2f}"
            + (f", nuclei {metrics[f'{kind}_nucleus_overlap']:.2f}" if kind in found else "")
            for kind in LAYERS
        ),
        metrics=metrics,
        figure=draw(RADII, series, pictures),
        caption=CAPTION.format(**{**metrics, **vars(config)}),
        series=series,
    )


STUDY = Study(
    name="deformable",
    title="A convolution that moves its grid",
    about="Every pixel of a disc has to name its radius, which asks for a receptive field as "
    "large as the disc; and every pixel of a micrograph has to say whether it is in a nucleus, on "
    "its edge, or outside. Plain convolutions against deformable ones with no more parameters, and "
    "a look at where these read.",
    quick=DeformableConfig(steps=120, nuclei_steps=50, crop=32, test_discs=25),
    full=DeformableConfig(steps=400, nuclei_steps=200),
    run=run,
)
