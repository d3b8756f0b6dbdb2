"""The gated feed-forward sublayer with SiLU."""

import jax

from braeburn.layers.sublayers.gated import gated

DEFINITION = gated(jax.nn.silu)
