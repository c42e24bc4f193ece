"""What is shipped for launchers and clusters is read by their own parsers, and starts commands that exist."""

from __future__ import annotations

import shutil
import subprocess

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType

from grpo_mlflow.config import parse_arguments, resolve
from tests.support.paths import ROOT

DDP = ROOT / "deploy/accelerate/ddp.yaml"


def test_accelerate_reads_its_config() -> None:
    config = load_config_from_file(str(DDP))  # refuses keys that it does not know
    assert config.distributed_type == DistributedType.MULTI_GPU
    assert (config.num_processes, config.mixed_precision) == (8, "no")
    words = ["--config_file", str(DDP), "--num_processes", "4", "-m", "grpo_mlflow", "train", "train.lr=1e-5"]
    parsed = launch_command_parser().parse_args(words)
    assert (parsed.module, parsed.training_script, parsed.num_processes) == (True, "grpo_mlflow", 4)
    assert parsed.training_script_args == ["train", "train.lr=1e-5"]


def test_every_config_is_tested() -> None:
    assert list((ROOT / "deploy/accelerate").iterdir()) == [DDP]


@pytest.mark.parametrize("name", ["job", "indexed-job"])
def test_kubernetes_jobs_start_training(name: str) -> None:
    documents = list(yaml.safe_load_all((ROOT / f"deploy/kubernetes/{name}.yaml").read_text()))
    job = next(document for document in documents if document["kind"] == "Job")
    assert job["apiVersion"] == "batch/v1"
    pod = job["spec"]["template"]["spec"]
    container = pod["containers"][0]
    command = " ".join([*container["command"], *container["args"]])
    assert "accelerate launch --config_file deploy/accelerate/ddp.yaml" in command
    assert "-m grpo_mlflow train" in command
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    if name == "indexed-job":
        service = next(document for document in documents if document["kind"] == "Service")
        assert f"{job['metadata']['name']}-0.{service['metadata']['name']}" in command
        assert job["spec"]["completions"] == job["spec"]["parallelism"] == 2
        assert pod["subdomain"] == service["metadata"]["name"]


def test_the_kubernetes_study_starts_one_command_per_gpu() -> None:
    job = yaml.safe_load((ROOT / "deploy/kubernetes/study.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert container["command"] == ["python", "-m", "grpo_mlflow", "optimize"]
    arguments = parse_arguments(container["args"], "grpo optimize", "", {})
    search = resolve(arguments.config, arguments.overrides).config.search
    assert (search.study_name, search.n_trials, search.n_jobs) == ("lr", 40, 1)
    assert str(search.storage).startswith("postgresql://")
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 1}
    assert job["spec"]["completions"] == job["spec"]["parallelism"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_the_slurm_study_is_bash() -> None:
    subprocess.run(["bash", "-n", str(ROOT / "deploy/slurm-study.sh")], check=True)
    text = (ROOT / "deploy/slurm-study.sh").read_text()
    assert "-m grpo_mlflow optimize" in text
    assert "#SBATCH --array=" in text


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_the_slurm_script_is_bash() -> None:
    subprocess.run(["bash", "-n", str(ROOT / "deploy/slurm.sh")], check=True)
    text = (ROOT / "deploy/slurm.sh").read_text()
    assert "accelerate launch" in text
    assert "-m grpo_mlflow train" in text
