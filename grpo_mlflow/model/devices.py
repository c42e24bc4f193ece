"""The devices that models compute on, by the names of the settings."""

from __future__ import annotations

import os

import torch

from grpo_mlflow.errors import UserError


def choose_device(device: str) -> torch.device:
    """Return the device of a config value, from now on the current one; `auto` prefers CUDA.

    One of several processes takes its own GPU.

    Raises:
        UserError: the device does not exist here.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and torch.cuda.device_count() > 1:  # a scheduler may show each process one GPU only
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    found = device_of(device, "model.device")
    if found.type == "cuda":
        torch.cuda.set_device(found)
    return found


def device_of(device: str, key: str) -> torch.device:
    """Return the device that the setting `key` names: cpu, cuda or cuda:N.

    Raises:
        UserError: it does not exist here.
    """
    if not device.startswith("cuda"):
        return torch.device(device)
    count = torch.cuda.device_count()
    index = int(device.partition(":")[2] or 0)
    if index >= count:
        allowed = ", ".join(["cpu", *(f"cuda:{i}" for i in range(count))])
        raise UserError(f"{key} = {device!r}: this machine has {count} CUDA devices; allowed: {allowed}")
    return torch.device("cuda", index)
