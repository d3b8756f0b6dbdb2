"""The typed run: every choice that determines a training run, as one frozen value.

A recipe is a function that returns a `Run`; `override` makes another `Run` from it by dotted paths,
and `provenance` tells where each value came from. Nothing here imports JAX, so a bad value is
refused before an accelerator is touched.
"""

from braeburn.config.assignments import override, parse_assignment, provenance
from braeburn.config.base import (
    MOST,
    MOST_STEPS,
    Count,
    Fraction,
    Name,
    NonNegative,
    OneOrMore,
    Positive,
    Seed,
    Share,
    Size,
    check_name,
    divisors,
    explain_validation_error,
    flatten,
    some,
)
from braeburn.config.data import Data, Source
from braeburn.config.directory import read_identity, read_run
from braeburn.config.distillation import Distillation
from braeburn.config.execution import KEEP_ALL, Execution
from braeburn.config.memory import NO_OFFLOAD, Matmul, NamedActivation, Offload, Precision, Remat
from braeburn.config.mesh import (
    AXES,
    BY_TRAFFIC,
    ONE_DEVICE,
    SHARDED,
    AxisSize,
    MeshAxis,
    MeshConfig,
    PipelineSchedule,
)
from braeburn.config.model import LARGEST_SIZES, LayerConfig, ModelConfig, RopeScaling, Segment
from braeburn.config.objectives import NextToken, Objective, ObjectiveConfig
from braeburn.config.optimizers import AdamW, AfmOptimizer, Optimizer, OptimizerConfig
from braeburn.config.rules import Placement, ShardingRules
from braeburn.config.run import Checkpoint, Evaluation, Run, StageModels, validate
from braeburn.config.stage import Schedule, Stage
from braeburn.config.sublayers import (
    Attention,
    AttentionConfig,
    FeedForward,
    FeedForwardConfig,
    FullAttention,
    GroupedQueryConfig,
    QKNorm,
    SwiGLU,
)
from braeburn.config.transforms import (
    PRUNABLE,
    PrunedAxis,
    Pruning,
    Quantization,
    TransformConfig,
    check_pruning,
)
from braeburn.config.weights import WeightType, file_type, platforms_of, weight_type

__all__ = [
    "AXES",
    "BY_TRAFFIC",
    "KEEP_ALL",
    "LARGEST_SIZES",
    "MOST",
    "MOST_STEPS",
    "NO_OFFLOAD",
    "ONE_DEVICE",
    "PRUNABLE",
    "SHARDED",
    "AdamW",
    "AfmOptimizer",
    "Attention",
    "AttentionConfig",
    "AxisSize",
    "Checkpoint",
    "Count",
    "Data",
    "Distillation",
    "Evaluation",
    "Execution",
    "FeedForward",
    "FeedForwardConfig",
    "Fraction",
    "FullAttention",
    "GroupedQueryConfig",
    "LayerConfig",
    "Matmul",
    "MeshAxis",
    "MeshConfig",
    "ModelConfig",
    "Name",
    "NamedActivation",
    "NextToken",
    "NonNegative",
    "Objective",
    "ObjectiveConfig",
    "Offload",
    "OneOrMore",
    "Optimizer",
    "OptimizerConfig",
    "PipelineSchedule",
    "Placement",
    "Positive",
    "Precision",
    "PrunedAxis",
    "Pruning",
    "QKNorm",
    "Quantization",
    "Remat",
    "RopeScaling",
    "Run",
    "Schedule",
    "Seed",
    "Segment",
    "ShardingRules",
    "Share",
    "Size",
    "Source",
    "Stage",
    "StageModels",
    "SwiGLU",
    "TransformConfig",
    "WeightType",
    "check_name",
    "check_pruning",
    "divisors",
    "explain_validation_error",
    "file_type",
    "flatten",
    "override",
    "parse_assignment",
    "platforms_of",
    "provenance",
    "read_identity",
    "read_run",
    "some",
    "validate",
    "weight_type",
]
