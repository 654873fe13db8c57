"""The study ``deformable``: its images are what they claim, and what is held out stays held out."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_nn import Rng
from mini_nn.vision import effective_dilation
from models.deformable import LAYERS, PixelNet
from models.studies import deformable as study
from models.studies.session import Session
from tests.support import assert_close, host

TINY = study.DeformableConfig(
    steps=2, batch=2, channels=4, plain_channels=6, nuclei_steps=2, crop=16, test_discs=2
)


@given(st.floats(1.5, 8.6), st.integers(0, 2**32))
def test_discs_are_whole_and_round(xp: Any, radius: float, seed: int) -> None:
    image, inside = study.discs(xp.asarray([radius], dtype="float32"), Rng(seed))
    mask = host(inside)[0]
    # Gauss's circle: the number of points differs from the area by less than 2√2 π r + 2π
    assert abs(mask.sum() - math.pi * radius**2) < 2 * math.sqrt(2) * math.pi * radius + 2 * math.pi
    rows, columns = np.nonzero(mask)
    for places in (rows, columns):
        assert places.max() - places.min() <= 2 * radius
        assert places.max() - places.min() >= 2 * radius - 3  # nothing is cut off
    assert image.shape == (1, 1, 24, 24)
    noise = host(image)[0, 0] - mask
    assert 0.2 < noise.std() < 0.4


def test_every_pixel_of_a_disc_has_its_class_and_no_other_counts(xp: Any) -> None:
    bins = xp.asarray([0, 3, 2])
    image, inside, classes = study.disc_batch(bins, Rng(0))
    for k in range(3):
        mask = host(inside)[k]
        assert {*host(classes)[k][mask]} == {int(host(bins)[k])}
        assert {*host(classes)[k][~mask]} == {-100}
    logits = Rng(1).normal((3, 4, 24, 24))
    loss = float(host(study.pixel_loss(logits, classes)))
    rows = host(logits).astype("float64")
    want = []
    for n, i, j in np.argwhere(host(inside)):
        z = rows[n, :, i, j]
        want.append(np.log(np.exp(z).sum()) - z[int(host(bins)[n])])
    assert_close(loss, np.mean(want), rtol=1e-5)
    assert image.dtype == "float32"


def test_the_classes_of_the_micrograph(xp: Any) -> None:
    image, classes = study.tissue()
    seen = host(classes)
    assert {*np.unique(seen)} == {0, 1, 2}
    labels = study.nuclei()[1]
    assert ((labels > 0) == (seen > 0)).all()
    # an edge is at most two pixels away from another label, an inside pixel is not
    near = [(a, b) for a in range(-2, 3) for b in range(-2, 3) if a * a + b * b <= 4]
    for i, j in np.argwhere(seen[2:-2, 2:-2] > 0)[::97] + 2:
        around = {labels[i + a, j + b] for a, b in near}
        assert (around == {labels[i, j]}) == (seen[i, j] == 1)
    assert abs(float(host(image).mean())) < 1e-3
    assert abs(float(host(image).std()) - 1) < 1e-3


def test_crops_never_reach_the_held_out_columns(xp: Any) -> None:
    image, _ = study.tissue()
    column = xp.broadcast_to(xp.arange(512), (512, 512))
    config = replace(TINY, batch=300, crop=100)
    _, seen = study.crops(image, column, config, Rng(0))
    assert int(host(seen).max()) < 512 - study.HELD_OUT
    # missing the last start has probability (1 − 1/285)^300 < 0.35: seeds are fixed
    assert int(host(seen).max()) > 512 - study.HELD_OUT - 10


def test_overlap_is_intersection_over_union(xp: Any) -> None:
    classes = xp.asarray(np.random.default_rng(0).integers(0, 3, (8, 512)))

    def perfect(image: Any) -> Any:
        return image[:, :1] * 0.0 + xp.asarray(want)[None]

    truth = host(classes)[:, -study.HELD_OUT :]
    want = np.stack([(truth == k).astype("float32") for k in range(3)])
    found, said = study.overlaps(perfect, xp.zeros((8, 512), "float32"), classes)
    assert found == [1.0, 1.0, 1.0]
    assert (said == truth).all()
    want = np.stack([np.ones_like(want[0]), 0 * want[0], 0 * want[0]])
    found, _ = study.overlaps(perfect, xp.zeros((8, 512), "float32"), classes)
    assert found == [0.0, 0.0, 0.0]
    want = np.stack([0 * want[0], 0 * want[0], np.ones_like(want[0])])
    found, _ = study.overlaps(perfect, xp.zeros((8, 512), "float32"), classes)
    assert_close(np.array(found), np.array([(truth > 0).mean(), 0, (truth == 2).mean()]), rtol=1e-6)


def test_the_networks_start_as_the_same_convolution_and_the_plain_one_is_no_smaller(
    xp: Any,
) -> None:
    image = Rng(0).normal((2, 1, 12, 12))
    nets = {kind: PixelNet(kind, 1, 4, 8, Rng(5)) for kind in LAYERS}
    attention = nets.pop("attention")
    assert attention(image).shape == (2, 4, 12, 12)
    with pytest.raises(ValueError, match="no grid"):
        attention.offsets(image)
    state = nets["conv"].state_dict()
    for net in nets.values():
        net.load_state_dict(state, strict=False)
    for net in nets.values():
        assert_close(net(image), nets["conv"](image), rtol=1e-4, atol=1e-5)
        assert_close(effective_dilation(net.offsets(image), 3), xp.ones((2, 1, 12, 12)), rtol=1e-6)
    config = study.STUDY.full
    sizes = {k: study.network(k, 1, 4, config, Rng(0)).num_parameters() for k in LAYERS}
    assert sizes["conv"] >= max(sizes.values())
    with pytest.raises(ValueError, match="dcn_v1"):
        PixelNet("dcn", 1, 4, 6, Rng(0))


def test_what_is_drawn_is_what_the_last_layer_reads(xp: Any) -> None:
    net = PixelNet("dcn_v1", 1, 4, 4, Rng(0))
    for p in net.fourth.conv_offset.parameters():
        p.data[...] = 0.2 * Rng(1).normal(p.shape)
    image = study.middle_disc(5.0)
    points = study.sampled_from(net, image)
    offset = host(net.offsets(image))[0, :, 12, 12].reshape(9, 2)
    grid = np.array([[12 + i, 12 + j] for i in (-1, 0, 1) for j in (-1, 0, 1)])
    assert_close(np.array(points), grid + offset, rtol=1e-6)
    field = study.field_of(net, image)
    assert field.shape == (24, 24)
    assert field.max() == 1.0
    plain = study.field_of(PixelNet("conv", 1, 4, 4, Rng(0)), image)
    reach = np.argwhere(plain > 0)
    assert (abs(reach - 12) <= 4).all()  # four 3 × 3 layers see 9 × 9


def test_deformable_layers_learn_what_plain_ones_cannot_see(xp: Any, tmp_path: Path) -> None:
    """A short run of the discs: the claim of the study, with a margin."""
    config = replace(study.STUDY.quick, steps=90, test_discs=10)

    def some(rng: Rng) -> Any:
        image, _, classes = study.disc_batch(rng.integers(0, 4, (config.batch,)), rng)
        return image, classes

    found = {}
    for kind in ("conv", "dcn_v2"):
        (tmp_path / kind).mkdir()
        net = study.network(kind, 1, 4, config, Rng(0))
        study.train(net, kind, config.steps, some, config, Session("x", tmp_path / kind))
        found[kind] = float(np.mean(study.accuracies(net, config, Rng(3))))
    assert found["dcn_v2"] > found["conv"] + 0.05


def test_a_run_has_all_its_parts(xp: Any, tmp_path: Path) -> None:
    result = study.run(TINY, Session("deformable", tmp_path))
    assert len(result.figure.axes) == 10
    assert {*result.series["accuracy"]} == {*LAYERS}
    assert all(0 <= v <= 1 for overlaps in result.series["overlap"].values() for v in overlaps)
    assert {*result.series["overlap"]} == {*study.CONVOLUTIONS}
    pixels = [n for n, _ in result.series["costs"]["softmax"]]
    assert pixels == [n for n, _ in result.series["costs"]["deformable"]] == sorted(pixels)
    assert {*result.series["dilation"]} == {"dcn_v1", "dcn_v2"}
