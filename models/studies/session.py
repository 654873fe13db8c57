"""What a running study is given: a log, a clock, and loops that survive an interruption."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from mini_nn import Rng, io

SAVE_EVERY = 10.0
"""Seconds between two savings of a loop's state, which a killed process loses at most."""


class Session:
    """One run of one study in one folder.

    Args:
        name: the study's, shown beside its progress.
        folder: where its files go; it exists.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder
        self.checkpoint = folder / "checkpoint"
        self.timings: dict[str, float] = {}
        self._begun = time.perf_counter()
        self._stepping = False
        self._stop = False

    def log(self, message: str) -> None:
        """Append a line to the file ``log``."""
        now = datetime.now().isoformat(" ", "seconds")
        with (self.folder / "log").open("a", encoding="utf-8") as file:
            file.write(f"{now}  {message}\n")

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Add the time that the block takes to ``timings[what]``, in seconds."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.timings[what] = self.timings.get(what, 0.0) + time.perf_counter() - begun

    def clock(self) -> dict[str, float]:
        """The timings and, as ``total``, all the time spent, in earlier sittings too; seconds."""
        now = time.perf_counter()
        total = self.timings.get("total", 0.0) + now - self._begun
        return {**self.timings, "total": total}

    def go_on(self, clock: dict[str, float]) -> None:
        """Count from what an earlier sitting's ``clock`` said."""
        self.timings = {key: max(self.timings.get(key, 0.0), clock[key]) for key in clock}
        self._begun = time.perf_counter()

    def loop(
        self,
        total: int,
        model: io.Stateful,
        optimizer: io.Stateful | None = None,
        *,
        name: str = "training",
        rngs: Mapping[str, Rng] | None = None,
        schedule: io.Stateful | None = None,
        ema: io.Stateful | None = None,
    ) -> Loop:
        """A loop over ``total`` steps; see ``Loop``.

        Args:
            total: at least 1.
            model, optimizer, rngs, schedule, ema: all that a step changes, as for
                ``mini_nn.io.save_training``.
            name: tells the loops of one study apart.

        Raises:
            ValueError: the state that an interrupted run left does not fit.
        """
        parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "ema": ema}
        return Loop(self, name, total, {**parts, "rngs": rngs or {}})

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Inside the block Ctrl-C lets a loop end its step and save before KeyboardInterrupt.

        Outside loops, and the second time, it interrupts at once.
        """

        def stop(signum: int, frame: Any) -> None:
            if not self._stepping or self._stop:
                raise KeyboardInterrupt
            self._stop = True
            os.write(2, b"\nstopping after this step; Ctrl-C again stops at once\n")

        if threading.current_thread() is not threading.main_thread():  # where signals are not heard
            yield
            return
        before = signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


class Loop:
    """Iterates over the numbers of the steps that are left, with a progress bar.

    Between two steps it saves now and then all it was given, and restores it when an interrupted
    run is resumed: steps, generators and ``history`` go on as if nothing had happened.

    Attributes:
        start: the number of steps that were taken before.
        history: the rows that ``record`` was given so far.
    """

    def __init__(self, session: Session, name: str, total: int, parts: dict[str, Any]) -> None:
        self.session = session
        self.total = total
        self.start = 0
        self.history: list[dict[str, float]] = []
        self._name = name
        self._parts = parts
        self._path = session.checkpoint / f"{name}.safetensors"
        self._note = ""
        if self._path.exists():
            progress = io.load_training(self._path, **parts)
            self.start = progress.step
            self.history = progress.extra["history"]
            session.go_on(progress.extra["clock"])
            session.log(f"{name}: resumed after step {self.start} of {total}")

    def __iter__(self) -> Iterator[int]:
        from tqdm import tqdm

        session, saved = self.session, time.monotonic()
        with tqdm(
            total=self.total,
            initial=self.start,
            desc=session.name if self._name == "training" else f"{session.name} {self._name}",
            unit="step",
            mininterval=0.3 if sys.stderr.isatty() else 5.0,
        ) as bar:
            try:
                for step in range(self.start, self.total):
                    session._stepping = True
                    yield step
                    bar.set_postfix_str(self._note, refresh=False)
                    bar.update()
                    last = step + 1 == self.total
                    if session._stop or last or time.monotonic() - saved > SAVE_EVERY:
                        self._save(step + 1)
                        saved = time.monotonic()
                    if session._stop:
                        session.log(
                            f"{self._name}: interrupted after step {step + 1} of {self.total}"
                        )
                        raise KeyboardInterrupt
            finally:
                session._stepping = False

    def record(self, **row: float) -> None:
        """Keep a row of numbers in ``history``, log it, and show it beside the progress bar."""
        self.history.append(row)
        self._note = ", ".join(
            f"{name} {value:.4g}" for name, value in row.items() if name != "step"
        )
        values = ", ".join(f"{name} {value:.6g}" for name, value in row.items())
        self.session.log(values if self._name == "training" else f"{self._name}: {values}")

    def _save(self, step: int) -> None:
        self.session.checkpoint.mkdir(exist_ok=True)
        extra = {"history": self.history, "clock": self.session.clock()}
        io.save_training(self._path, step=step, extra=extra, **self._parts)
