"""``python -m tests.benchmarks [NAME ...] [--json] [--threads 1 2] [--rounds N]``.

Each implementation runs in a process of its own, which builds the workload once and then does one
unit of work whenever it is told to.  The parent tells ours and the peer's in turn (A B A B …), so a
machine whose speed drifts slows both, and quotes the median of the paired ratios (ours ÷ peer;
below 1 we are faster) with the median of each.  With one thread the clock is the process's own CPU
time, which other load on the machine does not touch; with more it is the wall clock.

A peer that is not installed is named as such and never guessed.  With ``--json`` each row is one
object on a line: workload, peer, ratio, threads, ours, theirs and their unit.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import Any

from .workloads import FIGURES, OURS, PACKAGES, WORKLOADS, Workload


@dataclass
class Row:
    """One comparison: medians of both sides and the median of the paired ratios."""

    workload: str
    peer: str
    threads: int
    ratio: float | None
    ours: float | None
    theirs: float | None
    unit: str
    note: str = ""


class Worker:
    """A process that holds one implementation of a workload and runs it when told to."""

    def __init__(self, workload: str, implementation: str, threads: int) -> None:
        environment = dict(os.environ)
        for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
            environment[name] = str(threads)
        command = [sys.executable, "-m", "tests.benchmarks.worker", workload, implementation]
        self.process = subprocess.Popen(
            [*command, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        if self._answer() != "ready":
            raise RuntimeError(f"{implementation} could not build {workload}")

    def _answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def measure(self) -> float:
        """One unit of work; the figure it reports."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        answer = self._answer()
        if not answer:
            raise RuntimeError("a worker ended before it had measured: see its error above")
        return float(answer)

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def compare(workload: Workload, peer: str, threads: int, rounds: int) -> Row:
    """Measure ours and one peer in turn."""
    if peer in FIGURES:
        worker = Worker(workload.name, peer, threads)
        try:
            figures = [worker.measure() for _ in range(rounds + workload.warmup)]
        finally:
            worker.close()
        figure = statistics.median(figures[workload.warmup :])
        return Row(workload.name, peer, threads, figure, figure, 1.0, FIGURES[peer])
    package = "mini_nn" if peer in OURS else PACKAGES.get(peer, peer)
    if importlib.util.find_spec(package) is None:
        missing = f"{package} is not installed"
        return Row(workload.name, peer, threads, None, None, None, workload.unit, missing)
    ours, theirs = (Worker(workload.name, who, threads) for who in ("mini_nn", peer))
    try:
        pairs = [(ours.measure(), theirs.measure()) for _ in range(rounds + workload.warmup)]
    finally:
        ours.close()
        theirs.close()
    pairs = pairs[workload.warmup :]
    ratio = statistics.median(a / b for a, b in pairs)
    mine, other = (statistics.median(side) for side in zip(*pairs, strict=True))
    return Row(workload.name, peer, threads, ratio, mine, other, workload.unit)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(WORKLOADS)}")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--threads", type=int, nargs="+", default=None, help="default: 1 and 2")
    parser.add_argument("--rounds", type=int, default=None, help="pairs per row")
    arguments = parser.parse_args(argv)
    unknown = [name for name in arguments.names if name not in WORKLOADS]
    if unknown:
        parser.error(f"no workload {', '.join(unknown)}: choose from {', '.join(WORKLOADS)}")
    return arguments


def _show(row: Row) -> str:
    if row.ratio is None:
        return f"{row.workload:24} {row.peer:13} {row.threads:7}  {row.note}"
    assert row.ours is not None and row.theirs is not None
    sides = f"{row.ours:12.4g} {row.theirs:12.4g} {row.unit}"
    return f"{row.workload:24} {row.peer:13} {row.threads:7} {row.ratio:8.3f} {sides}"


def main(argv: list[str] | None = None) -> None:
    """Run the workloads that were named, or all, and print a row for each peer."""
    arguments = _parse(argv)
    if not arguments.json:
        print(
            f"{'workload':24} {'peer':13} {'threads':>7} {'ratio':>8} {'ours':>12} {'theirs':>12}"
        )
    for name in arguments.names or WORKLOADS:
        workload = WORKLOADS[name]
        for threads in arguments.threads or workload.threads:
            for peer in workload.peers:
                row = compare(workload, peer, threads, arguments.rounds or workload.rounds)
                fields: dict[str, Any] = asdict(row)
                print(json.dumps(fields) if arguments.json else _show(row), flush=True)


if __name__ == "__main__":
    main()
