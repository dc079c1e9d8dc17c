"""The one training loop and what it needs: optimiser, schedules, checkpoints, health."""
