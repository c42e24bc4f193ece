"""Operations that wait on the disk for a store that is away."""

from __future__ import annotations

import json
import os
from pathlib import Path

from grpo_mlflow.tracking.operations import Operation, from_list


class Spool:
    """A file of one JSON list per operation, in order.

    What a full disk or a kill cut off in the middle of a line never became one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def waits(self) -> bool:
        return self.path.exists()

    def read(self) -> list[Operation]:
        """Return the operations that wait."""
        return [from_list(json.loads(line)) for line in self._whole().splitlines()]

    def append(self, operation: Operation) -> None:
        """Add an operation; it is on the disk when this returns."""
        whole = len(self._whole())
        with self.path.open("ab") as stream:
            stream.truncate(whole)
            stream.write(json.dumps(operation.as_list()).encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())

    def clear(self) -> None:
        self.path.unlink(missing_ok=True)

    def _whole(self) -> bytes:
        data = self.path.read_bytes() if self.waits() else b""
        return data[: data.rfind(b"\n") + 1]
