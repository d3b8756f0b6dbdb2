"""What a stage can do to its model besides training it: every module of this package is a kind."""

from braeburn.config.transforms.base import TransformConfig
from braeburn.config.transforms.pruning import PRUNABLE, PrunedAxis, Pruning, check_pruning
from braeburn.config.transforms.quantization import Quantization
from braeburn.discovery import modules_of

modules_of(__name__, __path__)
# Each kind by the name of its module, which is that of its field in `Stage`.
TRANSFORMS = {
    config.__module__.rpartition(".")[2]: config for config in TransformConfig.__subclasses__()
}

__all__ = [
    "PRUNABLE",
    "TRANSFORMS",
    "PrunedAxis",
    "Pruning",
    "Quantization",
    "TransformConfig",
    "check_pruning",
]
