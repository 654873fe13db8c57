"""Bytes of a text: how a model is trained on them and how it is scored, for every study that does.

Bits per character are the mean of -log₂ p(character | what came before), as in Shannon 1951,
*Prediction and Entropy of Printed English*; the texts are ASCII, so characters are bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

import mini_nn
from mini_nn import Rng, backend
from mini_nn.backend import Array
from mini_nn.nn import functional as F
from mini_nn.nn.residual import decay_groups
from mini_nn.optim import AdamW, Schedule, clip_grad_norm_, warmup_cosine

from ..gpt import GPT, GPTConfig
from . import baselines
from .base import Config

BYTES = 256
EVAL_BATCH = 64
"""Windows that are scored at a time: enough for the matrix products, little memory."""

Loss = Callable[[GPT, Array, Array], Any]
"""``loss(model, inputs, targets)``: one number, on the tape."""


@dataclass(frozen=True, kw_only=True)
class TextConfig(Config):
    """A small model and the recipe that trains it.

    Args:
        corpus: a name of ``models.data.corpus``.
        n_layer, n_head, n_embd, context, dropout: of the model; context is in bytes.
        batch: windows of ``context`` bytes per step.
        lr: the largest learning rate, reached after ``warmup`` of the steps, then a cosine to a
            tenth of it.
        weight_decay: of the matrices; biases and gains have none.
    """

    corpus: str = "shakespeare"
    n_layer: int = 2
    n_head: int = 3
    n_embd: int = 96
    context: int = 32
    dropout: float = 0.0
    batch: int = 16
    lr: float = 6e-3
    warmup: float = 0.1
    weight_decay: float = 0.1

    def __post_init__(self) -> None:
        if self.context < 2:
            raise ValueError(f"a context has at least 2 bytes, got {self.context}")

    def sizes(self) -> GPTConfig:
        """Those of the model."""
        rates = dict.fromkeys(("resid_pdrop", "embd_pdrop"), self.dropout)
        return GPTConfig(BYTES, self.context, self.n_embd, self.n_layer, self.n_head, **rates)


def groups(model: GPT, weight_decay: float) -> list[dict[str, Any]]:
    """The parameters with weight decay (matrices and tables) and those without."""
    return decay_groups(model.parameters(), weight_decay)


def codes(text: bytes) -> Array:
    """The bytes as integers on the current backend, shape (len(text),)."""
    return backend.current().xp.asarray(np.frombuffer(text, np.uint8).astype("int64"))


def batches(text: Array, config: TextConfig, rng: Rng) -> tuple[Array, Array]:
    """``batch`` windows from random places, and the same ones a byte later: what is to be said.

    Raises:
        ValueError: the text is not longer than one window.
    """
    if len(text) <= config.context:
        raise ValueError(
            f"a window of {config.context} bytes and the byte after it do not fit into a text of "
            f"{len(text)}: take a longer text or a smaller context"
        )
    starts = rng.integers(0, len(text) - config.context, (config.batch, 1))
    places = starts + backend.of(text).arange(config.context)
    return text[places], text[places + 1]


def windows(train: bytes, text: bytes, context: int) -> Iterator[tuple[Array, Array]]:
    """Batches of (input, target) in which each byte of ``text`` is the target exactly once.

    The input is the text one byte earlier, so the first byte is predicted from the last of
    ``train``; nothing is seen across the edge of a window, and the last window may be shorter.

    Raises:
        ValueError: one of the texts is empty.
    """
    if not train or not text:
        raise ValueError(
            "a text is scored after at least one byte of train, and has at least one itself, got "
            f"{len(train)} of train and {len(text)} of text"
        )
    before, after = codes(train[-1:] + text[:-1]), codes(text)
    whole = len(text) // context * context
    inputs, targets = (x[:whole].reshape(-1, context) for x in (before, after))
    for start in range(0, len(inputs), EVAL_BATCH):
        yield inputs[start : start + EVAL_BATCH], targets[start : start + EVAL_BATCH]
    if whole < len(text):
        yield before[None, whole:], after[None, whole:]


def score(model: GPT, train: bytes, text: bytes) -> Any:
    """The bits that the model needs for each byte of ``text``: a host array, (len(text),).

    Without dropout; what was in training before is so again afterwards, and what was not is not.

    Raises:
        ValueError: one of the texts is empty.
    """
    modes = [(module, module.training) for module in model.modules()]
    losses = []
    try:
        model.eval()
        with mini_nn.no_grad():
            for inputs, targets in windows(train, text, model.config.n_positions):
                logits = model(inputs).reshape(-1, BYTES)
                nats = F.cross_entropy(logits, targets.reshape(-1), reduction="none")
                losses.append(backend.to_host(nats.data))
    finally:
        for module, training in modes:
            module.training = training
    return baselines.bits(1.0) * np.concatenate(losses).astype("float64")


def by_position(scores: Any, context: int) -> list[tuple[int, int, float]]:
    """(first, last, bits): the mean over the targets that have first … last bytes before them."""
    seen = np.arange(len(scores)) % context + 1
    edges = [1]
    while edges[-1] < context:
        edges.append(min(2 * edges[-1], context))
    spans = [(1, 1), *((low + 1, high) for low, high in pairwise(edges))]
    return [
        (a, b, float(scores[(seen >= a) & (seen <= b)].mean()))
        for a, b in spans
        if (seen >= a).any()
    ]


def on_text(model: GPT, inputs: Array, targets: Array) -> Any:
    """Mean cross-entropy with the text, in nats."""
    return F.cross_entropy(model(inputs).reshape(-1, BYTES), targets.reshape(-1))


class Training:
    """AdamW with a warm-up and a cosine, on random windows of a text.

    Args:
        model: what is trained.
        text: what it is trained on.
        config: the recipe.
        rng: draws the windows.
        loss: what is made small; by default the cross-entropy with the text.
        min_ratio: the last learning rate as a part of the largest.
    """

    def __init__(
        self,
        model: GPT,
        text: bytes,
        config: TextConfig,
        rng: Rng,
        loss: Loss = on_text,
        min_ratio: float = 0.1,
    ) -> None:
        self.model, self.text, self.config, self.rng = model, codes(text), config, rng
        self.loss = loss
        self.optimizer = AdamW(groups(model, config.weight_decay), config.lr, betas=(0.9, 0.99))
        warmup = int(config.warmup * config.steps)
        shape = partial(warmup_cosine, warmup=warmup, total=config.steps, min_ratio=min_ratio)
        self.schedule = Schedule(self.optimizer, shape)

    def parts(self) -> dict[str, Any]:
        """All that a step changes, as ``Session.loop`` takes it."""
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "schedule": self.schedule,
            "rngs": {"batches": self.rng},
        }

    def step(self) -> float:
        """One step; the loss before it, in nats."""
        inputs, targets = batches(self.text, self.config, self.rng)
        self.optimizer.zero_grad()
        loss = self.loss(self.model, inputs, targets)
        loss.backward()
        clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        return float(backend.to_host(loss.data))
