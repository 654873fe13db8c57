"""The parts of the studies: baselines against loops, the GPT study's sums, loops that resume."""

from __future__ import annotations

import math
import os
import signal
import sys
import textwrap
import threading
from dataclasses import asdict, dataclass, replace
from importlib import import_module, invalidate_caches
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import models.studies
from mini_nn import Rng, nn, ops, optim
from models import data
from models.gpt import GPT
from models.studies import (
    Config,
    Session,
    Study,
    StudyError,
    baselines,
    discover,
    gpt,
    plot,
    session,
)
from models.studies import text as texts
from tests.support import assert_close, host

TEXTS = st.binary(min_size=2, max_size=40).map(lambda text: bytes(b % 5 + 97 for b in text))
TINY = gpt.GPTStudyConfig(
    steps=8, n_layer=1, n_head=2, n_embd=8, context=6, batch=3, evaluations=2, sample_bytes=20
)


# baselines


def unigram_by_loops(train: bytes) -> dict[int, float]:
    def logarithm(alpha: float) -> float:
        total = 0.0
        for i, byte in enumerate(train):
            rest = train[:i] + train[i + 1 :]
            total += math.log((rest.count(byte) + alpha / 256) / (len(rest) + alpha))
        return total

    alpha = max(baselines.GRID, key=logarithm)
    return {b: (train.count(b) + alpha / 256) / (len(train) + alpha) for b in range(256)}


def bigram_by_loops(train: bytes) -> dict[tuple[int, int], float]:
    mean = unigram_by_loops(train)
    pairs = [*pairwise(train)]

    def probability(a: int, b: int, seen: list[tuple[int, int]], beta: float) -> float:
        after = [y for x, y in seen if x == a]
        return (after.count(b) + beta * mean[b]) / (len(after) + beta)

    def logarithm(beta: float) -> float:
        parts = enumerate(pairs)
        return sum(math.log(probability(*p, pairs[:i] + pairs[i + 1 :], beta)) for i, p in parts)

    beta = max(baselines.GRID, key=logarithm)
    return {(a, b): probability(a, b, pairs, beta) for a in range(96, 104) for b in range(96, 104)}


@given(TEXTS, TEXTS)
def test_unigram_bits_are_those_of_a_loop(train: bytes, text: bytes) -> None:
    p = unigram_by_loops(train)
    wanted = -sum(math.log2(p[b]) for b in text) / len(text)
    assert_close(baselines.unigram_bits(train, text), wanted, rtol=1e-9)


@given(TEXTS, TEXTS)
def test_bigram_bits_are_those_of_a_loop_that_starts_after_the_training_text(
    train: bytes, text: bytes
) -> None:
    p = bigram_by_loops(train)
    whole = train[-1:] + text
    wanted = -sum(math.log2(p[pair]) for pair in zip(whole, text, strict=False)) / len(text)
    assert_close(baselines.bigram_bits(train, text), wanted, rtol=1e-9)


@given(TEXTS)
def test_baselines_are_distributions(train: bytes) -> None:
    assert_close(baselines.unigram(train).sum(), 1.0, rtol=1e-12)
    assert_close(baselines.bigram(train).sum(1), np.ones(256), rtol=1e-12)
    assert baselines.bigram(train).min() > 0


@given(TEXTS, TEXTS)
def test_no_code_beats_the_entropy_of_the_text_itself(train: bytes, text: bytes) -> None:
    shares = [text.count(b) / len(text) for b in set(text)]
    entropy = -sum(share * math.log2(share) for share in shares)
    assert baselines.unigram_bits(train, text) >= entropy - 1e-9  # Gibbs' inequality


def test_the_bits_of_long_random_text_are_its_entropy() -> None:
    p = np.array([0.5, 0.25, 0.125, 0.125])
    text = bytes(np.random.default_rng(0).choice(4, 60_000, p=p).astype("uint8"))
    train, held_out = data.split(text, 0.5)
    # standard error of the mean of -log2 p over 30,000 draws: 0.0048; six of them
    for bits in (baselines.unigram_bits, baselines.bigram_bits):
        assert abs(bits(train, held_out) - 1.75) < 0.03


@pytest.mark.parametrize("name", baselines.COMPRESSORS)
def test_a_compressor_copies_what_it_has_seen_and_cannot_shrink_noise(name: str) -> None:
    noise = np.random.default_rng(0).bytes(40_000)
    train, fresh = noise[:20_000], noise[20_000:]
    assert baselines.conditional_bits(name, train, fresh) > 7.9
    if name != "bzip2":  # sorts instead of copying
        assert baselines.conditional_bits(name, train, train[:5_000]) < 0.8


def test_more_of_the_same_text_makes_every_baseline_better() -> None:
    train, held_out = data.split(data.corpus("hamlet"))
    for bits in gpt.compare, lambda a, b: {"bigram": baselines.bigram_bits(a, b)}:
        little, much = bits(train[-5_000:], held_out), bits(train, held_out)
        assert all(much[name] < little[name] for name in much)


# the GPT study


@given(st.integers(1, 40), st.integers(2, 9))
def test_each_held_out_byte_is_a_target_once_and_follows_its_input(
    count: int, context: int
) -> None:
    train, text = b"abc", bytes(range(count))
    parts = [(host(x), host(y)) for x, y in texts.windows(train, text, context)]
    assert all(x.shape == y.shape and x.shape[1] <= context for x, y in parts)
    assert [*np.concatenate([y.reshape(-1) for _, y in parts])] == [*text]
    assert [*np.concatenate([x.reshape(-1) for x, _ in parts])] == [*(train[-1:] + text[:-1])]


def test_scores_are_those_of_one_prediction_at_a_time() -> None:
    model = GPT(TINY.sizes(), Rng(1))
    train, text = b"to be, or not", b" to be: that is"
    whole, wanted = train[-1:] + text, []
    for i, byte in enumerate(text):
        start = i // TINY.context * TINY.context
        logits = host(model([[*whole[start : i + 1]]]))[0, -1].astype("float64")
        wanted.append((np.log(np.exp(logits).sum()) - logits[byte]) / math.log(2))
    assert_close(texts.score(model, train, text), np.array(wanted), rtol=1e-4)


def test_a_score_does_not_depend_on_what_comes_later() -> None:
    model = GPT(TINY.sizes(), Rng(1))
    first = texts.score(model, b"a", b"what comes")
    second = texts.score(model, b"a", b"what goes ")
    assert_close(first[:5], second[:5], rtol=0, atol=0)
    assert abs(first[5] - second[5]) > 1e-6  # the byte itself differs: the test can fail


def test_batches_are_from_the_training_text_only_and_targets_are_one_later() -> None:
    text = texts.codes(bytes(range(20)))
    config = replace(TINY, batch=2000)
    inputs, targets = (host(x) for x in texts.batches(text, config, Rng(0)))
    assert inputs.shape == targets.shape == (2000, 6)
    assert (targets == inputs + 1).all()
    assert (np.diff(inputs, axis=1) == 1).all()
    # every place but the ends is reached: missing one has probability 2000·(13/14)^2000 < 1e-60
    assert {*inputs[:, 0]} == set(range(14))


def test_bits_by_position_split_the_scores_by_what_was_visible() -> None:
    scores = np.array([9, 4, 2, 2, 1, 9, 4, 2, 2, 1, 9], dtype="float64")
    assert texts.by_position(scores, 5) == [(1, 1, 9.0), (2, 2, 4.0), (3, 4, 2.0), (5, 5, 1.0)]


def test_matrices_decay_and_vectors_do_not() -> None:
    model = GPT(TINY.sizes(), Rng(0))
    decayed, plain = texts.groups(model, 0.1)
    assert {p.ndim for p in decayed["params"]} == {2}
    assert {p.ndim for p in plain["params"]} == {1}
    assert len(decayed["params"]) + len(plain["params"]) == len([*model.parameters()])
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)


def test_a_sample_begins_with_the_prompt_and_has_the_length_asked_for() -> None:
    config = replace(TINY, prompt="HAMLET\n")
    model = GPT(config.sizes(), Rng(0))
    model.transformer.wte.weight.data[127:] = 0.0  # other bytes than ASCII become unlikely
    samples = [gpt.sample(model, config, Rng(seed)) for seed in (3, 3, 4)]
    assert samples[0].startswith("HAMLET\n")
    assert samples[0] == samples[1] != samples[2]
    assert len(samples[0]) <= 7 + 20  # a character may take several bytes


def test_the_study_learns_more_than_the_frequencies_of_letters(tmp_path: Path) -> None:
    config = replace(gpt.STUDY.quick, steps=120, lr=2e-3, evaluations=1, sample_bytes=30)
    result = gpt.STUDY.run(config, Session("gpt", tmp_path))
    bits = result.metrics
    assert bits["validation_bits_per_character"] < bits["unigram_bits_per_character"] - 0.4
    assert bits["validation_bits_per_character"] > 1.0  # less would be a leak (Shannon 1951)
    assert result.series["history"][-1]["validation"] == bits["validation_bits_per_character"]


def test_the_budgets_differ_in_work_only_where_they_say() -> None:
    quick, full = asdict(gpt.STUDY.quick), asdict(gpt.STUDY.full)
    assert quick["corpus"] == full["corpus"]
    assert full["steps"] * full["batch"] * full["context"] > quick["steps"] * quick["batch"]


def test_a_context_of_one_byte_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        replace(TINY, context=1)


# sessions and loops


class Walk:
    """A training run in small: dropout and batches draw random numbers, momentum has a memory."""

    def __init__(self, folder: Path, steps: int = 6) -> None:
        rng = Rng(3)
        self.model = nn.Sequential(nn.Linear(3, 8, rng=rng), nn.Dropout(0.3, rng=rng))
        self.model.append(nn.Linear(8, 1, rng=rng))
        self.optimizer = optim.AdamW(self.model.parameters(), lr=0.05)
        self.schedule = optim.Schedule(self.optimizer, lambda step: 1 / (1 + step))
        self.batches = Rng(5)
        self.session = Session("walk", folder)
        self.loop = self.session.loop(
            steps,
            self.model,
            self.optimizer,
            schedule=self.schedule,
            rngs={"batches": self.batches},
        )

    def go(self, stop_in: int | None = None) -> Walk:
        for step in self.loop:
            self.optimizer.zero_grad()
            loss = ops.mean(ops.square(self.model(self.batches.normal((4, 3))) - 1.0))
            loss.backward()
            if step == stop_in:
                raise KeyboardInterrupt  # between the gradient and the update: the worst moment
            self.optimizer.step()
            self.schedule.step()
            self.loop.record(step=step + 1, loss=float(host(loss.data)))
        return self

    def bits(self) -> list[bytes]:
        return [host(p.data).tobytes() for p in self.model.parameters()]


@pytest.fixture
def always_save(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "SAVE_EVERY", 0.0)


@pytest.mark.usefixtures("always_save")
@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_loop_that_was_cut_anywhere_ends_with_the_same_bits(tmp_path: Path, stop: int) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    whole = Walk(tmp_path / "whole").go()
    with pytest.raises(KeyboardInterrupt):
        Walk(tmp_path / "cut").go(stop_in=stop)
    resumed = Walk(tmp_path / "cut")
    assert resumed.loop.start == stop
    resumed.go()
    assert resumed.bits() == whole.bits()
    assert resumed.loop.history == whole.loop.history
    assert [row["step"] for row in resumed.loop.history] == [1, 2, 3, 4, 5, 6]


@pytest.mark.usefixtures("always_save")
def test_a_loop_that_forgot_its_generator_would_be_noticed(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    whole = Walk(tmp_path / "whole").go()
    with pytest.raises(KeyboardInterrupt):
        Walk(tmp_path / "cut").go(stop_in=3)
    resumed = Walk(tmp_path / "cut")
    resumed.batches.load_state_dict(Rng(5).state_dict())  # the classic bug, planted
    assert resumed.go().bits() != whole.bits()


def test_a_finished_loop_has_no_steps_left(tmp_path: Path) -> None:
    done = Walk(tmp_path).go()
    again = Walk(tmp_path)
    assert [*again.loop] == []
    assert again.bits() == done.bits()


def test_each_of_several_loops_is_named_where_it_is_shown_and_logged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    current = Session("study", tmp_path)
    for name in ("training", "other"):
        model = nn.Linear(1, 1, rng=Rng(0))
        loop = current.loop(1, model, optim.SGD(model.parameters()), name=name)
        for _ in loop:
            loop.record(loss=2.0)
    shown, logged = capsys.readouterr().err, (tmp_path / "log").read_text("utf-8")
    assert "study: 100%" in shown and "study other: 100%" in shown
    assert "  loss 2\n" in logged and "  other: loss 2\n" in logged


def test_a_loop_of_another_model_is_refused(tmp_path: Path) -> None:
    Walk(tmp_path).go()
    model = nn.Linear(2, 2, rng=Rng(0))
    with pytest.raises(ValueError, match="does not fit"):
        Session("walk", tmp_path).loop(6, model, optim.SGD(model.parameters()))


needs_signals = pytest.mark.skipif(
    threading.current_thread() is not threading.main_thread(), reason="signals need the main thread"
)


@needs_signals
def test_the_first_interrupt_lets_the_step_end_and_saves(tmp_path: Path) -> None:
    walk, seen = Walk(tmp_path), []
    with pytest.raises(KeyboardInterrupt), walk.session.interruptible():
        for step in walk.loop:
            if step == 2:
                os.kill(os.getpid(), signal.SIGINT)
            seen.append(step)
    assert seen == [0, 1, 2]
    assert Walk(tmp_path).loop.start == 3


@needs_signals
def test_the_second_interrupt_stops_at_once(tmp_path: Path) -> None:
    walk, seen = Walk(tmp_path), []
    with pytest.raises(KeyboardInterrupt), walk.session.interruptible():
        for step in walk.loop:
            for _ in range(2 * (step == 2)):
                os.kill(os.getpid(), signal.SIGINT)
            seen.append(step)
    assert seen == [0, 1]


@needs_signals
def test_outside_a_loop_an_interrupt_stops_at_once_and_the_old_handler_returns(
    tmp_path: Path,
) -> None:
    before = signal.getsignal(signal.SIGINT)
    reached = False
    with pytest.raises(KeyboardInterrupt), Session("walk", tmp_path).interruptible():
        os.kill(os.getpid(), signal.SIGINT)
        reached = True
    assert not reached
    assert signal.getsignal(signal.SIGINT) is before


def test_time_is_counted_over_all_sittings(tmp_path: Path) -> None:
    here = Session("walk", tmp_path)
    here.go_on({"training": 100.0, "total": 130.0})
    with here.timed("training"):
        pass
    clock = here.clock()
    assert 100.0 < clock["training"] < 101.0
    assert 130.0 < clock["total"] < 131.0


# what a study is, and how it is found


def study(name: str = "dice", **changes: Any) -> Study:
    made = {"quick": Config(steps=1), "full": Config(steps=2), "run": lambda config, session: None}
    return Study(name, "Dice", "What dice do.", **{**made, **changes})


@pytest.mark.parametrize("name", ["", "Dice", "two dice", "1st", "a/b", "../x"])
def test_a_name_that_cannot_be_typed_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="lower-case letters"):
        study(name)


def test_configs_are_of_one_class() -> None:
    with pytest.raises(ValueError, match="one class derived from Config"):
        study(full=TINY)
    with pytest.raises(ValueError, match="one class derived from Config"):
        study(quick={"steps": 1})


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: Any) -> Any:
    """A function that makes an importable package of the given files."""
    name = f"dropped_{abs(hash(request.node.name))}"

    def make(**files: str) -> ModuleType:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "__init__.py").touch()
        for file, source in files.items():
            (folder / f"{file}.py").write_text(textwrap.dedent(source))
        monkeypatch.syspath_prepend(tmp_path)
        invalidate_caches()
        return import_module(name)

    yield make
    for module in [module for module in sys.modules if module.partition(".")[0] == name]:
        del sys.modules[module]


DICE = """
    from models.studies import Config, Study
    STUDY = Study("dice", "Dice", "What dice do.", Config(steps=1), Config(steps=2), print)
"""


def test_a_dropped_file_is_a_study_and_a_helper_is_none(package: Any) -> None:
    found = discover(package(dice=DICE, helper="x = 1"))
    assert [*found] == ["dice"]
    assert found["dice"].full.steps == 2


def test_the_gpt_study_is_found() -> None:
    assert discover(models.studies)["gpt"] is gpt.STUDY


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({"bad": "import nowhere_to_be_found"}, r"\.bad cannot be imported: ModuleNotFoundError"),
        ({"bad": "STUDY = 3"}, r"\.bad\.STUDY is a int, not a Study"),
        ({"dice": DICE, "other": DICE}, r"two studies are called 'dice'; the second is .*\.other"),
    ],
)
def test_a_wrong_file_is_named(package: Any, files: dict[str, str], complaint: str) -> None:
    with pytest.raises(StudyError, match=complaint):
        discover(package(**files))


# figures


@dataclass
class Places:
    """Labels and the gap they need."""

    heights: list[float]
    gap: float


@given(
    st.builds(
        Places,
        st.lists(st.floats(-5, 5), min_size=1, max_size=7),
        st.floats(0.01, 2.0),
    )
)
def test_labels_are_spread_as_little_as_needed(places: Places) -> None:
    moved = plot.spread(places.heights, places.gap)
    order = sorted(range(len(moved)), key=lambda i: places.heights[i])
    ranked = [moved[i] for i in order]
    assert all(b - a >= places.gap - 1e-9 for a, b in pairwise(ranked))
    assert_close(sum(moved), sum(places.heights), rtol=0, atol=1e-6)  # pushes balance
    wanted = sorted(places.heights)
    if all(b - a >= places.gap for a, b in pairwise(wanted)):
        assert_close(np.array(moved), np.array(places.heights), rtol=0, atol=1e-9)
