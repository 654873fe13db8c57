"""Runnable experiments: each file here that defines ``STUDY`` is one, and nothing else lists them.

A study is a function from a config to metrics and a figure::

    @dataclass(frozen=True, kw_only=True)
    class DiceConfig(Config):
        sides: int = 6

    def run(config: DiceConfig, session: Session) -> Result:
        ...
        return Result(headline="…", metrics={"mean": mean}, figure=figure, caption="…")

    STUDY = Study("dice", "What dice do", "…", quick=DiceConfig(steps=100), full=…, run=run)

``gpt.py`` is the one to copy.  What is not a study: ``base`` (these types), ``session`` (log,
progress, interruption), ``runner`` (files), ``report`` (the page), ``plot`` (how figures look),
``baselines`` (what text costs without a network).
"""

from .base import Config, Result, Study, StudyError, discover
from .session import Loop, Session

__all__ = ["Config", "Loop", "Result", "Session", "Study", "StudyError", "discover"]
