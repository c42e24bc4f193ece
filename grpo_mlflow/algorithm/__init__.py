"""GRPO's mathematics on plain tensors and numbers: advantages, losses, schedules, statistics. No model, no config."""
