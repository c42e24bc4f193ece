"""Reports as a browser has them: what their script gets, and what it makes of it."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

_BROWSERS = ("chromium", "chromium-browser", "google-chrome")
_SECONDS = 60.0


class Parsed(HTMLParser):
    """A page's elements with their attributes, its visible text, and what its scripts are given."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, Mapping[str, str | None]]] = []
        self.said, self._given, self._inside = "", "", ""
        self.feed(text)
        self.close()

    @property
    def data(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self._given)
        return found

    def chart(self, axis: str) -> dict[str, Any]:
        """Return the first chart whose y axis has this label."""
        found: dict[str, Any] = next(each for each in self.data["charts"] if each["y"]["label"] == axis)
        return found

    def mark(self, axis: str, label: str) -> dict[str, Any]:
        """Return what is drawn under a label, in the first chart with this y axis that has it."""
        charts = (each for each in self.data["charts"] if each["y"]["label"] == axis)
        marks: list[dict[str, Any]] = [mark for chart in charts for mark in chart["marks"]]
        return next(mark for mark in marks if mark["label"] == label)

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.elements.append((tag, values))
        if tag in ("script", "style"):
            self._inside = "data" if values.get("id") == "data" else tag

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style"):
            self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "data":
            self._given += data
        elif not self._inside:
            self.said += data


def opened(path: Path) -> tuple[Parsed, list[str]]:
    """Open a page in a browser without a window; return what it has become, and what was complained about."""
    browser = next((found for name in _BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"needs a browser: {', '.join(_BROWSERS)}")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    profile = f"--user-data-dir={path.parent / 'profile'}"
    done = subprocess.run(
        [*command, profile, path.as_uri()], capture_output=True, text=True, timeout=_SECONDS, check=True
    )
    return Parsed(done.stdout), [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
