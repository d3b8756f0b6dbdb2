"""What the depth of a model costs before its first step: seconds to trace, compile and initialise.

    python benchmarks/depth.py [CASE ...] [--layers 8 24 48 80]

Each case is a recipe's model at a small width, with layers scanned over, so that only the number of
layers differs. Each depth is compiled in a process of its own, without caches, as often as
`--repeats` says, the depths in turn; printed are the medians, and how they compare with those of
the first depth. The train step of the deepest should cost at most 1.3 times that of the shallowest.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

LIMIT = 1.3
LAYERS = (8, 24, 48, 80)
# Its pattern is of six layers. With eight there is one repeat, which is no loop; a program of loops
# takes the compiler twice as long, whatever their number of turns.
LAYERS_OF_WINDOWS = (14, 26, 50, 80)
# The recipe, and which of its layers are in the tail, per 8 layers.
CASES = {
    "dense": ("afm-tiny", 0),
    "qwen3": ("qwen3-8b", 0),
    "windows": ("gemma3-1b", 0),
    "reused keys": ("afm-on-device-2025-tiny", 3),
    "experts": ("qwen3-30b-a3b", 0),
    "latents": ("deepseek-v3", 4),
}
SIZES = {
    "vocab_size": 512,
    "d_model": 64,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
    "ffn_dim": 128,
}


def run_of(case: str, layers: int) -> Any:
    """A run of one stage whose model is a case's, narrow, with so many layers."""
    from braeburn import recipes

    name, tail = CASES[case]
    model = recipes.load(name).model

    def narrow(layer: Any) -> Any:
        def smaller(size: int) -> int:
            return min(size, 32)

        return layer.model_copy(
            update={
                "attention": layer.attention.shrunk(SIZES["head_dim"], smaller),
                "feed_forward": layer.feed_forward.shrunk(smaller),
            }
        )

    model = model.model_copy(
        update={
            **SIZES,
            "num_layers": layers,
            "tail_layers": layers * tail // 8 if model.tail_layers else 0,
            "scan_layers": True,
            "pattern": tuple(map(narrow, model.pattern)),
            "tail_pattern": tuple(map(narrow, model.tail_pattern)),
        }
    )
    plain = recipes.load("afm-tiny")
    stage = plain.stages["core"].model_copy(
        update={"sequence_length": 128, "batch_tokens": 512, "tokens": 512 * 100}
    )
    return plain.replace(model=model, stages={"core": stage})


def measure(case: str, layers: int) -> dict[str, float]:
    """Seconds that one depth of a case takes, and seconds of processors, which other work on the
    machine changes less.
    """
    import jax

    from braeburn.train.resolved import resolve_stage
    from braeburn.train.stages import initial_state, lower_stage

    jax.config.update("jax_enable_compilation_cache", False)
    resolved = resolve_stage(run_of(case, layers), "core")
    times = [(time.perf_counter(), time.process_time())]

    def ended() -> None:
        times.append((time.perf_counter(), time.process_time()))

    with resolved.layout.compiling():
        lowered = lower_stage(resolved)
        ended()
        lowered.compile()
    ended()
    jax.block_until_ready(initial_state(resolved))
    ended()
    names = ("trace", "compile", "initialise")
    found = {}
    for clock, suffix in enumerate(("", "_cpu")):
        for i, name in enumerate(names):
            found[name + suffix] = times[i + 1][clock] - times[i][clock]
        found[f"step{suffix}"] = times[2][clock] - times[0][clock]
    return found | {"program": len(lowered.as_text()) / 1e6}


def main() -> int:
    """Measures all; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help="which; all by default")
    parser.add_argument("--layers", type=int, nargs="+", help=f"{LAYERS} by default")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.cases) - set(CASES):
        parser.error(f"no case is called {sorted(unknown)[0]!r}; choose from {', '.join(CASES)}")
    if options.one:
        print(json.dumps(measure(options.cases[0], options.layers[0])))
        return 0
    code = False
    for case in options.cases or CASES:
        depths = options.layers or (LAYERS_OF_WINDOWS if case == "windows" else LAYERS)
        found: dict[int, list[dict[str, float]]] = {layers: [] for layers in depths}
        for _ in range(options.repeats):
            for layers, rows in found.items():
                command = [sys.executable, __file__, "--one", case, "--layers", str(layers)]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                rows.append(json.loads(done.stdout))
        medians = {
            layers: {name: statistics.median(row[name] for row in rows) for name in rows[0]}
            for layers, rows in found.items()
        }
        first = medians[depths[0]]
        for layers, row in medians.items():
            ratio = row["step"] / first["step"]
            of_processors = row["step_cpu"] / first["step_cpu"]
            code |= ratio > LIMIT
            if options.json:
                print(json.dumps({"case": case, "layers": layers, **row, "ratio": ratio}))
                continue
            print(
                f"{case:<12} {layers:>3} layers  trace {row['trace']:6.2f} s  compile "
                f"{row['compile']:6.2f} s  initialise {row['initialise']:6.2f} s  program "
                f"{row['program']:5.2f} MB  step {ratio:4.2f} times that of "
                f"{depths[0]} layers, {of_processors:4.2f} in processor time",
                flush=True,
            )
    if not options.json:
        print(f"load average {os.getloadavg()[0]:.2f}")
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
