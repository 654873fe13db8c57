"""The command line: what it writes, what it refuses, and that Ctrl-C costs nothing."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from models import __main__ as program
from models.studies import Config, Result, Session, Study, gpt, plot, report, runner

ROOT = Path(__file__).parents[2]
TINY = replace(
    gpt.STUDY.quick,
    steps=40,
    n_layer=1,
    n_head=2,
    n_embd=8,
    context=8,
    batch=4,
    evaluations=4,
    sample_bytes=20,
    corpus="hamlet",
)


def study(name: str = "tiny", **changes: Any) -> dict[str, Study]:
    """The GPT study, made to take a second."""
    title = "Does <b>small</b> & quick do?"
    made = replace(gpt.STUDY, name=name, title=title, quick=TINY, full=replace(TINY, steps=50))
    return {name: replace(made, **changes)}


def coin(config: Config, session: Session) -> Result:
    """A study that costs nothing."""
    figure, _ = plot.figure(size=(1.0, 1.0))
    return Result(headline="heads", metrics={"heads": 1}, figure=figure, caption="Nothing.")


def coins(*names: str) -> dict[str, Study]:
    """Studies that cost nothing."""
    made = replace(gpt.STUDY, quick=Config(steps=1), full=Config(steps=2), run=coin)
    return {name: replace(made, name=name) for name in names}


def broken(config: Any, session: Session) -> Any:
    raise RuntimeError("the first line\nand a second")


def call(*argv: str | Path, studies: dict[str, Study] | None = None) -> int:
    """The exit code of a command line."""
    try:
        return program.main([str(word) for word in argv], study() if studies is None else studies)
    except SystemExit as end:  # argparse
        return int(end.code or 0)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one run that nothing disturbed."""
    out = tmp_path_factory.mktemp("out")
    assert call("run", "tiny", "--out", out, "--seed", "7", "--steps", "6") == 0
    return next(out.iterdir())


# what is written


def test_a_run_leaves_these_files_and_no_others(finished: Path) -> None:
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", finished.name)
    assert {path.name for path in finished.iterdir()} == {"report.html", "tiny"}
    names = {path.name for path in (finished / "tiny").iterdir()}
    assert names == {"metrics.json", "figure.png", "log"}
    assert (finished / "tiny" / "figure.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert "step 6, training" in (finished / "tiny" / "log").read_text("utf-8")


def test_metrics_hold_the_numbers_and_all_that_made_them(finished: Path) -> None:
    m = json.loads((finished / "tiny" / "metrics.json").read_text("utf-8"))
    assert (m["study"], m["seed"], m["budget"]) == ("tiny", 7, "custom")
    assert m["config"]["steps"] == 6
    assert m["config"]["seed"] == 7
    assert {"python", "mini_nn", "numpy", "matplotlib"} <= set(m["versions"])
    assert {"training", "evaluation", "total"} <= set(m["timings"])
    for name in ("validation", "unigram", "bigram", "gzip"):
        assert 0.5 < m["metrics"][f"{name}_bits_per_character"] < 8.5
    assert m["metrics"]["bytes_per_second"] > 0
    assert m["metrics"]["bytes_seen"] == 6 * 4 * 8
    assert [row["step"] for row in m["series"]["history"]] == [2, 3, 4, 6]


class Page(HTMLParser):
    """Collects what could go wrong in a page: tags, links, sources, ids."""

    EMPTY = ("meta", "img", "br", "link", "hr")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def values(self, name: str) -> list[str]:
        return [value for key, value in self.attributes if key == name]


def test_the_report_is_one_whole_page_that_loads_nothing(finished: Path) -> None:
    text = (finished / "report.html").read_text("utf-8")
    page = Page(text)
    assert text.startswith("<!DOCTYPE html>")
    assert {"html", "title", "main", "section", "figure", "figcaption", "pre"} <= set(page.seen)
    assert page.seen.count("img") == 1
    assert not {"script", "link", "iframe"} & set(page.seen)
    assert all(source.startswith("data:image/png;base64,") for source in page.values("src"))
    assert all(page.values("alt"))
    for outside in ("http://", "https://", "@import", "url("):
        assert outside not in text
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    assert {link.removeprefix("#") for link in page.values("href")} == set(ids)
    assert "Does &lt;b&gt;small&lt;/b&gt; &amp; quick do?" in text


def test_a_page_that_loads_something_would_be_noticed() -> None:
    with pytest.raises(AssertionError):
        Page("<p><b>bad nesting</p></b>")
    assert Page('<img src="https://x.test/a.png">').values("src") == ["https://x.test/a.png"]


def test_the_page_can_be_written_again(finished: Path) -> None:
    before = (finished / "report.html").read_text("utf-8")
    (finished / "report.html").unlink()
    assert call("report", finished) == 0
    assert (finished / "report.html").read_text("utf-8") == before


def test_a_run_prints_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("run", "tiny", "--out", tmp_path, studies=coins("tiny")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["study", "result", "time", "files"]
    assert lines[2].startswith("tiny ")
    assert "  heads  " in lines[2]
    assert lines[3] == f"report: {next(tmp_path.iterdir()) / 'report.html'}"


def test_the_tour_runs_every_study_on_its_quick_budget(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("--out", tmp_path, studies=coins("one", "two")) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:4]] == ["one", "two"]
    folder = next(tmp_path.iterdir())
    settings = [
        json.loads((folder / n / "metrics.json").read_text("utf-8")) for n in ("one", "two")
    ]
    assert [m["budget"] for m in settings] == ["quick", "quick"]
    assert Page((folder / "report.html").read_text("utf-8")).values("id") == ["one", "two"]


def test_full_is_the_other_config(tmp_path: Path) -> None:
    studies = coins("tiny")
    assert call("--out", tmp_path, "run", "tiny", "--full", studies=studies) == 0
    m = json.loads((next(tmp_path.iterdir()) / "tiny" / "metrics.json").read_text("utf-8"))
    assert (m["budget"], m["config"]["steps"]) == ("full", 2)


def test_the_seed_decides_the_bits_and_nothing_is_overwritten(tmp_path: Path) -> None:
    for seed in (1, 1, 2):
        assert call("run", "tiny", "--steps", "2", "--out", tmp_path, "--seed", f"{seed}") == 0
    folders = sorted(tmp_path.iterdir())
    assert [folder.name[10:] for folder in folders] == ["", "-2", "-3"]
    first, same, other = (digest(folder) for folder in folders)
    assert first == same != other


def digest(folder: Path) -> str:
    content = json.loads((folder / "tiny" / "metrics.json").read_text("utf-8"))
    return str(content["metrics"]["weights_sha256"])


def test_list_names_the_studies(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("list") == 0
    assert "tiny   Does <b>small</b> & quick do?  40           50" in capsys.readouterr().out


def test_numbers_that_json_lacks_become_null() -> None:
    text = runner.to_json({"a": float("nan"), "b": [float("inf"), 1.5], "c": (1, "ü")})
    assert json.loads(text) == {"a": None, "b": [None, 1.5], "c": [1, "ü"]}
    assert report.show(None) == "–"


# what is refused


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["run", "tini"], "no study 'tini': did you mean tiny? there are tiny"),
        (["run"], "the following arguments are required: NAME"),
        (["walk"], "invalid choice: 'walk'"),
        (["run", "tiny", "--steps", "-5"], "a number of steps is a whole number from 1 on"),
        (["run", "tiny", "--steps", "0"], "a number of steps is a whole number from 1 on"),
        (["run", "tiny", "--steps", "1e3"], "got '1e3'"),
        (["--seed", "-1"], "a seed is a whole number from 0 on"),
        (["run", "tiny", "--backend", "abacus"], "no backend 'abacus': choose one of"),
        (["--backend", "abacus"], "no backend 'abacus': choose one of"),
        (["run", "tiny", "--fast"], "unrecognized arguments: --fast"),
        (["run", "tiny", "--resume", "nowhere"], "there is no folder nowhere"),
        (["run", "tiny", "--resume", "."], "holds no interrupted run of tiny"),
        (["run", "tiny", "--resume", ".", "--seed", "0", "--full"], "leave out --seed, --full"),
        (["report", "."], "holds no results"),
        (["run", "tiny", "--out", "file"], "cannot write to the folder file"),
        (["--out", "file/inside"], "cannot write to the folder file/inside"),
    ],
)
def test_wrong_use_gets_one_line_and_exit_code_2(
    argv: list[str],
    complaint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    assert call(*argv) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("python -m models: ")
    assert printed.err.count("\n") == 1
    assert complaint in printed.err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_without_permission_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)  # root may write anywhere
    assert call("run", "tiny", "--out", tmp_path / "x") == 2
    assert "cannot write to the folder" in capsys.readouterr().err


def test_a_missing_package_is_named_with_what_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runner, "NEEDED", ("json", "tqdm_of_tomorrow"))
    assert call("--out", tmp_path) == 2
    assert "need tqdm_of_tomorrow: pip install 'mini-nn[studies]'" in capsys.readouterr().err


def test_a_finished_run_cannot_be_resumed(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("run", "tiny", "--resume", finished) == 2
    assert "nothing to resume" in capsys.readouterr().err


def test_a_study_that_fails_leaves_the_others_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    studies = study("bad", run=broken) | coins("good")
    assert call("--out", tmp_path, studies=studies) == 1
    printed = capsys.readouterr()
    assert "failed: RuntimeError: the first line\n" not in printed.out  # more columns follow it
    assert "failed: RuntimeError: the first line " in printed.out
    assert "bad failed: see" in printed.err
    folder = next(tmp_path.iterdir())
    assert "and a second" in (folder / "bad" / "log").read_text("utf-8")
    assert runner.is_finished(folder / "good")
    assert "not finished" in (folder / "report.html").read_text("utf-8")


# interruptions


def test_a_tour_goes_on_where_it_was_interrupted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[str] = []

    def counted(name: str, interrupts: int = 0) -> Callable[[Any, Session], Any]:
        def run(config: Any, session: Session) -> Any:
            calls.append(name)
            if calls.count(name) <= interrupts:
                raise KeyboardInterrupt
            return coin(config, session)

        return run

    studies: dict[str, Study] = {}
    for name, interrupts in (("a", 0), ("b", 1), ("c", 0)):
        studies[name] = replace(coins(name)[name], run=counted(name, interrupts))
    assert call("--seed", "4", "--out", tmp_path, studies=studies) == 130
    again = capsys.readouterr().err.splitlines()[-1].strip()
    assert again == f"python -m models --seed=4 --resume {next(tmp_path.iterdir())}"
    assert call(*shlex.split(again)[3:], studies=studies) == 0
    assert calls == ["a", "b", "b", "c"]
    folder = next(tmp_path.iterdir())
    metrics = [json.loads((folder / n / "metrics.json").read_text("utf-8")) for n in "abc"]
    assert [m["seed"] for m in metrics] == [4, 4, 4]


CHILD = """
import sys, time
from models.__main__ import main
from models.studies import Loop
from tests.models.test_main import study

if "--slowly" in sys.argv:  # gives the signal time to arrive in the middle
    sys.argv.remove("--slowly")
    record = Loop.record
    Loop.record = lambda self, **row: (record(self, **row), time.sleep(1.0))
sys.exit(main(sys.argv[1:], study()))
"""


def child(*argv: str | Path) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name != "MINI_NN_BACKEND"}
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, *map(str, argv)],
        cwd=ROOT,
        env={**environment, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_ctrl_c_says_how_to_resume_and_the_resumed_run_ends_with_the_same_bits(
    tmp_path: Path,
) -> None:
    whole = child("run", "tiny", "--seed", "3", "--out", tmp_path / "whole")
    cut = child("run", "tiny", "--seed", "3", "--out", tmp_path / "cut", "--slowly")
    deadline = time.monotonic() + 60.0
    while not any("step 10," in log.read_text() for log in tmp_path.glob("cut/*/tiny/log")):
        assert time.monotonic() < deadline
        assert cut.poll() is None, cut.stderr and cut.stderr.read()
        time.sleep(0.01)
    cut.send_signal(signal.SIGINT)
    _, errors = cut.communicate(timeout=60)
    assert cut.returncode == 130, errors
    assert "Traceback" not in errors
    again = errors.splitlines()[-1].strip()
    folder = next((tmp_path / "cut").iterdir())
    assert again == f"python -m models run tiny --resume {folder}"
    assert not (folder / "tiny" / "metrics.json").exists()
    assert "not finished" in (folder / "report.html").read_text("utf-8")

    resumed = child(*shlex.split(again)[3:])
    _, errors = resumed.communicate(timeout=60)
    assert resumed.returncode == 0, errors
    _, errors = whole.communicate(timeout=60)
    assert whole.returncode == 0, errors
    both = [next((tmp_path / name).iterdir()) for name in ("whole", "cut")]
    assert digest(both[0]) == digest(both[1])
    ends = [json.loads((f / "tiny" / "metrics.json").read_text("utf-8")) for f in both]
    for m in ends:
        del m["metrics"]["bytes_per_second"], m["timings"], m["finished"]
    assert ends[0] == ends[1]
    assert "resumed after step 1" in (folder / "tiny" / "log").read_text("utf-8")
    assert not (folder / "tiny" / "checkpoint").exists()


def test_listing_needs_neither_matplotlib_nor_tqdm() -> None:
    source = (
        "import sys; sys.modules.update(matplotlib=None, tqdm=None, safetensors=None)\n"
        "from models.__main__ import main; sys.exit(main(['list']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "gpt" in done.stdout


def test_python_m_models_is_the_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "models", "run", "gtp"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("python -m models: no study 'gtp': did you mean gpt?")
    assert done.stderr.count("\n") == 1
