"""The addresses of inference servers: a setting holds one, or a list of several that serve the same."""

from __future__ import annotations

from grpo_mlflow.config.keys import short

Addresses = str | tuple[str, ...] | None


def of(value: Addresses) -> tuple[str, ...]:
    """Return the addresses that a setting holds, in its order."""
    return () if value is None else (value,) if isinstance(value, str) else value


def place(address: str) -> str:
    """Return an address without what may be left out of it: two of the same place are one server."""
    return address.strip().rstrip("/").removesuffix("/v1")


def same(one: Addresses, other: Addresses) -> bool:
    """Return whether two settings name the same servers, in whatever order."""
    return {*map(place, of(one))} == {*map(place, of(other))}


def shown(value: Addresses) -> str:
    """Return a setting as error lines show it."""
    return short(list(value) if isinstance(value, tuple) else value)
