"""Pages: HTML that stands alone, with its style and its plots inside one file that fetches nothing.

Every function returns HTML; what it is given as text is escaped, but for the parameters named `body`. Numbers are written
with a comma between thousands and U+2212 as minus; what is missing is an en dash.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from pipelines.manifests import Check, Json

MISSING = "–"
LONG_CELL, LONG = 60, ' class="long"'
"""A text of more characters than this gets a column that is not narrower than a line of reading."""

STYLE = """
:root { color-scheme: light dark; --page: #fcfcfa; --ink: #22262b; --quiet: #656c75; --rule: #e2e2dc; --accent: #2f6690;
  --good: #2f6f44; --bad: #a8322a; }
@media (prefers-color-scheme: dark) { :root { --page: #16181b; --ink: #dcdfe3; --quiet: #989fa8; --rule: #30343a; --accent: #7fb0d6;
  --good: #7fbf92; --bad: #ee8f86; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; padding: 3rem 1.25rem 5rem; max-width: 62rem; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
p, ul, ol, header { max-width: 44rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .3rem; font-weight: 650; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 3.2rem 0 .6rem; padding-top: .9rem; border-top: 1px solid var(--rule); font-weight: 650; }
h3 { font-size: 1rem; margin: 1.8rem 0 .4rem; font-weight: 650; }
a { color: var(--accent); text-underline-offset: .15em; }
.quiet, figcaption, nav { color: var(--quiet); }
.quiet, nav, figcaption { font-size: .875rem; }
.answer { font-size: 1.075rem; margin: 1.4rem 0 1.8rem; }
nav { margin: 1.6rem 0 0; display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; }
nav a { text-decoration: none; padding: .15rem 0; }
nav a:hover { text-decoration: underline; }
.scroll { overflow-x: auto; margin: .6rem 0 1.2rem; }
table { border-collapse: separate; border-spacing: 0; font-size: 14px; line-height: 20px; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--quiet); padding: 0 0 .35rem; }
th, td { padding: 5px 18px 5px 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--rule); }
th { font-weight: 500; color: var(--quiet); vertical-align: bottom; border-bottom-color: var(--quiet); }
td:last-child, th:last-child { padding-right: 0; }
.n { text-align: right; white-space: nowrap; } th.n { white-space: normal; }
td:first-child, th:first-child { position: sticky; left: 0; background: var(--page); min-width: 6.5rem; }
td.long { min-width: 16rem; }
code { font: 13px/20px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; white-space: nowrap; }
wbr { display: none; }
.bar { display: block; height: 4px; margin-top: 4px; background: var(--accent); border-radius: 2px; min-width: 1px; }
table.wide { width: 100%; }
table.wide td:first-child { width: 40%; min-width: 9rem; }
.passed { color: var(--good); } .failed { color: var(--bad); font-weight: 600; }
.figures { display: flex; flex-wrap: wrap; gap: 1rem 2rem; margin: 1rem 0; }
figure { margin: 0; max-width: min(100%, 28.5rem); } figure:only-child { max-width: 100%; }
img { display: block; max-width: 100%; height: auto; mix-blend-mode: multiply; }
@media (prefers-color-scheme: dark) { img { filter: invert(1) hue-rotate(180deg); mix-blend-mode: screen; } }
details { margin: .6rem 0; } summary { cursor: pointer; color: var(--accent); font-size: .9375rem; padding: .2rem 0; }
@media (max-width: 34rem) { body { padding: 1.6rem 1rem 3rem; } h1 { font-size: 1.55rem; } h2 { margin-top: 2.4rem; }
  .answer { font-size: 1rem; } td:first-child, th:first-child { max-width: 42vw; } table.wide td:first-child { min-width: 7rem; }
  code { white-space: normal; } wbr { display: inline; } }
@media print { details::details-content { content-visibility: visible; } body { padding: 0; max-width: none; } }
"""


class Html(str):
    """HTML, to be written as it stands."""

    __slots__ = ()


Form = Callable[[Json], str]


class Column(NamedTuple):
    """A column of a table: which value of the row, what it is headed, how it is written."""

    key: str
    heading: str
    form: Form | None = None
    """None for text, set left; numbers are set right."""


def text(value: Json) -> str:
    """Return `value` as text, escaped unless it is `Html`."""
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if isinstance(value, Html) else escape(value if isinstance(value, str) else number(value))


def count(value: Json) -> str:
    """Return a whole number: ``12,345``."""
    return f"{round(value):,}".replace("-", "−") if _finite(value) else MISSING


def number(value: Json) -> str:
    """Return a number with four significant digits: ``12,345``, ``0.06803``; anything else as text."""
    if not _finite(value):
        return MISSING if value is None or isinstance(value, float) else str(value)
    if isinstance(value, int) or abs(value) >= 1000:
        return count(value)
    return f"{value:.4g}".replace("-", "−")


def decimals(places: int, *, sign: bool = False) -> Form:
    """Return a form with `places` decimals, and a plus sign where `sign` asks for it."""
    return lambda value: f"{value:{'+' if sign else ''},.{places}f}".replace("-", "−") if _finite(value) else MISSING


def percent(value: Json) -> str:
    """Return a share as ``68.0 %``."""
    return f"{100 * value:.1f} %" if _finite(value) else MISSING


def size(value: Json) -> str:
    """Return a number of bytes as ``12.3 MB``, 1 MB being 10^6 bytes."""
    if not _finite(value):
        return MISSING
    unit, name = next((pair for pair in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if abs(value) >= pair[0]), (1, "B"))
    return f"{value / unit:,.{0 if unit == 1 else 1}f} {name}"


def energy(value: Json) -> str:
    """Return joules as ``12.3 kJ`` or, from a kilowatt-hour on, ``1.20 kWh``."""
    if not _finite(value):
        return MISSING
    return f"{value / 3.6e6:,.2f} kWh" if value >= 3.6e6 else f"{value / 1e3:,.1f} kJ"


def table(rows: Iterable[Mapping[str, Json]], columns: Sequence[Column], *, caption: str = "", wide: bool = False) -> Html:
    """Return a table that scrolls sideways where it is wider than the page; nothing where there is no row."""
    rows = list(rows)
    if not rows:
        return Html("")
    name = escape(caption or columns[0].heading)
    heads = "".join(f'<th scope="col"{_side(column)}>{escape(column.heading)}</th>' for column in columns)
    lines = "".join(f"<tr>{''.join(_cell(row.get(column.key), column) for column in columns)}</tr>\n" for row in rows)
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    kind = ' class="wide"' if wide else ""
    return Html(
        f'<div class="scroll" role="region" aria-label="{name}" tabindex="0"><table{kind}>{title}<thead><tr>{heads}</tr></thead>\n'
        f"<tbody>{lines}</tbody></table></div>\n"
    )


def _side(column: Column) -> str:
    return ' class="n"' if column.form else ""


def _cell(value: Json, column: Column) -> str:
    shown = escape(column.form(value)) if column.form and not isinstance(value, str) else text(value)
    long = isinstance(value, str) and not isinstance(value, Html) and len(value) > LONG_CELL
    return f"<td{_side(column) or (long and LONG) or ''}>{shown}</td>"


def figures(plots: Iterable[tuple[Path, str]]) -> Html:
    """Return PNG files side by side, each with what it shows as caption and as alternative text; absent files are left out."""
    shown = "".join(_figure(path, caption) for path, caption in plots if path.exists())
    return Html(f'<div class="figures">{shown}</div>\n' if shown else "")


def _figure(path: Path, caption: str) -> str:
    content = path.read_bytes()
    width, height = (int.from_bytes(content[at : at + 4], "big") for at in (16, 20))  # of the IHDR chunk, so that nothing moves on load
    source = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    image = f'<img src="{source}" width="{width}" height="{height}" alt="{escape(caption)}">'
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>\n"


def bar(label: str, share: float | None) -> Html:
    """Return `label` over a bar of `share` (0 to 1) of the cell's width."""
    line = f'<span class="bar" style="width:{100 * min(max(share, 0.0), 1.0):.1f}%"></span>' if share is not None else ""
    return Html(f"{escape(label)}{line}")


def code(value: Json) -> Html:
    """Return `value` in the type of code; a long name may break after a point or an underscore."""
    return Html(f"<code>{text(value).replace('_', '_<wbr>').replace('.', '.<wbr>')}</code>")


def mark(*checks: Check) -> Html:
    """Return ``passed`` where all of `checks` did, else ``failed``."""
    word = "passed" if all(check.passed for check in checks) else "failed"
    return Html(f'<span class="{word}">{word}</span>')


def paragraph(value: str, *, kind: str = "") -> Html:
    """Return a paragraph; nothing where there is no text."""
    return Html(f"<p{f' class={chr(34)}{kind}{chr(34)}' if kind else ''}>{text(value)}</p>\n" if value else "")


def folded(summary: str, body: str) -> Html:
    """Return `body` behind a line that opens it; nothing where it is empty."""
    return Html(f"<details><summary>{escape(summary)}</summary>\n{body}</details>\n" if body else "")


def section(name: str, heading: str, body: str) -> Html:
    """Return a section with an anchor; one that has nothing to show says so."""
    shown = body or paragraph("The manifests hold nothing for this section.", kind="quiet")
    return Html(f'<section id="{escape(name)}">\n<h2>{escape(heading)}</h2>\n{shown}</section>\n')


def page(title: str, body: str) -> Html:
    """Return the whole document."""
    return Html(
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}</body>\n</html>\n"
    )


def _finite(value: Json) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
