"""The views of an experiment in the MLflow UI: its training runs, and its evaluations."""

from __future__ import annotations

from grpo_mlflow.tracking.views import Section, View, attribute, bar, line, metric, param

BEST = "eval/pass_at_1"
# Bands are not to be had: an interval is three lines of one chart.
_HELD_OUT: Section = (
    "Held-out problems",
    [
        line(BEST),
        line(BEST, f"{BEST}_low", f"{BEST}_high"),
        line("eval/greedy_accuracy"),
        line("eval/completion_length_mean"),
        line("eval/truncated_frac"),
    ],
)
_TRAINING: Section = (
    "Training",
    [
        line("train/reward_mean"),
        line("train/success_rate"),
        line("train/entropy_mean"),
        line("train/kl_divergence"),
        line("train/grad_norm", log=True),
        line("train/lr", log=True),
        line("train/completion_length_mean"),
        line("train/flat_group_frac"),
    ],
)
_COST: Section = ("Cost", [line("perf/seconds_iteration"), line("perf/tokens_per_sec"), line("perf/peak_memory_mb")])
# Ends of intervals stand in the charts of what they belong to, or are looked up in metrics/.
_HIDDEN = (f"{BEST}_low", f"{BEST}_high", "eval/mean_at_1_low", "eval/mean_at_1_high", "eval/tasks", "eval/replicates")
_OF_ALL = (attribute("Dataset"), metric(BEST), metric(f"{BEST}_low"), metric(f"{BEST}_high"))

TRAINING = View(
    key="grpo-training",
    name="GRPO: training runs",
    filter="tags.`grpo.kind` = 'train' and tags.`optuna.study` IS NULL",  # a study has a view of its own
    order=metric(BEST),
    columns=(
        *_OF_ALL,
        metric("eval/greedy_accuracy"),
        param("model.train_id"),
        param("train.lr"),
        param("train.iterations"),
        attribute("Duration"),
    ),
    sections=(_HELD_OUT, _TRAINING, _COST),
    hidden=_HIDDEN,
)
EVALUATIONS = View(
    key="grpo-evaluations",
    name="GRPO: evaluations",
    filter="tags.`grpo.kind` = 'evaluate' and tags.`mlflow.parentRunId` IS NULL",
    order=metric(BEST),
    columns=(*_OF_ALL, metric("eval/greedy_accuracy"), metric("eval/tasks"), param("model.train_id")),
    sections=(("Held-out problems", [bar(BEST), bar("eval/greedy_accuracy"), bar("eval/completion_length_mean")]),),
    hidden=_HIDDEN,
)
OF_KIND = {"train": (TRAINING,), "evaluate": (EVALUATIONS,)}
