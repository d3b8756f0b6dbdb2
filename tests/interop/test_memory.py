"""Models are imported, pruned and exported in less memory than they have weights."""

import filecmp
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hf_models import MODELS, random_params, write

from braeburn.config import ModelConfig
from braeburn.data.tokenizer import Tokenizer
from braeburn.interop import huggingface
from braeburn.layers.spec import map_specs
from braeburn.models.decoder import param_specs
from braeburn.train.checkpoint import Checkpoints
from support import braeburn, contents, together

MB = 10**6
# A model of 1.2 GB in bfloat16, whose layers have 100 MB each.
LARGE = ModelConfig(
    vocab_size=512,
    d_model=2048,
    num_layers=12,
    num_heads=16,
    num_kv_heads=4,
    head_dim=128,
    ffn_dim=6144,
    qk_norm=False,
)
LIMIT = 1000 * MB
UNDER_A_LIMIT = """
import resource, sys
resource.setrlimit(resource.RLIMIT_DATA, (int(sys.argv[1]),) * 2)
del sys.argv[1]
from braeburn.cli import console
console()
"""
IN_SEVERAL = """
import sys
from pathlib import Path
from braeburn.parallel import processes
processes.connect()
from braeburn.interop import huggingface
from braeburn.train.trained import open_stored
trained = open_stored(Path(sys.argv[1]))
files = huggingface.Files(2048, max_shard_bytes=50_000)
huggingface.write(sys.argv[2], trained.params, trained.model, trained.tokenizer, files)
"""


FAILING = """
import os, sys
from braeburn.errors import UserError
from braeburn.train import stored
from braeburn.cli import console
if sys.argv.pop(1) == os.environ["FAILING"]:
    def pieces(self, numbers=None):
        raise UserError("the disk is gone")
        yield
    stored.Pieces.pieces = pieces
console()
"""


class Constant:
    """A parameter whose layers are made as they are asked for."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape

    def __getitem__(self, layer: int) -> np.ndarray:
        return np.resize(np.arange(101 + layer, dtype=np.float32), self.shape[1:])

    def __array__(self, dtype: object = None, copy: object = None) -> np.ndarray:
        return np.resize(np.arange(101, dtype=np.float32), self.shape)


def limited(*arguments: object) -> None:
    """Calls the command line in a process that has no more memory of its own than `LIMIT`."""
    program = [sys.executable, "-c", UNDER_A_LIMIT, str(LIMIT), *map(str, arguments)]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "4"}
    done = subprocess.run(program, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr


def stored(folder: Path) -> int:
    """The bytes of a folder's weights."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


@pytest.mark.deep
def test_weights_never_lie_in_memory_whole(tokenizer_file: Path, tmp_path: Path) -> None:
    params = map_specs(lambda _, spec: Constant(spec.shape), param_specs(LARGE))
    source, imported, pruned = (tmp_path / name for name in ("source", "imported", "pruned"))
    files = huggingface.Files(2048, "bfloat16")
    huggingface.write(source, params, LARGE, Tokenizer.load(tokenizer_file), files)
    assert stored(source) > 1.1 * LIMIT
    limited("import", source, "--out", imported)
    limited("export", imported, "--out", tmp_path / "out", "--dtype", "bf16")
    name = "model.safetensors"
    assert filecmp.cmp(source / name, tmp_path / "out" / name, shallow=False)
    limited("prune", imported, "--ffn", 3072, "--out", pruned, "--method", "magnitude")
    smaller = json.loads((pruned / "config.json").read_text())["run"]["model"]
    assert smaller["ffn_dim"] == 3072


def test_several_processes_write_what_one_writes(tokenizer_file: Path, tmp_path: Path) -> None:
    model, _ = MODELS["qwen3-untied-wide-heads"]
    source = write(tmp_path / "source", random_params(model), model, tokenizer_file)
    assert braeburn("import", source, "--out", tmp_path / "run").code == 0
    program = [sys.executable, "-c", IN_SEVERAL, str(tmp_path / "run")]
    (one,) = together([*program, str(tmp_path / "one")], devices=1)
    several = together(*[[*program, str(tmp_path / "several")]] * 2, devices=1)
    assert [answer.code for answer in (one, *several)] == [0, 0, 0], several[0].err
    assert len(list((tmp_path / "several").glob("*.safetensors"))) > 3
    assert contents(tmp_path / "several") == contents(tmp_path / "one")
    refused = together(*[[*program, str(tmp_path / "several")]] * 2, devices=1)
    assert all("is not empty" in answer.err for answer in refused)


# Every array is cut into chunks of one layer, as large ones are.
IN_CHUNKS = """
import sys
from braeburn.train import checkpoint
checkpoint.CHUNK_BYTES = 4096
from braeburn.cli import console
console()
"""


@pytest.mark.parametrize("in_chunks", [False, True])
def test_several_processes_import_what_one_imports(
    in_chunks: bool, tokenizer_file: Path, tmp_path: Path
) -> None:
    """Arrays that lie in one chunk each, and arrays of one chunk a layer."""
    model, _ = MODELS["qwen3-untied-wide-heads"]
    source = write(tmp_path / "source", random_params(model), model, tokenizer_file)
    start = IN_CHUNKS if in_chunks else "from braeburn.cli import console; console()"
    program = [sys.executable, "-c", start, "import", str(source)]
    out = tmp_path / "run"
    answers = together(*[[*program, "--out", str(out)]] * 3, devices=1)
    assert [answer.code for answer in answers] == [0, 0, 0], answers[0].err
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    databases = {path.name for path in (out / "checkpoints/0/params").glob("ocdbt.process_*")}
    assert databases == {f"ocdbt.process_{index}" for index in range(3)}
    assert Checkpoints(out).newest_sound() == (0, [])
    assert [answer.out.count("imported ") for answer in answers] == [1, 0, 0]
    assert braeburn("import", source, "--out", tmp_path / "one").code == 0
    for name in ("run", "one"):
        assert braeburn("export", tmp_path / name, "--out", tmp_path / f"hf-{name}").code == 0
    assert contents(tmp_path / "hf-run") == contents(tmp_path / "hf-one")
    refused = together(*[[*program, "--out", str(out)]] * 2, devices=1)
    assert all("is in use; choose a new or empty folder" in answer.err for answer in refused)


def test_a_failure_of_one_process_ends_the_others(tokenizer_file: Path, tmp_path: Path) -> None:
    """A tensor that one process alone reads is damaged once the files have been looked at."""
    model, _ = MODELS["qwen3-untied-wide-heads"]
    source = write(tmp_path / "source", random_params(model), model, tokenizer_file)
    program = [
        [sys.executable, "-c", FAILING, str(index), "import", str(source), "--out"]
        for index in range(2)
    ]
    for failing in range(2):
        answers = together(
            *[[*each, str(tmp_path / "run")] for each in program],
            devices=1,
            environment={"FAILING": str(failing)},
        )
        assert [answer.code for answer in answers] != [0, 0]
        assert "the disk is gone" in answers[failing].err
        assert not any("Traceback" in answer.err for answer in answers), answers
        assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.deep
def test_many_layers_are_generated_from_in_several_processes(
    tokenizer_file: Path, tmp_path: Path
) -> None:
    """More programs that gather than XLA for CPUs has under way at once held each other up."""
    sizes = {"num_heads": 4, "num_kv_heads": 1, "head_dim": 16, "ffn_dim": 64, "qk_norm": False}
    model = ModelConfig(vocab_size=308, d_model=64, num_layers=40, **sizes)
    source = write(tmp_path / "source", random_params(model), model, tokenizer_file)
    assert braeburn("import", source, "--out", tmp_path / "run").code == 0
    generate = ["generate", str(tmp_path / "run"), "--prompt", "a", "--max-new-tokens", "4"]
    program = [sys.executable, "-c", "from braeburn.cli import console; console()", *generate]
    one, *_ = together([*program, "--greedy", "--json"], devices=1)
    mesh = [*program, "--greedy", "--json", "--mesh", "tensor=4"]
    first, second = together(mesh, mesh, devices=2, timeout=200)
    assert (first.code, second.code) == (0, 0), first.err
    assert json.loads(first.out)["samples"] == json.loads(one.out)["samples"]
