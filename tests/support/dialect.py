"""What the fake server has to know of the tongue of one kind of server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from tests.support.fake_server import FakeServer

Answer = tuple[int, Any]  # status, JSON content (or bytes as they are)


class Refused(Exception):
    """The request is wrong: 400."""


class Dialect(Protocol):
    """Requests and answers of one kind of server.

    `sample`, `load` and `label` are the paths that sample, load weights and say which are there; `loading` are the
    calls of a load in their order. `model_option` names the model on its command line. `shaped_logprobs`: whether
    log-probabilities know top-k and top-p; `names_model`: whether a request says which model it is for.
    `ids` is where a completion has its tokens.
    """

    sample: str
    load: str
    label: str
    loading: tuple[str, ...]
    model_option: str
    shaped_logprobs: bool
    names_model: bool
    ids: str

    def answer(self, server: FakeServer, path: str, body: dict[str, Any]) -> Answer | None:
        """Return what a request is answered with; None: there is no such path."""
        ...

    def penalised(self, prompt: list[int], generated: list[int]) -> list[int]:
        """Return the tokens that a repetition penalty falls on."""
        ...

    def refusal(self, message: str) -> Any:
        """Return the content of an answer of 400."""
        ...

    def completions(self, content: Any) -> list[dict[str, Any]]:
        """Return the completions in the content of an answer."""
        ...

    def answer_with(self, completions: list[dict[str, Any]]) -> Any:
        """Return the content of an answer with these completions."""
        ...

    def logprobs(self, completion: dict[str, Any]) -> list[float]: ...

    def set_logprobs(self, completion: dict[str, Any], values: Any) -> None: ...

    def set_finish(self, completion: dict[str, Any], reason: str) -> None: ...
