"""The options with which a stage is compiled."""

from typing import Any

import jax
import pytest

from braeburn.config import Precision, Run
from braeburn.hardware.catalogue import catalogue
from braeburn.train import compiler_flags as module
from braeburn.train.compiler_flags import compiler_flags
from braeburn.train.resolved import resolve_stage
from braeburn.train.stages import compile_stage

BF16, FP8 = Precision(), Precision(matmul="fp8")


def test_flags_of_devices() -> None:
    assert compiler_flags("TPU v5", BF16)["xla_tpu_scoped_vmem_limit_kib"] == "65472"
    assert list(compiler_flags("TPU v5p", FP8)) == [flag.name for flag in catalogue()["v5p"].flags]
    assert compiler_flags("cpu", FP8) == compiler_flags("TPU v99", FP8) == {}
    assert compiler_flags("NVIDIA H100 80GB HBM3", BF16) == {}
    assert compiler_flags("NVIDIA H100 80GB HBM3", FP8) == {
        "xla_gpu_enable_triton_gemm": False,
        "xla_gpu_dot_merger_threshold_mb": "0",
    }


def test_flags_reach_the_compiler(tiny: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(
        jax.stages.Lowered, "compile", lambda lowered, options=None: given.append(options)
    )
    stage = resolve_stage(tiny, "core", jax.devices()[:1])
    compile_stage(stage)
    assert given == [None]  # on CPUs
    asked: list[str] = []
    monkeypatch.setattr(module, "chip_of", lambda kind: (asked.append(kind), catalogue()["v5p"])[1])
    compile_stage(stage)
    assert given[1:] == [compiler_flags("TPU v5p", BF16)] and given[1]
    assert asked[0] == jax.devices()[0].device_kind
