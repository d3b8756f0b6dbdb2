"""Braeburn: pretrain language models in pure JAX, from one recipe."""

__version__ = "0.1.0"
