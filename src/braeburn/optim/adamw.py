"""AdamW, by optax."""

import optax

from braeburn.config import AdamW
from braeburn.optim.definition import Definition, Parameters


def _scale_by_adam(config: AdamW, parameters: Parameters) -> optax.GradientTransformation:
    return optax.scale_by_adam(config.beta1, config.beta2, config.epsilon)


DEFINITION = Definition(
    transformation=_scale_by_adam,
    second_moment=lambda state: state.nu,
    weight_decay=lambda stage: stage.learning_rate * stage.weight_decay,
    no_decay=frozenset({"norm", "bias"}),
)
