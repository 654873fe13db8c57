"""The ends of intervals, sizes of one, and arguments that only some shapes feel."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from mini_nn import Rng, Tensor, grad, ops
from mini_nn.vision import (
    DCNv3,
    DCNv4,
    ModulatedDeformRoIPool,
    MSDeformAttn,
    affine_grid,
    dcn_v3,
    deform_conv2d,
    deform_ps_roi_pool,
    encoder_proposals,
    grid_sample,
    offset_groups,
    roi_align,
    valid_ratio,
)
from mini_nn.vision.deform_conv import Geometry, _needed
from models.deformable import (
    DeformableConfig,
    DeformableEncoder,
    DeformableTransformerDecoderLayer,
    DeformableTransformerEncoderLayer,
    MultiheadAttention,
)
from tests.support import assert_close, host


def test_no_sampling_ratio_is_the_adaptive_one(xp: Any) -> None:
    x = Rng(0).normal((1, 2, 6, 6), dtype="float64")
    boxes = xp.asarray([[0.0, 0.5, 0.5, 5.0, 4.0]])
    adaptive = roi_align(x, boxes, 2, 1.0, -1)
    assert_close(roi_align(x, boxes, 2, 1.0, 0), adaptive, rtol=1e-12)


def test_on_the_edge_of_a_held_border_nothing_moves(xp: Any) -> None:
    x = Rng(0).normal((1, 1, 3, 4), dtype="float64")
    grid = Tensor(xp.asarray([[[[-1.0, 0.1], [1.0, 0.1]]]]), requires_grad=True)
    out = grid_sample(x, grid, padding_mode="border", align_corners=True)
    (g,) = grad(ops.sum(out), grid)
    assert (host(g)[..., 0] == 0).all()
    assert (host(g)[..., 1] != 0).all()


def test_a_single_aligned_pixel_stands_in_the_middle(xp: Any) -> None:
    theta = xp.asarray([[[1.0, 0, 0], [0, 1.0, 0]]])
    grid = host(affine_grid(theta, (1, 1, 1, 3), True))
    assert (grid[..., 1] == 0).all()
    assert_close(grid[0, 0, :, 0], np.array([-1.0, 0.0, 1.0]), rtol=1e-12)


def test_a_sample_half_a_pixel_outside_still_counts(xp: Any) -> None:
    """At w − ½ exactly, the upper end of the released kernel's closed interval."""
    x = np.zeros((1, 1, 4, 4))
    x[..., -1] = 8.0
    boxes = xp.asarray([[0.0, 4.0, 0.0, 4.0, 0.0]])
    inside = deform_ps_roi_pool(xp.asarray(x), boxes, None, 1, sample_per_part=1)
    assert_close(inside, np.full((1, 1, 1, 1), 8.0), rtol=1e-12)


def test_the_memory_bound_counts_offset_groups() -> None:
    one, four = (Geometry((6, 6), (3, 3), ((1, 1), (1, 1), (1, 1)), 1, groups) for groups in (1, 4))
    more = _needed((1, 4, 6, 6), 4, four) - _needed((1, 4, 6, 6), 4, one)
    assert more == 3 * 72 * 9 * 36


def test_the_middle_of_an_even_dilated_kernel_is_the_middle_of_its_extent(xp: Any) -> None:
    ramp = np.arange(81.0).reshape(1, 9, 9, 1)
    offset, mask = xp.zeros((1, 7, 7, 8)), xp.full((1, 7, 7, 4), 0.25)
    found = dcn_v3(xp.asarray(ramp), offset, mask, 2, 1, 0, 2, 1, offset_scale=2.0)
    assert_close(host(found)[0, 3, 3, 0], ramp[0, 2:7:4, 2:7:4, 0].mean(), rtol=1e-12)


def test_constants_of_the_released_layers() -> None:
    assert DCNv3(8, group=2).dw_conv[1][1].eps == 1e-6
    assert DCNv4(8, group=8).offset_mask.out_features == 216  # 3 · 8 · 9 is a multiple of 8


def test_a_proposal_larger_than_the_image_is_of_no_use(xp: Any) -> None:
    shapes = [(2, 2)] * 6  # the last size is 0.05 · 2⁵ = 1.6
    logits, valid = encoder_proposals(None, shapes)
    assert host(valid)[0, :20].all()
    assert not host(valid)[0, 20:].any()
    assert np.isfinite(host(logits)[0, :20]).all()


def test_queries_keys_and_values_start_as_one_matrix(xp: Any) -> None:
    """torch draws (3C, C) at once, whose Xavier bound is √(6/4C)."""
    weight = host(MultiheadAttention(16, 2, rng=Rng(0)).in_proj_weight)
    bound = math.sqrt(6 / (4 * 16))
    assert 0.95 * bound < abs(weight).max() <= bound


@pytest.mark.parametrize(
    "make", [DeformableTransformerEncoderLayer, DeformableTransformerDecoderLayer]
)
def test_dropout_is_in_every_branch_and_in_the_mlp(xp: Any, make: Any) -> None:
    config = DeformableConfig(d_model=8, d_ffn=6, n_heads=2, n_levels=1, n_points=2, dropout=0.5)
    layer, widths = make(config, rng=Rng(0)), []
    drop = layer.dropout.forward

    def recording(x: Any) -> Any:
        widths.append(x.shape[-1])
        return drop(x)

    vars(layer.dropout)["forward"] = recording
    src, at = Rng(1).normal((1, 4, 8)), xp.full((1, 4, 1, 2), 0.5, dtype="float32")
    if make is DeformableTransformerEncoderLayer:
        layer(src, src, at, [(2, 2)])
        assert widths == [8, 6, 8]
    else:
        layer(src, src, at, src, [(2, 2)])
        assert widths == [8, 8, 6, 8]


def test_levels_are_told_apart_by_unit_vectors(xp: Any) -> None:
    encoder = DeformableEncoder(DeformableConfig(d_model=64, n_heads=2, n_levels=4), rng=Rng(0))
    assert 0.85 < host(encoder.level_embed).std() < 1.15


# what would have gone through without a word


def test_a_bias_of_another_dtype_is_refused(xp: Any) -> None:
    x, w = xp.ones((1, 1, 3, 3), "float32"), xp.ones((1, 1, 1, 1), "float32")
    with pytest.raises(TypeError, match="bias has the weight's dtype"):
        deform_conv2d(x, xp.zeros((1, 2, 3, 3), "float32"), w, xp.zeros(1, "float64"))


def test_padding_masks_of_integers_are_refused(xp: Any) -> None:
    mask = xp.asarray([[[0, 0, 0, 1]]])
    assert_close(valid_ratio(mask == 1), np.array([[0.75, 1.0]]), rtol=1e-6)
    with pytest.raises(TypeError, match="booleans"):
        valid_ratio(mask)
    with pytest.raises(TypeError, match="booleans"):
        encoder_proposals(mask.reshape(1, 4), [(1, 4)])
    layer, src = MSDeformAttn(8, 1, 2, 2, rng=Rng(0)), Rng(0).normal((1, 4, 8))
    at = xp.full((1, 4, 1, 2), 0.5, dtype="float32")
    with pytest.raises(TypeError, match="booleans"):
        layer(src, at, src, [(1, 4)], mask.reshape(1, 4))


def test_references_for_other_levels_are_refused(xp: Any) -> None:
    layer, src = MSDeformAttn(8, 2, 2, 2, rng=Rng(0)), Rng(0).normal((1, 5, 8))
    at = xp.full((1, 5, 1, 2), 0.5, dtype="float32")
    with pytest.raises(ValueError, match=r"\(N, Lq, L\) = \(1, 5, 2\)"):
        layer(src, at, src, [(2, 2), (1, 1)])


def test_the_branch_of_a_pool_learns_slower(xp: Any) -> None:
    pool = ModulatedDeformRoIPool(2, 2, hidden=4, rng=Rng(0))
    usual, slow = offset_groups(pool, 1.0)
    assert usual["params"] == []
    assert len(slow["params"]) == 6
