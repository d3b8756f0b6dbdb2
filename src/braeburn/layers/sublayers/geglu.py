"""The gated feed-forward sublayer with GELU."""

import functools

import jax

from braeburn.layers.sublayers.gated import gated

DEFINITION = gated(functools.partial(jax.nn.gelu, approximate=True))
