"""One HTML page with all that it needs inside: styles, scripts, data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any

from grpo_mlflow.reports.charts import Chart
from grpo_mlflow.reports.texts import embedded, escaped

# Nothing may be loaded, whatever a text on the page manages to be.
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'"
_HEAD = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
"""


@dataclass
class Page:
    """A page that is put together from top to bottom. Every text is escaped here, so callers give them as they are."""

    title: str
    names: Sequence[str] = ()
    samples: Sequence[Mapping[str, Any]] = ()
    _parts: list[str] = field(default_factory=list)
    _charts: list[dict[str, Any]] = field(default_factory=list)

    def facts(self, values: Mapping[str, str]) -> None:
        """Add short facts in one row, such as ids."""
        items = "".join(
            f'<div><dt>{escaped(name)}</dt><dd class="id">{escaped(value)}</dd></div>' for name, value in values.items()
        )
        self._parts.append(f'<dl class="facts">{items}</dl>')

    def verdict(self, lines: Sequence[str], kind: str = "") -> None:
        """Add what the page says first; `kind` is `better`, `worse` or nothing."""
        text = "".join(f"<p>{escaped(line)}</p>" for line in lines)
        self._parts.append(f'<div class="verdict {escaped(kind)}">{text}</div>')

    def cards(self, cards: Sequence[tuple[str, str, str]]) -> None:
        """Add figures: a name, the value, a line on it."""
        names = ("name", "value", "more")
        self._parts.append('<div class="cards">')
        for card in cards:
            inner = "".join(f'<div class="{n}">{escaped(text)}</div>' for n, text in zip(names, card, strict=True))
            self._parts.append(f'<div class="card">{inner}</div>')
        self._parts.append("</div>")

    def heading(self, text: str, note: str = "") -> None:
        self._parts.append(f"<h2>{escaped(text)}</h2>")
        if note:
            self.paragraph(note)

    def paragraph(self, text: str) -> None:
        self._parts.append(f'<p class="note">{escaped(text)}</p>')

    def charts(self, charts: Sequence[Chart], small: bool = False) -> None:
        """Add charts in a grid with as many columns as there is room for."""
        self._parts.append(f'<div class="charts{" small" if small else ""}">')
        for chart in charts:
            self._parts.append(
                f'<figure class="{"wide" if chart.wide else ""}" data-chart="{len(self._charts)}">'
                f"<h3>{escaped(chart.title)}</h3><figcaption>{escaped(chart.note)}</figcaption>"
                '<div class="legend"></div><div class="plot"></div></figure>'
            )
            self._charts.append(chart.content())
        self._parts.append("</div>")

    def table(
        self, columns: Sequence[str], rows: Sequence[Sequence[str]], *, sortable: bool = False, best: str | None = None
    ) -> None:
        """Add a table; the row whose first cell is `best` stands out. A `sortable` one sorts by the column clicked."""
        head = "".join(
            f'<th><button type="button">{escaped(name)}</button></th>' if sortable else f"<th>{escaped(name)}</th>"
            for name in columns
        )
        body = "".join(
            f"<tr{' class=best' if best is not None and row[0] == best else ''}>{''.join(map(_cell, row))}</tr>"
            for row in rows
        )
        name = ' class="sortable"' if sortable else ""
        self._parts.append(
            f'<div class="scroll"><table{name}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        )

    def pairs(self, rows: Sequence[tuple[str, str]]) -> None:
        """Add lines of two columns: a word, and what there is to say of it."""
        body = "".join(f"<dt>{escaped(name)}</dt><dd>{escaped(text)}</dd>" for name, text in rows)
        self._parts.append(f'<dl class="pairs">{body}</dl>')

    def bars(self, values: Mapping[str, float]) -> None:
        """Add one bar from 0 to 1 for each value."""
        rows = "".join(
            f'<span>{escaped(name)}</span><i style="width:{100 * min(1.0, max(0.0, value)):.1f}%"></i>'
            f"<span>{value:.2f}</span>"
            for name, value in values.items()
        )
        self._parts.append(f'<div class="bars">{rows}</div>')

    def commands(self, commands: Mapping[str, str]) -> None:
        """Add commands to copy, each with what it does; links would do nothing in a viewer that only runs scripts."""
        items = "".join(
            f"<div><span>{escaped(what)}</span><code>{escaped(command)}</code></div>"
            for what, command in commands.items()
        )
        self._parts.append(f'<div class="commands">{items}</div>')

    def compared_samples(self) -> None:
        """Add the page's samples, of which one problem is chosen to be shown."""
        self._parts.append('<div class="samples"></div>')

    def render(self) -> str:
        """Return the page."""
        content: dict[str, Any] = {"charts": self._charts, "names": self.names, "samples": self.samples}
        style = f"<style>{_asset('uPlot.min.css')}{_asset('report.css')}</style>"
        title = escaped(self.title)
        scripts = "".join(f"<script>{_asset(name)}</script>" for name in ("uPlot.iife.min.js", "report.js"))
        body = "".join(self._parts)
        return (
            f"{_HEAD}<title>{title}</title>{style}</head>\n<body><main><h1>{title}</h1>{body}"
            "<noscript><p>The curves are drawn by a script, which is switched off here.</p></noscript></main>"
            f'<script id="data" type="application/json">{embedded(content)}</script>{scripts}</body></html>\n'
        )


def _cell(text: str) -> str:
    return f'<td class="n">{escaped(text)}</td>' if _is_number(text) else f"<td>{escaped(text)}</td>"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


@cache
def _asset(name: str) -> str:
    return (resources.files("grpo_mlflow.reports") / "assets" / name).read_text("utf-8")
