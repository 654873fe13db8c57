"""Initialisations of whole models: which weights get which law, and why the depth enters.

Each function takes the weights by their role, in lists, and fills them in place; what they share
is in ``nn.init``.  N is a number of layers (a Transformer's has two branches), L one of branches.

==================================================================  ============================
Devlin et al. 2018, arXiv:1810.04805 (the released code)            ``bert_``
Radford et al. 2019, GPT-2, §2.3: branches' ends / √(2N)            ``gpt2_``
Raffel et al. 2019, arXiv:1910.10683 (Mesh TensorFlow's code)       ``t5_stds, t5_``
Wang et al. 2022, DeepNet, arXiv:2203.00555, fig. 2                 ``deepnorm_constants,
                                                                    deepnorm_``
Wang et al. 2022, Sub-LN, arXiv:2210.06423, fig. 2                  ``sub_ln_gain, sub_ln_``
Su 2022, kexue.fm/archives/8978                                     ``optimizer_residual_constants``
Zhang, Dauphin, Ma 2019, Fixup, arXiv:1901.09321, §3                ``fixup_``
Huang et al. 2020, T-Fixup (ICML), §3.2                             ``t_fixup_``
Liu et al. 2020, Admin, arXiv:2004.08249, §4.3                      ``admin_``
Mishkin & Matas 2015, LSUV, arXiv:1511.06422, alg. 1                ``lsuv_``
Zhao, Schäfer, Anandkumar 2021, ZerO, arXiv:2110.12661, algs. 1, 2  ``zero_``
==================================================================  ============================

The roles in a ``models.gpt.GPT``, whose queries, keys and values are the thirds of one weight of
layout (in, out); slices are views, so they are filled in place too::

    ends = [w for b in gpt.transformer.h for w in (b.attn.c_proj.weight, b.mlp.c_proj.weight)]
    d = gpt.config.n_embd
    joint = [b.attn.c_attn.weight.data for b in gpt.transformer.h]
    queries_keys = [w[:, i : i + d] for w in joint for i in (0, d)]
    values = [w[:, 2 * d :] for w in joint]
    first = [b.mlp.c_fc.weight for b in gpt.transformer.h]
    alpha, beta = deepnorm_constants(decoder=gpt.config.n_layer)
    deepnorm_(values + ends + first, queries_keys, beta=beta)

Deviations:

* ZerO's Hadamard matrix is scaled by 2^(−m/2), as in the authors' code, so that W has orthonormal
  columns where sizes are powers of two; the paper prints 2^(−(m−1)/2).
* Admin counts the input as the branch f₀ of variance 1, so ω₁ = 1, and measures each branch behind
  those that are set already, both as in the authors' code.
* LSUV divides once: with biases at 0 a layer is linear in its weight, so its output then has
  variance 1 exactly, and the paper's loop would stop after one turn.
* Fixup's scalar biases and multipliers, the constants α and Admin's ω belong to ways of wrapping a
  branch; here are weights only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ..backend import Array, of
from ..engine import data_of
from ..rng import Rng
from ..tape import no_grad
from .init import (
    constant_,
    eye_,
    kaiming_normal_,
    normal_,
    orthogonal_,
    trunc_normal_,
    xavier_normal_,
    xavier_uniform_,
    zeros_,
)

Weights = Iterable[Any]
"""Parameters, Tensors or arrays, each filled in place."""

__all__ = [
    "admin_", "bert_", "deepnorm_", "deepnorm_constants", "fixup_", "gpt2_", "lsuv_",
    "optimizer_residual_constants", "sub_ln_", "sub_ln_gain", "t5_", "t5_stds", "t_fixup_", "zero_",
]  # fmt: skip


# A standard deviation for each role


def bert_(
    weights: Weights,
    biases: Weights = (),
    std: float = 0.02,
    *,
    corrected: bool = False,
    rng: Rng | None = None,
) -> None:
    """Every weight and embedding from a normal of ``std`` truncated at two of its deviations.

    The released weights come from TensorFlow's sampler: 0.02 there has a true standard deviation of
    0.0175925, less than half of LeCun's 1/√768 = 0.0361.  ``corrected`` gives the result ``std``.
    """
    for weight in weights:
        trunc_normal_(weight, 0.0, std, corrected=corrected, rng=rng)
    for bias in biases:
        zeros_(bias)


def gpt2_(
    weights: Weights,
    residual: Weights,
    biases: Weights = (),
    std: float = 0.02,
    *,
    layers: int,
    rng: Rng | None = None,
) -> None:
    """N(0, std²), and N(0, std² / 2N) for the last weights of the 2N branches.

    The stream then carries one branch's variance after all of them instead of 2N.

    Args:
        weights: embeddings and all weights that do not end a branch.
        residual: the output projections of attention and of the MLP.
        biases: become 0.
        std: 0.02 for every width.
        layers: N.

    Raises:
        ValueError: ``layers`` is below 1.
    """
    _positive(layers=layers)
    for weight in weights:
        normal_(weight, 0.0, std, rng=rng)
    for weight in residual:
        normal_(weight, 0.0, std / math.sqrt(2.0 * layers), rng=rng)
    for bias in biases:
        zeros_(bias)


def t5_stds(
    d_model: int, d_kv: int, heads: int, d_ff: int, allocation: str = "query"
) -> dict[str, float]:
    """Standard deviations that put attention's 1/√d_kv into the weights.

    For inputs of mean square 1 a query and a key so drawn have E (q · k)² = 1: no scale is needed.

    Args:
        d_model, d_kv, heads, d_ff: the widths of the stream, of a head, their number, the MLP's.
        allocation: ``query`` divides Var(W_q) by d_kv, as the released models do; ``both`` divides
            those of W_q and W_k by √d_kv each, the reading of kexue.fm/archives/8620.

    Returns:
        By role: q, k, v, o, wi, wo, embedding, and the table of ``relative`` positions.

    Raises:
        ValueError: a size below 1, or another ``allocation``.
    """
    _positive(d_model=d_model, d_kv=d_kv, heads=heads, d_ff=d_ff)
    powers = {"query": (-0.5, 0.0), "both": (-0.25, -0.25)}
    if allocation not in powers:
        raise ValueError(f"allocation is 'query' or 'both', got {allocation!r}")
    stream = d_model**-0.5
    q, k = (stream * d_kv**power for power in powers[allocation])
    o, wo = (heads * d_kv) ** -0.5, d_ff**-0.5
    return {"q": q, "k": k, "v": stream, "o": o, "wi": stream, "wo": wo} | {
        "embedding": 1.0,
        "relative": stream,
    }


def t5_(
    roles: Mapping[str, Weights],
    stds: Mapping[str, float],
    factor: float = 1.0,
    *,
    rng: Rng | None = None,
) -> None:
    """Normal weights by role; T5 has no biases.

    Args:
        roles: lists of weights under the names of ``t5_stds``; any may be left out.
        stds: from ``t5_stds``.
        factor: multiplies every standard deviation.

    Raises:
        ValueError: a role without a standard deviation.
    """
    unknown = sorted(set(roles) - set(stds))
    if unknown:
        raise ValueError(f"no standard deviation for {unknown}: the roles are {', '.join(stds)}")
    for role, weights in roles.items():
        for weight in weights:
            normal_(weight, 0.0, factor * stds[role], rng=rng)


# Gains that depend on the depth


def deepnorm_constants(
    encoder: int = 0, decoder: int = 0, part: str | None = None
) -> tuple[float, float]:
    """DeepNet's α of x ← LN(α x + F(x)) and β, the gain of F's weights.

    ==========================  =====================  =====================
    model, part                 α                      β
    ==========================  =====================  =====================
    N layers of one kind only   (2N)^(1/4)             (8N)^(−1/4)
    encoder of N and M          0.81 (N⁴M)^(1/16)      0.87 (N⁴M)^(−1/16)
    decoder of N and M          (3M)^(1/4)             (12M)^(−1/4)
    ==========================  =====================  =====================

    Args:
        encoder, decoder: N and M, the numbers of layers; 0 for a model without that part.
        part: ``encoder`` or ``decoder``, for a model that has both.

    Returns:
        α, β.

    Raises:
        ValueError: no layers, or both parts and no ``part``.
    """
    part = _part(encoder, decoder, part)
    if not (encoder and decoder):
        n = encoder or decoder
        return (2.0 * n) ** 0.25, (8.0 * n) ** -0.25
    if part == "encoder":
        depth = (float(encoder) ** 4 * decoder) ** 0.0625
        return 0.81 * depth, 0.87 / depth
    return (3.0 * decoder) ** 0.25, (12.0 * decoder) ** -0.25


def deepnorm_(scaled: Weights, plain: Weights = (), *, beta: float, rng: Rng | None = None) -> None:
    """Xavier normal weights, with gain β where the size of the update matters.

    Args:
        scaled: the MLP's weights, the value and output projections.
        plain: query and key projections, which only reweight, at gain 1.
        beta: from ``deepnorm_constants``.
    """
    for weights, gain in ((scaled, beta), (plain, 1.0)):
        for weight in weights:
            xavier_normal_(weight, gain, rng=rng)


def sub_ln_gain(encoder: int = 0, decoder: int = 0, part: str | None = None) -> float:
    """The gain that Sub-LN's weights may have, because a second norm in the branch bounds it.

    √log 2N for N layers of one kind; with both, √(log 3M · log 2N / 3) in the encoder and √log 3M
    in the decoder.

    Args:
        encoder, decoder, part: as for ``deepnorm_constants``.

    Raises:
        ValueError: no layers, or both parts and no ``part``.
    """
    part = _part(encoder, decoder, part)
    if not (encoder and decoder):
        return math.sqrt(math.log(2.0 * (encoder or decoder)))
    if part == "encoder":
        return math.sqrt(math.log(3.0 * decoder) * math.log(2.0 * encoder) / 3.0)
    return math.sqrt(math.log(3.0 * decoder))


def sub_ln_(scaled: Weights, plain: Weights = (), *, gain: float, rng: Rng | None = None) -> None:
    """As ``deepnorm_`` with a gain from ``sub_ln_gain``, above 1 where β is below.

    Args:
        scaled: the MLP's weights, the value and output projections of self-attention.
        plain: query and key projections, and all of a decoder's cross-attention.
        gain: from ``sub_ln_gain``.
    """
    deepnorm_(scaled, plain, beta=gain, rng=rng)


def t_fixup_(
    scaled: Weights,
    plain: Weights = (),
    embeddings: Weights = (),
    *,
    layers: int,
    part: str = "decoder",
    rng: Rng | None = None,
) -> None:
    """Xavier uniform weights, shrunk so that a Transformer trains without norms and warm-up.

    The factor is 0.67 N^(−1/4) in an encoder and (9N)^(−1/4) in a decoder; the authors' code gives
    values √2 on top because fairseq draws them with gain 1/√2, so both draw the same.

    Args:
        scaled: the MLP's weights, the value and output projections, of this part.
        plain: query and key projections, at factor 1.
        embeddings: N(0, 1/d) with d their last axis, times (9N)^(−1/4) in either part.
        layers: N, of this part.
        part: ``encoder`` or ``decoder``.

    Raises:
        ValueError: ``layers`` is below 1, or another ``part``.
    """
    _positive(layers=layers)
    factors = {"encoder": 0.67 * layers**-0.25, "decoder": (9.0 * layers) ** -0.25}
    if part not in factors:
        raise ValueError(f"part is 'encoder' or 'decoder', got {part!r}")
    for weights, factor in ((scaled, factors[part]), (plain, 1.0)):
        for weight in weights:
            xavier_uniform_(weight, factor, rng=rng)
    for table in embeddings:
        normal_(table, 0.0, factors["decoder"] * table.shape[-1] ** -0.5, rng=rng)


def optimizer_residual_constants(optimizer: str, layers: int) -> tuple[float, float]:
    """α of x ← LN(α x + F(x)) and λ, the gain of F's weights, for an update free of the depth.

    A step lowers the loss by η‖∂L/∂θ‖² with SGD, η‖∂L/∂θ‖₁ with Adam, η‖θ‖ ‖∂L/∂θ‖ with LAMB.  With
    ∂L/∂θ ∼ λ/α and ‖θ‖ ∼ λ, the 2N branches together make it 2N (λ/α)², 2N λ/α, 2N λ²/α times a
    constant; each choice makes that 1.

    Args:
        optimizer: ``sgd``, ``adam`` or ``lamb``.
        layers: N.

    Returns:
        α, λ.

    Raises:
        ValueError: another optimiser, or ``layers`` below 1.
    """
    _positive(layers=layers)
    powers = {"sgd": (0.25, -0.25), "adam": (0.5, -0.5), "lamb": (0.0, -0.5)}
    if optimizer not in powers:
        raise ValueError(f"optimizer is one of {', '.join(powers)}, got {optimizer!r}")
    alpha, gain = powers[optimizer]
    return (2.0 * layers) ** alpha, (2.0 * layers) ** gain


# Branches that start at zero


def fixup_(
    branches: Sequence[Sequence[Any]],
    head: Weights = (),
    *,
    mode: str = "fan_in",
    rng: Rng | None = None,
) -> None:
    """He's weights times L^(−1/(2m−2)) in a branch of m layers, whose last is 0; a head of 0.

    Every residual block starts as the identity, and the first steps change the output by Θ(η)
    whatever L is.

    Args:
        branches: for each of the L branches its m weights in order; a single one becomes 0.
        head: the classifier's weight and bias.
        mode: the fan of He's law; the authors' networks have ``fan_out``.

    Raises:
        ValueError: a branch without weights.
    """
    if not all(len(branch) for branch in branches):
        raise ValueError("every branch has at least one weight, got an empty one")
    for *inner, last in branches:
        for weight in inner:
            kaiming_normal_(weight, mode=mode, nonlinearity="relu", rng=rng)
            data_of(weight)[...] *= len(branches) ** (-0.5 / len(inner))
        zeros_(last)
    for weight in head:
        zeros_(weight)


def zero_(tensor: Any) -> Any:
    """ZerO: the identity, or where outputs outnumber inputs, a part of a Hadamard matrix.

    W = I for out ≤ in (with zero rows or columns missing), else the first out × in entries of
    2^(−m/2) H_m with m = ⌈log₂ out⌉, H_0 = 1 and H_m = [[H, H], [H, −H]]: an identity there would
    leave the extra channels at 0 and the rank at that of the input.  No random number is drawn.

    Args:
        tensor: (out, in), or (out, in, *kernel), whose middle gets the matrix.

    Raises:
        ValueError: fewer than two axes.
    """
    data, xp = data_of(tensor), of(data_of(tensor))
    if data.ndim < 2:
        raise ValueError(f"zero_ takes (out, in, *kernel), got shape {data.shape}")
    outputs, inputs = data.shape[:2]
    matrix = eye_(xp.empty((outputs, inputs), data.dtype))
    if outputs > inputs:
        size = (outputs - 1).bit_length()
        hadamard = xp.full((1, 1), 2.0 ** (-size / 2.0), data.dtype)
        for _ in range(size):
            hadamard = xp.concatenate(
                [xp.concatenate([hadamard, hadamard], 1), xp.concatenate([hadamard, -hadamard], 1)]
            )
        matrix = hadamard[:outputs, :inputs]
    zeros_(tensor)
    data[(slice(None), slice(None), *(length // 2 for length in data.shape[2:]))] = matrix
    return tensor


# Weights that look at data


def admin_(
    branches: Sequence[Callable[[Array], Any]],
    norms: Sequence[Callable[[Array], Any]],
    omegas: Sequence[Any],
    x: Array,
) -> None:
    """Set ω of x ← norm(ω x + f(x)) so that post-norm starts with the weights of pre-norm.

    ω_i² = 1 + Σ_{j<i} Var f_j: each branch's output then keeps its part of the stream, where plain
    post-norm halves what is older at every layer.

    Args:
        branches: f_1 … f_L in order.
        norms: the norm behind each.
        omegas: for each a vector or scalar, filled with its ω_i.
        x: a batch of the stream before the first branch, of variance 1.

    Raises:
        ValueError: the three lists differ in length.
    """
    total = 1.0
    with no_grad():
        for branch, norm, omega in zip(branches, norms, omegas, strict=True):
            constant_(omega, total**0.5)
            change = data_of(branch(x))
            x = data_of(norm(total**0.5 * x + change))
            total = total + change.var()


def lsuv_(layers: Sequence[Any], x: Array, *, rng: Rng | None = None) -> None:
    """Orthogonal weights, each then divided by the standard deviation of its layer's output.

    Args:
        layers: Modules in the order in which ``x`` passes through them; those with a ``weight`` of
            two or more axes are set, and their ``bias`` to 0.
        x: a batch of inputs.
        rng: for the orthogonal matrices.

    A layer whose output is constant over the batch keeps its orthogonal weight.
    """
    with no_grad():
        for layer in layers:
            weight = getattr(layer, "weight", None)
            if weight is not None and weight.ndim > 1:
                orthogonal_(weight, rng=rng)
                if getattr(layer, "bias", None) is not None:
                    zeros_(layer.bias)
                spread = data_of(layer(x)).std()
                weight.data[...] = weight.data / of(spread).where(spread > 0.0, spread, 1.0)
            x = data_of(layer(x))


def _positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} is at least 1, got {size}")


def _part(encoder: int, decoder: int, part: str | None) -> str | None:
    if min(encoder, decoder) < 0 or encoder + decoder < 1:
        raise ValueError(
            f"a model has layers in an encoder, a decoder or both, got {encoder} and {decoder}"
        )
    if part not in (None, "encoder", "decoder") or (encoder and decoder and part is None):
        raise ValueError(
            f"part is 'encoder' or 'decoder' in a model of {encoder} and {decoder} layers, got "
            f"{part!r}"
        )
    return part
