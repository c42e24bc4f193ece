"""GRPO training of small language models on tasks with a checkable answer, tracked in MLflow."""

import os

__version__ = "0.1.0"

# Before torch starts its threads: on a machine with anything else to do, threads that wait by spinning for each other
# made iterations several times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
