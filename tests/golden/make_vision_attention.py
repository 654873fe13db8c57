"""Makes vision_attention.safetensors: what the Deformable DETR of transformers answers, in float64.

``python -m tests.golden.make_vision_attention`` (needs torch and transformers) rewrites the file
beside this script.  Each case is a prefix:

    core       the function: value, at, weights → out, and their gradients
    points     the attention module with reference points, a position and padding
    boxes      the same module with reference boxes
    encoder    two layers on padded maps: src, pos, ratios → out
    decoder    two layers with box heads: tgt, pos, reference, memory → out, boxes
    proposals  padding → logits of the two-stage boxes, read … the memory that is read

with ``CASE.in.NAME``, ``CASE.out``, ``CASE.grad.NAME`` (of Σ cos(0.7 i + 0.3) outᵢ) and, for the
modules, ``CASE.state.NAME`` and ``CASE.grad.state.NAME`` under the port's names.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

SHAPES = [(4, 5), (2, 3)]
PIXELS = sum(height * width for height, width in SHAPES)
N, QUERIES, HEADS, CHANNELS, POINTS = 2, 3, 2, 8, 3
CONFIG = {
    "d_model": CHANNELS,
    "num_feature_levels": len(SHAPES),
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_n_points": POINTS,
    "decoder_n_points": POINTS,
    "encoder_ffn_dim": 6,
    "decoder_ffn_dim": 6,
    "activation_function": "relu",
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
}

_rng = np.random.default_rng(12)


def normal(*shape: int) -> Any:
    return np.round(_rng.standard_normal(shape), 3)


def unit(*shape: int) -> Any:
    return np.round(_rng.uniform(0.05, 0.95, shape), 3)


def padding() -> list[Any]:
    """The second image leaves a row and a column of the finer map, a column of the other."""
    masks = [np.zeros((N, height, width), bool) for height, width in SHAPES]
    masks[0][1, 3:], masks[0][1, :, 4:], masks[1][1, :, 2:] = True, True, True
    return masks


def flat(masks: list[Any]) -> Any:
    return np.concatenate([mask.reshape(N, -1) for mask in masks], axis=1)


def randomised(module: Any) -> Any:
    """In float64, with weights without pattern and offsets of a pixel or so."""
    import torch

    module = module.double().eval()
    for p in module.parameters():
        p.data = torch.from_numpy(np.asarray(_rng.standard_normal(tuple(p.shape)) * 0.4).round(3))
    return module


def record(case: str, call: Any, module: Any = None, constant: Any = None, **inputs: Any) -> Any:
    """Call it, differentiate it, and name everything."""
    import torch

    leaves = {name: torch.from_numpy(a).requires_grad_() for name, a in inputs.items()}
    out, *others = call(**leaves, **(constant or {}))
    wave = torch.cos(0.7 * torch.arange(out.numel(), dtype=torch.float64) + 0.3)
    (out.reshape(-1) * wave).sum().backward()
    stored = {f"{case}.in.{name}": a for name, a in inputs.items()}
    stored |= {f"{case}.grad.{name}": leaf.grad.numpy() for name, leaf in leaves.items()}
    stored[f"{case}.out"] = out.detach().numpy()
    stored |= {f"{case}.out{i}": other.detach().numpy() for i, other in enumerate(others)}
    for name, p in module.named_parameters() if module is not None else ():
        stored[f"{case}.state.{name}"] = p.detach().numpy()
        if p.grad is not None:
            stored[f"{case}.grad.state.{name}"] = p.grad.numpy()
    return stored


def main() -> None:
    import torch
    import transformers
    from safetensors.numpy import save_file
    from transformers.models.deformable_detr import modeling_deformable_detr as port

    config = transformers.DeformableDetrConfig(**CONFIG)
    config._attn_implementation = "eager"
    sizes = torch.tensor(SHAPES)
    geometry = {"spatial_shapes": sizes, "spatial_shapes_list": SHAPES, "level_start_index": None}
    masks = padding()
    kept = torch.from_numpy(~flat(masks))
    ratios = torch.stack(
        [port.DeformableDetrModel.get_valid_ratio(None, ~torch.from_numpy(m), torch.float64)
         for m in masks], dim=1,
    )  # fmt: skip
    stored: dict[str, Any] = {"ratios": ratios.numpy()}

    core = port.MultiScaleDeformableAttention()
    stored |= record(
        "core",
        lambda value, at, weights: (core(value, sizes, SHAPES, None, at, weights, 64),),
        value=normal(N, PIXELS, HEADS, 4),
        at=np.round(_rng.uniform(-0.2, 1.2, (N, QUERIES, HEADS, len(SHAPES), POINTS, 2)), 3),
        weights=unit(N, QUERIES, HEADS, len(SHAPES), POINTS),
    )
    for case, coordinates in (("points", 2), ("boxes", 4)):
        module = randomised(port.DeformableDetrMultiscaleDeformableAttention(config, HEADS, POINTS))

        def attend(query: Any, pos: Any, reference: Any, memory: Any, of: Any = module) -> Any:
            options = {"encoder_hidden_states": memory, "position_embeddings": pos, **geometry}
            return of(query, attention_mask=kept, reference_points=reference, **options)[:1]

        stored |= record(
            case,
            attend,
            module,
            query=normal(N, QUERIES, CHANNELS),
            pos=normal(N, QUERIES, CHANNELS),
            reference=unit(N, QUERIES, len(SHAPES), coordinates),
            memory=normal(N, PIXELS, CHANNELS),
        )

    encoder = randomised(port.DeformableDetrEncoder(config))

    def encode(src: Any, pos: Any) -> Any:
        options = {"spatial_position_embeddings": pos, "valid_ratios": ratios, **geometry}
        return (encoder(inputs_embeds=src, attention_mask=kept, **options).last_hidden_state,)

    maps = {"src": normal(N, PIXELS, CHANNELS), "pos": normal(N, PIXELS, CHANNELS)}
    stored |= record("encoder", encode, encoder, **maps)

    decoder = randomised(port.DeformableDetrDecoder(config))
    heads = (torch.nn.Linear(CHANNELS, 4) for _ in range(2))
    decoder.bbox_embed = randomised(torch.nn.ModuleList(heads))

    def decode(tgt: Any, pos: Any, reference: Any, memory: Any) -> Any:
        answer = decoder(
            inputs_embeds=tgt,
            encoder_hidden_states=memory,
            encoder_attention_mask=kept,
            object_queries_position_embeddings=pos,
            reference_points=reference,
            valid_ratios=ratios,
            **geometry,
        )
        return answer.last_hidden_state, answer.intermediate_reference_points

    for case, coordinates in (("decoder", 2), ("decoder_boxes", 4)):
        decoder.zero_grad()
        stored |= record(
            case,
            decode,
            decoder,
            tgt=normal(N, QUERIES, CHANNELS),
            pos=normal(N, QUERIES, CHANNELS),
            reference=unit(N, QUERIES, coordinates),
            memory=normal(N, PIXELS, CHANNELS),
        )

    nothing = SimpleNamespace(enc_output=lambda x: x, enc_output_norm=lambda x: x)
    memory = torch.ones((N, PIXELS, 1), dtype=torch.float64)
    read, logits = port.DeformableDetrModel.gen_encoder_output_proposals(
        nothing, memory, ~kept, SHAPES
    )
    stored |= {"proposals.out": logits.numpy(), "proposals.read": read[..., 0].numpy() > 0}
    metadata = {
        "shapes": json.dumps(SHAPES),
        "config": json.dumps(CONFIG),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    twice = "decoder_boxes.state."  # the same as decoder.state
    stored = {k: np.ascontiguousarray(a) for k, a in stored.items() if not k.startswith(twice)}
    save_file(stored, Path(__file__).with_name("vision_attention.safetensors"), metadata)


if __name__ == "__main__":
    main()
