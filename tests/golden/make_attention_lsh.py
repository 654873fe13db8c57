"""Makes attention_lsh.safetensors: what two implementations of the Reformer answer, in float64.

``python -m tests.golden.make_attention_lsh`` (needs torch, transformers and reformer-pytorch, which
is MIT licensed) rewrites the file beside this script; the metadata has the versions.

``attend.K.``  reformer-pytorch's LSHAttention with given rotations, restricted to buckets and with
    the discount of duplicates: in.qk, in.v (batch, n, d), rotations (d, r, b/2), out, grad.NAME (of
    Σ cos(0.7 i + 0.3) outᵢ).
``hash.``  buckets of transformers' LSHSelfAttention, with and without pads.
``one.``  its output if all rotations are 0, so that all tokens share a bucket, with its ε at 0.
``model.``  the logits and gradients of ReformerModelWithLMHead with one local and one LSH layer,
    for a text that fits into one chunk of the latter, which it does not hash.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

# rounds, causal
CASES = [(1, False), (1, True), (3, False), (3, True)]
BATCH, N, D, CHUNK = 1, 18, 4, 3

_rng = np.random.default_rng(4)


def normal(*shape: int) -> Any:
    return np.round(_rng.standard_normal(shape), 3)


def wave(shape: Any) -> Any:
    return np.cos(0.7 * np.arange(int(np.prod(shape))) + 0.3).reshape(shape)


def attend(arrays: dict[str, Any]) -> None:
    """Both kinds of masks, one round and several."""
    import torch
    from reformer_pytorch import LSHAttention

    for k, (rounds, causal) in enumerate(CASES):
        layer = LSHAttention(
            bucket_size=CHUNK, n_hashes=rounds, causal=causal, attend_across_buckets=False,
            allow_duplicate_attention=False,
        )  # fmt: skip
        rotations = normal(D, rounds, N // CHUNK // 2)
        inputs = {"qk": normal(BATCH, N, D), "v": normal(BATCH, N, D)}
        leaves = {name: torch.tensor(x, requires_grad=True) for name, x in inputs.items()}
        with mock.patch("torch.randn", lambda *a, R=rotations, **b: torch.tensor(R)[None]):
            out = layer(*leaves.values())[0]
        (out * torch.tensor(wave(out.shape))).sum().backward()
        prefix = f"attend.{k}."
        arrays |= {f"{prefix}in.{name}": x for name, x in inputs.items()}
        arrays |= {f"{prefix}grad.{name}": leaf.grad.numpy() for name, leaf in leaves.items()}
        arrays |= {f"{prefix}out": out.detach().numpy(), f"{prefix}rotations": rotations}


def layer(**options: Any) -> Any:
    from transformers import ReformerConfig
    from transformers.models.reformer.modeling_reformer import LSHSelfAttention

    config = ReformerConfig(
        hidden_size=8, num_attention_heads=2, attention_head_size=4, num_hashes=3,
        lsh_attn_chunk_length=CHUNK, max_position_embeddings=N, is_decoder=True, **options,
    )  # fmt: skip
    return LSHSelfAttention(config, 0).eval()


def hashes(arrays: dict[str, Any]) -> None:
    import torch

    x, rotations = normal(2, 2, N, 4), normal(2, 4, 3, 3)  # the last axis is also that of [2, 4]
    real = np.arange(N) < np.array([[N], [N - 5]])
    arrays |= {"hash.x": x, "hash.rotations": rotations, "hash.real": real.astype("uint8")}
    mask = torch.tensor(real.astype("int64"))
    with mock.patch("torch.randn", lambda *a, **b: torch.tensor(rotations)):
        for name, b, pads in (("all", 6, None), ("padded", 6, mask), ("factors", [2, 4], None)):
            buckets = layer(num_buckets=b)._hash_vectors(torch.tensor(x), 3, pads)
            count = int(np.prod(b)) + (pads is not None)
            buckets = buckets.reshape(2, 2, 3, N) - torch.arange(3)[:, None] * count
            arrays[f"hash.{name}"] = buckets.numpy().astype("uint8")


def one_bucket(arrays: dict[str, Any]) -> None:
    import torch

    module = layer(num_buckets=4)
    type(module)._len_norm.__defaults__ = (0.0,)
    x, w, v = normal(2, N, 8), normal(8, 8), normal(8, 8)
    module.query_key.weight.data = torch.tensor(w)
    module.value.weight.data = torch.tensor(v)
    with mock.patch("torch.randn", lambda *a, **b: torch.zeros(2, 4, 3, 2)):
        out = module(torch.tensor(x)).hidden_states
    arrays |= {"one.x": x, "one.query_key": w, "one.value": v, "one.out": out.detach().numpy()}


def model(arrays: dict[str, Any]) -> dict[str, Any]:
    import torch
    from transformers import ReformerConfig, ReformerModelWithLMHead

    options: dict[str, Any] = {
        "vocab_size": 11, "hidden_size": 8, "num_attention_heads": 2, "attention_head_size": 3,
        "attn_layers": ["local", "lsh"], "feed_forward_size": 12, "axial_pos_shape": [3, 4],
        "axial_pos_embds_dim": [2, 6], "local_attn_chunk_length": 3, "lsh_attn_chunk_length": 12,
        "num_buckets": 2, "chunk_size_feed_forward": 5, "hidden_dropout_prob": 0.0,
        "initializer_range": 0.5,
    }  # fmt: skip
    more = {"chunk_size_feed_forward": 4, "is_decoder": True, "max_position_embeddings": 12}
    more |= {"local_attention_probs_dropout_prob": 0.0, "lsh_attention_probs_dropout_prob": 0.0}
    net = ReformerModelWithLMHead(ReformerConfig(**{**options, **more})).double().train()
    for parameter in net.parameters():
        parameter.data = torch.tensor(normal(*parameter.shape))
    net.lm_head.bias.data *= 0.0  # this version of transformers does not add it
    ids = _rng.integers(0, 11, (2, 12))
    logits = net(torch.tensor(ids)).logits
    (logits * torch.tensor(wave(logits.shape))).sum().backward()
    for name, parameter in net.named_parameters():
        arrays[f"model.state.{name}"] = parameter.detach().numpy()
        if parameter.grad is not None:
            arrays[f"model.grad.{name}"] = parameter.grad.numpy()
    arrays |= {"model.ids": ids, "model.logits": logits.detach().numpy()}
    return options


def main() -> None:
    import torch
    from safetensors.numpy import save_file

    torch.set_default_dtype(torch.float64)
    arrays: dict[str, Any] = {}
    attend(arrays)
    hashes(arrays)
    options = model(arrays)
    one_bucket(arrays)
    path = Path(__file__).with_name("attention_lsh.safetensors")
    names = ("torch", "transformers", "reformer-pytorch", "numpy")
    metadata = {name: version(name) for name in names}
    metadata |= {"cases": json.dumps(CASES), "chunk": str(CHUNK), "options": json.dumps(options)}
    save_file({k: np.ascontiguousarray(a) for k, a in arrays.items()}, path, metadata)


if __name__ == "__main__":
    main()
