"""Makes attention_funnel.safetensors: pooling, repetition and a whole Funnel of transformers.

``python -m tests.golden.make_attention_funnel`` (needs torch and transformers) rewrites the file
beside this script.

    pool.N.MODE.CLS.CUT, up.N.CLS.CUT
        pool_tensor of x[:, :N] with separate_cls = CLS and truncate_seq = CUT, twice, and
        ``upsample`` of the second back to N places, by 4
    model.x, .mask, .state.NAME → .block, .encoded, .decoded, and the same with masked.*
        FunnelEncoder and FunnelDecoder on vectors, its relative positions and segments being 0 as
        when a model is made; .block is the end of the first block.  With the mask, only the real
        tokens mean something; pads begin where a run of pooled tokens does

In float64; the scores, which the model makes float32, are kept in float64 as well.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np

D, HEADS, INNER, BLOCKS, DECODER, N = 4, 2, 6, [1, 2, 1], 1, 16
RNG = np.random.default_rng(7)


def normal(*shape: int) -> Any:
    return RNG.standard_normal(shape).round(3)


def pooling() -> dict[str, Any]:
    import torch
    from transformers import FunnelConfig
    from transformers.models.funnel.modeling_funnel import FunnelAttentionStructure, upsample

    x = torch.tensor(normal(2, 9, 2))
    arrays = {"pool.x": x.numpy()}
    for n, separate, cut in itertools.product((4, 6, 7, 8, 9), (False, True), (False, True)):
        config = FunnelConfig(separate_cls=separate, truncate_seq=cut)
        structure = FunnelAttentionStructure(config)
        for mode in ("mean", "max"):
            y = structure.pool_tensor(structure.pool_tensor(x[:, :n], mode), mode)
            arrays[f"pool.{n}.{mode}.{separate}.{cut}"] = y.numpy()
            if mode == "mean":
                arrays[f"up.{n}.{separate}.{cut}"] = upsample(y, 4, n, separate, cut).numpy()
    return arrays


def model() -> dict[str, Any]:
    import torch
    from transformers import FunnelConfig
    from transformers.models.funnel.modeling_funnel import FunnelDecoder, FunnelEncoder

    config = FunnelConfig(
        d_model=D,
        n_head=HEADS,
        d_head=D // HEADS,
        d_inner=INNER,
        block_sizes=BLOCKS,
        num_decoder_layers=DECODER,
    )
    encoder, decoder = FunnelEncoder(config).eval(), FunnelDecoder(config).eval()
    arrays = {}
    for part in (encoder, decoder):
        for name, parameter in part.named_parameters():
            if ".r_" in name or "seg_embed" in name:
                parameter.data = torch.zeros(parameter.shape)
                continue
            parameter.data = torch.tensor(0.7 * normal(*parameter.shape)) + (
                1.0 if name.endswith("norm.weight") else 0.0
            )
            arrays[f"model.state.{name}"] = parameter.detach().numpy()
    x = torch.tensor(normal(2, N, D))
    mask = torch.arange(N)[None] < torch.tensor([[13], [5]])
    arrays |= {"model.x": x.numpy(), "model.mask": mask.numpy()}
    for prefix, real in (("model", torch.ones(2, N)), ("masked", mask.double())):
        with torch.no_grad():
            found = encoder(x, real, output_hidden_states=True)
            first = found.hidden_states[BLOCKS[0]]
            decoded = decoder(found.last_hidden_state, first, real).last_hidden_state
        arrays |= {
            f"{prefix}.block": first.numpy(),
            f"{prefix}.encoded": found.last_hidden_state.numpy(),
            f"{prefix}.decoded": decoded.numpy(),
        }
    return arrays


def main() -> None:
    import torch
    import transformers
    from safetensors.numpy import save_file

    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]
    metadata = {
        "torch": torch.__version__,
        "numpy": np.__version__,
        "transformers": transformers.__version__,
    }
    arrays = pooling() | model()
    path = Path(__file__).with_name("attention_funnel.safetensors")
    save_file({name: np.ascontiguousarray(x) for name, x in arrays.items()}, path, metadata)


if __name__ == "__main__":
    main()
