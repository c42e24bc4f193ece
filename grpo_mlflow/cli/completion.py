"""Print the completion of `grpo` for a shell: `grpo completion bash`, `grpo completion zsh`.

The script holds all words itself, so that a tab starts no Python. It completes commands, options, keys of settings, the
values of those that have a few, presets and spaces; where a text is free, files.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources

from grpo_mlflow.config import describe, helping, presets
from grpo_mlflow.errors import ConfigError

SHELLS = ("bash", "zsh")
_FILES = "<files>"  # no word of a command line: the shell lists files in its place
_COMMON = ("--config", "--overrides", "--print-config", "--help")

# What both shells read alike.
_WORDS = r"""
_grpo_words() {  # COMMAND PREVIOUS CURRENT: one word per line that may stand in the place of CURRENT
  case "$2" in
@PREVIOUS@
    --help|-h) printf '%s\n' @TOPICS@; return ;;
  esac
  case "$3" in
    *=*)
      case "${3%%=*}" in
@VALUES@
      esac ;;
    -*)
      case "$1" in
@OPTIONS@
      esac ;;
    *.*) printf '%s\n' @KEYS@ ;;
    *) printf '%s\n' @SECTIONS@ ;;
  esac
}
"""

_BASH = r"""# Completion of grpo for bash. To keep it:
#   mkdir -p ~/.local/share/bash-completion/completions
#   grpo completion bash > ~/.local/share/bash-completion/completions/grpo
@WORDS@
_grpo() {
  local line="${COMP_LINE:0:COMP_POINT}" start="" current word words
  current="${line##*[[:space:]]}"
  read -ra words <<< "${line%"$current"}"
  COMPREPLY=()
  if [ ${#words[@]} -lt 2 ]; then
    COMPREPLY=($(compgen -W "@COMMANDS@" -- "$current"))
    return
  fi
  local typed="$current"
  if [[ "$current" == *=* ]]; then
    typed="${current#*=}"
    [[ "$COMP_WORDBREAKS" == *=* ]] || start="${current%%=*}="
  fi
  while IFS= read -r word; do
    if [ "$word" = "@FILES@" ]; then
      compopt -o filenames 2> /dev/null
      while IFS= read -r word; do COMPREPLY+=("$start$word"); done < <(compgen -f -- "$typed")
    elif [[ "$word" == "$typed"* ]]; then
      COMPREPLY+=("$start$word")
      [[ "$word" == *[.=] ]] && compopt -o nospace 2> /dev/null
    fi
  done < <(_grpo_words "${words[1]}" "${words[${#words[@]} - 1]}" "$current")
}
complete -F _grpo grpo
"""

_ZSH = r"""#compdef grpo
# Completion of grpo for zsh. To keep it, write it as _grpo into a folder of $fpath:
#   grpo completion zsh > "${fpath[1]}/_grpo"
@WORDS@
_grpo() {
  local word previous="$words[CURRENT-1]" current="$PREFIX" files=""
  local -a whole begun
  if (( CURRENT == 2 )); then
    compadd -- @COMMANDS@
    return
  fi
  [[ "$current" == *=* ]] && compset -P 1 '*='
  for word in "${(@f)$(_grpo_words "$words[2]" "$previous" "$current")}"; do
    case "$word" in
      "@FILES@") files=yes ;;
      *[.=]) begun+=("$word") ;;
      ?*) whole+=("$word") ;;
    esac
  done
  (( $#whole )) && compadd -a whole
  (( $#begun )) && compadd -S '' -a begun
  [[ -n "$files" ]] && _files
}
if [ "$funcstack[1]" = "_grpo" ]; then _grpo; else compdef _grpo grpo; fi
"""


def script(shell: str, commands: Iterable[str]) -> str:
    """Return the script for one of `SHELLS`."""
    text = _BASH if shell == "bash" else _ZSH
    for name, words in {"WORDS": _words(commands), "COMMANDS": " ".join(commands), "FILES": _FILES}.items():
        text = text.replace(f"@{name}@", words)
    return text


def _words(commands: Iterable[str]) -> str:
    settings = describe.settings()
    values: dict[tuple[str, ...], list[str]] = {}
    for key, setting in settings.items():
        names = [name for name in setting.choices if name != "null" or len(setting.choices) > 1]
        if names or setting.allowed.startswith("text"):
            values.setdefault(tuple(names) or (_FILES,), []).append(key)
    sections = {key.partition(".")[0] + ("." if "." in key else "=") for key in settings}
    parts = {
        "PREVIOUS": _cases(_of_options(commands), "    ", "; return"),
        "VALUES": _cases({"|".join(keys): names for names, keys in values.items()}, "        "),
        "OPTIONS": _cases({name: options_of(name) for name in commands}, "        "),
        "TOPICS": _quoted([*describe.sections(), *settings]),
        "KEYS": _quoted([f"{key}=" for key in settings]),
        "SECTIONS": _quoted(sorted(sections)),
    }
    text = _WORDS
    for name, words in parts.items():
        text = text.replace(f"@{name}@", words)
    return text


def options_of(command: str) -> list[str]:
    """Return the options that a command takes."""
    if command == "completion":
        return ["--help"]
    module = importlib.import_module(f"grpo_mlflow.cli.{command}")
    return [*_COMMON, *(f"--{name}" for name in (*getattr(module, "OPTIONS", ()), *getattr(module, "FLAGS", ())))]


def _of_options(commands: Iterable[str]) -> dict[str, Sequence[str]]:
    """Return the words that may follow each option."""
    settings, folder = describe.settings(), resources.files("grpo_mlflow") / "search" / "spaces"
    spaces = sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))
    known: dict[str, Sequence[str]] = {
        "--config": [*presets(), _FILES],
        "--space": [*spaces, _FILES],
        "--checkpoint": ["best", "last"],
        "completion": SHELLS,
    }
    for name in ("model", "output", "folder"):
        known[f"--{name}"] = [_FILES]
    for option in dict.fromkeys(option for name in commands for option in options_of(name)):
        setting = settings.get(f"search.{option[2:]}")
        if option not in known and setting is not None and setting.choices not in ((), ("null",)):
            known[option] = setting.choices
    return known


def _cases(cases: Mapping[str, Sequence[str]], indent: str, end: str = "") -> str:
    return "\n".join(f"{indent}{name}) printf '%s\\n' {_quoted(words)}{end} ;;" for name, words in cases.items())


def _quoted(words: Iterable[str]) -> str:
    return " ".join(f"'{word}'" for word in words)


def main(argv: Sequence[str]) -> None:
    """Print the script.

    Raises:
        ConfigError: the words name no shell.
    """
    from grpo_mlflow.cli.commands import COMMANDS

    if list(argv) in (["-h"], ["--help"]):
        about = "Print the completion of grpo for a shell; the script says at its top how to keep it."
        print("\n".join(["usage: grpo completion bash|zsh", "", *helping.folded(about, 0)]))
    elif len(argv) == 1 and argv[0] in SHELLS:
        print(script(argv[0], COMMANDS), end="")
    else:
        raise ConfigError(f"grpo completion {' '.join(argv)}: no such shell; allowed: {', '.join(SHELLS)}")
