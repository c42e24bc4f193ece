"""Check everything a run needs: `mlflow run . -e doctor`, or `grpo doctor generation.base_url=...`."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from grpo_mlflow.cli.command import importing, show, with_task
from grpo_mlflow.config import parse_arguments, resolve
from grpo_mlflow.errors import ConfigError


def main(argv: Sequence[str]) -> None:
    arguments = parse_arguments(argv, "grpo doctor", "Check what a run needs, with a remedy for what fails.")
    try:
        resolved = resolve(arguments.config, arguments.overrides)
        resolved.require_trainable()
        resolved = with_task(resolved)
    except ConfigError:
        print("FAILED  configuration         (remedy: as the line below says)", flush=True)
        raise
    if arguments.print_config:
        show(resolved)
        return
    print("ok      configuration", flush=True)
    for warning in resolved.warnings:
        print(f"        warning: {warning}")
    with importing():
        from grpo_mlflow.runs.doctor import Doctor

    with tempfile.TemporaryDirectory() as folder:
        doctor = Doctor(resolved.config, Path(folder))
        for check in doctor.examine():
            print(check, flush=True)
    print("the first failure above is the one to mend" if doctor.exit_code else "all is well", flush=True)
    sys.exit(doctor.exit_code)
