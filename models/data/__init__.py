"""The real data that ships with the repository; README.md beside it names sources and licences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent

CORPORA = {
    "shakespeare": ("king-lear.txt", "hamlet.txt"),
    "hamlet": ("hamlet.txt",),
    "king-lear": ("king-lear.txt",),
}
"""The files of each corpus, in the order in which they are joined."""


def corpus(name: str = "shakespeare") -> bytes:
    """A text as bytes: one of ``CORPORA``, or ``"python"``, the language reference inside Python.

    Raises:
        ValueError: no corpus has that name.
    """
    if name == "python":  # 0.7 MB of Python source: imported only where it is asked for
        from pydoc_data.topics import topics

        return "\n\n".join(topics[topic].strip("\n") for topic in sorted(topics)).encode()
    if name not in CORPORA:
        raise ValueError(f"no corpus {name!r}: choose one of {', '.join([*CORPORA, 'python'])}")
    return b"".join((FOLDER / file).read_bytes() for file in CORPORA[name])


def nuclei() -> tuple[Any, Any]:
    """A micrograph of cell nuclei and who is who in it: host arrays, both (512, 512) uint8.

    Returns:
        The brightness, 0 … 235, and the number of the nucleus that a pixel belongs to: 1 … 125, or
        0 for the background.
    """
    with np.load(FOLDER / "nuclei.npz", allow_pickle=False) as file:
        return file["image"], file["labels"]


def split(text: bytes, validation: float = 0.1) -> tuple[bytes, bytes]:
    """The text cut by position: what trains, and the last part, which validates.

    The validation part has ``validation * len(text)`` bytes, rounded down.

    Raises:
        ValueError: ``validation`` is not between 0 and 1, or one of the parts is empty.
    """
    if not 0.0 < validation < 1.0:
        raise ValueError(f"the part that validates is between 0 and 1, got {validation}")
    cut = len(text) - int(len(text) * validation)
    if not 0 < cut < len(text):
        raise ValueError(f"{len(text)} bytes cannot be split: {validation} of them is nothing")
    return text[:cut], text[cut:]
