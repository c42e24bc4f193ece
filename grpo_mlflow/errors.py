"""The errors that a person can mend, and how they are told. Everything else is a bug and keeps its traceback."""

from __future__ import annotations

from grpo_mlflow.redaction import redact as redact

_MOST = 300  # characters of a message of somebody else's


class UserError(Exception):
    """Something outside the program is wrong (a path, a store, a model): one line says what and where."""

    exit_code = 1
    told = False  # by another process of the run


class ModelError(UserError):
    """A model folder, its tokenizer or its adapter cannot be used: what is wrong, where, and what is allowed."""

    exit_code = 2


class PromptTooLong(UserError):
    """The model has too few positions for a problem that the run met late. Nothing of the run is lost.

    `seed` is that of the problem; `room` how many tokens a completion of it may have: none where it is 0 or less.
    """

    def __init__(self, found: str, seed: int, room: int) -> None:
        super().__init__(found)
        self.seed, self.room = seed, room


class TextUntried(UserError):
    """A text is longer than those that the model was tried with. Nothing of the run is lost, and a resume tries it."""


class StoreAway(UserError):
    """The MLflow store or the storage of a study does not answer: what needs it can only wait."""


class ServerFailed(UserError):
    """The inference server gives no usable answer. No rollout is lost: the run can be resumed."""


class ServerAway(ServerFailed):
    """The server gave no usable answer for as long as it may be asked again: another one may do its work."""


class ServerUnfit(ServerFailed):
    """The server was started without something that the run needs: what was `found`, and the `remedy` at the end."""

    def __init__(self, found: str, remedy: str = "") -> None:
        super().__init__(f"{found}. {remedy}" if remedy else found)
        self.found, self.remedy = found, remedy


class PeerLost(UserError):
    """Another process of the run failed or is gone. The run can be resumed."""


class Pruned(Exception):
    """A trial was ended early because it is hopeless: neither a failure nor a finish."""


class ConfigError(UserError):
    """A setting is wrong: each line names the key, the value and what is allowed."""

    exit_code = 2


def one_line(error: BaseException) -> str:
    """Return what went wrong in at most 300 characters, and the whole remedy after it: a cut command does not work."""
    remedy = error.remedy if isinstance(error, ServerUnfit) else ""
    found = error.found if isinstance(error, ServerUnfit) else str(error)
    found = found.partition("[SQL: ")[0]  # what a database says comes first, and the statement is of no use
    text = " ".join(redact(found).split())[:_MOST]  # cut last: half a secret is not recognised
    return f"{text}. {redact(remedy)}" if remedy else text
