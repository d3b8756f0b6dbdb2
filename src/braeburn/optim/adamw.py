"""AdamW, by optax."""

import optax

from braeburn.config import AdamW, ModelConfig
from braeburn.layers.spec import Tree
from braeburn.optim.definition import Definition


def _direction(config: AdamW, specs: Tree, model: ModelConfig) -> optax.GradientTransformation:
    return optax.scale_by_adam(config.beta1, config.beta2, config.epsilon)


DEFINITION = Definition(
    direction=_direction,
    second_moment=lambda state: state.nu,
    weight_decay=lambda stage: stage.learning_rate * stage.weight_decay,
    no_decay=frozenset({"norm"}),
)
