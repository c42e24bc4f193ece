"""An inference server over real HTTP that speaks the tongue of vLLM or another (`DIALECTS`), with faults on demand.

It loads a model folder with transformers and samples token by token, so it shares nothing with the generator in the
package but the rule that turns logits and a uniform number into a token. Prompts are cached until they are flushed, so
a missing flush shows as it does on a real server. Answers have the shapes of the real ones, their oddities included.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo_mlflow import seeding
from grpo_mlflow.generation import Sampling
from grpo_mlflow.generation.local.decoding import cache_name
from grpo_mlflow.generation.sampling import draw, processed_logprobs
from tests.support.dialect import Answer as Answer
from tests.support.dialect import Dialect, Refused
from tests.support.fake_sglang import SGLang
from tests.support.fake_vllm import VLLM
from tests.support.raw_server import send

DIALECTS: dict[str, Dialect] = {"vllm": VLLM(), "sglang": SGLang()}
SAMPLE = {name: dialect.sample for name, dialect in DIALECTS.items()}
_LOADING = threading.Lock()  # transformers loads one model at a time: it sets what is global to do so
LOAD = {name: dialect.load for name, dialect in DIALECTS.items()}


@dataclass
class Fault:
    """What goes wrong, once: with the `nth` request of a path since weights were loaded `loads` times.

    Requests that prove weights do not count: of the path that samples, only those for several completions do.

    `answer` gets the server and the right answer and returns another one; it may sleep, restart the server, or raise
    `Dropped` or `Truncated`.
    """

    path: str
    answer: Callable[[FakeServer, Answer], Answer]
    loads: int = 2
    nth: int = 1
    met: int = 0

    def strikes(self, path: str, loads: int, body: dict[str, Any]) -> bool:
        several = body.get("n", 1) > 1 or len(body.get("input_ids", ())) > 1
        proves = (path in SAMPLE.values() and not several) or str(body.get("method")).endswith("checksums")
        if path != self.path or loads < self.loads or proves:
            return False
        self.met += 1
        return self.met == self.nth + 1


class Dropped(Exception):
    """The connection is closed without an answer."""


class Truncated(Exception):
    """The connection is closed in the middle of the body."""


@dataclass(frozen=True)
class Raw:
    """As the content of an answer: what is sent instead, status line and all, with `pause` seconds after each byte."""

    content: bytes
    pause: float = 0.0


@dataclass
class Quirks:
    """Ways in which a server can be the wrong one."""

    keeps_old_weights: bool = False
    keeps_tensors: str = ""  # those whose name starts so
    raw_logprobs: bool = False
    without_development: bool = False
    without_extension: bool = False
    on_cpu: bool = False  # layers are packed at start: vLLM's own loader leaves an old output layer
    lists_no_model: bool = False
    text_only: bool = False  # one completion whatever is asked for, as text alone
    without_token_ids: bool = False
    without_logprobs: bool = False
    without_scores: bool = False
    without_lora: bool = False
    keeps_old_adapter: bool = False
    keeps_prefixes: bool = False
    other_tokenizer: bool = False
    refuses: dict[str, int] = field(default_factory=dict)  # by path, with a status, as a gateway does
    context: int = 512


@dataclass
class FakeServer:
    """Serves a model folder at `url` inside a `with` block."""

    dialect: str
    folder: Path
    faults: list[Fault] = field(default_factory=list)
    quirks: Quirks = field(default_factory=Quirks)
    port: int = 0
    dtype: torch.dtype = torch.float32
    address: str = "127.0.0.1"

    def __post_init__(self) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        self.requests: dict[str, int] = {}
        self.most_at_once = self.at_once = 0
        self.loads: list[str] = []
        self.calls: list[str] = []  # everything but sampling and scoring
        self._prefixes: dict[tuple[object, ...], Any] = {}
        self.name = "policy"
        self._closed = False
        self._lock, self._model_lock = threading.Lock(), threading.Lock()
        self.restart()
        self._listen()

    # Life

    def _listen(self) -> None:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                server._serve(self, {})

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                server._serve(self, json.loads(body) if body else {})

            def log_message(self, *_: object) -> None:
                pass

        class Http(ThreadingHTTPServer):
            daemon_threads = True
            allow_reuse_address = True
            request_queue_size = 256

            def handle_error(self, *_: object) -> None:  # a client that gave up is no news
                pass

        self._http = Http((self.address, self.port), Handler)
        self.port = self._http.server_address[1]
        self._listens = True
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://{self.address}:{self.port}"

    def __enter__(self) -> FakeServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True
        self.stop_listening()

    def stop_listening(self) -> None:
        self._listens = False
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def away(self, seconds: float) -> None:
        """Refuse connections for a while, then come back at the same port with the initial weights."""

        def leave() -> None:
            self.stop_listening()
            time.sleep(seconds)
            if not self._closed:
                self.restart()
                self._listen()

        threading.Thread(target=leave, daemon=True).start()

    def restart(self, folder: Path | None = None) -> None:
        """Come back with the weights of the start, or those of another folder."""
        self._take(folder or self.folder)
        self.label, self.paused, self.asleep = "default", False, False
        self.adapters: dict[str, Any] = {}
        self._prefixes.clear()

    def take_adapter(self, name: str, folder: Path) -> None:
        """Load an adapter beside the base model, by peft's own loader; as the first one it had, if it is that wrong."""
        if self.quirks.keeps_old_adapter and self.adapters:
            self.adapters[name] = next(iter(self.adapters.values()))
            return
        from peft import PeftModel  # seconds at each start of a process, which most tests never need

        base = AutoModelForCausalLM.from_pretrained(self.root, dtype=self.dtype)
        taken = PeftModel.from_pretrained(base, str(folder)).eval()
        if self.quirks.keeps_tensors and self.adapters:
            before = list(self.adapters.values())[-1].state_dict().items()
            kept = f"base_model.model.{self.quirks.keeps_tensors}"
            taken.load_state_dict({n: w for n, w in before if n.startswith(kept) and ".lora_" in n}, strict=False)
        self.adapters[name] = taken

    def models(self) -> dict[str, Any]:
        if self.quirks.lists_no_model:
            return {"object": "list", "data": []}
        cards = [{"id": self.name, "root": self.root, "parent": None}]
        return {"object": "list", "data": [*cards, *({"id": n, "root": n, "parent": self.name} for n in self.adapters)]}

    def _take(self, folder: Path) -> None:
        with _LOADING, self._model_lock:
            self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=self.dtype).eval()
            self.root = str(folder)

    # HTTP

    def _serve(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        path = urlsplit(handler.path).path
        with self._lock:
            self.requests[path] = self.requests.get(path, 0) + 1
            struck = [fault for fault in self.faults if fault.strikes(path, len(self.loads), body)]
            if path != SAMPLE[self.dialect]:
                self.calls.append(path)
            self.at_once += path == SAMPLE[self.dialect]
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            while self.paused and path == SAMPLE[self.dialect]:
                time.sleep(0.01)
            if not self._listens:  # over a connection from before
                raise Dropped
            status, content = self._answer(path, body)
            for fault in struck:
                status, content = fault.answer(self, (status, content))
        except Dropped:
            handler.close_connection = True
            handler.connection.shutdown(socket.SHUT_RDWR)
            return
        except Truncated:
            status, content = 200, Truncated
        finally:
            with self._lock:
                self.at_once -= path == SAMPLE[self.dialect]
        if isinstance(content, Raw):
            handler.close_connection = True
            with suppress(OSError):  # a client that gave up
                send(handler.connection, content.content, content.pause)
            return
        raw = b'{"choices": [' if content is Truncated else content if isinstance(content, bytes) else _dumps(content)
        handler.send_response(status)
        handler.send_header("content-type", "application/json")
        handler.send_header("content-length", str(len(raw) + (100 if content is Truncated else 0)))
        if status == 429:
            handler.send_header("retry-after", "0.2")
        if handler.headers.get("connection") == "close":
            handler.send_header("connection", "close")
        elif status == 500:  # as uvicorn does after an exception: closed, though nothing said so
            handler.close_connection = True
        handler.end_headers()
        handler.wfile.write(raw)
        if content is Truncated:
            handler.close_connection = True

    def _answer(self, path: str, body: dict[str, Any]) -> Answer:
        if path in self.quirks.refuses:
            return self.quirks.refuses[path], {"detail": "Not for you"}
        try:
            found = DIALECTS[self.dialect].answer(self, path, body)
        except Refused as refusal:
            return 400, DIALECTS[self.dialect].refusal(str(refusal))
        return found if found is not None else (404, {"detail": "Not Found"})

    # The model

    def reload(self, folder: Path) -> None:
        self.loads.append(folder.name)
        before, kept = self.model.state_dict(), self.quirks.keeps_tensors
        if not self.quirks.keeps_old_weights:
            self._take(folder)
        if kept:
            self.model.load_state_dict({n: w for n, w in before.items() if n.startswith(kept)}, strict=False)

    def weights(self) -> list[tuple[str, torch.Tensor]]:
        """Return the tensors that it computes with, in its number format."""
        return [(name, weight.to(self.dtype)) for name, weight in self.model.state_dict().items()]

    def adapter_weights(self) -> list[list[tuple[str, torch.Tensor]]]:
        """Return for each adapter the tensors that it computes with: B times the scaling, after rounding as before."""
        found = []
        for model in self.adapters.values():
            scaling = model.peft_config["default"].lora_alpha / model.peft_config["default"].r
            named = [
                (name.removeprefix("base_model.model.").replace(".default.", "."), weight.detach().to(self.dtype))
                for name, weight in model.named_parameters()
                if ".lora_" in name
            ]
            found.append([(name, weight * scaling if ".lora_B." in name else weight) for name, weight in named])
        return found

    def flush(self) -> None:
        if not self.quirks.keeps_prefixes:
            self._prefixes.clear()

    def _of(self, adapter: str | None) -> Any:
        return self.model if adapter is None else self.adapters[adapter]

    def _prefix(self, prompt: list[int], adapter: str | None) -> Any:
        """Return the key-value cache of all but the last token: of the weights that saw this prompt first."""
        key, before = (adapter, *prompt), torch.tensor([prompt[:-1]])
        if key not in self._prefixes:
            self._prefixes[key] = None
            if len(prompt) > 1:
                out = self._of(adapter)(input_ids=before, use_cache=True)
                self._prefixes[key] = getattr(out, cache_name(self.model))
        return copy.deepcopy(self._prefixes[key])

    def tokens(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text[1:] if self.quirks.other_tokenizer else text).input_ids
        return ids

    @torch.inference_mode()
    def score(self, prompt: list[int], adapter: str | None) -> list[float]:
        with self._model_lock:
            logprobs = self._of(adapter)(input_ids=torch.tensor([prompt])).logits[0].float().log_softmax(-1)
        return [float(logprobs[place - 1, token]) for place, token in enumerate(prompt) if place]

    @torch.inference_mode()
    def sample(
        self, prompt: list[int], parameters: dict[str, Any], seed: int, adapter: str | None
    ) -> tuple[list[int], list[float], str]:
        """Sample one completion."""
        if not prompt or not all(0 <= token < self.model.config.vocab_size for token in prompt):
            raise Refused("Token id is out of vocabulary")
        if len(prompt) >= self.quirks.context or parameters["max_new_tokens"] > self.quirks.context:
            raise Refused(f"This model's maximum context length is {self.quirks.context} tokens.")
        most = min(parameters["max_new_tokens"], self.quirks.context - len(prompt))
        sampling = Sampling(
            most,
            parameters["temperature"],
            parameters.get("top_p", 1.0),
            parameters.get("top_k", -1),
            parameters.get("repetition_penalty", 1.0),
        )
        unfiltered = Sampling(most, sampling.temperature, repetition_penalty=sampling.repetition_penalty)
        uniforms = seeding.stream(seed, "fake").random(most)
        ids, logprobs = list(prompt), []
        with self._model_lock:
            cache = self._prefix(prompt, adapter)
        for uniform in uniforms:
            with self._model_lock:
                given = {cache_name(self.model): cache}
                out = self._of(adapter)(input_ids=torch.tensor([ids[-1:]]), use_cache=True, **given)
            cache, logits = getattr(out, cache_name(self.model)), out.logits[:, -1].float()
            seen = torch.zeros(1, self.model.config.vocab_size, dtype=torch.bool)
            seen[0, DIALECTS[self.dialect].penalised(prompt, ids[len(prompt) :])] = True
            distribution = processed_logprobs(logits, sampling, seen)
            token = int(draw(distribution, torch.tensor([uniform])) if sampling.temperature else distribution.argmax())
            shown = distribution
            if self.quirks.raw_logprobs:
                shown = logits.log_softmax(-1)
            elif not DIALECTS[self.dialect].shaped_logprobs:
                shown = processed_logprobs(logits, unfiltered, seen)
            logprobs.append(float(shown[0, token]))
            ids.append(token)
            if token in parameters.get("stop_token_ids", ()):
                return ids[len(prompt) :], logprobs, "stop"
        return ids[len(prompt) :], logprobs, "length"


def _dumps(content: Any) -> bytes:
    return json.dumps(content).encode()  # NaN and Infinity as Python spells them, as some servers do


def main() -> None:
    """Serve as a process of its own, started with a real server's arguments: `DIALECT ... --model FOLDER --port N`.

    FAKE_DIES_AFTER=N makes it kill itself with the N-th request to sample, once; FAKE_DIED is the file that says so.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("dialect")
    parser.add_argument(*(dialect.model_option for dialect in DIALECTS.values()), dest="model", type=Path)
    parser.add_argument("--port", type=int)
    given, _ = parser.parse_known_args()
    server = FakeServer(given.dialect, given.model, port=given.port)
    print("fake server is up", flush=True)
    limit, died = int(os.environ.get("FAKE_DIES_AFTER", 0)), Path(os.environ.get("FAKE_DIED", "/nowhere"))
    while True:
        time.sleep(0.01)
        if limit and server.requests.get(SAMPLE[given.dialect], 0) >= limit and not died.exists():
            died.write_text("")
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
