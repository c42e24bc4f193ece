#!/bin/bash
# One study, a task of the array per GPU: sbatch deploy/slurm-study.sh --config qwen search.study_name=lr search.n_trials=40
# The first task that gets there leads; the others join. After the time limit the same command goes on.
#SBATCH --job-name=grpo-study
#SBATCH --array=1-8
#SBATCH --gpus-per-task=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@300
#SBATCH --output=grpo-study-%A-%a.log
set -euo pipefail

cd "${SLURM_SUBMIT_DIR:?}"
: "${MLFLOW_TRACKING_URI:?the address of an MLflow server that all nodes reach}"
: "${STUDY_STORAGE:?postgresql://USER@HOST/DATABASE, with the password in ~/.pgpass}"
export OMP_NUM_THREADS=8

exec srun .venv/bin/python -m grpo_mlflow optimize "search.storage=$STUDY_STORAGE" "$@"
