"""A layer with random features: a projection that stays, and is drawn anew while training.

Choromanski et al. 2021, "Rethinking Attention with Performers", arXiv:2009.14794 (redrawing of
features); the mechanism is in ``performer``.

=======================================================  =====================================
W is drawn every so many steps in training, else fixed   ``PerformerAttention``
φ(x) = exp(W x), W trained: kexue.fm 8338                ``ExponentialAttention``
=======================================================  =====================================

Deviations: W is drawn anew after so many *calls* in training, by the layer itself; the released
code has an object beside the model count its passes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from .. import backend
from ..backend import Array
from ..nn.module import Module, Parameter
from ..rng import Rng, default_rng
from .performer import check_feature, exponential_attention, favor_attention
from .random_matrix import gaussian_matrix, orthogonal_matrix

__all__ = ["ExponentialAttention", "PerformerAttention"]

Law = Callable[..., Array]
"""``law(m, d, rng, dtype=…)`` is a projection (m, d): see ``random_matrix``."""

NO_MATRIX = (
    "linear attention has no matrix of logits, so no bias or mask (n, m) can be added to it, and "
    "attn_mask of shape {} is one: use is_causal=True, key_mask=(…, m) for pads, and positions "
    "that act on queries and keys (rotary)"
)


class PerformerAttention(Module):
    """Attention by random features, for the place of softmax attention in a model.

    One projection serves all heads.  In training it is drawn anew before every call whose number is
    a multiple of ``redraw_interval``, in evaluation never.  A block that ``checkpoint`` runs again
    meets the projection of its first run, and its second one is not counted.  ``io.save_training``
    saves the stream and the count, so a run continues with the same draws.

    Args:
        head_dim: d.
        num_features: rows of the projection; None for 4 d.  Below d little is gained, and the cost
            is that of softmax attention over so many keys.
        attention: ``attention(query, key, value, projection, is_causal=…, state=…, key_mask=…)``
            from ``performer``, with ``functools.partial`` for its options.
        law: what the projection is drawn by, ``law(num_features, head_dim, rng, dtype=…)``.
        redraw_interval: in calls; None for never.
        rng: starts the layer's own stream (None: ``default_rng()``).

    Attributes:
        projection: W (num_features, head_dim), a buffer: saved, not trained.

    Raises:
        ValueError: a number is below 1, or a ``partial`` of ``favor_attention`` names a feature
            that there is not.
        TypeError: ``attention`` is no function.
    """

    def __init__(
        self,
        head_dim: int,
        num_features: int | None = None,
        attention: Callable[..., Any] = favor_attention,
        law: Law = orthogonal_matrix,
        redraw_interval: int | None = None,
        *,
        rng: Rng | None = None,
    ) -> None:
        features = 4 * head_dim if num_features is None else num_features
        if min(head_dim, features, 1 if redraw_interval is None else redraw_interval) < 1:
            raise ValueError(
                "PerformerAttention takes numbers of at least 1, got "
                f"{head_dim=}, {num_features=} and {redraw_interval=}"
            )
        if not callable(attention):
            raise TypeError(
                "attention is a function of mini_nn.attention, such as favor_attention or "
                f"partial(favor_attention, feature=…), got {attention!r}"
            )
        if isinstance(attention, partial) and attention.func is favor_attention:
            check_feature(attention.keywords.get("feature", "positive"))
        self.head_dim = head_dim
        self.num_features = features
        self.redraw_interval = redraw_interval
        self.attention = attention
        self.law = law
        (source,) = (default_rng() if rng is None else rng).split(1)
        self.draws = _Draws(source.seed)
        self.register_buffer("projection", law(features, head_dim, self.draws))

    @property
    def projection(self) -> Array:
        """W; it lies with the stream, which goes back to it when a checkpointed block does."""
        return self.draws.drawn.array

    @projection.setter
    def projection(self, array: Array) -> None:
        self.draws.drawn = _Drawn(self.draws.drawn, array)

    def redraw(self) -> None:
        """Draw the projection anew, in its dtype and on its backend."""
        old = self.projection
        with backend.using(backend.backend_of(old).name):
            new = self.law(self.num_features, self.head_dim, self.draws, dtype=old.dtype)
        self.draws.drawn = _Drawn(self.draws.drawn + 1, new)

    def forward(
        self,
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        is_causal: bool = False,
        state: Any = None,
        key_mask: Any = None,
    ) -> Any:
        """(…, n, d), (…, m, d), (…, m, e) to (…, n, e); the arguments are those of ``attention``.

        Raises:
            ValueError: there is an ``attn_mask``.
        """
        if attn_mask is not None:
            raise ValueError(NO_MATRIX.format(getattr(attn_mask, "shape", attn_mask)))
        if self.training and self.draws.count(self.redraw_interval):
            self.redraw()
        return self.attention(
            query,
            key,
            value,
            self.projection,
            is_causal=is_causal,
            state=state,
            key_mask=key_mask,
        )


class ExponentialAttention(Module):
    """Linear attention with the features exp(W x), W trained: ``exponential_attention``.

    Args:
        head_dim: d.
        num_features: rows of W; None for 4 d.
        rng: what W is drawn from, N(0, 1 / √d), as for W x with x d^(−1/4) (None:
            ``default_rng()``).

    Attributes:
        weight: W (num_features, head_dim), shared by the heads.

    Raises:
        ValueError: a number is below 1.
    """

    def __init__(
        self, head_dim: int, num_features: int | None = None, *, rng: Rng | None = None
    ) -> None:
        features = 4 * head_dim if num_features is None else num_features
        drawn = gaussian_matrix(features, head_dim, default_rng() if rng is None else rng)
        self.weight = Parameter(drawn * head_dim**-0.25)

    def forward(
        self,
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        is_causal: bool = False,
        state: Any = None,
        key_mask: Any = None,
    ) -> Any:
        """As ``PerformerAttention``."""
        if attn_mask is not None:
            raise ValueError(NO_MATRIX.format(getattr(attn_mask, "shape", attn_mask)))
        return exponential_attention(query, key, value, self.weight, is_causal, state, key_mask)


class _Drawn(int):
    """The number of a draw, which carries what was drawn; written to a file it is a number.

    Whoever noted where the stream stood thereby holds the projection of that time.
    """

    array: Array

    def __new__(cls, number: int, array: Array) -> _Drawn:
        made = super().__new__(cls, number)
        made.array = array
        return made

    def __getnewargs__(self) -> tuple[int, Array]:  # type: ignore[override]
        return int(self), self.array


class _Draws(Rng):
    """A stream whose state includes the number of calls and the last projection."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.calls = 0
        self.drawn: Any = 0  # without an array until there is a projection

    def count(self, interval: int | None) -> bool:
        """Count a call, and say whether it is one to draw anew before."""
        # also where nothing is drawn: a checkpointed block then notes where this stream stands
        _ = self.host
        due = interval is not None and self.calls > 0 and self.calls % interval == 0
        self.calls += 1
        return due

    def state_dict(self) -> dict[str, Any]:
        """As for ``Rng``, with the calls and the draw."""
        return {**super().state_dict(), "calls": self.calls, "drawn": self.drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back; a number that comes from a file stands for the projection that is there."""
        state = dict(state)
        self.calls, drawn = state.pop("calls"), state.pop("drawn")
        self.drawn = drawn if isinstance(drawn, _Drawn) else _Drawn(drawn, self.drawn.array)
        super().load_state_dict(state)
