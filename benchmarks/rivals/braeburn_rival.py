"""Braeburn: the step that `braeburn train` compiles, of a run written as a recipe is."""

import time

BEGAN = time.perf_counter()

from typing import TYPE_CHECKING  # noqa: E402

import protocol  # noqa: E402

if TYPE_CHECKING:
    from braeburn.config import Run


def recipe() -> "Run":
    """The work as a run; `float32` and layers that are not scanned, the settings for CPUs."""
    from braeburn.config import (
        ONE_DEVICE,
        AdamW,
        Data,
        ModelConfig,
        Precision,
        Remat,
        Run,
        Source,
        Stage,
    )

    work = protocol.work()
    return Run(
        name="rival",
        model=ModelConfig(
            vocab_size=work.vocab,
            d_model=work.width,
            num_layers=work.layers,
            num_heads=work.heads,
            num_kv_heads=work.kv_heads,
            head_dim=work.head_dim,
            ffn_dim=work.ffn,
            norm_epsilon=1e-6,
            rope_base=10_000.0,
            z_loss=0.0,
            scan_layers=False,
        ),
        stages={
            "only": Stage(
                tokens=work.tokens * 100_000,
                sequence_length=work.length,
                batch_tokens=work.tokens,
                mixture={"random": 1.0},
                learning_rate=protocol.LEARNING_RATE,
                weight_decay=protocol.WEIGHT_DECAY,
            )
        },
        data=Data(sources={"random": Source(paths=("random",))}),
        optimizer=AdamW(beta1=protocol.BETA1, beta2=protocol.BETA2, epsilon=protocol.EPSILON),
        mesh=ONE_DEVICE,
        precision=Precision(compute="float32"),
        remat=Remat(policy="none"),
    )


def main() -> None:
    """Serves steps of the model."""
    serving = protocol.Serving(BEGAN)
    work = serving.work
    import jax
    import numpy as np

    import braeburn
    from braeburn.config import override
    from braeburn.layers.spec import count
    from braeburn.models.decoder import param_specs
    from braeburn.train.resolved import resolve_stage
    from braeburn.train.stages import compile_stage, initial_state

    jax.config.update("jax_enable_compilation_cache", False)
    run = override(recipe(), work.setting)
    name = next(iter(run.stages))
    resolved = resolve_stage(run, name)
    program = compile_stage(resolved)
    state = initial_state(resolved)
    shape = (work.sequences, work.length)

    def placed(batch: int) -> object:
        tokens = protocol.tokens_of(work, batch)
        arrays = {
            "inputs": np.ascontiguousarray(tokens[:, :-1]),
            "targets": np.ascontiguousarray(tokens[:, 1:]),
            "positions": np.broadcast_to(np.arange(work.length, dtype=np.int32), shape).copy(),
            "segment_ids": np.ones(shape, np.int32),
            "weights": np.ones(shape, np.float32),
        }
        return resolved.layout.place(arrays, range(work.sequences), work.sequences)

    batches = [placed(batch) for batch in range(protocol.BATCHES)]

    def step(batch: int) -> float:
        nonlocal state
        state, metrics = program.step(state, batches[batch])
        jax.block_until_ready(state)
        return float(metrics["loss"])

    first = step(0)
    serving.ready(
        first,
        versions={"braeburn": braeburn.__version__, "jax": jax.__version__},
        parameters=count(param_specs(run.model)),
    )
    serving.serve(step)


if __name__ == "__main__":
    main()
