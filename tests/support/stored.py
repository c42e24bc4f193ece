"""Stores of an earlier version, kept as `tests/formats/vN.zip`: how they are packed, and how a test gets one back.

Databases are kept as SQL text. Where a file holds a path of the folder that it was made in, it holds `@ROOT@` instead.
"""

from __future__ import annotations

import hashlib
import json
import socket
import sqlite3
import zipfile
from contextlib import closing
from pathlib import Path

FORMATS = Path(__file__).parent.parent / "formats"
_ROOT = "@ROOT@"


def pack(folder: Path, archive: Path) -> None:
    """Write a folder with its databases as an archive that names neither the folder nor this machine."""
    with zipfile.ZipFile(archive, "x", zipfile.ZIP_DEFLATED, compresslevel=9) as out:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            name, content = str(path.relative_to(folder)), path.read_bytes()
            if path.suffix == ".db":
                with closing(sqlite3.connect(path)) as database:
                    content = "\n".join(database.iterdump()).encode()
                content = content.replace(f'"machine": "{socket.gethostname()}'.encode(), b'"machine": "elsewhere')
                name = str(Path(name).with_suffix(".sql"))
            content = content.replace(str(folder).encode(), _ROOT.encode())
            out.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)


def unpack(archive: Path, folder: Path) -> None:
    """Bring back what `pack` was given, in another folder."""
    with zipfile.ZipFile(archive) as stored:
        stored.extractall(folder)
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        content = path.read_bytes()
        if _ROOT.encode() in content:
            path.write_bytes(content.replace(_ROOT.encode(), str(folder).encode()))
            _sign(path)
        if path.suffix == ".sql":
            with closing(sqlite3.connect(path.with_suffix(".db"))) as database:
                database.executescript(path.read_text())
            path.unlink()


def _sign(path: Path) -> None:
    """Note the changed file in the manifest of its checkpoint, if it is part of one."""
    manifest = path.parent / "manifest.json"
    if manifest.is_file():
        content = json.loads(manifest.read_text())
        data = path.read_bytes()
        content["files"][path.name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        manifest.write_text(json.dumps(content, indent=1))
