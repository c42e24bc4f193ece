"""What a model's folder must hold: checked before transformers reads it, which guesses at what it does not find.

Without its tokenizer's files it makes a tokenizer that knows no text, and a settings file that it cannot parse it
replaces by defaults. A name that is no folder, such as a hub id, is left to it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from grpo_mlflow.errors import ModelError

_INDEX = "model.safetensors.index.json"
_SETTINGS = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json")
_OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack")
SAVED = "allowed: a folder written by save_pretrained of the model and of its tokenizer"


def require_tokenizer(source: str | Path) -> None:
    """Refuse a folder without the settings of its tokenizer, or with settings that are no JSON.

    Raises:
        ModelError: the line names the file.
    """
    folder = Path(source)
    if not folder.is_dir():
        return
    _require_settings(folder)
    if not (folder / "tokenizer_config.json").is_file():
        raise ModelError(f"model {str(source)!r}: holds no tokenizer_config.json; {SAVED}")


def require_weights(source: str | Path) -> None:
    """Refuse a folder without a config.json, or whose safetensors files are incomplete.

    Only the headers of the files are read: they say what each file holds, and how long it must be.

    Raises:
        ModelError: the line names the file.
    """
    folder = Path(source)
    if not folder.is_dir():
        return
    _require_settings(folder)
    if not (folder / "config.json").is_file():
        raise ModelError(f"model {str(source)!r}: holds no config.json; {SAVED}")
    whole = folder / "model.safetensors"
    shards = [whole.name] if whole.is_file() or not (folder / _INDEX).is_file() else _shards(folder)
    for name in shards:
        require_readable(folder, name)


def require_readable(folder: Path, name: str) -> None:
    """Refuse a safetensors file that is missing, cut off or none.

    Raises:
        ModelError: the line names the file.
    """
    if not (folder / name).is_file():
        others = sorted({path.name for pattern in _OTHER_WEIGHTS for path in folder.glob(pattern)})
        found = f" (it has {', '.join(others[:3])})" if others else ""
        raise ModelError(f"model {str(folder)!r}: {name} is missing{found}; allowed: weights as complete safetensors")
    try:
        with safe_open(folder / name, framework="pt"):
            pass
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"model {str(folder)!r}: {name} is damaged ({error}); allowed: the whole file, as it was written"
        ) from error


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        ModelError: it is none; the line names the file.
    """
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"{type(content).__name__} instead of an object")
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(
            f"model {str(folder)!r}: {name} cannot be read: {error}; allowed: a JSON object, as save_pretrained writes"
        ) from error
    return content


def _require_settings(folder: Path) -> None:
    for name in _SETTINGS:
        if (folder / name).is_file():
            read_json(folder, name)


def _shards(folder: Path) -> list[str]:
    """Return the names of the files that the index lists."""
    places = read_json(folder, _INDEX).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise ModelError(
            f"model {str(folder)!r}: {_INDEX} has no weight_map; allowed: one that names the file of each tensor"
        )
    names = sorted(set(places.values()))
    if outside := [name for name in names if Path(name).name != name or name in ("", "..")]:
        raise ModelError(
            f"model {str(folder)!r}: {_INDEX} leads outside it, to {outside[0]!r}; allowed: names of files in it"
        )
    return names
