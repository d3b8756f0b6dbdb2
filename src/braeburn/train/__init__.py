"""The training loop and what it needs: state, step, stages, checkpoints, metrics."""
