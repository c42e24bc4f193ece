"""One iteration and the loop around it: rollouts, groups, batches, optimizer steps, evaluation, checkpoints."""
