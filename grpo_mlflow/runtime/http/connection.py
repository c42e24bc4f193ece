"""How a server is reached: the SDK's client with our key, timeouts and redirects, and a proxy where one is set."""

from __future__ import annotations

import os
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from grpo_mlflow.errors import UserError, one_line, redact

if TYPE_CHECKING:
    import openai

_REDIRECTS = 3  # a gateway's http to https, and one more; each costs a round trip of every request
_KEY = "OPENAI_API_KEY"


def open_client(root: str, timeout: float, key: str | None = None) -> openai.AsyncOpenAI:
    """Return a client for the server at `root`, without retries of its own; `key` None: that of the environment.

    Raises:
        UserError: the key or the proxy in the environment cannot be used.
    """
    import openai

    patience, host = openai.Timeout(timeout, connect=min(5.0, timeout)), urlsplit(root).hostname or ""
    # A proxy would look for this machine's server on its own machine. No transport means the direct one.
    direct: dict[str, Any] = {f"all://{f'[{host}]' if ':' in host else host}": None} if _is_this_machine(host) else {}
    try:
        # A third less CPU time than the default client.
        http = openai.DefaultAioHttpClient(timeout=patience, max_redirects=_REDIRECTS, mounts=direct)
    except Exception as error:  # whatever the library says of an address in HTTP_PROXY and its like
        shown = proxy_of(root) or "the environment (HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, NO_PROXY)"
        raise UserError(f"the proxy in {shown} cannot be used: {one_line(error)}; allowed: http://HOST:PORT") from error
    return openai.AsyncOpenAI(
        base_url=f"{root}/v1", api_key=_key(key), max_retries=0, timeout=patience, http_client=http
    )


def proxy_of(root: str) -> str | None:
    """Return the address of the proxy through which a server is reached, without its password; None: directly."""
    parts = urlsplit(root)
    host = parts.hostname or ""
    if _is_this_machine(host) or proxy_bypass(host):
        return None
    proxies = getproxies()
    found = proxies.get(parts.scheme) or proxies.get("all")
    return redact(found) if found else None


def _is_this_machine(host: str) -> bool:
    try:
        number = ip_address(host)
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
    return number.is_loopback or number.is_unspecified


def _key(given: str | None) -> str:
    """Return the key that servers are sent, or a word that no server takes for one.

    Raises:
        UserError: a header cannot hold it. Sent anyway, it would fail with each request, and be shown.
    """
    # a key read from a file ends with a line break
    key = (os.environ.get(_KEY, "") if given is None else given).strip()
    if not (key.isascii() and key.isprintable()):
        name = _KEY if given is None else "api_key"
        raise UserError(f"{name}: cannot be sent in an HTTP header; allowed: printable ASCII characters in one line")
    return key or "none"
