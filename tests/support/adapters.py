"""Adapters as training leaves them."""

from __future__ import annotations

import torch

from grpo_mlflow.model.policy import Policy


def move_adapter(adapted: Policy, seed: int = 0) -> None:
    """Change the adapter as training does: at first it changes nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapted.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
