"""Cross-entropy with the next token."""

from typing import Literal

from braeburn.config.objectives.base import ObjectiveConfig


class NextToken(ObjectiveConfig):
    """Cross-entropy with the next token, and the z-loss whose coefficient is `model.z_loss`."""

    kind: Literal["cross_entropy"] = "cross_entropy"
