"""What a study is, and how the files of this folder are found."""

from __future__ import annotations

import pkgutil
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .session import Session


class StudyError(Exception):
    """Something that whoever started a study can put right; its text is one line."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """What every config has; a study adds fields of its own, of types that JSON knows.

    Args:
        steps: how much work is done, at least 1; of training, the number of optimiser steps.
        seed: of every random number.
    """

    steps: int
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a study found.

    Args:
        headline: one line that states it, for the table.
        metrics: numbers (or short strings) by name; the name ends in the unit where it has one.
        figure: drawn with ``plot.figure``.
        caption: says what the figure shows and how it was measured, for someone who sees it alone.
        series: what was drawn, by name, of types that JSON knows.
        texts: longer pieces by title, such as a sample.
    """

    headline: str
    metrics: dict[str, float | int | str]
    figure: Figure
    caption: str
    series: dict[str, Any] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """One experiment.

    Args:
        name: what it is called on the command line: lower-case letters, digits and ``_``.
        title: one line.
        about: a paragraph: the question, and how it is answered.
        quick: the config of the tour, ≤ 30 s on 2 cores.
        full: the same with more work, ≤ 3 minutes, whose figure the docs show.
        run: the experiment.

    Raises:
        ValueError: the name cannot be one, or the configs are not of one class derived from Config.
    """

    name: str
    title: str
    about: str
    quick: Config
    full: Config
    run: Callable[[Any, Session], Result]

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", self.name):
            raise ValueError(
                f"a study's name has lower-case letters, digits and _, got {self.name!r}"
            )
        for config in (self.quick, self.full):
            if not isinstance(config, Config) or type(config) is not type(self.quick):
                raise ValueError(
                    f"both configs are of one class derived from Config, got {config!r:.80}"
                )


def discover(package: ModuleType) -> dict[str, Study]:
    """The studies of a package by name: the ``STUDY`` of each of its modules that has one.

    Raises:
        StudyError: a module cannot be imported, its ``STUDY`` is no Study, or a name is taken.
    """
    found: dict[str, Study] = {}
    for module_info in pkgutil.iter_modules(package.__path__):
        name = f"{package.__name__}.{module_info.name}"
        try:
            study = getattr(import_module(name), "STUDY", None)
        except Exception as error:  # whatever a file raises, the user needs its name
            raise StudyError(
                f"{name} cannot be imported: {type(error).__name__}: {error}"
            ) from error
        if study is None:
            continue
        if not isinstance(study, Study):
            raise StudyError(f"{name}.STUDY is a {type(study).__name__}, not a Study")
        if study.name in found:
            raise StudyError(f"two studies are called {study.name!r}; the second is {name}")
        found[study.name] = study
    return found
