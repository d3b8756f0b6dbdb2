"""Braeburn: pretrain, prune and distil language models in pure JAX, from one recipe, on any XLA accelerator."""

__version__ = "0.1.0"
