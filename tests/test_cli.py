import json
import math
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from braeburn.config import Execution, read_run
from braeburn.models import decoder
from braeburn.recipes import BUILT_IN
from braeburn.train.trained import load
from support import braeburn, contents, events, process, rows

COMMANDS = [
    "recipes",
    "explain",
    "chips",
    "plan",
    "compile",
    "train",
    "evaluate",
    "generate",
    "import",
    "export",
]


@pytest.fixture(scope="module")
def exported(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "hf"
    answer = braeburn("export", finished, "--out", out, "--json")
    assert answer.code == 0, answer.err
    assert json.loads(answer.out) == {
        "out": str(out),
        "format": "hf",
        "dtype": "float32",
        "step": 14,
    }
    return out


@pytest.fixture(scope="module")
def imported(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("imported") / "tiny"
    answer = braeburn("import", exported, "--out", out, "--json")
    assert answer.code == 0, answer.err
    assert json.loads(answer.out)["model"]["d_model"] == 64
    return out


def results(directory: Path, *files: Path) -> dict[str, Any]:
    answer = braeburn(
        "evaluate", directory, *(part for file in files for part in ("--data", file)), "--json"
    )
    assert answer.code == 0, answer.err
    return json.loads(answer.out)


def test_help_lists_the_commands() -> None:
    for arguments in [(), ("--help",), ("-h",)]:
        answer = braeburn(*arguments)
        assert answer.code == 0
        assert all(command in answer.out for command in COMMANDS)
    assert "--stop-after-steps" in braeburn("train", "--help").out


def test_recipes_are_listed() -> None:
    lines = braeburn("recipes").out.splitlines()
    assert [line.split()[0] for line in lines] == list(BUILT_IN)
    assert list(json.loads(braeburn("recipes", "--json").out)) == list(BUILT_IN)


def test_explain_tells_values_origins_and_sums(tiny_arguments: list[str]) -> None:
    answer = braeburn("explain", *tiny_arguments)
    words = {line.split()[0]: line.split() for line in answer.out.splitlines() if line.strip()}
    assert words["seed"] == ["seed", "0", "default"]
    assert words["model.d_model"] == ["model.d_model", "64", "recipe"]
    assert words["stages.core.tokens"] == ["stages.core.tokens", "6144", "command", "line"]
    assert words["core"] == ["core", "6,144", "6", "64", "16", "500,000", "119,168", "119,168"]
    assert words["context"][5] == "6,315,089"
    assert words["all"] == ["all", "14,336", "14"]
    assert "parameters: 119,168 (86,400 without the 32,768 of embeddings)" in answer.out
    assert answer.err == ""


def test_explain_as_json_agrees_with_the_run(tiny_arguments: list[str], finished: Path) -> None:
    explained = json.loads(braeburn("explain", *tiny_arguments, "--json").out)
    saved = json.loads((finished / "config.json").read_text())
    assert explained["run"] == saved["run"]
    assert explained["provenance"] == saved["provenance"]
    assert explained["provenance"]["data.held_out"] == "command line"
    assert explained["provenance"]["stages.context.rope_base"] == "recipe"
    assert explained["provenance"]["optimizer.momentum"] == "default"
    assert explained["stages"]["context"] == {
        "tokens": 4096,
        "steps": 4,
        "sequence_length": 256,
        "batch_size": 4,
        "rope_base": 6_315_089.0,
        "parameters": 119_168,
        "parameters_left": 119_168,
    }
    assert set(saved["versions"]) >= {"braeburn", "python", "jax", "jaxlib", "orbax-checkpoint"}


def test_explain_of_a_recipe_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("from braeburn.recipes.quickstart import afm_tiny\n")
    answer = braeburn("explain", f"{tmp_path}/mine.py:afm_tiny", "--set", "seed=7", "--json")
    assert json.loads(answer.out)["run"]["seed"] == 7


CHAIN = """
from braeburn.config import Distillation, Pruning, Quantization, validate
from braeburn.recipes import load

def chain():
    run = load("afm-tiny")
    core = run.stages["core"].model_dump()
    stages = {
        "larger": core,
        "cut": core | {"pruning": Pruning(keep={"ffn": 80})},
        "distilled": core
        | {"teacher": "larger", "distillation": Distillation(target="top_k", cached=True)},
        "rounded": core | {"quantization": Quantization()},
    }
    return validate(run.model_dump() | {"stages": stages})
"""


def test_explain_tells_what_each_stage_makes_of_the_model(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(CHAIN)
    recipe = f"{tmp_path}/mine.py:chain"
    stages = json.loads(braeburn("explain", recipe, "--json").out)["stages"]
    counts = [(facts["parameters"], facts["parameters_left"]) for facts in stages.values()]
    # Of 160 hidden units in each of two layers 80 go, with their 64 weights in each of three
    # matrices.
    small = 119_168 - 2 * 80 * 3 * 64
    assert counts == [(119_168, 119_168), (119_168, small), (small, small), (small, small)]
    table = braeburn("explain", recipe).out
    for words in (
        "prunes to ffn=80 by soft_top_k",
        "distilled from larger: top 8, cached, weight 0.9",
        "rounds to int4",
    ):
        assert words in table


def test_training_a_finished_run_again_shows_its_results(
    finished: Path, copied: Path, tiny_arguments: list[str]
) -> None:
    answer = braeburn("train", *tiny_arguments, "--out", copied, "--json")
    assert answer.code == 0
    outcome = json.loads(answer.out)
    assert outcome["step"] == 14 and outcome["finished"] is True
    assert [(stage["stage"], stage["step"], stage["tokens"]) for stage in outcome["stages"]] == [
        ("core", 6, 6144),
        ("continued", 10, 4096),
        ("context", 14, 4096),
    ]
    assert [set(stage["held_out"]) for stage in outcome["stages"]] == [{"code", "prose"}] * 2 + [
        {"code", "long"}
    ]
    losses = {stage["stage"]: stage["loss"] for stage in outcome["stages"]}
    for stage, loss in losses.items():
        assert loss == pytest.approx(
            np.mean([row["loss"] for row in rows(finished) if row["stage"] == stage])
        )
    assert losses["context"] < losses["core"]
    assert "finished at step 14 of 14" in answer.err
    assert rows(copied) == rows(finished)

    table = braeburn("train", *tiny_arguments, "--out", copied).out.splitlines()
    assert table[0].split() == [
        "stage",
        "tokens",
        "loss",
        "held-out",
        "loss",
        "bits",
        "per",
        "byte",
    ]
    assert [line.split()[0] for line in table[1:]] == [
        "core",
        "core",
        "continued",
        "continued",
        "context",
        "context",
    ]


def test_evaluating_files_counts_their_bytes(finished: Path, tmp_path: Path) -> None:
    texts = [
        "def f(x):\n    return x  # naïve – 漢字\n" * 30,
        "import os\n" * 7,
        "class A: ...\n" * 90,
    ]
    plain, lines = tmp_path / "plain.txt", tmp_path / "lines.jsonl"
    plain.write_text(texts[0], encoding="utf-8")
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    answer = results(finished, plain, lines)
    assert answer["step"] == 14
    assert set(answer["results"]) == {str(plain), str(lines)}
    assert (
        json.loads(braeburn("evaluate", finished, "--data", plain, lines, "--json").out) == answer
    )
    for path, included in ((plain, texts[:1]), (lines, texts)):
        figures = answer["results"][str(path)]
        assert figures["bytes"] == sum(len(text.encode()) for text in included)
        nll = figures["loss"] * figures["tokens"]
        assert figures["bits_per_byte"] == pytest.approx(nll / math.log(2) / figures["bytes"])
        assert figures["perplexity"] == pytest.approx(math.exp(figures["loss"]))
        assert 0 <= figures["accuracy"] <= 1

    table = braeburn("evaluate", finished, "--data", plain).out.splitlines()
    assert table[0].split()[:2] == ["text", "tokens"]
    assert table[1].startswith(str(plain))


def test_evaluating_the_held_out_text_repeats_the_last_stage(
    finished: Path, tiny_arguments: list[str]
) -> None:
    evaluated = results(finished)["results"]
    assert set(evaluated) == {"code", "prose", "long"}
    last = events(finished, "stage_end")[-1]
    for source, figures in last["held_out"].items():
        assert evaluated[source]["loss"] == pytest.approx(figures["loss"], rel=1e-5)
        assert evaluated[source]["bytes"] == figures["bytes"]


def test_greedy_generation_is_deterministic(finished: Path) -> None:
    arguments = [
        "generate",
        finished,
        "--prompt",
        "import os",
        "--prompt",
        "def f",
        "--max-new-tokens",
        8,
    ]
    first = json.loads(braeburn(*arguments, "--greedy", "--json").out)
    again = json.loads(braeburn(*arguments, "--greedy", "--seed", 5, "--json").out)
    assert first == again
    assert first["step"] == 14
    assert [sample["prompt"] for sample in first["samples"]] == ["import os", "def f"]
    assert all(0 < len(sample["tokens"]) <= 8 for sample in first["samples"])

    text = braeburn(*arguments, "--greedy").out
    assert (
        text
        == "\n---\n".join(sample["prompt"] + sample["text"] for sample in first["samples"]) + "\n"
    )

    sampled = [braeburn(*arguments, "--seed", seed, "--json").out for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_an_export_comes_back_the_same(finished: Path, imported: Path, tmp_path: Path) -> None:
    before, after = load(finished), load(imported)
    assert (after.step, after.sequence_length) == (0, before.sequence_length)
    assert after.model.rope_base == before.model.rope_base == 6_315_089.0
    assert after.tokenizer.hash == before.tokenizer.hash
    tokens = np.arange(48)[None] * 7 % 512
    inputs = (tokens, np.arange(48)[None], np.ones((1, 48), np.int32))
    forward = jax.jit(decoder.forward, static_argnames=("model", "execution"))
    logits = [
        forward(t.params, inputs, t.model, Execution(precision=t.run.precision))
        @ decoder.head_matrix(t.params).T
        for t in (before, after)
    ]
    np.testing.assert_allclose(*logits, atol=1e-5)

    file = tmp_path / "text.txt"
    file.write_text("for line in sys.stdin:\n    print(line)\n")
    losses = [
        results(directory, file)["results"][str(file)]["loss"] for directory in (finished, imported)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_an_export_in_bfloat16_holds_the_rounded_weights(
    finished: Path, exported: Path, tmp_path: Path
) -> None:
    narrow = tmp_path / "narrow"
    assert braeburn("export", finished, "--out", narrow, "--dtype", "bf16").code == 0
    config = json.loads((narrow / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (exported, narrow)]
    assert sizes[1] == pytest.approx(sizes[0] / 2, rel=0.01)
    assert braeburn("import", narrow, "--out", tmp_path / "back").code == 0
    expected = jax.tree.map(
        lambda x: np.asarray(x).astype("bfloat16").astype(np.float32), load(finished).params
    )
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "back").params, expected)
    for options, sentence in (
        (["--dtype", "fp8"], "--dtype 'fp8' is not known; use --dtype fp32 or --dtype bf16"),
        (["--dtype", "bf16", "--format", "gguf"], "of a GGUF file it is --type f16, q8_0 or q4_0"),
        (["--type", "f16"], "of a Hugging Face directory it is --dtype fp32 or --dtype bf16"),
    ):
        assert sentence in braeburn("export", finished, "--out", tmp_path / "x", *options).error
    assert not (tmp_path / "x").exists()


def test_an_import_of_an_export_exports_the_same(
    exported: Path, imported: Path, tmp_path: Path
) -> None:
    answer = braeburn("export", imported, "--out", tmp_path / "again")
    assert answer.out == f"exported step 0 of {str(imported)!r} into {str(tmp_path / 'again')!r}\n"
    assert contents(exported) == contents(tmp_path / "again")


RECIPE = """
from pathlib import Path
from braeburn.config import read_run
from braeburn.recipes import load

def more():
    return load("afm-tiny").model_copy(update={{"model": read_run(Path({imported!r})).model}})
"""


def test_training_goes_on_from_an_import(
    imported: Path, finished: Path, tiny_arguments: list[str], tmp_path: Path
) -> None:
    (tmp_path / "recipe.py").write_text(RECIPE.format(imported=str(imported)))
    out = shutil.copytree(imported, tmp_path / "more")
    arguments = [f"{tmp_path}/recipe.py:more", *tiny_arguments[1:]]

    other = tmp_path / "other.json"
    other.write_text((finished / "tokenizer.json").read_text().replace("<|endoftext|>", "<s>"))
    refused = braeburn("train", *arguments, "--out", out, "--set", f"data.tokenizer={other}")
    assert "data.tokenizer=" in refused.error and "leave data.tokenizer unset" in refused.error
    assert read_run(out).stages == {}

    answer = braeburn("train", *arguments, "--out", out, "--stop-after-steps", 2, "--json")
    assert json.loads(answer.out) == {"step": 2, "finished": False, "stages": []}
    assert "beginning from the weights of checkpoint 0, with 14 steps to make" in answer.err
    assert "resuming" not in answer.err
    assert (out / "tokenizer.json").read_bytes() == (imported / "tokenizer.json").read_bytes()
    assert rows(out)[0]["loss"] < rows(finished)[0]["loss"] - 0.2
    assert read_run(out).model == read_run(imported).model
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["0", "2"]


def test_standard_output_of_a_process_is_pure_json(copied: Path, tiny_arguments: list[str]) -> None:
    answer = process("train", *tiny_arguments, "--out", copied, "--json")
    assert answer.code == 0
    assert json.loads(answer.out)["finished"] is True
    assert "finished at step 14" in answer.err
