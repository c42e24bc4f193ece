#!/bin/bash
# One training run over whole nodes: sbatch deploy/slurm.sh model.train_id=Qwen/Qwen2.5-0.5B data.task=sat train.batch_size=8 train.lr=1e-5
# After the time limit: sbatch deploy/slurm.sh resume=RUN_ID
#SBATCH --job-name=grpo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@300
#SBATCH --output=grpo-%j.log
set -euo pipefail

cd "${SLURM_SUBMIT_DIR:?}"
: "${MLFLOW_TRACKING_URI:?the address of an MLflow server that all nodes reach}"
export OMP_NUM_THREADS=8
MAIN=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
PORT=$((20000 + SLURM_JOB_ID % 20000))

# The node's number is known on the node only, hence the inner shell.
srun --kill-on-bad-exit=1 bash -c 'exec .venv/bin/accelerate launch \
    --config_file deploy/accelerate/ddp.yaml \
    --num_machines "$SLURM_NNODES" --num_processes $((SLURM_NNODES * 8)) --machine_rank "$SLURM_NODEID" \
    --main_process_ip "$0" --main_process_port "$1" \
    -m grpo_mlflow train "${@:2}"' "$MAIN" "$PORT" "$@"
