"""The memory of the jobs after training, on a model larger than they may hold.

    python benchmarks/job_memory.py [--gigabytes 3] [--limit 5] [--devices 4] [--keep FOLDER]

A Hugging Face directory of random weights is made in bfloat16, one layer after the other. It is
imported, evaluated, sampled, pruned and exported, each in a process that the system gives no more
memory than `--limit` GB to (RLIMIT_DATA: of its own, without mapped files), with simulated devices,
and by two processes that have half of them each, under the same limit. What is exported in bfloat16
must be the directory that was imported, byte for byte, and what two processes have pruned must be
what one has. Evaluation and generation are compared with those of one device, which has no limit.
"""

import argparse
import filecmp
import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from braeburn.config import ModelConfig
from braeburn.data.tokenizer import Tokenizer, train
from braeburn.interop import huggingface
from braeburn.layers.spec import ParamSpec, count, map_specs
from braeburn.models.decoder import param_specs

GB = 1e9
TEXT = (
    "The committee shall report on the state of the works in each of the years that follow. " * 200
)


@dataclass(frozen=True)
class Random:
    """A parameter of random values, which are made as they are asked for.

    Attributes:
        spec: of the parameter.
        seed: of its values.
    """

    spec: ParamSpec
    seed: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the dimensions."""
        return self.spec.shape

    def __getitem__(self, layer: int) -> np.ndarray:
        return self._values(self.shape[1:], layer)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self._values(self.shape, 0)

    def _values(self, shape: tuple[int, ...], layer: int) -> np.ndarray:
        if self.spec.role == "norm":
            return np.ones(shape, np.float32)
        generator = np.random.default_rng((self.seed, layer))
        return generator.standard_normal(shape, np.float32) * np.float32(0.02)


def model_of(gigabytes: float) -> ModelConfig:
    """A Llama of about so many bytes in bfloat16; narrower below a gigabyte."""
    width = 2048 if gigabytes >= 1 else 512
    sizes = {
        "vocab_size": 32_000,
        "d_model": width,
        "num_heads": width // 128,
        "num_kv_heads": width // 512,
        "head_dim": 128,
        "ffn_dim": 4 * width,
        "qk_norm": False,
        "max_position_embeddings": 2048,
    }
    fewer, more = (count(param_specs(ModelConfig(num_layers=n, **sizes))) for n in (1, 2))
    layers = round((gigabytes * GB / 2 - fewer) / (more - fewer)) + 1
    return ModelConfig(num_layers=max(2, layers), **sizes)


def make(folder: Path, gigabytes: float) -> tuple[ModelConfig, Tokenizer]:
    """Writes the Hugging Face directory."""
    model, tokenizer = model_of(gigabytes), train([TEXT], 300)
    numbers = iter(range(10_000))
    params = map_specs(lambda _, spec: Random(spec, next(numbers)), param_specs(model))
    files = huggingface.Files(2048, "bfloat16")
    huggingface.write(folder, params, model, tokenizer, files)
    return model, tokenizer


def run(arguments: list[str], limit: float, devices: int) -> tuple[float, float, str]:
    """Runs `braeburn` under a limit on its memory; returns the seconds, its peak in bytes and its
    output.
    """

    def limited() -> None:
        if limit:
            resource.setrlimit(resource.RLIMIT_DATA, (int(limit * GB),) * 2)

    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    program = [sys.executable, "-c", "from braeburn.cli import console; console()"]
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as output:
        child = subprocess.Popen(
            [*program, *arguments], env=environment, stdout=output, preexec_fn=limited
        )
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read()
    if child.returncode:
        raise SystemExit(f"braeburn {' '.join(arguments)} ended with {child.returncode}: {text}")
    return time.monotonic() - began, usage.ru_maxrss * 1024, text


def compared_with(found: str, expected: str) -> str:
    """What two outputs of a job have in common."""
    ours, theirs = json.loads(found), json.loads(expected)
    if "samples" in theirs:
        same = [s["tokens"] for s in ours["samples"]] == [s["tokens"] for s in theirs["samples"]]
        return f"the same tokens: {same}"
    ((mine,), (one,)) = (result["results"].values() for result in (ours, theirs))
    return f"losses apart by {abs(mine['loss'] / one['loss'] - 1):.1e}"


def by_two(folder: Path) -> Path:
    """Where two processes write what one writes into a folder."""
    return folder.with_name(f"{folder.name}-by-two")


def same_weights(one: Path, other: Path) -> bool:
    """Whether two Hugging Face directories have the same files of weights, byte for byte."""
    names = [{file.name for file in folder.glob("*.safetensors")} for folder in (one, other)]
    return names[0] == names[1] and all(
        filecmp.cmp(one / name, other / name, shallow=False) for name in names[0]
    )


def main() -> None:
    """Prints a line for each job."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=3.0, help="of the model in bfloat16")
    parser.add_argument("--limit", type=float, default=5.0, help="GB of memory of a process")
    parser.add_argument("--devices", type=int, default=4, help="simulated")
    parser.add_argument("--keep", type=Path, help="a folder to work in, which is left")
    options = parser.parse_args()
    folder = options.keep or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    source, imported, pruned, exported = (
        folder / name for name in ("source", "imported", "pruned", "exported")
    )
    if not source.exists():
        make(source, options.gigabytes)
    text = folder / "text.txt"
    text.write_text(TEXT[: len(TEXT) // 10])
    for old in (pruned, exported):
        for name in (old, by_two(old)):
            shutil.rmtree(name, ignore_errors=True)
    mesh = f"tensor={options.devices}"
    ffn = json.loads((source / "config.json").read_text())["intermediate_size"] * 3 // 4
    evaluate = f"evaluate {imported} --data {text} --json --sequence-length 64"
    generate = f"generate {imported} --prompt the --max-new-tokens 8 --greedy --dtype bf16 --json"
    prune = f"prune {imported} --ffn {ffn} --method magnitude --out"
    two = "launch local --processes 2 --"
    jobs = {
        "import": f"import {source} --out {imported}",
        "import, two processes": f"{two} import {source} --out {by_two(imported)}",
        "evaluate": f"{evaluate} --mesh {mesh}",
        "evaluate, two processes": f"{two} {evaluate} --mesh {mesh}",
        "prune": f"{prune} {pruned}",
        "prune, two processes": f"{two} {prune} {by_two(pruned)}",
        "export": f"export {imported} --out {exported} --dtype bf16",
        "export, two processes": (
            f"{two} export {by_two(imported)} --out {by_two(exported)} --dtype bf16"
        ),
        "generate": f"{generate} --mesh {mesh}",
        "generate, two processes": f"{two} {generate} --mesh {mesh}",
    }
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    print(f"a model of {size / GB:.2f} GB, at most {options.limit} GB a process")
    outputs = {}
    for name, arguments in jobs.items():
        if name.startswith("import") and Path(arguments.split()[-1]).exists():
            continue
        devices = options.devices // 2 if "two" in name else options.devices
        seconds, peak, outputs[name] = run(shlex.split(arguments), options.limit, devices)
        # That of processes which a launcher starts is not known here.
        told = "" if "two" in name else f"   peak {peak / GB:5.2f} GB"
        print(f"{name:24} {seconds:6.1f} s{told}", flush=True)
    for name, arguments in {"evaluate": evaluate, "generate": generate}.items():
        _, _, output = run(shlex.split(arguments), 0, 1)
        for other in (name, f"{name}, two processes"):
            if other in outputs:
                print(f"{other} beside one device: {compared_with(outputs[other], output)}")
    for weights in (exported, by_two(exported)):
        print(f"{weights.name} as imported, byte for byte: {same_weights(source, weights)}")
        shutil.rmtree(weights)
    for each, out in ((pruned, exported), (by_two(pruned), by_two(exported))):
        run(["export", str(each), "--out", str(out), "--dtype", "bf16"], options.limit, 1)
    print(f"pruned by two as by one: {same_weights(exported, by_two(exported))}")
    if not options.keep:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
