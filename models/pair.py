"""The recipe of the two small language models in ``models/data/pair``: a target and its draft.

``python -m models.pair FOLDER`` trains both over again: the target on the text, as the study
``gpt`` does; then the draft on what the target thinks of the same text (Zhou et al. 2023,
*DistillSpec*, arXiv:2310.08461, with the forward KL), so that it learns to guess the target, not
Shakespeare.  Weights are stored as float16.  About ten minutes on one core.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mini_nn
from mini_nn import Rng, no_grad, ops
from mini_nn.backend import Array

from .data import corpus, split
from .gpt import GPT
from .studies.gpt import GPTStudyConfig
from .studies.text import Loss, Training, on_text, score

TARGET = GPTStudyConfig(
    steps=1200, n_layer=12, n_head=4, n_embd=96, context=128, batch=16, lr=4e-3, seed=1
)
"""Deep and narrow: one token costs twelve layers of calls, several at once hardly more."""

DRAFT = replace(TARGET, steps=1500, n_layer=1, n_head=2, n_embd=64, lr=5e-3, seed=2)

FOLDER = Path(__file__).parent / "data" / "pair"


def train(config: GPTStudyConfig, loss: Loss, log: Callable[[str], None]) -> GPT:
    """A model of these sizes after ``config.steps`` steps on random windows of the text."""
    weights_rng, batch_rng = Rng(config.seed).split(2)
    text, _ = split(corpus(config.corpus))
    training = Training(GPT(config.sizes(), weights_rng), text, config, batch_rng, loss, 0.05)
    for step in range(config.steps):
        nats = training.step()
        if (step + 1) % 100 == 0:
            log(f"step {step + 1} of {config.steps}: loss {nats:.3f} nats")
    return training.model.eval()


def on_target(target: GPT) -> Loss:
    """Mean cross-entropy with the target's laws: the forward KL, but for a constant."""

    def loss(model: GPT, inputs: Array, targets: Array) -> Any:
        with no_grad():
            p = ops.softmax(target(inputs)).data
        log_q = ops.log_softmax(model(inputs))
        return -ops.sum(p * log_q) / float(targets.size)

    return loss


def save(model: GPT, folder: Path) -> None:
    """Store the weights as float16; the model itself stays as it is."""
    small = GPT(model.config, Rng(0))
    small.load_state_dict(model.state_dict())
    small.astype("float16").save_pretrained(folder)


def load() -> tuple[GPT, GPT]:
    """The target and the draft that ship with the repository, in float32."""
    return GPT.from_pretrained(FOLDER / "target"), GPT.from_pretrained(FOLDER / "draft")


def main(argv: list[str] | None = None) -> None:
    """Train both and store them."""
    parser = argparse.ArgumentParser(prog="python -m models.pair", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER, help="where to store them")
    folder = parser.parse_args(argv).folder
    mini_nn.tune_allocator()
    train_text, held_out = split(corpus(TARGET.corpus))
    target = train(TARGET, on_text, print)
    save(target, folder / "target")
    draft = train(DRAFT, on_target(target), print)
    save(draft, folder / "draft")
    for name, model in (("target", target), ("draft", draft)):
        bits = score(model, train_text, held_out[:8192]).mean()
        print(f"{name}: {model.num_parameters():,} parameters, {bits:.3f} bits per character")


if __name__ == "__main__":
    main()
