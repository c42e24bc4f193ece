"""Start an inference server for a model and keep it until Ctrl-C: `make server`, or `grpo server`.

With `--print-command` it starts nothing: it prints the command that starts one, for a run with the same settings.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from grpo_mlflow.cli.command import complain, importing, show
from grpo_mlflow.config import Resolved, addresses, layers, parse_arguments, resolve
from grpo_mlflow.errors import redact

_PORT, _URL = "generation.server.port", "generation.base_url"
DEFAULTS = {"generation.backend": "vllm_server", "generation.server.manage": "true", _PORT: "30000"}
FLAGS = {"print-command": "show the command that starts such a server by hand, and stop"}


def main(argv: Sequence[str]) -> None:
    words = "Serve model.train_id as generation.server says, with vLLM where generation.backend does not say otherwise."
    arguments = parse_arguments(argv, "grpo server", words, flags=FLAGS, own_values=True)
    prints = "print-command" in arguments.flags
    given = layers.read(arguments.config) if arguments.config else {}
    kept = {key for key in DEFAULTS if given.get(key, ("local",))[0] not in ("local", False)}
    if prints:  # the address of the run says a port, too
        kept.add(_PORT)
    defaults = [f"{key}={value}" for key, value in DEFAULTS.items() if key not in kept]
    resolved = resolve(arguments.config, [*defaults, *arguments.overrides])
    if arguments.print_config:
        show(resolved)
        return
    with importing():
        from grpo_mlflow.runs import serve

    if not prints:
        serve.serve(resolved.config, Path("outputs/server.log").absolute())
        return
    gives_way = _chosen(resolved, _PORT) and not _chosen(resolved, _URL)  # a preset's address
    named = () if gives_way else addresses.of(resolved.config.generation.base_url)
    remarks = list[str]()
    for url in named or (None,):
        command, remark = serve.command(resolved.config, url)
        # A shell reads a variable outside single quotes only, in which the command has all words with a `$`.
        print(re.sub(r"\$\{ENV:(\w+)\}", r"""'"$\1"'""", redact(command)))
        remarks += [remark] if remark else []
    for remark in dict.fromkeys(remarks):
        complain(remark)


def _chosen(resolved: Resolved, key: str) -> bool:
    return resolved.origins[key].startswith(("override", "file"))
