"""Does a GPT, trained on our own engine, learn English?  Its loss beside counts and compressors.

The text is Shakespeare's, as bytes, and its last tenth is held out.  Bits per character are the
mean of -log₂ p(character | what came before), the measure of Shannon 1951, *Prediction and Entropy
of Printed English*; the text is ASCII, so characters are bytes.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mini_nn
from mini_nn import Rng, backend

from ..data import corpus, split
from ..gpt import GPT
from . import baselines, plot
from .base import Result, Study
from .session import Session
from .text import TextConfig, Training, by_position, codes, score

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True)
class GPTStudyConfig(TextConfig):
    """What is trained, and how; the model's sizes and the recipe are those of ``TextConfig``.

    Args:
        evaluations: how often the validation text is scored, evenly spread, at the end too.
        sample_bytes: the length of the sample.
        temperature, prompt: of the sample.
    """

    evaluations: int = 10
    sample_bytes: int = 600
    temperature: float = 0.8
    prompt: str = "HAMLET\n"


def sample(model: GPT, config: GPTStudyConfig, rng: Rng) -> str:
    """The config's prompt and what the model adds, looking back over at most its context."""
    text = codes(config.prompt.encode())
    xp, longest = backend.of(text), config.context
    end = len(text) + config.sample_bytes
    while len(text) < end:
        seen = text[None, -(longest // 2) :]
        more = min(longest - seen.shape[1], end - len(text))
        grown = model.generate(seen, more, temperature=config.temperature, rng=rng)
        text = xp.concatenate([text, grown.data[0, seen.shape[1] :]])
    return bytes(backend.to_host(text).astype("uint8")).decode("utf-8", "replace")


def digest(model: GPT) -> str:
    """The sha256 of all weights: equal for equal bits."""
    total = hashlib.sha256()
    for name, array in sorted(model.state_dict().items()):
        total.update(name.encode() + backend.to_host(array).tobytes())
    return total.hexdigest()


def run(config: GPTStudyConfig, session: Session) -> Result:
    """Train, score, sample and draw."""
    mini_nn.tune_allocator()
    train, held_out = split(corpus(config.corpus))
    weights_rng, batch_rng, sample_rng = Rng(config.seed).split(3)
    model = GPT(config.sizes(), weights_rng)
    training = Training(model, train, config, batch_rng)
    loop = session.loop(config.steps, **training.parts())
    due = {round(k * config.steps / config.evaluations) for k in range(1, config.evaluations + 1)}
    scores = None
    for step in loop:
        with session.timed("training"):
            loss = training.step()
        if step + 1 in due:
            with session.timed("evaluation"):
                scores = score(model, train, held_out)
            loop.record(
                step=step + 1,
                training=baselines.bits(loss),
                validation=float(scores.mean()),
            )
    if scores is None:  # resumed after the last step
        scores = score(model, train, held_out)
    with session.timed("sampling"):
        text_made = sample(model, config, sample_rng)
    with session.timed("baselines"):
        others = compare(train, held_out)
    learnt = score(model, train[: -len(held_out)], train[-len(held_out) :])
    seen = config.steps * config.batch * config.context
    bits = float(scores.mean())
    metrics: dict[str, float | int | str] = {
        "validation_bits_per_character": bits,
        "training_bits_per_character": float(learnt.mean()),
        **{f"{name}_bits_per_character": value for name, value in others.items()},
        "training_bytes": len(train),
        "validation_bytes": len(held_out),
        "bytes_seen": seen,
        "parameters": model.num_parameters(),
        "bytes_per_second": seen / session.timings["training"],
        "weights_sha256": digest(model),
    }
    spans = by_position(scores, config.context)
    return Result(
        headline=f"{bits:.2f} bits per character; "
        + ", ".join(f"{name} {value:.2f}" for name, value in others.items()),
        metrics=metrics,
        figure=draw(config, loop.history, spans, others),
        caption=CAPTION.format(context=config.context, **metrics),
        series={"history": loop.history, "bits_by_position": spans},
        texts={f"{config.sample_bytes} characters that the model wrote": text_made},
    )


def compare(train: bytes, text: bytes) -> dict[str, float]:
    """Bits per byte of the same ``text`` without a network."""
    return {
        "unigram": baselines.unigram_bits(train, text),
        "bigram": baselines.bigram_bits(train, text),
        **{name: baselines.conditional_bits(name, train, text) for name in baselines.COMPRESSORS},
    }


def draw(
    config: GPTStudyConfig,
    history: list[dict[str, float]],
    spans: list[tuple[int, int, float]],
    others: dict[str, float],
) -> Figure:
    """The validation loss over training, and by what the model could see."""
    figure, (left, right) = plot.figure(2, size=(11.0, 4.6), width_ratios=(1.25, 1.0))
    steps = [row["step"] for row in history]
    curve = [row["validation"] for row in history]
    top = others["unigram"] + 0.25
    bottom = min(*curve, *others.values()) - 0.2
    for axes in (left, right):
        axes.set_ylim(bottom, top)
    labels = []
    for name, value in others.items():
        plot.reference(left, value)
        labels.append((value, f"{name} {value:.2f}", plot.GREY))
    left.plot(steps, curve, color=plot.BLUE, marker="o", markersize=4.5, zorder=3)
    labels.append((curve[-1], f"GPT {curve[-1]:.2f}", plot.BLUE))
    left.set_xlim(0, config.steps)
    left.set_xlabel(f"training steps of {config.batch * config.context:,} characters")
    left.set_ylabel("bits per character, held-out text")
    plot.title(left, "A GPT against counts and compressors")

    for name in ("unigram", "bigram"):
        value = others[name]
        plot.reference(right, value)
        right.annotate(
            name,
            (1.0, value),
            (-2, 3),
            xycoords=("axes fraction", "data"),
            color=plot.GREY,
            textcoords="offset points",
            ha="right",
            fontsize=plot.SIZE - 1,
        )
    places = range(len(spans))
    right.plot(places, [bits for *_, bits in spans], color=plot.BLUE, marker="o", markersize=5.5)
    right.set_xticks(places, [f"{a}" if a == b else f"{a}–{b}" for a, b, _ in spans])
    right.set_xlabel("characters the model can look back on")
    plot.title(right, "What context is worth")
    plot.label_right(left, labels)
    return figure


CAPTION = """Left: bits per character on the last tenth of the text ({validation_bytes:,} \
characters), over training on the rest. Every character of it is predicted once, from those \
before it in its window of {context}. Dashed, on the same characters: unigram and bigram \
(counts of the training text, smoothed as is best for that text itself) and compressors, whose \
cost is the compressed size of training and held-out text together minus that of the training \
text alone, times 8, per character. Right: the trained model's bits by how many characters of \
the window come before the one to be said."""

STUDY = Study(
    name="gpt",
    title="A GPT learns English from two plays",
    about="A decoder-only Transformer over bytes, written and trained on this engine, reads King "
    "Lear and most of Hamlet, and is asked for the last tenth, Hamlet's fifth act. How many bits "
    "does it need for a character, beside a model of single characters, one of pairs, and "
    "compressors that have seen the same text?",
    quick=GPTStudyConfig(steps=1000),
    full=GPTStudyConfig(
        steps=3000, n_layer=3, n_head=4, n_embd=128, context=64, lr=4e-3, sample_bytes=1200
    ),
    run=run,
)
