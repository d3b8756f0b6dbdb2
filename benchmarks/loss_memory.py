"""Peak memory of a train step with a large vocabulary: the chunked loss against whole logits.

Model, batch and optimizer are the same; only the cross-entropy differs. The figures are XLA's own
account of the compiled program, so nothing of the larger size is run. That both losses and their
gradients agree is checked on one sequence of the batch.
"""

import argparse
import functools
import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from braeburn.config import ONE_DEVICE, AdamW, Data, ModelConfig, Precision, Run, Source, Stage
from braeburn.data.packing import Batch
from braeburn.layers.spec import Tree, initialize
from braeburn.models import decoder
from braeburn.objectives import cross_entropy
from braeburn.train.resolved import resolve_stage
from braeburn.train.stages import abstract_batch, abstract_state, stage_step
from braeburn.train.step import accumulated, train_step

WANTED = 5.0
TOLERANCE = 1e-5


def small_run(vocab_size: int, tokens: int, sequence_length: int) -> Run:
    """A run whose model is all vocabulary."""
    stage = Stage(
        tokens=tokens,
        sequence_length=sequence_length,
        batch_tokens=tokens,
        mixture={"none": 1.0},
        learning_rate=1e-3,
    )
    return Run(
        name="loss-memory",
        model=ModelConfig(
            vocab_size=vocab_size,
            d_model=64,
            num_layers=1,
            num_heads=2,
            num_kv_heads=1,
            head_dim=32,
            ffn_dim=128,
        ),
        stages={"only": stage},
        data=Data(sources={"none": Source(paths=("none",))}),
        optimizer=AdamW(),
        precision=Precision(compute="float32"),
    )


def whole_logits_loss(
    run: Run, params: Tree, batch: Batch
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`cross_entropy.loss` as it is commonly written: the logits of the whole batch at once."""
    inputs = (batch["inputs"], batch["positions"], batch["segment_ids"])
    hidden = decoder.forward(params, inputs, run.model, run.execution("only", ONE_DEVICE))
    logits = jnp.einsum("BTD,VD->BTV", hidden, decoder.head_matrix(params))
    log_z = jax.nn.logsumexp(logits, axis=-1)
    target_logit = jnp.take_along_axis(logits, batch["targets"][..., None], axis=-1)[..., 0]
    nll = jnp.sum(batch["weights"] * (log_z - target_logit))
    return nll + run.model.z_loss * jnp.sum(batch["weights"] * jnp.square(log_z)), {"loss": nll}


def peak_bytes(run: Run, step: Any) -> int:
    """The most memory that a compiled train step holds at once, its arguments included."""
    resolved = resolve_stage(run, "only")
    shapes = (abstract_state(resolved), abstract_batch(resolved))
    compiled = jax.jit(step, donate_argnums=0).lower(*shapes).compile()
    analysis = compiled.memory_analysis()
    # Results that take an argument's place are among the arguments. XLA's own peak leaves
    # temporaries out on a CPU.
    return (
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes
        + analysis.temp_size_in_bytes
    )


def largest_difference(run: Run) -> float:
    """The relative difference of the two losses and of their gradients on one sequence."""
    length = run.stages["only"].sequence_length
    tokens = np.random.default_rng(0).integers(0, run.model.vocab_size, (1, length + 1), np.int32)
    batch = {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "positions": np.arange(length, dtype=np.int32)[None],
        "segment_ids": np.ones((1, length), np.int32),
        "weights": np.full((1, length), 1 / length, np.float32),
    }
    params = initialize(decoder.param_specs(run.model), run.seed)

    def chunked(params: Tree, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        return cross_entropy.loss(params, batch, run.model, run.execution("only", ONE_DEVICE))

    functions = (chunked, functools.partial(whole_logits_loss, run))
    ours, whole = (
        jax.jit(jax.value_and_grad(function, has_aux=True))(params, batch) for function in functions
    )

    def apart(a: jax.Array, b: jax.Array) -> float:
        return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))

    return max(jax.tree.leaves(jax.tree.map(apart, ours, whole)))


def main() -> int:
    """Compares the two; returns 1 if the saving or the agreement is not what it must be."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--vocab-size", type=int, default=100_000)
    parser.add_argument("--tokens", type=int, default=8192, help="tokens in the batch")
    parser.add_argument("--sequence-length", type=int, default=1024)
    parser.add_argument("--json", action="store_true", help="print JSON alone on standard output")
    arguments = parser.parse_args()

    run = small_run(arguments.vocab_size, arguments.tokens, arguments.sequence_length)
    whole_step = functools.partial(
        train_step,
        gradients=accumulated(functools.partial(whole_logits_loss, run), 1),
        optimizer=resolve_stage(run, "only").optimizer,
    )
    chunked, whole = (
        peak_bytes(run, stage_step(resolve_stage(run, "only"))),
        peak_bytes(run, whole_step),
    )
    difference = largest_difference(run)
    result = {
        "vocab_size": arguments.vocab_size,
        "tokens": arguments.tokens,
        "chunked_bytes": chunked,
        "whole_bytes": whole,
        "ratio": whole / chunked,
        "wanted_ratio": WANTED,
        "largest_relative_difference": difference,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }
    good = whole / chunked >= WANTED and difference <= TOLERANCE
    if arguments.json:
        print(json.dumps(result))
        return 0 if good else 1
    print(
        f"peak memory of a train step, {arguments.tokens:,} tokens and a vocabulary of "
        f"{arguments.vocab_size:,}:\n"
        f"  chunked loss  {chunked / 2**20:>9,.1f} MiB\n"
        f"  whole logits  {whole / 2**20:>9,.1f} MiB\n"
        f"  ratio         {whole / chunked:>9.1f}      (wanted: at least {WANTED:g})\n"
        f"the two losses and their gradients differ by {difference:.1e} at most (allowed: "
        f"{TOLERANCE:g})"
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
