"""GPT-2: a decoder-only Transformer whose weights are those of the released checkpoints.

Radford, Wu, Child, Luan, Amodei, Sutskever 2019, "Language Models are Unsupervised Multitask
Learners", §2.3; the block is that of Radford et al. 2018 with the norms moved to the branches'
inputs.  Names and layouts follow Hugging Face's ``GPT2LMHeadModel``.

======================================  =====================================================
x₀ = E[ids] + P[0 … t−1]                ``Transformer``: wte, wpe
x ← x + A(LN₁(x))                       ``Block``, ``CausalSelfAttention``, ``pre_norm``
x ← x + W₂ gelu(W₁ LN₂(x))              ``gpt_layers.MLP``
logits = LN_f(x) Eᵀ                     ``gpt_layers.Unembedding``, tied to E
N(0, 0.02), branches' ends / √(2N)      the layers' constructors, N = n_layer
======================================  =====================================================

Deviations: dropout rates are 0 by default (GPT-2 trained with 0.1); biases and gains start at 0 and
1, on which the paper is silent; the vocabulary is that of bytes by default.
"""

from __future__ import annotations

import inspect
import json
import math
import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, Self

from mini_nn import Rng, Tensor, backend, io, nn, ops
from mini_nn.backend import Array
from mini_nn.engine import data_of
from mini_nn.nn import Module, Parameter
from mini_nn.nn.heads import split_heads
from mini_nn.nn.residual import Residual, pre_norm

from .generation import GenerationMixin, KVCache, LayerCache, as_ids, at_home, on_arrays
from .gpt_config import ACTIVATIONS, SIZES, SUPPORTED, GPTConfig, gelu_new
from .gpt_layers import MLP, Conv1D, DroppedAttention, Unembedding

__all__ = [
    "ACTIVATIONS", "GPT", "MLP", "SIZES", "SUPPORTED", "Attention", "Block", "CausalSelfAttention",
    "Conv1D", "DroppedAttention", "GPTConfig", "Transformer", "Unembedding", "gelu_new",
    "split_heads", "visible",
]  # fmt: skip

Attention = Callable[..., Any]
"""``attention(query, key, value, is_causal=…)`` or ``attn_mask=…``: see ``CausalSelfAttention``."""


class CausalSelfAttention(Module):
    """Multi-head attention in which a token sees itself and those before it.

    Args:
        config: the model's.
        rng: for the initial weights and dropout.
        attention: what maps queries, keys and values (b, h, t, d) to (b, h, t, d); None for softmax
            attention.  Given ``is_causal=True`` it hides the future itself; ``attn_mask``
            (booleans, true where a query may look) comes instead where there are pads, or a cache
            and several new tokens.
    """

    def __init__(self, config: GPTConfig, rng: Rng, attention: Attention | None = None) -> None:
        d, std = config.n_embd, config.initializer_range
        self.heads = config.n_head
        self.c_attn = Conv1D(d, 3 * d, std, rng)
        self.c_proj = Conv1D(d, d, std / math.sqrt(2 * config.n_layer), rng)
        if attention is None and config.attn_pdrop:
            attention = DroppedAttention(config.attn_pdrop, rng)
        self.attention = attention or ops.scaled_dot_product_attention
        self.resid_dropout = nn.Dropout(config.resid_pdrop, rng=rng)

    def forward(self, x: Any, mask: Any = None, cache: LayerCache | None = None) -> Any:
        """(b, t, d) to (b, t, d); ``mask`` None means that everything earlier may be seen.

        Raises:
            ValueError: there is a mask, and the attention takes none.
        """
        b, t, d = x.shape
        query, key, value = split_heads(self.c_attn(x), self.heads)
        if cache is not None:
            key, value = cache.append(key, value)
        if mask is None:
            y = self.attention(query, key, value, is_causal=t > 1)
        else:
            try:
                y = self.attention(query, key, value, attn_mask=mask)
            except TypeError as error:
                if _takes_mask(self.attention):
                    raise
                raise ValueError(
                    "this attention takes no attn_mask, which pads need (pass texts of one length) "
                    "and several tokens after a cache (pass one token at a time)"
                ) from error
        return self.resid_dropout(self.c_proj(y.swapaxes(1, 2).reshape(b, t, d)))


def _takes_mask(attention: Attention) -> bool:
    """Whether it has an argument ``attn_mask``."""
    function = attention.forward if isinstance(attention, Module) else attention
    parameters = inspect.signature(function).parameters.values()
    return any(p.name == "attn_mask" or p.kind is p.VAR_KEYWORD for p in parameters)


class Block(Module):
    """Attention and an MLP, each a branch beside the residual stream.

    Args:
        config: the model's.
        rng: for the initial weights and dropout.
        attention: see ``CausalSelfAttention``.
        mlp: a Module (b, t, d) → (b, t, d) in place of ``MLP``.
        residuals: how the two branches are wrapped, see ``mini_nn.nn.residual``; a wrapper with
            parameters is a Module of its own for each branch.
        norm: makes the norm of a branch; None for ``LayerNorm``.  For wrappers that use none,
            ``nn.Identity`` leaves out its parameters.
        attn: a Module (x, mask, cache) → (b, t, d) in place of ``CausalSelfAttention``.
    """

    def __init__(
        self,
        config: GPTConfig,
        rng: Rng,
        attention: Attention | None = None,
        mlp: Module | None = None,
        residuals: tuple[Residual, Residual] = (pre_norm, pre_norm),
        norm: Callable[[], Module] | None = None,
        attn: Module | None = None,
    ) -> None:
        norm = norm or partial(nn.LayerNorm, config.n_embd, config.layer_norm_epsilon)
        self.ln_1 = norm()
        self.attn = attn or CausalSelfAttention(config, rng, attention)
        self.ln_2 = norm()
        self.mlp = mlp or MLP(config, rng)
        self.attn_residual, self.mlp_residual = residuals

    def forward(self, x: Any, mask: Any = None, cache: LayerCache | None = None) -> Any:
        """(b, t, d) to (b, t, d)."""
        x = self.attn_residual(x, self.ln_1, self.attn, mask, cache)
        return self.mlp_residual(x, self.ln_2, self.mlp)


class Transformer(Module):
    """Embeddings, blocks and the last norm: token numbers in, hidden states out."""

    def __init__(
        self,
        config: GPTConfig,
        rng: Rng,
        blocks: Iterable[Module] | None,
        norm: Callable[[], Module] | None = None,
    ) -> None:
        std = config.initializer_range
        self.wte = nn.Embedding(config.vocab_size, config.n_embd, rng=rng)  # draws from N(0, 1)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd, rng=rng)
        for table in (self.wte, self.wpe):
            table.weight.data *= std
        self.drop = nn.Dropout(config.embd_pdrop, rng=rng)
        if blocks is None:
            blocks = [Block(config, rng) for _ in range(config.n_layer)]
        self.h = nn.ModuleList(blocks)
        self.ln_f = norm() if norm else nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)

    def forward(
        self,
        ids: Array,
        attention_mask: Any = None,
        cache: KVCache | None = None,
        positions: Any = None,
        mask: Any = None,
    ) -> Any:
        """(b, t) integers to (b, t, d); the arguments are those of ``GPT.forward``."""
        x, mask = self.embed(ids, attention_mask, cache, positions, mask)
        layers = [None] * len(self.h) if cache is None else cache.layers
        for block, layer in zip(self.h, layers, strict=True):
            x = block(x, mask, layer)
        return self.ln_f(x)

    def embed(
        self,
        ids: Array,
        attention_mask: Any = None,
        cache: KVCache | None = None,
        positions: Any = None,
        mask: Any = None,
    ) -> tuple[Any, Any]:
        """What the first block gets, (b, t, d), and the mask of all blocks; see ``visible``.

        The cache is told of the new tokens, so its layers have to be given them next.
        """
        batch, count = ids.shape
        start = 0 if cache is None else cache.length
        stop, longest = start + count, self.wpe.weight.shape[0]
        if positions is None and stop > longest:
            raise ValueError(
                f"{stop} tokens do not fit into the {longest} positions of this model: pass only "
                f"the last {longest}"
            )
        if attention_mask is not None:  # a pad may be a number outside the vocabulary
            ids = ops.where(attention_mask, ids, 0)
        real = attention_mask if cache is None else cache.note(attention_mask, batch, count)
        if positions is not None:
            places = self.wpe(positions)
        elif real is None:
            places = self.wpe.weight[start:stop]
        else:  # pads do not count; that of a pad itself is never looked at
            seen = real.astype("int64").cumsum(axis=1)[:, start:]
            places = self.wpe(ops.maximum(seen - 1, 0))
        x = self.drop(self.wte(ids) + places)
        return x, visible(ids, start, real, mask)


def visible(ids: Array, start: int, real: Array | None, mask: Array | None = None) -> Array | None:
    """Which keys (b or nothing, 1 or nothing, t, start + t) each new token may look at.

    None says all that are earlier, where attention can do that by itself: no pads, and the first
    token is the first of all or the only new one.  ``mask``, (t, start + t) or (b, t, start + t),
    is looked at instead of the order of the tokens.
    """
    count = ids.shape[1]
    if mask is not None:
        if mask.ndim not in (2, 3) or mask.shape[-2:] != (count, start + count):
            raise ValueError(
                f"mask says for {count} new tokens which of all {start + count} each may look at, "
                f"({count}, {start + count}) or (b, {count}, {start + count}), got {mask.shape}"
            )
        allowed = mask if mask.ndim == 2 else mask[:, None]
    elif real is None and (start == 0 or count == 1):
        return None
    else:
        places = backend.of(ids).arange(start + count)
        allowed = places[start:, None] >= places
    return allowed if real is None else allowed & real[:, None, None, :]


class GPT(GenerationMixin, Module):
    """A language model over tokens: GPT-2, or with other blocks whatever they make of it.

    Args:
        config: sizes and options.
        rng: for the initial weights and dropout; None for ``Rng(0)``.
        blocks: ``config.n_layer`` Modules ``block(x, mask, cache)`` in place of GPT-2's, such as
            ``[Block(config, rng, attention=…) for _ in range(config.n_layer)]``.
        norm: makes the norm before the logits; None for ``LayerNorm``, ``nn.Identity`` for none.

    Raises:
        ValueError: the number of blocks is not ``config.n_layer``.
    """

    def __init__(
        self,
        config: GPTConfig,
        rng: Rng | None = None,
        blocks: Iterable[Module] | None = None,
        norm: Callable[[], Module] | None = None,
    ) -> None:
        rng = Rng(0) if rng is None else rng
        self.config = config
        self.transformer = Transformer(config, rng, blocks, norm)
        if len(self.transformer.h) != config.n_layer:
            raise ValueError(
                f"config.n_layer is {config.n_layer}, got {len(self.transformer.h)} blocks"
            )
        table = self.transformer.wte.weight
        if not config.tie_word_embeddings:
            table = Parameter(rng.normal(table.shape, std=config.initializer_range))
        self.lm_head = Unembedding(table)

    def forward(
        self,
        ids: Any,
        attention_mask: Any = None,
        cache: KVCache | None = None,
        positions: Any = None,
        mask: Any = None,
    ) -> Any:
        """The logits of the token after each of ``ids``.

        Args:
            ids: (b, t) integers in [0, vocab_size): an array, a Tensor or lists.
            attention_mask: (b, t), 0 or False where a token is a pad: any number, which has no
                position and is not looked at.  What comes out there means nothing.
            cache: from ``new_cache``; ``ids`` then continue what it holds, and are added to it.
                The result then has no history, and dropout is off.
            positions: (t,) or (b, t) integers in place of 0 … t − 1, or of what continues the
                cache: those of a tree's nodes, of which several may have the same.
            mask: (t, s + t) or (b, t, s + t), with s tokens in the cache: what each of ``ids`` may
                look at, in place of all that is earlier: a tree's ancestors.

        Returns:
            (b, t, vocab_size).

        Raises:
            TypeError: ``ids`` are not integers.
            IndexError: a token, or one of ``positions``, is out of range (on a GPU: nan instead).
            ValueError: the shapes do not fit, or the context is longer than ``n_positions``.
        """
        numbers = as_ids(ids, data_of(self.transformer.wte.weight))
        if attention_mask is not None:
            attention_mask = at_home(attention_mask, numbers) != 0
            if attention_mask.shape != numbers.shape:
                raise ValueError(
                    f"attention_mask has the shape of ids, {numbers.shape}, got "
                    f"{attention_mask.shape}"
                )
        if positions is not None:
            positions = at_home(positions, numbers)
        if mask is not None:
            mask = at_home(mask, numbers) != 0
        if cache is None:
            return self.lm_head(self.transformer(numbers, attention_mask, None, positions, mask))
        view = on_arrays(self)
        hidden = view.transformer(numbers, attention_mask, cache, positions, mask)
        return Tensor(view.lm_head(hidden))

    def next_logits(self, ids: Array, attention_mask: Any, cache: KVCache | None) -> Any:
        """The logits (b, vocab_size) after the last of ``ids`` only, checked by the caller."""
        return self.lm_head(self.transformer(ids, attention_mask, cache)[:, -1])

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: Any = "float32") -> Self:
        """A GPT-2 checkpoint as Hugging Face writes it: config.json and model.safetensors.

        Weights may be in several files with an index, and may lack the prefix ``transformer.`` and
        carry the masks of attention as buffers, as in the first release.  The model is in
        evaluation mode.

        Raises:
            FileNotFoundError: one of the files is not there.
            ValueError: an option that is not supported; missing, unexpected and mis-shaped weights
                by name; an output layer that should be tied and is not the embedding.
        """
        folder = Path(folder)
        config = GPTConfig.from_dict(json.loads((folder / "config.json").read_text("utf-8")))
        state: dict[str, Any] = {}
        for name, value in _read_weights(folder).items():
            if not name.endswith((".attn.bias", ".attn.masked_bias")):
                inside = name.startswith(("transformer.", "lm_head."))
                state[name if inside else f"transformer.{name}"] = value
        table, head = "transformer.wte.weight", "lm_head.weight"
        if config.tie_word_embeddings and table in state:
            shared = state[table]
            own = state.setdefault(head, shared)
            if own is not shared and (own.shape != shared.shape or bool((own != shared).any())):
                raise ValueError(
                    f"the config ties {head} to {table}, but they differ in {folder}: set "
                    "tie_word_embeddings to false in config.json"
                )
        model = cls(config, _Blank(0)).astype(dtype)
        model.load_state_dict(state)
        return model.eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors, which Hugging Face and ``from_pretrained`` read.

        Each file replaces its predecessor in one step, the config last, so a reader never sees half
        of one.  A tied output layer is not stored twice.

        Raises:
            OSError: the folder cannot be written to.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = self.state_dict()
        if self.config.tie_word_embeddings:
            del state["lm_head.weight"]
        io.save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        _replace(folder / "config.json", json.dumps(self.config.to_dict(), indent=2) + "\n")


class _Blank(Rng):
    """Zeros instead of random numbers, for weights that are about to be loaded."""

    def normal(
        self, shape: Any = (), mean: float = 0.0, std: float = 1.0, dtype: Any = "float32"
    ) -> Any:
        return backend.current().xp.zeros(shape, dtype)


def _replace(path: Path, text: str) -> None:
    """Write a file so that its name leads to the old text or to all of the new one."""
    aside = path.with_name(f".{path.name}.tmp")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def _read_weights(folder: Path) -> dict[str, Array]:
    """All arrays of model.safetensors, or of the files that its index lists."""
    index = folder / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if not (folder / files[0]).exists() and index.exists():
        files = sorted({*json.loads(index.read_text("utf-8"))["weight_map"].values()})
    weights: dict[str, Array] = {}
    for file in files:
        weights |= io.load_file(folder / file)
    return weights
