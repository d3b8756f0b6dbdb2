"""The memory of an export beside what the plan says of it.

    python benchmarks/export_memory.py [--recipe afm-server] [--divide 4] [--layers 4]
        [--stored float32] [--formats hf:fp32,hf:bf16] [--limit GB] [--folder DIR]

A run directory of random weights is made, one layer after the other: the recipe's model with fewer
layers, and with its width, FFN, heads and vocabulary divided by `--divide`. With `--divide 1` its
tensors are as large as the recipe's own, and so is the memory of an export, whatever the number of
layers: `--divide 1 --layers 6` makes a tenth of afm-server. Each export runs in a process of its
own, with `--limit` under RLIMIT_DATA, and its files are removed before the next.
"""

import argparse
import shlex
import shutil
import tempfile
from pathlib import Path

import numpy as np

from braeburn.config import ModelConfig, Precision, Run, file_type
from braeburn.data.tokenizer import train
from braeburn.layers.spec import ParamSpec, count, map_specs
from braeburn.models.decoder import param_specs
from braeburn.plan.export_cost import estimate_export
from braeburn.plan.jobs import Export, model_after
from braeburn.recipes import load
from braeburn.train.state import TrainState
from braeburn.train.stored import Pieces
from braeburn.train.trained import found_run
from job_memory import GB, TEXT, Random, run


def smaller(recipe: str, divide: int, layers: int) -> ModelConfig:
    """The model that a recipe leaves, with fewer layers and narrower ones."""
    run = load(recipe)
    model = model_after(run, list(run.stages)[-1])[0]
    fewer_heads = {
        "num_heads": max(1, model.num_heads // divide),
        "num_kv_heads": max(1, model.num_kv_heads // divide),
    }
    return model.replace(
        num_layers=layers,
        d_model=model.d_model // divide,
        ffn_dim=model.ffn_dim // divide,
        vocab_size=model.vocab_size // divide,
        **fewer_heads,
    )


def make(folder: Path, model: ModelConfig, stored: str) -> None:
    """Writes a run directory of random weights."""
    numbers = iter(range(10_000))

    def pieces(_: str, spec: ParamSpec) -> Pieces:
        values = Random(spec, next(numbers))
        dtype = spec.held_in(stored)
        if not spec.stacked:
            return Pieces.whole(spec.shape, dtype, lambda: np.asarray(values).astype(dtype))
        return Pieces.of_layers(spec.shape, dtype, lambda layer: values[layer].astype(dtype))

    params = map_specs(pieces, param_specs(model))
    found = Run(name="random", model=model, stages={}, precision=Precision(compute="float32"))
    state = TrainState(np.int32(0), params, None)
    found_run(folder, found, state, train([TEXT], 300), "random", folder)


def main() -> None:
    """Prints a line for each format."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="afm-server")
    parser.add_argument("--divide", type=int, default=4, help="of width, FFN, heads, vocabulary")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--stored", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--formats", default="hf:fp32,hf:bf16", help="also gguf:f16, gguf:q8_0")
    parser.add_argument("--limit", type=float, default=0.0, help="GB of memory; none without it")
    parser.add_argument("--folder", type=Path, help="to work in; a temporary one without it")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        model = smaller(options.recipe, options.divide, options.layers)
        parameters = count(param_specs(model))
        print(f"{parameters / 1e9:.2f}B parameters, stored in {options.stored}", flush=True)
        make(folder / "run", model, options.stored)
        for text in options.formats.split(","):
            format_, _, type_ = text.partition(":")
            named = (type_, None) if format_ == "hf" else (None, type_)
            job = Export(format_, file_type(format_, *named), None, 1.0, 1.0)
            planned = estimate_export(job, model, options.stored)
            option = "--dtype" if format_ == "hf" else "--type"
            out = folder / ("out" if format_ == "hf" else "out.gguf")
            arguments = f"export {folder / 'run'} --out {out} --format {format_} {option} {type_}"
            seconds, peak, _ = run(shlex.split(arguments), options.limit, 1)
            print(
                f"{text:10} {seconds:6.1f} s   peak {peak / GB:5.2f} GB, planned "
                f"{planned.peak / GB:5.2f} (at {planned.tensor})",
                flush=True,
            )
            shutil.rmtree(out, ignore_errors=True)
            out.unlink(missing_ok=True)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
