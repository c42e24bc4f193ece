"""Check everything a run needs: `mlflow run . -e doctor`, or `grpo doctor generation.base_url=...`."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from grpo_mlflow.cli.command import importing, show, tell, with_task
from grpo_mlflow.config import parse_arguments, resolve
from grpo_mlflow.errors import ConfigError


def main(argv: Sequence[str]) -> None:
    flags = {"keep-run": "keep the run that tries the store"}
    arguments = parse_arguments(
        argv, "grpo doctor", "Check what a run needs, with a remedy for what fails.", flags=flags
    )
    try:
        resolved = resolve(arguments.config, arguments.overrides)
        resolved.require_trainable()
        resolved = with_task(resolved)
    except ConfigError:
        tell("FAILED  configuration         (remedy: as the line below says)")
        raise
    if arguments.print_config:
        show(resolved)
        return
    tell("ok      configuration")
    for warning in resolved.warnings:
        tell(f"        warning: {warning}")
    with importing():
        from grpo_mlflow.runs.doctor import Doctor

    with tempfile.TemporaryDirectory() as folder:
        doctor = Doctor(resolved.config, Path(folder), keeps_run="keep-run" in arguments.flags)
        for check in doctor.examine():
            tell(str(check))
    tell("fix the first failure above, then run the doctor again" if doctor.exit_code else "all is well")
    sys.exit(doctor.exit_code)
