"""Keep what the present version writes as a stored format: `python -m tests.support.make_formats v2`.

It leaves `tests/formats/v2.zip` (runs, checkpoints, a study) and `tests/formats/v2.json` (which run is which, and what
one computes when it goes on). Do so when a format changes, and let tests/test_formats.py read the new one as well. What
an earlier version wrote is never made anew: it is there to be read by all later ones.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import mlflow

from grpo_mlflow.cli import optimize, train, warmup
from tests.support import stored
from tests.support.fake_server import FakeServer

STORE = "sqlite:///mlflow.db"  # relative, as in a checkpoint no path of this machine may stand
RUN = (
    *("model.tiny.hidden_size=16", "model.tiny.layers=1", "model.tiny.heads=2", "model.tiny.steps=800"),
    *("model.tiny.lr=1e-2", "model.tiny.error_rate=0.3", "model.train_id=base", "data.arithmetic.digits=1"),
    *("data.problems_per_iteration=2", "data.rollouts_per_problem=4", "generation.max_new_tokens=4"),
    *("train.iterations=4", "train.batch_size=4", "train.grad_accum_steps=1", "train.epochs=2", "train.lr=1e-3"),
    *("train.lr_warmup_steps=2", "train.kl_coef=0.02", "train.kl_target=0.05", "eval.num_ids=8", "eval.replicates=4"),
    *("eval.interval=2", "checkpoint.save_interval=2", "checkpoint.keep_last=2", "tracking.samples=4"),
    f"tracking.uri={STORE}",
)
ADAPTER = ("model.lora.rank=2", "train.lr=5e-3", "checkpoint.keep_last=1")
AHEAD = ("generation.backend=vllm_server", "generation.async_rollouts=1", "train.iterations=3", "eval.enabled=false")
STUDY = (
    *("search.space=train.lr='{low: 1e-4, high: 1.0, log: true}'", "search.sampler=random", "search.n_trials=3"),
    *("search.pruner=threshold", "search.finalists=1", "search.confirm_num_ids=8", "search.confirm_replicates=4"),
    *("checkpoint.keep_last=1", "tracking.rollouts=false"),
)
MEASURED = ("reward_mean", "grad_norm", "entropy_mean", "kl_divergence", "kl_coef", "ratio_std", "loss_kl")


def make() -> None:
    """Write the stores into the current folder."""
    warmup.main([*RUN, "model.train_id=tiny", "tracking.uri=sqlite:///../warmup.db"])
    (made,) = Path(os.environ["GRPO_MLFLOW_CACHE"]).glob("tiny/*")
    made.rename("base")
    train.main([*RUN, "tracking.run_name=trained"])
    train.main([*RUN, *ADAPTER, "tracking.run_name=adapter"])
    with FakeServer("vllm", Path("base")) as server:
        train.main([*RUN, *AHEAD, f"generation.base_url={server.url}", "tracking.run_name=ahead"])
    optimize.main([*RUN, *STUDY, "tracking.run_name=study"])


def expected() -> dict[str, Any]:
    """Return the ids of the runs in the current folder, and what the trained one computes when it goes on."""
    client = mlflow.MlflowClient(STORE)
    (experiment,) = client.search_experiments(filter_string="name = 'grpo'")
    found = client.search_runs([experiment.experiment_id])
    ids = {run.info.run_name: run.info.run_id for run in found}
    train.main([f"resume={ids['trained']}", f"tracking.uri={STORE}", "train.iterations=6"])
    folder = Path(client.get_run(ids["trained"]).info.artifact_uri) / "metrics"
    iterations = [json.loads((folder / f"train_iter_00{i}.json").read_text()) for i in (4, 5)]
    return {
        "runs": ids,
        "resumed": [{name: iteration[name] for name in MEASURED} for iteration in iterations],
        "resumed_pass_at_1": json.loads((folder / "eval_iter_006.json").read_text())["pass@1"],
    }


def main(name: str) -> None:
    archive, figures = (stored.FORMATS / f"{name}{suffix}" for suffix in (".zip", ".json"))
    if archive.exists():
        sys.exit(f"error: {archive} exists; allowed: a name of its own for each version")
    os.environ["LOGNAME"], sys.argv = "somebody", ["train"]  # MLflow notes who ran what
    with tempfile.TemporaryDirectory() as parent:
        os.environ["GRPO_MLFLOW_CACHE"] = f"{parent}/cache"
        for folder in ("made", "again"):
            (Path(parent) / folder).mkdir()
            os.chdir(f"{parent}/{folder}")
            if folder == "made":
                make()
                stored.pack(Path.cwd(), archive)
            else:
                stored.unpack(archive, Path.cwd())
                figures.write_text(json.dumps(expected(), indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
