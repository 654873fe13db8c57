"""The tour: ``python -m models`` runs every study on its quick budget and writes one page about it.

::

    python -m models                      all studies, quick; table, figures, report.html
    python -m models list                 what there is
    python -m models run NAME [--full]    one study (NAME ``all``: every one)
    python -m models report DIR           write DIR/report.html again

Exit codes: 0 done, 1 a study failed, 2 wrong use, 130 interrupted (it says how to resume).
"""

from __future__ import annotations

import argparse
import difflib
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, NoReturn

from mini_nn import backend

from . import studies as package
from .studies import Study, StudyError, discover, report, runner
from .studies.runner import Outcome

PROGRAM = "python -m models"

FOLDERS = ("target", "draft")
"""Options that are fields of some studies' configs."""


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{PROGRAM}: {message} (see {PROGRAM} --help)\n")


def at_least(least: int, what: str) -> Any:
    """A converter of an argument to a whole number."""

    def convert(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(
                f"{what} is a whole number from {least} on, got {text!r}"
            )
        return number

    return convert


def parser() -> Parser:
    """The command line."""
    # SUPPRESS: an option given before the command is not overwritten by the command's default
    options = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    options.add_argument(
        "--out", type=Path, metavar="DIR", help="write to DIR/<date>/ (default: runs)"
    )
    options.add_argument(
        "--seed", type=at_least(0, "a seed"), metavar="N", help="of all random numbers"
    )
    options.add_argument("--backend", metavar="NAME", help="the array library: numpy or cupy")
    options.add_argument(
        "--resume",
        type=Path,
        metavar="DIR",
        help="go on with an interrupted run in DIR (runs/<date>)",
    )
    top = Parser(
        prog=PROGRAM,
        parents=[options],
        description="Run the studies: real data in, numbers, figures and one HTML page out.",
        epilog="Without a command every study runs on its quick budget, 30 s or less on two cores.",
    )
    commands = top.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    commands.add_parser("list", help="the studies there are")
    run = commands.add_parser("run", parents=[options], help="one study, or all")
    run.add_argument("name", metavar="NAME", help="a name that `list` shows, or all")
    run.add_argument(
        "--full", action="store_true", help="minutes instead of seconds: the docs' figures"
    )
    run.add_argument(
        "--steps",
        type=at_least(1, "a number of steps"),
        metavar="N",
        help="instead of the budget's",
    )
    for name in FOLDERS:
        run.add_argument(
            f"--{name}",
            metavar="FOLDER",
            help=f"a checkpoint in GPT-2's layout, as the {name} of a study that has one",
        )
    again = commands.add_parser("report", help="write the page of a folder again")
    again.add_argument("folder", type=Path, metavar="DIR", help="runs/<date>")
    return top


def main(argv: Sequence[str] | None = None, studies: Mapping[str, Study] | None = None) -> int:
    """Run a command line; returns the exit code.

    Args:
        argv: the arguments; None for those of the process.
        studies: by name; None for those in ``models/studies``.
    """
    try:
        args = parser().parse_args(argv)
        known = discover(package) if studies is None else studies
        if args.command == "list":
            return show_list(known)
        if args.command == "report":
            return rewrite(args.folder)
        return run(args, known)
    except StudyError as problem:
        print(f"{PROGRAM}: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{PROGRAM}: interrupted; no study was running", file=sys.stderr)
        return 130


def show_list(known: Mapping[str, Study]) -> int:
    """Print the studies."""
    rows = [[s.name, s.title, f"{s.quick.steps:,}", f"{s.full.steps:,}"] for s in known.values()]
    print(aligned(["study", "title", "quick steps", "full steps"], rows))
    return 0


def rewrite(folder: Path) -> int:
    """Write a folder's report again."""
    if not folder.is_dir() or not any(runner.is_finished(path) for path in folder.iterdir()):
        raise StudyError(f"{folder} holds no results: give a folder such as runs/<date>")
    try:
        print(f"report: {report.build(folder)}")
    except (OSError, ValueError, KeyError) as problem:
        raise StudyError(f"the results in {folder} cannot be reported: {problem}") from None
    return 0


def run(args: argparse.Namespace, known: Mapping[str, Study]) -> int:
    """Run studies one after the other, then print the table and write the report."""
    given = vars(args)
    name, resume = given.get("name", "all"), given.get("resume")
    chosen = [*known.values()] if name == "all" else [pick(name, known)]
    device = known_backend(given.get("backend"))
    runner.need_packages()
    if resume is not None and name != "all":
        keys = ("seed", "steps", "backend", "out", *FOLDERS)
        settled = [key for key in keys if given.get(key) is not None]
        taken = [f"--{key}" for key in settled + ["full"] * given["full"]]
        if taken:
            raise StudyError(f"--resume goes on as it began: leave out {', '.join(taken)}")
        if resume.name == name and (resume / "checkpoint").is_dir():
            resume = resume.parent
    folder = (
        runner.old_folder(resume) if resume else runner.new_folder(given.get("out") or Path("runs"))
    )
    own = {key: given[key] for key in FOLDERS if given.get(key) is not None}
    for study, key in product(chosen, own):
        if not hasattr(study.quick, key):
            raise StudyError(f"the study {study.name} has no --{key}: leave it out")
    budget = "custom" if given.get("steps") or own else "full" if given.get("full") else "quick"
    changes = {key: given[key] for key in ("seed", "steps") if given.get(key) is not None} | own
    outcomes = []
    for study in chosen:
        place = folder / study.name
        config = replace(study.full if given.get("full") else study.quick, **changes)
        settings = {"budget": budget, "backend": device}
        if resume and (name != "all" or (place / "checkpoint").is_dir()):
            config, settings = runner.unfinished(study, place)
        elif runner.is_finished(place):
            continue
        outcome = runner.execute(study, config, place, settings)
        outcomes.append(outcome)
        if outcome.status == "interrupted":
            break
    return conclude(folder, outcomes, command(args, folder))


def pick(name: str, known: Mapping[str, Study]) -> Study:
    """The study of that name."""
    if name not in known:
        close = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise StudyError(f"no study {name!r}: {hint}there are {', '.join(known) or 'none'}")
    return known[name]


def known_backend(name: str | None) -> str:
    """The backend's name, after it has been loaded."""
    try:
        return backend.current().name if name is None else backend.get(name).name
    except (ValueError, RuntimeError) as problem:
        raise StudyError(str(problem)) from None


def command(args: argparse.Namespace, folder: Path) -> str:
    """What resumes this run."""
    given = vars(args)
    words = [PROGRAM]
    name = given.get("name", "all")
    if args.command == "run":
        words += ["run", name]
    if name == "all":  # the studies that have not begun need their options
        words += ["--full"] if given.get("full") else []
        words += [
            f"--{key}={given[key]}"
            for key in ("steps", "seed", "backend")
            if given.get(key) is not None
        ]
    return f"{' '.join(words)} --resume {shlex.quote(str(folder))}"


def conclude(folder: Path, outcomes: Sequence[Outcome], again: str) -> int:
    """Print the table, write the report, and say how to resume what was interrupted."""
    rows = [[o.study.name, o.headline, report.seconds(o.seconds), f"{o.folder}"] for o in outcomes]
    print(aligned(["study", "result", "time", "files"], rows))
    print(f"report: {report.build(folder)}")
    states = {outcome.status for outcome in outcomes}
    if "interrupted" in states:
        print(f"\ninterrupted; what was done is kept. To resume:\n    {again}", file=sys.stderr)
        return 130
    for outcome in outcomes:
        if outcome.status == "failed":
            print(f"{outcome.study.name} failed: see {outcome.folder / 'log'}", file=sys.stderr)
    return 1 if "failed" in states else 0


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in plain text."""
    lines = [head, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines
    )


if __name__ == "__main__":
    sys.exit(main())
