"""A GPT that is asked about texts, and keeps what it has computed as long as it is of use.

Whoever asks says the whole text each time.  What the cache holds is compared with it, cut back to
where the two begin alike, and only the rest is fed.  So to take back rejected drafts needs no call,
a token that was emitted without being drafted is fed by itself, and no row of a text that is not
the one asked about can be looked at.

``CachedModel`` has one text, and also passes over trees (``mini_nn.decoding.tree``);
``CachedBatch`` has several that are fed together, whatever part of each was taken back: its rows
have gaps, which are masked as pads are.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mini_nn import backend
from mini_nn.backend import Array
from mini_nn.decoding import TokenTree

from .generation import KVCache, on_arrays

if TYPE_CHECKING:
    from .gpt import GPT

ROOM = 64
"""Positions that a cache has room for at first; it doubles when they are used up."""


def shared(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two texts have in common at their beginnings."""
    same, most = 0, min(len(a), len(b))
    step = most
    while same < most:  # bisection: slices are compared a hundred times faster than tokens
        if a[same : same + step] == b[same : same + step]:
            same += step
        else:
            most = same + step - 1
        step = (most - same + 1) // 2
    return same


class _Cached:
    """The model's passes, counted."""

    def __init__(self, model: GPT) -> None:
        self.model = model
        self.view = on_arrays(model)
        self.home = backend.backend_of(next(iter(model.parameters())).data)
        self.cache: KVCache = self.view.new_cache(ROOM)
        self.calls = 0
        """Passes so far."""
        self.fed = 0
        """Tokens that were fed in them, pads not counted."""
        self.seconds = 0.0
        """Time spent in them, until the numbers are on the host."""

    def _feed(
        self, ids: list[list[int]], mask: Any = None, positions: Any = None, visible: Any = None
    ) -> Array:
        """The hidden states (b, t, d) of tokens that continue the cache."""
        size = self.model.config.vocab_size
        if any(row and not 0 <= min(row) <= max(row) < size for row in ids):  # devices do not look
            raise IndexError(f"the tokens of this model are 0 … {size - 1}, got {ids}")
        needed = self.cache.length + len(ids[0])
        if needed > self.cache.layers[0].capacity:
            self.cache.reserve(max(needed, 2 * self.cache.layers[0].capacity))
        xp = self.home.xp
        extras = [None if x is None else xp.asarray(x) for x in (mask, positions, visible)]
        self.calls += 1
        return self.view.transformer(
            xp.asarray(ids, dtype="int64"), extras[0], self.cache, extras[1], extras[2]
        )

    def _logits(self, hidden: Array) -> Array:
        return self.home.to_host(self.view.lm_head(hidden))


class CachedModel(_Cached):
    """A GPT and the keys and values of one text.

    Its weights must not be replaced by other arrays, nor change between two calls about one text.

    Args:
        model: shared, not copied.

    Attributes:
        tokens: the text whose rows the cache holds.
        calls, fed, seconds: passes so far, tokens fed in them, and how long they took.
    """

    def __init__(self, model: GPT) -> None:
        super().__init__(model)
        self.tokens: list[int] = []
        self._tree: TokenTree | None = None

    def logits(self, tokens: Sequence[int], rows: int = 1) -> Array:
        """What the model thinks of the token after each of the last beginnings of a text.

        Args:
            tokens: the whole text, at least one token; host integers.
            rows: how many rows, 1 … the number of tokens.

        Returns:
            (rows, V) host logits in the model's dtype; row j belongs to the token after
            ``tokens[: len(tokens) - rows + 1 + j]``.

        Raises:
            IndexError: a token is not in the vocabulary.
            ValueError: ``rows`` is out of its range, or the text longer than ``n_positions``.
        """
        text = list(tokens)
        if not 1 <= rows <= len(text):
            raise ValueError(
                f"a text of {len(text)} tokens has 1 … {len(text)} rows of logits, got rows={rows}"
            )
        began = time.perf_counter()
        start = min(shared(self.tokens, text), len(text) - rows)
        self._cut(start)
        hidden = self._feed([text[start:]])
        self.tokens = text
        self.fed += len(text) - start
        found = self._logits(hidden[0, -rows:])
        self.seconds += time.perf_counter() - began
        return found

    def tree_logits(self, text: Sequence[int], tree: TokenTree) -> Array:
        """What the model thinks of the token after each node of a tree of drafts, in one pass.

        Miao et al. 2023, 2305.09781: a node looks at the text, its ancestors and itself, and its
        position is that of its depth.  What follows is ``keep``; after anything else the text alone
        is left, without the drafts.

        Args:
            text: all that is verified; its last token is node 0.
            tree: the drafts.

        Returns:
            (nodes, V) host logits in the model's dtype.

        Raises:
            IndexError: a token is not in the vocabulary.
            ValueError: node 0 is not the last token, or text and tree are deeper than
                ``n_positions``.
        """
        known = list(text)
        if not known or known[-1] != tree.tokens[0]:
            raise ValueError(
                f"node 0 of a tree, {tree.tokens[0]}, is the last token of the text, "
                f"{known[-1:]}: make the tree from it"
            )
        last, deepest = len(known) - 1, int(tree.depths.max())
        if last + deepest >= self.model.config.n_positions:
            raise ValueError(
                f"a text of {len(known)} tokens and {deepest} drafts do not fit into the "
                f"{self.model.config.n_positions} positions of this model: draft fewer"
            )
        began = time.perf_counter()
        start = min(shared(self.tokens, known), last)
        missing = last - start
        # what is missing of the text is a chain above the tree
        whole = TokenTree(
            (*known[start:last], *tree.tokens),
            (*range(-1, missing), *(parent + missing for parent in tree.parents[1:])),
        )
        self._cut(start)
        hidden = self._feed(
            [[*whole.tokens]], positions=whole.positions(start), visible=whole.mask(start)
        )
        self.tokens, self._tree = known, tree  # node 0 has a row like any other token
        self.fed += len(whole)
        found = self._logits(hidden[0, missing:])
        self.seconds += time.perf_counter() - began
        return found

    def keep(self, text: Sequence[int], path: Sequence[int]) -> None:
        """Keep of the tree that was passed just now the rows of an accepted path.

        Args:
            text: that of ``tree_logits``.
            path: as in ``Verdict.path``: without node 0, perhaps empty.

        Raises:
            ValueError: the last call was not ``tree_logits`` of this text, or the path does not
                lead downwards from node 0.
        """
        tree = self._tree
        if tree is None or list(text) != self.tokens:
            raise ValueError("keep belongs to the text of the tree_logits just before it")
        self.cache.select(tree.compact(path, len(self.tokens) - 1).tolist())
        self.tokens = [*self.tokens, *(tree.tokens[node] for node in path)]
        self._tree = None

    def rollback(self, text: Sequence[int]) -> None:
        """Forget at once what is no beginning of this text; every other call does so by itself."""
        self._cut(shared(self.tokens, list(text)))

    def _cut(self, length: int) -> None:
        """Before a pass, so that one that fails leaves a cache that agrees with ``tokens``."""
        self.cache.truncate(length)
        self.tokens = self.tokens[:length]
        self._tree = None


class CachedBatch(_Cached):
    """A GPT and the keys and values of several texts, of which each may be at another length.

    One pass feeds each row what it lacks, with pads on the left of the shorter ones.  The rows of
    what was taken back stay as gaps, which ``KVCache.real`` masks and which have no position; when
    there are more gaps than texts, the cache is made compact.

    Args:
        model: as for ``CachedModel``.
        batch: the number of texts.

    Attributes:
        tokens: the texts whose rows the cache holds.
        calls, fed, seconds: passes so far, tokens fed in them, and how long they took.
    """

    def __init__(self, model: GPT, batch: int) -> None:
        super().__init__(model)
        self.tokens: list[list[int]] = [[] for _ in range(batch)]
        self.slots: list[list[int]] = [[] for _ in range(batch)]
        """Where in the cache each of the tokens is."""

    def logits(self, texts: Sequence[Sequence[int]], rows: Sequence[int]) -> list[Array]:
        """As ``CachedModel.logits`` for each text.

        Args:
            texts: the whole texts, one per row; host integers.
            rows: how many rows of each; 0 leaves a text out, and what is held of it as it is.

        Returns:
            For each text (rows, V) host logits in the model's dtype.

        Raises:
            IndexError: a token is not in the vocabulary.
            ValueError: another number of texts, or as ``CachedModel.logits``.
        """
        batch, longest = len(self.tokens), self.model.config.n_positions
        known = [list(text) for text in texts]
        if len(known) != batch or len(rows) != batch:
            raise ValueError(
                f"this is a batch of {batch}, got {len(known)} texts, {len(rows)} rows"
            )
        for text, count in zip(known, rows, strict=True):
            if not 0 <= count <= len(text) or len(text) > longest:
                raise ValueError(
                    f"a text of 1 … {longest} tokens has a row of logits for each, got {len(text)} "
                    f"tokens and rows={count}"
                )
        if not any(rows):
            return [self._empty() for _ in rows]
        began = time.perf_counter()
        fed: list[list[int]] = []
        for row, (text, count) in enumerate(zip(known, rows, strict=True)):
            if count:
                start = min(shared(self.tokens[row], text), len(text) - count)
                self.tokens[row] = self.tokens[row][:start]
                self.slots[row] = self.slots[row][:start]
                fed.append(text[start:])
            else:
                fed.append([])
        self._tidy()
        start, width = self.cache.length, max(map(len, fed))
        self._mark()
        pads = [width - len(new) for new in fed]
        hidden = self._feed(
            [[0] * pad + new for pad, new in zip(pads, fed, strict=True)],
            mask=[[False] * pad + [True] * (width - pad) for pad in pads],
            positions=[
                [0] * pad + [*range(len(held), len(held) + width - pad)]
                for pad, held in zip(pads, self.tokens, strict=True)
            ],
        )
        for row, new in enumerate(fed):
            self.tokens[row] = self.tokens[row] + new
            self.slots[row] = self.slots[row] + [*range(start + pads[row], start + width)]
        self.fed += sum(map(len, fed))
        found = self._logits(hidden[:, -max(rows) :])
        self.seconds += time.perf_counter() - began
        return [found[row, len(found[row]) - count :] for row, count in enumerate(rows)]

    def _tidy(self) -> None:
        """Cut off what no row holds at the end; close the gaps when they are the larger part."""
        self.cache.truncate(max((slots[-1] + 1 for slots in self.slots if slots), default=0))
        longest = max(map(len, self.slots))
        if self.cache.length > max(2 * longest, ROOM):
            self.cache.select([[0] * (longest - len(held)) + held for held in self.slots])
            self.slots = [[*range(longest - len(held), longest)] for held in self.slots]

    def _mark(self) -> None:
        """Tell the cache which of its places are tokens of the texts."""
        if self.cache.length:
            held = backend.get("numpy").xp.zeros((len(self.slots), self.cache.length), dtype=bool)
            for row, slots in enumerate(self.slots):
                held[row, slots] = True
            self.cache.real[:, : self.cache.length] = self.home.xp.asarray(held)

    def _empty(self) -> Array:
        return backend.get("numpy").xp.zeros((0, self.model.config.vocab_size))
