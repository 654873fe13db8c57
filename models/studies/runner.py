"""Runs studies and writes what they found, where an interruption at any moment leaves it whole.

::

    <out>/<date>/report.html
    <out>/<date>/<study>/metrics.json, figure.png, log
    <out>/<date>/<study>/checkpoint/        only until the study is finished
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import platform
import shutil
import sys
import traceback
from dataclasses import asdict, dataclass
from datetime import date, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import mini_nn
from mini_nn import backend

from .base import Config, Result, Study, StudyError
from .session import Session

NEEDED = ("matplotlib", "tqdm", "safetensors")
SHOWN = ("numpy", "scipy", *NEEDED)


@dataclass(frozen=True)
class Outcome:
    """How a run ended: ``status`` is finished, interrupted or failed."""

    study: Study
    status: str
    folder: Path
    seconds: float
    headline: str


def need_packages() -> None:
    """Raise StudyError if a package that every study uses is missing."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise StudyError(
            f"the studies need {' and '.join(missing)}: pip install 'mini-nn[studies]' "
            "(in a clone: pip install -e '.[studies]')"
        )


def new_folder(out: Path) -> Path:
    """Make and return ``out/<date>``, with -2, -3 … where that exists: nothing is overwritten.

    Raises:
        StudyError: it cannot be made.
    """
    today, count = date.today().isoformat(), 1
    try:
        out.mkdir(parents=True, exist_ok=True)
        while True:
            folder = out / (today if count == 1 else f"{today}-{count}")
            try:
                folder.mkdir()
            except FileExistsError:
                count += 1
            else:
                return folder
    except OSError as problem:
        raise StudyError(
            f"cannot write to the folder {out} ({problem.strerror}): choose another with --out"
        ) from None


def old_folder(folder: Path) -> Path:
    """``folder`` if results can be written there.

    Raises:
        StudyError: it does not exist or cannot be written to.
    """
    if not folder.is_dir():
        raise StudyError(f"there is no folder {folder} to resume from")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise StudyError(f"cannot write to the folder {folder}")
    return folder


def is_finished(folder: Path) -> bool:
    """Whether a study's folder holds a result."""
    return (folder / "metrics.json").exists() and not (folder / "checkpoint").exists()


def unfinished(study: Study, folder: Path) -> tuple[Config, dict[str, Any]]:
    """The config and the other settings of the run that was interrupted in a study's folder.

    Raises:
        StudyError: there is none, it is finished, or it does not fit the study as it is now.
    """
    if is_finished(folder):
        raise StudyError(f"{study.name} is finished in {folder}: there is nothing to resume")
    path = folder / "checkpoint" / "run.json"
    try:
        settings = json.loads(path.read_text("utf-8"))
        fields = settings.pop("config").items()
        config = {name: tuple(v) if isinstance(v, list) else v for name, v in fields}
        return type(study.quick)(**config), settings
    except FileNotFoundError:
        raise StudyError(f"{folder} holds no interrupted run of {study.name}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        raise StudyError(f"{path} does not fit the study {study.name} ({problem})") from None


def execute(study: Study, config: Config, folder: Path, chosen: dict[str, str]) -> Outcome:
    """Run a study, or go on with it where ``folder`` holds an interrupted run of it.

    An error in the study becomes an Outcome whose traceback is in the log.

    Args:
        study, config: what to run.
        folder: for its files; its parent exists.
        chosen: ``backend``, its name, and ``budget``: quick, full or custom, for the reader.
    """
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir(parents=True, exist_ok=True)
    session = Session(study.name, folder)
    settings = {**chosen, "config": asdict(config)}
    write_text(checkpoint / "run.json", to_json(settings))
    session.log(f"{chosen['budget']} budget on {chosen['backend']}: {config}")
    status, headline = "finished", ""
    try:
        with backend.using(chosen["backend"]), session.interruptible():
            mini_nn.manual_seed(config.seed)
            result = study.run(config, session)
            save_figure(result, folder / "figure.png")
            write_metrics(study, settings, result, session)
        headline = result.headline
        session.log(headline)
        shutil.rmtree(checkpoint)
    except KeyboardInterrupt:
        status, headline = "interrupted", "interrupted"
    except Exception as error:  # of any kind: the other studies of the tour still run
        line = f"{type(error).__name__}: {error}".splitlines()[0]
        status, headline = "failed", f"failed: {line}"
        session.log(traceback.format_exc())
    return Outcome(study, status, folder, session.clock()["total"], headline)


def write_metrics(study: Study, settings: dict[str, Any], result: Result, session: Session) -> None:
    """Write metrics.json: all numbers, and all that is needed to get them again."""
    content = {
        "study": study.name,
        "title": study.title,
        "about": study.about,
        "headline": result.headline,
        "metrics": result.metrics,
        "seed": settings["config"]["seed"],
        **settings,
        "timings": {name: round(seconds, 3) for name, seconds in session.clock().items()},
        "finished": datetime.now().isoformat(" ", "seconds"),
        "versions": versions(),
        "machine": {"platform": platform.platform(), "cores": os.cpu_count()},
        "caption": result.caption,
        "series": result.series,
        "texts": result.texts,
    }
    write_text(session.folder / "metrics.json", to_json(content))


def save_figure(result: Result, path: Path) -> None:
    """Write a PNG."""
    aside = path.with_name(f".{path.name}.tmp")
    result.figure.savefig(aside, format="png", metadata={"Software": None})
    aside.replace(path)


def versions() -> dict[str, str]:
    """What ran: Python, mini_nn and the packages below them."""
    found = {"python": sys.version.split()[0], "mini_nn": mini_nn.__version__}
    for name in SHOWN:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


def to_json(value: Any) -> str:
    """Indented JSON; numbers that JSON lacks (inf, nan) become null."""
    return json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_text(path: Path, text: str) -> None:
    """Write a file so that its name leads to the old text or to all of the new one."""
    aside = path.with_name(f".{path.name}.tmp")
    with aside.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
