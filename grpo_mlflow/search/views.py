"""The view of a study in the MLflow UI: its trials, what they varied, and what they reached."""

from __future__ import annotations

from collections.abc import Sequence

from grpo_mlflow.runs.views import TRAINING
from grpo_mlflow.tracking.views import View, attribute, key_of, line, metric, parallel, param, scatter


def of_study(name: str, parent: str, varied: Sequence[str], k: int) -> View:
    """Return the view of a study with this parent run, which varies these settings and maximises pass@k."""
    score = f"eval/pass_at_{k}"
    shown = ["train.log10_lr" if key == "train.lr" else key for key in varied]  # no axis of the UI is logarithmic
    charts = [parallel(shown, [score]), *(scatter(key, score) for key in shown)]
    return View(
        key=f"{key_of(f'grpo-study-{name}')[:60]}-{parent[:8]}",  # names may differ in what a key leaves out
        name=f"GRPO: study {name}",
        filter=f"tags.`mlflow.parentRunId` = '{parent}' and tags.`grpo.kind` = 'train'",
        order=metric(score),
        columns=(
            metric(score),
            metric(f"{score}_low"),
            metric(f"{score}_high"),
            *map(param, varied),
            attribute("Duration"),
        ),
        sections=(
            ("What was varied", charts),
            (
                "Trials",
                [line(score), line("train/reward_mean"), line("train/entropy_mean"), line("train/kl_divergence")],
            ),
        ),
        hidden=TRAINING.hidden,
    )
