"""Where an iteration's groups come from: one module for each source, and one function that picks by the config.

Sampled        with the weights of the iteration itself
SampledAhead   while the iteration before is trained          generation.async_rollouts=1
Resampled      around either: flat groups are replaced        data.resample_rounds > 0
Recorded       kept by an earlier run                         data.source=runs:/RUN_ID
"""

from grpo_mlflow.training.sources.ahead import AHEAD, read_ahead
from grpo_mlflow.training.sources.base import Collected, GroupSource
from grpo_mlflow.training.sources.factory import group_source
from grpo_mlflow.training.sources.recorded import Recording, open_recording

__all__ = ["AHEAD", "Collected", "GroupSource", "Recording", "group_source", "open_recording", "read_ahead"]
