"""How every command ends: a mistake is one line on stderr and its exit code, never a traceback."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from grpo_mlflow.config import Mistakes, Resolved, render
from grpo_mlflow.errors import ConfigError, UserError, one_line, redact
from grpo_mlflow.runtime import failures, output
from grpo_mlflow.runtime.folding import fitted
from grpo_mlflow.runtime.interrupts import Interrupted


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Call `main` with the command line and exit.

    0: done; 1: for what it met; 2: for a wrong setting, or a model that cannot be used; 128 + n: for a signal.
    """
    output.guard()
    try:
        main(sys.argv[1:])
    except UserError as error:
        everywhere = isinstance(error, ConfigError) and os.environ.get("LOCAL_RANK", "0") != "0"
        if not (error.told or everywhere):  # else another process of the run tells it
            for line in redact(str(error)).splitlines():
                complain(f"error: {line}")
        sys.exit(error.exit_code)
    except Exception as error:
        _unforeseen(error)
        sys.exit(1)
    except Interrupted as stop:
        sys.exit(stop.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


def _unforeseen(error: Exception) -> None:
    """Tell what nothing below has told: a failure of the machine, or a mistake of the program with its traceback."""
    if (known := failures.told(error)) is not None:
        complain(f"error: {redact(str(known))}")
        return
    try:
        place = failures.kept(error)
    except OSError:
        print(failures.log(error), file=sys.stderr)
        return
    what = f"{type(error).__name__}: {one_line(error)}"
    complain(f"error: {redact(what)}: a mistake of the program; its traceback is in {place}")


def tell(text: str) -> None:
    """Print text, folded to the terminal."""
    print(fitted(text, sys.stdout), flush=True)


def complain(text: str) -> None:
    """Print text to stderr, folded to the terminal."""
    print(fitted(text, sys.stderr), file=sys.stderr)


@contextmanager
def importing() -> Iterator[None]:
    """Import large libraries inside the block, a quarter faster: nothing is looked through for garbage meanwhile, what
    exists at its end, which is next to all theirs and stays, never again, and the rest less often than by default."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.set_threshold(10_000)  # no cycles hold tensors; a look at all that a run sets up takes half an iteration
        if was_on:
            gc.enable()


def require_all(resolved: Resolved, *checks: Callable[[Resolved], Resolved | None]) -> Resolved:
    """Make all checks of a config, so that all mistakes are told at once.

    Returns:
        The config, as the checks that return one leave it.

    Raises:
        ConfigError: one or more of them have failed.
    """
    mistakes = Mistakes()
    for check in checks:
        try:
            with mistakes.noted():
                resolved = check(resolved) or resolved
        except UserError:  # what is no mistake, such as a hub that is away, comes after those
            mistakes.require_none()
            raise
    mistakes.require_none()
    return resolved


def with_task(resolved: Resolved, *, trains: bool = True) -> Resolved:
    """Make the task, so that what only the task can refuse is refused before anything heavy is imported.

    Returns:
        The config with sizes that the task sets limits to.
    """
    from grpo_mlflow import tasks

    return tasks.fitted(resolved, trains=trains)


def require_loss(resolved: Resolved) -> None:
    """Try the loss, so that what only the loss can refuse is refused before a model or a store is touched."""
    with importing():  # of torch, which a loss computes with
        from grpo_mlflow.training import loss

        loss.load(resolved.config.train)


def show(resolved: Resolved) -> None:
    """Print every setting with its origin, and on stderr what cannot act."""
    print(f"{render(resolved)}# what one means and takes: --help KEY, such as --help train.lr")
    for warning in resolved.warnings:
        complain(f"warning: {redact(warning)}")
