"""Peak memory of a distilled student's gradient with a large vocabulary, against that of the
student alone.

Each is the value and gradient of the loss of one batch: parameters, gradients, activations and the
loss's own arrays, the teacher's weights where it has one, and no optimizer, whose state would only
hide what a teacher costs. The teacher is twice as wide and runs in the same program. The figures
are XLA's own account of the compiled program, which is not run.
"""

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any, get_args

import jax
import jax.numpy as jnp

from braeburn.config import Distillation, Execution, ModelConfig, Precision, Remat
from braeburn.layers.spec import Tree, abstract, count
from braeburn.models import decoder
from braeburn.objectives import cross_entropy, distillation

WANTED = 1.3
KINDS = get_args(Distillation.model_fields["target"].annotation)


def models(vocab_size: int, width: int, layers: int) -> tuple[ModelConfig, ModelConfig]:
    """The student, and a teacher twice as wide."""
    student = ModelConfig(
        vocab_size=vocab_size,
        d_model=width,
        num_layers=layers,
        num_heads=width // 64,
        num_kv_heads=width // 64,
        head_dim=64,
        ffn_dim=4 * width,
    )
    heads = 2 * student.num_heads
    wider = {
        "d_model": 2 * width,
        "num_heads": heads,
        "num_kv_heads": heads,
        "ffn_dim": 2 * student.ffn_dim,
    }
    return student, student.model_copy(update=wider)


def peak_bytes(function: Callable[..., Any], *arguments: Any) -> int:
    """The most memory that the compiled value and gradient hold at once, their arguments and
    results included.
    """
    compiled = jax.jit(jax.value_and_grad(function, has_aux=True)).lower(*arguments).compile()
    analysis = compiled.memory_analysis()
    # XLA's own peak leaves temporaries out on a CPU.
    return (
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        + analysis.temp_size_in_bytes
    )


def main() -> int:
    """Compares the kinds of target; returns 1 if one needs more than it may."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--vocab-size", type=int, default=100_352)
    parser.add_argument("--tokens", type=int, default=8192, help="tokens in the batch")
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--width", type=int, default=256, help="of the student, a multiple of 64")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--temperature", type=float, default=2.0)
    parser.add_argument("--compute", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--json", action="store_true", help="print JSON alone on standard output")
    arguments = parser.parse_args()

    student, teacher = models(arguments.vocab_size, arguments.width, arguments.layers)
    precision = Precision(compute=arguments.compute)
    execution = Execution(precision=precision, remat=Remat(policy="full"))
    params, teachers = (abstract(decoder.param_specs(model)) for model in (student, teacher))
    teacher_bytes = 4 * count(decoder.param_specs(teacher))
    shape = (arguments.tokens // arguments.sequence_length, arguments.sequence_length)
    types = dict.fromkeys(("inputs", "targets", "positions", "segment_ids"), jnp.int32) | {
        "weights": jnp.float32
    }
    batch = {name: jax.ShapeDtypeStruct(shape, dtype) for name, dtype in types.items()}

    def alone(params: Tree, batch: dict[str, Any]) -> Any:
        return cross_entropy.loss(params, batch, student, execution)

    reference = peak_bytes(alone, params, batch)
    rows = []
    for kind in KINDS:
        settings = Distillation(
            target=kind, top_k=arguments.top_k, temperature=arguments.temperature
        )

        def distilled(
            params: Tree, batch: dict[str, Any], teachers: Tree, settings: Distillation = settings
        ) -> tuple[jax.Array, dict[str, jax.Array]]:
            online = (teacher, teachers)
            return distillation.loss(params, batch, online, student, settings, execution)

        peak = peak_bytes(distilled, params, batch, teachers)
        rows.append({"target": kind, "bytes": peak, "ratio": (peak - teacher_bytes) / reference})
    good = all(row["ratio"] <= WANTED for row in rows)
    if arguments.json:
        result = {
            "vocab_size": arguments.vocab_size,
            "tokens": arguments.tokens,
            "compute": arguments.compute,
            "student_bytes": reference,
            "teacher_weight_bytes": teacher_bytes,
            "targets": rows,
            "wanted_ratio": WANTED,
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
        }
        print(json.dumps(result))
        return 0 if good else 1
    print(
        f"peak memory of value and gradient, {arguments.tokens:,} tokens, a vocabulary of "
        f"{arguments.vocab_size:,}, "
        f"{arguments.compute}:\n"
        f"  student alone      {reference / 2**20:>9,.1f} MiB\n"
        f"  teacher's weights  {teacher_bytes / 2**20:>9,.1f} MiB\n"
        f"  with an online teacher              less its weights, of the student alone"
    )
    for row in rows:
        print(f"    {row['target']:<16} {row['bytes'] / 2**20:>9,.1f} MiB   {row['ratio']:.2f}")
    print(f"  wanted: at most {WANTED:g}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
