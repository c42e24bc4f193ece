"""How the learning rate and the KL coefficient move: functions of where the run stands, with no state to save."""

from __future__ import annotations

import math

from grpo_mlflow.algorithm.names import Schedule


def learning_rate(step: int, total_steps: int, peak: float, warmup_steps: int, schedule: Schedule) -> float:
    """Return the learning rate of optimizer step `step` (from 0).

    The warm-up starts at peak / warmup_steps rather than at 0, so that no step is wasted; the decay ends at 0 one
    step after the last.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if schedule == "linear":
        return peak * (1.0 - progress)
    return peak * 0.5 * (1.0 + math.cos(progress * math.pi))


def adapt_kl_coef(coef: float, kl: float, target: float, horizon: float) -> float:
    """Return the next KL coefficient: proportional control (Ziegler et al. 2019, section 2.2).

    The relative error is limited to +-0.2 and spread over `horizon` iterations.
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return coef * (1.0 + error / horizon)
