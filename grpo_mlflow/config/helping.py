"""What `--help` prints of settings: all sections, one section, or one setting."""

from __future__ import annotations

import difflib
import shutil
import textwrap
from collections.abc import Mapping

from grpo_mlflow import redaction
from grpo_mlflow.config import describe, yaml12
from grpo_mlflow.config.describe import Setting
from grpo_mlflow.config.keys import KEYS, flatten
from grpo_mlflow.config.resolve import Resolved
from grpo_mlflow.errors import ConfigError

_MOST_COLUMNS = 100  # longer lines are hard to read, however wide the terminal is
_LABELS = 12


def columns() -> int:
    """Return how wide help may be: the terminal, 80 where there is none."""
    return max(40, min(shutil.get_terminal_size().columns, _MOST_COLUMNS))


def folded(text: str, indent: int) -> list[str]:
    """Return text as lines that begin with `indent` spaces, those after the first with at least four."""
    rest = " " * (indent or 4)
    return textwrap.wrap(
        text,
        columns(),
        initial_indent=" " * indent,
        subsequent_indent=rest,
        break_long_words=False,
        break_on_hyphens=False,
    )


def overview() -> str:
    """Return what stands below a command's options: the sections, and how to see more."""
    rows = {", ".join(describe.inside("")): "Settings outside the sections."} | describe.sections()
    lines = [
        "settings, as KEY=VALUE; values are YAML:",
        *folded("train.lr=5e-6 eval.ks='[1,4]' train.grad_clip=null", 2),
    ]
    lines += [line for name, text in rows.items() for line in _row(name, text, indent=2, width=20)]
    more = {
        "--help SECTION": "its settings, such as --help train",
        "--help KEY": "one setting, such as --help train.lr",
        "--print-config": "all values, and where each came from",
    }
    lines += ["", "more:", *(line for name, text in more.items() for line in _row(name, text, indent=2, width=20))]
    return "\n".join(lines)


def topic(name: str, resolved: Resolved | None) -> str:
    """Return the help of a setting or a section, with the values of `resolved` and their origins if there is one.

    Raises:
        ConfigError: there is no such setting or section.
    """
    values = {} if resolved is None else _values(resolved)
    if name in KEYS:
        return "\n".join(_full(describe.settings()[name], values)) + "\n"
    sections = describe.sections()
    if name not in sections:
        raise ConfigError(f"--help {name}: no such setting or section; {_near(name)}")
    lines = [*folded(f"{name}: {sections[name]}", 0), ""]
    for key in describe.inside(name):
        lines += _brief(describe.settings()[key], values)
    below = [each for each in sections if each.rpartition(".")[0] == name]
    if below:
        lines += ["", *(line for each in below for line in _row(f"--help {each}", sections[each], 0, 25))]
    return "\n".join([*lines, "", *folded(f"More of one: --help KEY, such as --help {_first(name)}", 0)]) + "\n"


def _first(section: str) -> str:
    return next(key for key in KEYS if key.startswith(f"{section}."))


def _values(resolved: Resolved) -> dict[str, str]:
    flat: Mapping[str, object] = flatten(redaction.without(resolved.config.model_dump(mode="json")))
    return {key: f"{yaml12.inline(flat[key])} ({origin})" for key, origin in resolved.origins.items()}


def _brief(setting: Setting, values: Mapping[str, str]) -> list[str]:
    value = values.get(setting.key, f"{yaml12.inline(setting.default)} (default)")
    return [*folded(f"{setting.key} = {value}", 0), *folded(f"{setting.meaning} [{setting.allowed}]", 4)]


def _full(setting: Setting, values: Mapping[str, str]) -> list[str]:
    default = yaml12.inline(setting.default)
    rows = {
        "takes": setting.allowed,
        "default": default,
        "presets": describe.grouped(setting.presets),
        "methods": describe.grouped(setting.methods),
        "value here": values.get(setting.key, ""),
        "changes": describe.freedom(setting),
    }
    lines = [*folded(f"{setting.key}: {setting.meaning}", 0), ""]
    return lines + [line for label, text in rows.items() if text for line in _row(label, text, 2, _LABELS)]


def _row(label: str, text: str, indent: int, width: int) -> list[str]:
    start, rest = " " * indent + label.ljust(width), " " * (indent + width)
    if len(label) >= width:
        return [" " * indent + label, *folded(text, indent + width)]
    return textwrap.wrap(text, columns(), initial_indent=start, subsequent_indent=rest, break_on_hyphens=False)


def _near(name: str) -> str:
    last, names = name.rpartition(".")[2], [*describe.sections(), *KEYS]
    by_last = {each.rpartition(".")[2]: each for each in names}
    same = [each for each in names if each.rpartition(".")[2] == last]
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.75)
    close += [by_last[each] for each in difflib.get_close_matches(last, by_last, n=3, cutoff=0.75)]
    close += [each for each in names if len(last) > 1 and last in each]
    found = list(dict.fromkeys([*same, *close]))[:5]
    return f"near it: {', '.join(found)}" if found else f"sections: {', '.join(describe.sections())}"
