"""Speed and memory of the real train step of a recipe's stage, on whatever device is there.

The step is the one that `braeburn train` compiles; only the data are random tokens, several
documents to a sequence, so no corpus is read. Steps are timed as the training loop times them: the
metrics of a step are read once the next step is on its way. JAX aside, this needs pydantic, optax,
jaxtyping and rich with what these need: no orbax, grain or tokenizers.
"""

import argparse
import contextlib
import itertools
import json
import logging
import os
import platform
import resource
import statistics
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from braeburn.config import Run, Stage

BEGAN = time.perf_counter()


def random_batch(stage: "Stage", vocab_size: int, seed: int) -> "dict[str, np.ndarray]":
    """Random tokens in documents of about a quarter of a sequence, packed as
    `braeburn.data.packing` packs them.
    """
    import numpy as np

    generator = np.random.default_rng(seed)
    shape = (stage.batch_size, stage.sequence_length)
    tokens = generator.integers(0, vocab_size, (shape[0], shape[1] + 1), np.int32)
    starts = generator.random(shape) < 4 / stage.sequence_length
    starts[:, 0] = True
    index = np.arange(shape[1], dtype=np.int32)
    return {
        "inputs": np.ascontiguousarray(tokens[:, :-1]),
        "targets": np.ascontiguousarray(tokens[:, 1:]),
        "positions": index
        - np.maximum.accumulate(np.where(starts, index, 0), axis=1).astype(np.int32),
        "segment_ids": np.cumsum(starts, axis=1, dtype=np.int32),
        "weights": np.ones(shape, np.float32),
    }


def peak_memory() -> tuple[int, str]:
    """The most bytes in use so far, and whose they are."""
    import jax

    stats = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"], "device"
    # Kilobytes everywhere but on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "resident set of the process"


class AttentionBackends(logging.Handler):
    """Collects the names of the back ends that attention was traced with, as the log tells them."""

    def __init__(self) -> None:
        """Begins to listen, until `close`."""
        from braeburn.layers.attention import select

        super().__init__(logging.INFO)
        self.names: list[str] = []
        self._logger = logging.getLogger(select.__module__)
        self._logger.addHandler(self)
        self._logger.setLevel(logging.INFO)

    def emit(self, record: logging.LogRecord) -> None:
        """Takes a line of the log."""
        if isinstance(record.args, tuple) and record.args[1] not in self.names:
            self.names.append(str(record.args[1]))

    def close(self) -> None:
        """Listens no more."""
        self._logger.removeHandler(self)
        super().close()


def measure(
    run: "Run", name: str, steps: int, warmup: int, profile: str | None = None
) -> dict[str, Any]:
    """Compiles a stage of a run and times `steps` of its steps after `warmup` others; two more are
    profiled into a folder `profile`.
    """
    import jax

    from braeburn.layers.spec import count
    from braeburn.models.decoder import param_specs
    from braeburn.train.metrics import flops_per_token, peak_flops
    from braeburn.train.resolved import resolve_stage
    from braeburn.train.stages import compile_stage, initial_state

    jax.config.update("jax_enable_compilation_cache", False)  # compilation is timed
    stage, specs = run.stages[name], param_specs(run.model)
    began = time.perf_counter()
    resolved = resolve_stage(run, name)
    with contextlib.closing(AttentionBackends()) as backends:
        layout, program = resolved.layout, compile_stage(resolved)
    compile_seconds = time.perf_counter() - began
    state = initial_state(resolved)
    rows = range(stage.batch_size)
    batches = [
        layout.place(random_batch(stage, run.model.vocab_size, seed), rows, stage.batch_size)
        for seed in range(4)
    ]

    state, metrics = program.step(state, batches[0])
    losses, ends = [float(metrics["loss"])], [time.perf_counter()]
    state, metrics = program.step(state, batches[1])
    for step in range(2, warmup + steps + 1):
        # One step more than is timed, so that another is on its way at the end of each.
        before = metrics
        state, metrics = program.step(state, batches[step % len(batches)])
        losses.append(float(before["loss"]))
        ends.append(time.perf_counter())
    if profile:
        with jax.profiler.trace(profile):
            for batch in batches[:2]:
                state, metrics = program.step(state, batch)
            jax.block_until_ready(state)
    timed = ends[warmup - 1 :]
    seconds = [after - before for before, after in itertools.pairwise(timed)]

    median = statistics.median(seconds)
    flops = flops_per_token(run.model, specs, stage.sequence_length) * stage.batch_tokens / median
    device = jax.devices()[0]
    peak = peak_flops(device.device_kind)
    memory, whose = peak_memory()
    return {
        "run": run.name,
        "stage": name,
        "parameters": count(specs),
        "sequence_length": stage.sequence_length,
        "batch_tokens": stage.batch_tokens,
        "accumulation_steps": stage.accumulation_steps,
        "compute": run.precision.compute,
        "optimizer": run.optimizer.kind,
        "remat": run.remat.policy,
        "attention": ", ".join(backends.names),
        "steps": len(seconds),
        "tokens_per_second": stage.batch_tokens / median,
        "step_seconds_median": median,
        "step_seconds_min": min(seconds),
        "model_flops_per_second": flops,
        "mfu": flops / peak if peak else None,
        "peak_memory_bytes": memory,
        "peak_memory_of": whose,
        "seconds_to_first_step": ends[0] - BEGAN,
        "compile_seconds": compile_seconds,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "skipped_steps": int(metrics["skipped"]),
        "device": device.device_kind,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
    }


def report(result: dict[str, Any]) -> str:
    """The result as text."""
    mfu = (
        "unknown: no peak is known for this device"
        if result["mfu"] is None
        else f"{result['mfu']:.1%}"
    )
    rows = {
        "run": f"{result['run']}, stage {result['stage']}, {result['parameters']:,} parameters",
        "batch": f"{result['batch_tokens']:,} tokens in sequences of "
        f"{result['sequence_length']:,}, "
        f"{result['compute']}, {result['optimizer']}, remat {result['remat']}",
        "device": f"{result['device']}, jax {result['jax']}, Python {result['python']}, "
        f"attention {result['attention']}",
        "tokens/s": f"{result['tokens_per_second']:,.0f}",
        "step": f"{result['step_seconds_median']:.4f} s median, {result['step_seconds_min']:.4f} "
        f"s least of {result['steps']}",
        "model FLOP/s": f"{result['model_flops_per_second'] / 1e12:.3f}e12 (6N + 12LdS)",
        "MFU": mfu,
        "peak "
        "memory": f"{result['peak_memory_bytes'] / 2**30:.2f} GiB ({result['peak_memory_of']})",
        "first step": f"{result['seconds_to_first_step']:.1f} s after the start, "
        f"{result['compile_seconds']:.1f} s of them compilation",
        "loss": f"{result['first_loss']:.4f} first, {result['last_loss']:.4f} last, "
        f"{result['skipped_steps']} steps skipped",
        "load average": f"{result['load_average']:.2f}",
    }
    return "\n".join(f"{name:<13} {text}" for name, text in rows.items())


def main() -> int:
    """Measures one stage of one recipe; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("recipe", help="a built-in recipe, or file.py:function")
    parser.add_argument(
        "--set", action="append", default=[], metavar="PATH=VALUE", help="override a field"
    )
    parser.add_argument("--stage", help="the stage to measure; the first by default")
    parser.add_argument("--steps", type=int, default=10, help="steps to time")
    parser.add_argument("--warmup", type=int, default=2, help="steps before these, at least 1")
    parser.add_argument(
        "--batch-tokens", type=int, help="tokens in a batch, instead of the recipe's"
    )
    parser.add_argument("--profile", metavar="DIR", help="profile two further steps into a folder")
    parser.add_argument("--json", action="store_true", help="print JSON alone on standard output")
    arguments = parser.parse_args()
    if arguments.steps < 1 or arguments.warmup < 1:
        parser.error("--steps and --warmup must be at least 1")

    from braeburn import recipes
    from braeburn.config import override, parse_assignment
    from braeburn.errors import UserError, did_you_mean

    try:
        run = recipes.load(arguments.recipe)
        name = arguments.stage or next(iter(run.stages))
        if name not in run.stages:
            raise UserError(
                f"--stage {name!r} is not a stage of {run.name!r}; {did_you_mean(name, run.stages)}"
            )
        values = dict(parse_assignment(text) for text in arguments.set)
        if arguments.batch_tokens:
            values[f"stages.{name}.batch_tokens"] = arguments.batch_tokens
        run = override(run, values)
        result = measure(run, name, arguments.steps, arguments.warmup, arguments.profile)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result) if arguments.json else report(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
