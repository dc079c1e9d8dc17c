"""The training loop: optimiser, schedules, checkpoints, health checks."""
