"""Vision: sampling between pixels, deformable convolution and attention, regions of interest."""

from .boxes import (
    encoder_proposals,
    encoder_reference_points,
    inverse_sigmoid,
    refine_boxes,
    top_proposals,
    valid_ratio,
)
from .dat import DeformableAttention, reference_grid, relative_position_bias
from .dcn_v3 import DCNv3, DCNv4, dcn_v3, dcn_v4
from .deform_conv import deform_conv2d, deform_conv2d_by_warps
from .deform_roi import (
    DeformPSRoIPool,
    DeformRoIPool,
    ModulatedDeformRoIPool,
    deform_ps_roi_pool,
    deform_roi_pool,
    feature_mimic_loss,
    modulated_deform_roi_pool,
)
from .deformable_attention import (
    MSDeformAttn,
    compass_offsets,
    locations_from_offsets,
    ms_deform_attn,
    sampled_values,
)
from .layers import (
    ActiveConv2d,
    DeformConv2d,
    DeformConvPack,
    ModulatedDeformConvPack,
    SpatialTransformer,
    from_mmcv,
    offset_groups,
)
from .receptive_field import (
    effective_dilation,
    effective_receptive_field,
    effective_sampling_locations,
    gaussian_width,
    measured_width,
    saliency_region,
)
from .roi import ps_roi_align, ps_roi_pool, roi_align, roi_pool
from .sampling import affine_grid, bilinear_sample, grid_sample, sample_points

__all__ = [
    "ActiveConv2d", "DCNv3", "DCNv4", "DeformConv2d", "DeformConvPack", "DeformPSRoIPool",
    "DeformRoIPool", "DeformableAttention", "MSDeformAttn", "ModulatedDeformConvPack",
    "ModulatedDeformRoIPool", "SpatialTransformer", "affine_grid", "bilinear_sample",
    "compass_offsets", "dcn_v3", "dcn_v4", "deform_conv2d", "deform_conv2d_by_warps",
    "deform_ps_roi_pool", "deform_roi_pool", "effective_dilation", "effective_receptive_field",
    "effective_sampling_locations", "encoder_proposals", "encoder_reference_points",
    "feature_mimic_loss", "from_mmcv", "gaussian_width", "grid_sample", "inverse_sigmoid",
    "locations_from_offsets", "measured_width", "modulated_deform_roi_pool", "ms_deform_attn",
    "offset_groups", "ps_roi_align", "ps_roi_pool", "reference_grid", "refine_boxes",
    "relative_position_bias", "roi_align", "roi_pool", "saliency_region", "sample_points",
    "sampled_values", "top_proposals", "valid_ratio",
]  # fmt: skip
