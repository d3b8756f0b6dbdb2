"""Golden losses: what 20 steps of small runs of every kind come to; `golden/losses.json` keeps
them.

The data are pseudo-random numbers of NumPy, so no text decides. `write_golden_losses.py` writes the
file.
"""

import os
import platform
from pathlib import Path
from typing import Any

import jax
import numpy as np

from braeburn.config import (
    AdamW,
    AfmOptimizer,
    Data,
    Distillation,
    MeshConfig,
    ModelConfig,
    Precision,
    Pruning,
    Quantization,
    RopeScaling,
    Run,
    Schedule,
    Source,
    Stage,
)
from braeburn.layers.spec import initialize
from braeburn.models.decoder import param_specs
from braeburn.optim.guard import begin_stage
from braeburn.train.resolved import resolve_stage
from braeburn.train.stages import compile_stage, initial_state
from braeburn.train.transitions import enter

FILE = Path(__file__).parent / "golden" / "losses.json"
STEPS = 20
VOCABULARY, LENGTH, SEQUENCES = 512, 64, 8

SIZES = {
    "vocab_size": VOCABULARY,
    "d_model": 64,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
    "ffn_dim": 160,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "afm": {"qk_norm": True, "tied_embeddings": True, "z_loss": 1e-6, "rope_base": 500_000.0},
    "llama": {
        "qk_norm": False,
        "tied_embeddings": False,
        "z_loss": 0.0,
        "rope_base": 500_000.0,
        "rope_scaling": RopeScaling(original_max_position_embeddings=32),
    },
    "qwen3": {
        "qk_norm": True,
        "tied_embeddings": True,
        "z_loss": 0.0,
        "rope_base": 1e6,
        "norm_epsilon": 1e-6,
    },
}
OPTIMIZERS: dict[str, tuple[Any, float, float]] = {
    "afm": (AfmOptimizer(mup_base_width=64), 0.02, 3e-4),
    "adamw": (AdamW(), 3e-3, 0.1),
}
MESHES = {
    "one device": MeshConfig(fsdp=1),
    "fsdp 2 x tensor 2": MeshConfig(fsdp=2, tensor=2),
    "ring of 2": MeshConfig(fsdp=1, context=2, context_attention="ring"),
}
# Stages that do more than train a model, on the Qwen3 shape under AdamW.
COMPRESSIONS: dict[str, dict[str, Any]] = {
    "learned masks of the FFN": {"pruning": Pruning(keep={"ffn": 80}, calibration_tokens=1024)},
    "FFN cut by activations": {
        "pruning": Pruning(keep={"ffn": 80}, method="activation", calibration_tokens=1024)
    },
    "teacher's distribution": {
        "distillation": Distillation(target="distribution", temperature=2.0)
    },
    "teacher's top 8": {"distillation": Distillation(target="top_k", weight=0.5)},
    "teacher's labels": {"distillation": Distillation(target="label")},
    "int8": {"quantization": Quantization(kind="int8")},
    "int4": {"quantization": Quantization(kind="int4")},
    "int2": {"quantization": Quantization(kind="int2")},
}


def run_of(family: str, optimizer: str, mesh: str, **stage: Any) -> Run:
    """A small run of one stage of 20 steps, in float32."""
    kind, learning_rate, weight_decay = OPTIMIZERS[optimizer]
    tokens = SEQUENCES * LENGTH
    return Run(
        name="golden",
        model=ModelConfig(**SIZES, **FAMILIES[family]),
        stages={
            "core": Stage(
                tokens=STEPS * tokens,
                sequence_length=LENGTH,
                batch_tokens=tokens,
                mixture={"numbers": 1.0},
                learning_rate=learning_rate,
                weight_decay=weight_decay,
                schedule=Schedule(warmup_steps=3, floor=0.1),
                **stage,
            )
        },
        data=Data(sources={"numbers": Source(paths=("numbers",))}),
        optimizer=kind,
        precision=Precision(compute="float32"),
        mesh=MESHES[mesh],
    )


def cases() -> dict[str, Run]:
    """Every run that is kept, by its name."""
    found = {
        f"{family}, {optimizer}, {mesh}": run_of(family, optimizer, mesh)
        for family in FAMILIES
        for optimizer in OPTIMIZERS
        for mesh in MESHES
    }
    for name, stage in COMPRESSIONS.items():
        teacher = {"teacher": "elsewhere"} if "distillation" in stage else {}
        found[name] = run_of("qwen3", "adamw", "one device", **stage, **teacher)
    return found


def batch(step: int) -> dict[str, np.ndarray]:
    """Packed documents of about 16 tokens, in which a token mostly decides the next."""
    rng = np.random.default_rng(step)
    shape = (SEQUENCES, LENGTH + 1)
    tokens = np.zeros(shape, np.int32)
    tokens[:, 0] = rng.integers(0, VOCABULARY, SEQUENCES)
    noise = rng.integers(0, 8, shape)
    for at in range(1, LENGTH + 1):
        tokens[:, at] = (5 * tokens[:, at - 1] + noise[:, at]) % VOCABULARY
    begins = rng.random((SEQUENCES, LENGTH)) < 1 / 16
    begins[:, 0] = True
    index = np.arange(LENGTH, dtype=np.int32)
    weights = np.ones((SEQUENCES, LENGTH), np.float32)
    weights[-1, LENGTH // 2 :] = 0
    return {
        "inputs": np.ascontiguousarray(tokens[:, :-1]),
        "targets": np.ascontiguousarray(tokens[:, 1:]),
        "positions": (index - np.maximum.accumulate(np.where(begins, index, 0), axis=1)).astype(
            np.int32
        ),
        "segment_ids": np.cumsum(begins, axis=1, dtype=np.int32),
        "weights": weights,
    }


def losses(run: Run) -> list[float]:
    """The loss of each step."""
    teacher = run.model if run.stages["core"].teacher else None
    stage = resolve_stage(run, "core").with_teacher(teacher)
    layout = stage.layout
    rows = layout.rows(SEQUENCES)

    def placed(step: int) -> Any:
        own = {name: values[rows] for name, values in batch(step).items()}
        return layout.place(own, rows, SEQUENCES)

    teaching = [initialize(param_specs(run.model), 77)] if teacher else []
    program = compile_stage(stage)
    calibration = (placed(step) for step in range(2))
    state = enter(stage, initial_state(stage), calibration)
    state = state._replace(optimizer=begin_stage(state.optimizer))
    found = []
    for step in range(STEPS):
        state, metrics = program.step(state, placed(step), *teaching)
        found.append(float(metrics["loss"]))
    return found


def machine() -> dict[str, str]:
    """What decides the last bits of a loss, besides the program: JAX, the processor and the number
    of its cores.
    """
    facts = {}
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("model name", "flags"):
                facts.setdefault(name.strip(), " ".join(sorted(value.split())))
    return {
        "jax": jax.__version__,
        "cores": str(os.cpu_count()),
        "processor": facts.get("model name", platform.processor()),
        "instructions": " ".join(
            f for f in facts.get("flags", "").split() if f.startswith(("avx", "fma", "amx"))
        ),
    }
