"""The command line shared by all entry points.

    PROG [--config NAME|FILE] [--overrides "a.b=1 c.d=2"] [--print-config] [a.b=1 ...] [--a.b 1 ...]
    PROG ... --help [KEY|SECTION ...]

`--a.b 1` is how `mlflow run -P a.b=1` passes parameters that MLproject does not declare.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from grpo_mlflow.config import helping, hydra
from grpo_mlflow.config.keys import KEYS
from grpo_mlflow.config.layers import presets
from grpo_mlflow.config.mistakes import Mistakes
from grpo_mlflow.config.overrides import read_overrides, split_overrides
from grpo_mlflow.config.resolve import Resolved, resolve
from grpo_mlflow.errors import ConfigError

_RUN_ID = re.compile(r"(?:runs:/)?([0-9a-f]{32})")


@dataclass(frozen=True, slots=True)
class Arguments:
    """What was asked for: overrides in the order given (`--overrides` first), and the entry point's own options.

    `config` is empty where none was named. `flags` are those of the options without a value that were given.
    """

    config: str
    overrides: tuple[str, ...]
    print_config: bool
    options: Mapping[str, str]
    flags: frozenset[str] = frozenset()

    def resumes(self) -> str | None:
        """Return the run id or checkpoint folder to continue, or None; overrides that cannot be read are passed over.

        Raises:
            ConfigError: it is neither.
        """
        name = read_overrides(self.overrides, Mistakes()).get("resume")
        if name is None:
            return None
        if run_id_of(name) is None and not os.path.isdir(os.path.expanduser(name)):
            raise ConfigError(f"resume = {name!r} (override): neither a run id (32 hex digits) nor a checkpoint folder")
        return str(name)


def run_id_of(name: str) -> str | None:
    """Return the MLflow run id in `name` (with or without `runs:/`), or None where it is something else."""
    match = _RUN_ID.fullmatch(name)
    return match[1] if match else None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see --help")


def _as_overrides(argv: Sequence[str], known: set[str], alone: set[str]) -> list[str]:
    """Turn `--a.b value` and `--a.b=value` of unknown options into `a.b=value`; those `alone` have no value."""
    words, rest = [], list(argv)
    while rest:
        word = rest.pop(0)
        name = word.partition("=")[0]
        if not word.startswith("--") or name in known:
            words.append(word)
            if name in known and "=" not in word and name not in alone and rest:
                words.append(rest.pop(0))
        elif "=" in word:
            words.append(word[2:])
        elif rest and not rest[0].startswith("--"):
            words.append(f"{word[2:]}={rest.pop(0)}")
        else:
            raise ConfigError(f"{word}: unknown option, or an override without a value; allowed: {word} VALUE")
    return words


def parse_arguments(
    argv: Sequence[str],
    prog: str,
    description: str,
    options: Mapping[str, tuple[str, str]] | None = None,
    flags: Mapping[str, str] | None = None,
    *,
    own_values: bool = False,
) -> Arguments:
    """Parse a command line; `options` maps further option names to (default, help), `flags` (no value) to help.

    `own_values`: the command has values of its own below the overrides, so `--help KEY` cannot show what is in effect.

    Raises:
        ConfigError: the words do not make sense. `--help` prints and exits with 0.
    """
    parser = _parser(prog, description, options or {}, flags or {})
    alone = {"-h", "--help", "--print-config", *hydra.SWEEP, *(f"--{name}" for name in flags or {})}
    known = {"--config", "--overrides", *(f"--{name}" for name in options or {}), *alone}
    argv, topics = _topics(argv)
    hydra.refuse_options(argv)
    parsed = parser.parse_intermixed_args(_as_overrides(argv, known, alone))
    overrides = (*split_overrides(parsed.overrides), *parsed.override)
    hydra.refuse_sweep(parsed.config, overrides, parsed.sweep)
    arguments = Arguments(
        config=parsed.config,
        overrides=overrides,
        print_config=parsed.print_config,
        options={name: getattr(parsed, name) for name in options or {}},
        flags=frozenset(name for name in flags or {} if getattr(parsed, name.replace("-", "_"))),
    )
    if topics:
        resolved = None if own_values else _in_effect(arguments)
        print("\n".join(helping.topic(name, resolved) for name in topics), end="")
        parser.exit()
    return arguments


def _parser(
    prog: str, description: str, options: Mapping[str, tuple[str, str]], flags: Mapping[str, str]
) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=prog,
        description="\n".join(helping.folded(description, 0)),
        allow_abbrev=False,
        add_help=False,
        epilog=helping.overview(),
        formatter_class=argparse.RawDescriptionHelpFormatter,  # it would run the list of sections together
    )
    parser.add_argument(
        "-h", "--help", action="help", help="show this; --help KEY or SECTION: what a setting means, and its values"
    )
    parser.add_argument(
        "--config", default="", help=f"preset ({', '.join(presets())}) or YAML file; empty: as the model needs"
    )
    parser.add_argument("--overrides", default="", help='several overrides in one argument: "a.b=1 c.d=2"')
    parser.add_argument("--print-config", action="store_true", help="show each setting and its origin, and stop")
    for name, (default, text) in options.items():
        parser.add_argument(f"--{name}", default=default, help=text)
    for name, text in flags.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    parser.add_argument(*hydra.SWEEP, dest="sweep", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("override", nargs="*", metavar="KEY=VALUE", help="one override, such as train.lr=5e-6")
    return parser


def _topics(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the words of a command line without a `--help KEY ...`, and what it asks about; a bare one stays."""
    for place, word in enumerate(argv):
        if word.startswith("--help="):
            return [*argv[:place], *argv[place + 1 :]], [word.removeprefix("--help=")]
        if word in ("-h", "--help"):
            end = place + 1
            while end < len(argv) and not argv[end].startswith("-") and "=" not in argv[end]:
                end += 1
            topics = list(argv[place + 1 : end])
            return [*argv[:place], *argv[end if topics else place :]], topics
    return list(argv), []


def _in_effect(arguments: Arguments) -> Resolved | None:
    """Return the config of a command line; None where it is wrong, or begins from that of a stored run."""
    options = {f"search.{name}": value for name, value in arguments.options.items() if value}
    given = [f"{key}={value}" for key, value in options.items() if key in KEYS]
    try:
        stored = arguments.options.get("model") or arguments.resumes()
        return None if stored else resolve(arguments.config, [*arguments.overrides, *given])
    except ConfigError:
        return None
