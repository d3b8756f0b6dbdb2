"""Optimizers as optax transformations, with schedules and a guard against bad steps."""
