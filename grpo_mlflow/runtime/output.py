"""What this process prints and logs, without known secrets: also what other libraries say, and tracebacks."""

from __future__ import annotations

import logging
import sys
from typing import Any, TextIO

from grpo_mlflow import redaction

_format_exception = logging.Formatter().formatException


class _Guarded:
    """A text stream that leaves out known secrets."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(redaction.redact(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def guard() -> None:
    """Guard the standard streams and the logs of this process from now on."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, _Guarded):
            setattr(sys, name, _Guarded(stream))
    guard_logs()


def guard_logs() -> None:
    """Guard what is logged, to whatever handler: those of libraries are set up by themselves."""
    if logging.getLogRecordFactory() is not _record:
        global _made
        _made = logging.getLogRecordFactory()
        logging.setLogRecordFactory(_record)


_made: Any = logging.LogRecord


def _record(*args: Any, **kwargs: Any) -> logging.LogRecord:
    record: logging.LogRecord = _made(*args, **kwargs)
    try:
        told = record.getMessage()
    except Exception:  # a wrong call of the logger, which its handler tells
        return record
    if (shown := redaction.redact(told)) != told:
        record.msg, record.args = shown, ()
    if record.exc_info and record.exc_info[0] is not None:
        record.exc_text = redaction.redact(_format_exception(record.exc_info))  # what formatters take, if it is there
    return record
