"""Autoregressive generation: sampling, the cache of keys and values, the loop.

The filters of logits are those of ``mini_nn.decoding.processors``; names, order and meaning are
those of Hugging Face's ``generate``; temperature 0 is greedy decoding.

A model can be generated from if it has ``config.n_positions``, ``config.eos_token_id``,
``new_cache(capacity)`` and ``next_logits(ids, attention_mask, cache)``; ``GenerationMixin`` adds
the rest.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, TypeVar

from mini_nn import Rng, Tensor, backend, default_rng
from mini_nn.backend import Array
from mini_nn.decoding.processors import (  # noqa: F401 - the filters, under the name they had
    Warper,
    filter_logits,
    min_p_filter,
    top_k_filter,
    top_p_filter,
)
from mini_nn.engine import data_of
from mini_nn.nn import Module

M = TypeVar("M", bound=Module)


def sample(logits: Array, rng: Rng) -> Array:
    """One token for each row of (…, V) by the law softmax(logits): integers of shape (…).

    By the Gumbel-max trick (Gumbel 1954), in which a logit of −inf is never drawn.
    """
    return (logits + rng.gumbel(logits.shape, dtype=logits.dtype)).argmax(axis=-1)


# The cache


class LayerCache:
    """The keys and values of one layer, in arrays that are allocated once.

    The first ``append`` decides batch, heads, sizes, dtype and backend.

    Args:
        capacity: how many positions fit.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self.keys: Array = None
        self.values: Array = None

    def place(self, count: int) -> tuple[int, int]:
        """Where the next ``count`` positions start and stop; ValueError if they do not fit in."""
        stop = self.length + count
        if stop > self.capacity:
            raise ValueError(
                f"a cache of capacity {self.capacity} cannot hold {stop} positions: make a larger "
                "one or truncate it"
            )
        return self.length, stop

    def append(self, key: Array, value: Array) -> tuple[Array, Array]:
        """Add keys (b, h, t, d) and values (b, h, t, e); all there are by now come back, as views.

        Raises:
            ValueError: they do not fit in, or are not like those of the first call.
        """
        start, stop = self.place(key.shape[2])
        if self.keys is None:
            self.keys, self.values = (
                backend.of(x).empty((*x.shape[:2], self.capacity, x.shape[3]), x.dtype)
                for x in (key, value)
            )
        if key.shape[:2] != self.keys.shape[:2] or key.dtype != self.keys.dtype:
            raise ValueError(
                f"this cache holds keys of {self.keys.shape[:2]} rows and heads in "
                f"{self.keys.dtype}, got {key.shape[:2]} in {key.dtype}: make a new cache for "
                "another batch"
            )
        self.keys[:, :, start:stop] = key
        self.values[:, :, start:stop] = value
        self.length = stop
        return self.keys[:, :, :stop], self.values[:, :, :stop]

    def gather(self, positions: Array, start: int) -> None:
        """Put what is at ``positions``, (n,) or (b, n), to ``start`` and the places after it."""
        self.length = start + positions.shape[-1]
        for x in (self.keys, self.values):
            if positions.ndim == 1:
                x[:, :, start : self.length] = x[:, :, positions]
            else:
                taken = backend.of(x).take_along_axis(x, positions[:, None, :, None], axis=2)
                x[:, :, start : self.length] = taken

    def copy(self, capacity: int, rows: Array = None) -> LayerCache:
        """Another one with this capacity, of the same positions; of these rows of the batch."""
        made = LayerCache(capacity)
        made.length = self.length
        if self.keys is not None:
            made.keys, made.values = (
                _copy(x, capacity, self.length, 2, rows) for x in (self.keys, self.values)
            )
        return made


class KVCache:
    """What attention has seen so far: a ``LayerCache`` for each layer, and which tokens were pads.

    It is written in place and outside the tape, so it belongs to inference only.  Layers have
    lengths of their own, since a forward pass that stops early fills only the first ones.

    Args:
        n_layer: the number of layers.
        capacity: how many positions fit.
    """

    def __init__(self, n_layer: int, capacity: int) -> None:
        self.layers = [LayerCache(capacity) for _ in range(n_layer)]
        self.real: Array = None  # (b, capacity) booleans; None as long as there has been no pad

    @property
    def length(self) -> int:
        """How many positions the first layer holds."""
        return self.layers[0].length

    def truncate(self, length: int) -> None:
        """Forget all positions from ``length`` on, in each layer that has them."""
        for layer in self.layers:
            layer.length = min(layer.length, length)

    def select(self, positions: Sequence[int] | Sequence[Sequence[int]]) -> None:
        """Keep these positions only, in this order: a tree's accepted path, a row without its gaps.

        A layer that holds fewer positions keeps those of them that it has.

        Args:
            positions: (n,) host integers, increasing, for all rows; or (b, n) integers, for each
                row its own, where each layer holds all of them.

        Raises:
            ValueError: there is no such position, or they do not increase.
        """
        if len(positions) and isinstance(positions[0], Sequence):
            self._select_by_row(positions)  # type: ignore[arg-type]
            return
        kept: list[int] = [*positions]
        rising = all(a < b for a, b in pairwise(kept))
        if kept and not (rising and kept[0] >= 0 and kept[-1] < self.length):
            raise ValueError(
                f"select takes increasing positions from 0 to {self.length - 1}, got {kept}"
            )
        # what stays where it is is not moved: all but a few, as a rule
        start = next((i for i, position in enumerate(kept) if position != i), len(kept))
        for layer in self.layers:
            moved = [position for position in kept[start:] if position < layer.length]
            if moved:
                layer.gather(backend.of(layer.keys).asarray(moved), start)
            layer.length = min(layer.length, start + len(moved))
        if self.real is not None and start < len(kept):
            moved = backend.of(self.real).asarray(kept[start:])
            self.real[:, start : len(kept)] = self.real[:, moved]

    def _select_by_row(self, positions: Sequence[Sequence[int]]) -> None:
        count = len(positions[0])
        flat = [position for row in positions for position in row]
        if len(flat) != count * len(positions) or any(not 0 <= x < self.length for x in flat):
            raise ValueError(
                f"select takes rows of as many positions from 0 to {self.length - 1}, got "
                f"{[*map(list, positions)]}"
            )
        places = backend.of(self.layers[0].keys).asarray([*map(list, positions)])
        for layer in self.layers:
            layer.gather(places, 0)
        if self.real is not None:
            taken = backend.of(self.real).take_along_axis(self.real, places, axis=1)
            self.real[:, :count] = taken

    def fork(self, rows: Sequence[int] | None = None) -> KVCache:
        """A copy that goes on by itself; of these rows of the batch, in this order.

        ``fork([0, 0, 0])`` continues the first text in three ways, and ``fork()`` is what to go
        back to where ``truncate`` cannot.
        """
        return self._copy(self.layers[0].capacity, rows)

    def reserve(self, capacity: int) -> None:
        """Make room for so many positions; what is there stays, and nothing shrinks."""
        if capacity > self.layers[0].capacity:
            larger = self._copy(capacity, None)
            self.layers, self.real = larger.layers, larger.real

    def _copy(self, capacity: int, rows: Sequence[int] | None) -> KVCache:
        filled = self.layers[0].keys
        chosen = None if rows is None or filled is None else backend.of(filled).asarray([*rows])
        made = KVCache(0, capacity)
        made.layers = [layer.copy(capacity, chosen) for layer in self.layers]
        if self.real is not None:
            made.real = _copy(self.real, capacity, self.length, 1, chosen)
        return made

    def note(self, attention_mask: Array | None, batch: int, count: int) -> Array | None:
        """Write down which of the next ``count`` tokens are no pads; those of all until then.

        Args:
            attention_mask: (batch, count) booleans, or None if there is no pad among them.
            batch: the number of rows.
            count: the number of tokens.

        Returns:
            (batch, length + count) booleans, or None if there has been no pad at all.

        Raises:
            ValueError: they do not fit in.
        """
        start, stop = self.layers[0].place(count)
        if attention_mask is None and self.real is None:
            return None
        if self.real is None:
            xp = backend.of(attention_mask)
            self.real = xp.ones((batch, self.layers[0].capacity), "bool")
        self.real[:, start:stop] = True if attention_mask is None else attention_mask
        return self.real[:, :stop]


def _copy(x: Array, capacity: int, length: int, axis: int, rows: Array) -> Array:
    """The first ``length`` places along ``axis`` of these rows, with room for ``capacity``."""
    held = (*(slice(None),) * axis, slice(0, length))
    source = x[held] if rows is None else x[held][rows]
    made = backend.of(x).empty((*source.shape[:axis], capacity, *source.shape[axis + 1 :]), x.dtype)
    made[held] = source
    return made


def on_arrays(module: M) -> M:
    """A view of the module for inference: parameters are the bare arrays, dropout is off.

    Arrays in, arrays out: every primitive of the forward pass then skips the tape and the Tensors,
    which at small sizes is half of the time.  The view shares all arrays with the module, whose own
    attributes are left alone; make it anew after parameters have been given other arrays.
    """
    view = copy.copy(module)
    for name, value in vars(module).items():
        if isinstance(value, Module):
            setattr(view, name, on_arrays(value))
        elif isinstance(value, Tensor):
            setattr(view, name, value.data)
    view.training = False
    return view


# The loop


class GenerationMixin:
    """``generate`` for a Module that has what this file's docstring lists."""

    config: Any

    def new_cache(self, capacity: int) -> KVCache:
        """An empty cache for this model."""
        return KVCache(self.config.n_layer, capacity)

    def next_logits(self, ids: Array, attention_mask: Array | None, cache: KVCache | None) -> Any:
        """Logits (b, V) of the token after the last of ``ids``, (b, t)."""
        raise NotImplementedError(f"{type(self).__name__} does not say its next_logits")

    def generate(
        self,
        ids: Any,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        attention_mask: Any = None,
        rng: Rng | None = None,
        draft: Any = None,
        draft_tokens: Any = 4,
    ) -> Tensor:
        """Continue each row of ``ids``; the result starts with the prompt.

        Rows of different lengths are padded on the left: say where with ``attention_mask``, or with
        ``pad_token_id``, whose run at the start of a row is then taken for padding (unless it is an
        EOS token too, which may well begin a text).  A padded row is continued as it would be
        alone.

        Args:
            ids: (b, t) integers, t ≥ 1: an array, a Tensor or lists.
            max_new_tokens: how many to add at most; 0 returns the prompt.
            temperature: divides the logits; 0 is greedy decoding, which takes the largest logit
                (the lowest number of those that tie), draws nothing and needs no filter.
            top_k: see ``top_k_filter``; None is off.
            top_p: see ``top_p_filter``; None is off.
            min_p: see ``min_p_filter``; None is off.
            eos_token_id: the token, or tokens, that end a row; None for the config's (which may
                have none), an empty sequence for none.
            pad_token_id: what follows in a row that has ended, while others go on; None for the
                first EOS token.  It may lie outside the vocabulary, such as −1 where that is bytes.
            attention_mask: (b, t), 0 or False where ``ids`` is padding.
            rng: where to draw from; None for ``default_rng()``.
            draft: speculative decoding, which needs fewer passes of this model: a GPT with the same
                vocabulary, or a ``mini_nn.decoding.draft.Draft``; or one for each row.  Greedy
                texts are the same, sampled ones have the same law.
            draft_tokens: how many to draft per pass, or a policy; see ``draft_length``.

        Returns:
            (b, t + n) int64, n ≤ ``max_new_tokens``: it stops early when every row has ended.

        Raises:
            TypeError: ``ids`` are not integers.
            ValueError: ``ids`` is not (b, t) with t ≥ 1; prompt and new tokens do not fit into
                ``config.n_positions``; padding on the right, or a row of nothing else; an argument
                out of its range.
        """
        prompt = as_ids(ids, next(iter(self.parameters())).data)  # type: ignore[attr-defined]
        xp = backend.of(prompt)
        batch, start = prompt.shape
        stop = start + max_new_tokens
        if max_new_tokens < 0 or stop > self.config.n_positions:
            raise ValueError(
                f"a prompt of {start} tokens and {max_new_tokens} new ones do not fit into the "
                f"{self.config.n_positions} positions of this model: pass max_new_tokens between 0 "
                f"and {max(self.config.n_positions - start, 0)}, or the prompt's last tokens only"
            )
        if temperature < 0:
            raise ValueError(f"temperature is at least 0 (greedy), got {temperature}")
        ends = _as_tokens(self.config.eos_token_id if eos_token_id is None else eos_token_id)
        real = _as_mask(attention_mask, prompt, None if pad_token_id in ends else pad_token_id)
        pad = pad_token_id if pad_token_id is not None else ends[0] if ends else 0
        rng = rng or default_rng()
        if draft is not None and max_new_tokens:
            from .speculative import speculative_generate

            warper = Warper(temperature, top_k, top_p, min_p)
            kept = prompt.tolist() if real is None else _without_pads(prompt, real)
            found = speculative_generate(
                self, draft, kept, max_new_tokens, count=draft_tokens, warper=warper, eos=ends,
                rng=rng,
            )  # fmt: skip
            new = [text[len(row) :] for text, row in zip(found.texts, kept, strict=True)]
            longest = max(map(len, new))
            tail = xp.asarray([row + [pad] * (longest - len(row)) for row in new], dtype="int64")
            return Tensor(xp.concatenate([prompt, tail], axis=1))

        model = on_arrays(self)  # type: ignore[type-var]
        cache = model.new_cache(stop)
        text = xp.full((batch, stop), pad, dtype="int64")
        text[:, :start] = prompt
        ended = xp.zeros(batch, "bool")
        fed = prompt
        for place in range(start, stop):
            logits = model.next_logits(fed, real, cache)
            if temperature == 0:
                token = logits.argmax(axis=-1)
            else:
                token = sample(filter_logits(logits, temperature, top_k, top_p, min_p), rng)
            if ends:
                token = xp.where(ended, pad, token)
                for end in ends:
                    ended = ended | (token == end)
            text[:, place] = token
            if ends and bool(ended.all()):
                return Tensor(text[:, : place + 1])
            fed, real = xp.where(ended, 0, token)[:, None] if ends else token[:, None], None
        return Tensor(text)


def as_ids(ids: Any, like: Array) -> Array:
    """Token numbers as an int64 array of shape (b, t) on the backend of ``like``.

    Raises:
        TypeError: they are not integers.
        ValueError: they have another number of axes, or t is 0.
    """
    array = at_home(ids, like)
    if array.ndim != 2 or array.shape[1] == 0:
        raise ValueError(
            f"ids are (batch, tokens) with at least 1 token, got shape {array.shape}: for one text "
            "pass [ids], and start an empty one with a token that means so"
        )
    if array.dtype.kind not in "iu":
        raise TypeError(f"ids are integers, got {array.dtype}: convert with astype('int64')")
    return array.astype("int64", copy=False)


def _without_pads(ids: Array, real: Array) -> list[list[int]]:
    """The rows as lists of their own lengths."""
    rows = zip(ids.tolist(), real.tolist(), strict=True)
    return [[x for x, is_token in zip(*row, strict=True) if is_token] for row in rows]


def at_home(x: Any, like: Array) -> Array:
    """Numbers, a Tensor or an array as an array on the backend of ``like``."""
    x, home = data_of(x), backend.backend_of(like)
    if isinstance(x, home.array_type):
        return x
    return home.xp.asarray(backend.to_host(x) if hasattr(x, "ndim") else x)


def _as_tokens(tokens: int | Sequence[int] | None) -> list[int]:
    if tokens is None:
        return []
    return [*tokens] if isinstance(tokens, Sequence) else [int(tokens)]


def _as_mask(attention_mask: Any, ids: Array, pad: int | None) -> Array | None:
    """Booleans that are true where a token is no pad; None if none is."""
    if attention_mask is None:
        if pad is None:
            return None
        real = (ids != pad).astype("int64").cumsum(axis=1) > 0
    else:
        real = at_home(attention_mask, ids) != 0
    if real.shape != ids.shape:
        raise ValueError(f"attention_mask has the shape of ids, {ids.shape}, got {real.shape}")
    if not bool(real[:, -1].all()):
        raise ValueError(
            "the last token of each row must be real, but attention_mask or pad_token_id says that "
            "one is padding: pad on the left, and drop rows that are empty"
        )
    return None if bool(real.all()) else real
