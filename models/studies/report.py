"""One HTML page from the files of the studies: figures inside it, nothing loaded, works offline."""

from __future__ import annotations

import base64
import json
from html import escape
from pathlib import Path
from typing import Any

from .runner import is_finished, write_text

CSS = """
:root { color-scheme: light; --ink: #222; --soft: #5b5b5b; --line: #ddd; --blue: #0072b2; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 2rem 1.25rem 4rem; color: var(--ink);
  background: #fff;
  font: 1rem/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.4rem; line-height: 1.3; margin: 0 0 .3rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .4rem; }
header p, figcaption, .quiet { color: var(--soft); }
section { border-top: 1px solid var(--line); margin-top: 2.5rem; padding-top: 2rem; }
section > p, figcaption { max-width: 46rem; }
.headline { font-size: 1.1rem; font-weight: 600;
  border-left: .25rem solid var(--blue); padding-left: .8rem; }
figure { margin: 1.5rem 0; }
img { max-width: 100%; height: auto; display: block; }
figcaption { font-size: .92rem; margin-top: .6rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem 1.4rem .3rem 0;
  border-bottom: 1px solid var(--line); vertical-align: top; }
td { overflow-wrap: anywhere; }
pre { background: #f6f6f4; border: 1px solid var(--line); border-radius: .4rem; padding: .9rem 1rem;
  overflow-x: auto; white-space: pre-wrap;
  font: .88rem/1.5 ui-monospace, "DejaVu Sans Mono", monospace; }
details { margin: .8rem 0; }
summary { cursor: pointer; color: var(--blue); }
a { color: var(--blue); }
@media print { section { break-inside: avoid; } details { display: none; } }
"""


def build(folder: Path) -> Path:
    """Write ``folder/report.html`` from what the studies' folders in it hold; returns its path.

    Raises:
        OSError: something cannot be read or written.
        ValueError: a metrics.json is not one.
    """
    inside = sorted(path for path in folder.iterdir() if path.is_dir())
    done = [
        (path, json.loads((path / "metrics.json").read_text("utf-8")))
        for path in inside
        if is_finished(path)
    ]
    left = [path.name for path in inside if (path / "checkpoint").exists()]
    target = folder / "report.html"
    write_text(target, page(folder.name, done, left))
    return target


def page(name: str, done: list[tuple[Path, dict[str, Any]]], left: list[str]) -> str:
    """The document: ``done`` are the folders of finished studies with their metrics.json."""
    rows = [
        [
            f'<a href="#{escape(m["study"])}">{escape(m["title"])}</a>',
            escape(m["headline"]),
            clock(m),
        ]
        for _, m in done
    ]
    rows += [[escape(study), '<span class="quiet">not finished</span>', ""] for study in left]
    body = "\n".join(section(path, metrics) for path, metrics in done)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>mini_nn studies, {escape(name)}</title>
<style>{CSS}</style>
</head>
<body>
<header>
<h1>What the studies measured</h1>
<p>mini_nn, run of {escape(name)}. Every figure and number comes from the run itself.</p>
</header>
<main>
{table(["study", "result", "time"], rows)}
{body}
</main>
</body>
</html>
"""


def section(folder: Path, m: dict[str, Any]) -> str:
    """One study."""
    figure = base64.b64encode((folder / "figure.png").read_bytes()).decode()
    texts = "\n".join(
        f"<h3>{escape(title)}</h3>\n<pre>{escape(text)}</pre>" for title, text in m["texts"].items()
    )
    setting = {
        "budget": m["budget"],
        "backend": m["backend"],
        **m["config"],
        **{f"seconds, {what}": seconds for what, seconds in m["timings"].items()},
        **{f"version of {what}": number for what, number in m["versions"].items()},
        **m["machine"],
        "finished": m["finished"],
    }
    return f"""<section id="{escape(m["study"])}">
<h2>{escape(m["title"])}</h2>
<p>{escape(m["about"])}</p>
<p class="headline">{escape(m["headline"])}</p>
<figure>
<img src="data:image/png;base64,{figure}" alt="Figure: {escape(m["headline"])}">
<figcaption>{escape(m["caption"])}</figcaption>
</figure>
{pairs(m["metrics"])}
{texts}
<details>
<summary>How it was run</summary>
{pairs(setting)}
</details>
</section>"""


def pairs(values: dict[str, Any]) -> str:
    """A table of names and values."""
    return table(
        None, [[escape(name.replace("_", " ")), show(value)] for name, value in values.items()]
    )


def table(head: list[str] | None, rows: list[list[str]]) -> str:
    """A table of cells that are HTML already."""
    heading = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head or [])
    top = f"<thead><tr>{heading}</tr></thead>\n" if head else ""
    body = "\n".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table>\n{top}<tbody>\n{body}\n</tbody></table></div>'


def show(value: Any) -> str:
    """A value as HTML text: numbers short, missing ones as a dash."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return escape(str(value))
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def clock(m: dict[str, Any]) -> str:
    """How long a study took."""
    return seconds(m["timings"]["total"])


def seconds(duration: float) -> str:
    """A duration for people."""
    return f"{duration:.1f} s" if duration < 100 else f"{duration / 60:.1f} min"
