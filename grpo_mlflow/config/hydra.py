"""What people type who come from Hydra, and what they type here: sweeps above all."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import NoReturn

from grpo_mlflow.config.keys import KEYS, LISTS, MAPPINGS, TEXT
from grpo_mlflow.errors import ConfigError
from grpo_mlflow.program import program

SWEEP = ("-m", "--multirun")
_OPTIONS = {
    "--config-name": "--config NAME or FILE.yaml names the settings to start from",
    "--config-path": "--config FILE.yaml names the settings to start from",
    "--config-dir": "--config FILE.yaml names the settings to start from",
    "--cfg": "--print-config shows every setting",
    "--info": "--print-config shows every setting and where it came from",
}


def refuse_options(argv: Sequence[str]) -> None:
    """Raise ConfigError at an option that Hydra has, with the one that does it here."""
    for word in argv:
        name = word.partition("=")[0]
        if name in _OPTIONS:
            raise ConfigError(f"{name}: an option of Hydra; here {_OPTIONS[name]}")


def refuse_sweep(config: str, overrides: Sequence[str], asked: bool) -> None:
    """Refuse several values for a setting that takes one, with the study that tries them all.

    `asked`: Hydra's `-m` stands among the words.

    Raises:
        ConfigError: there are several values, or they were asked for.
    """
    varied = {item: values for item in overrides if (values := _several(item, asked))}
    if varied:
        _refuse(config, varied, [item for item in overrides if item not in varied])
    if asked:
        raise ConfigError("-m: no setting has several values here, such as train.lr=[5e-6,1e-5]; leave -m out")


def _several(item: str, asked: bool) -> str:
    """Return `KEY=[VALUES]` for an override that gives several values to a setting of one, else an empty text."""
    key, _, text = item.partition("=")
    text = text.strip()
    if key not in KEYS or key in LISTS or key in MAPPINGS:
        return ""
    if text.startswith("[") and text.endswith("]"):
        return f"{key}={text}" if key not in TEXT or asked else ""
    return f"{key}=[{text}]" if "," in text and (asked or key not in TEXT) else ""


def _refuse(config: str, varied: dict[str, str], fixed: Sequence[str]) -> NoReturn:
    words: list[str] = ["optimize", *(["--config", config] if config else [])]
    words += ["--sampler", "grid", "--space", " ".join(varied.values()), *fixed]
    raise ConfigError(
        f"{', '.join(varied)}: one run takes one value of each setting; to try all combinations: "
        f"{program()} {shlex.join(words)}"
    )
