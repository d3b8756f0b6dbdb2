"""`make demo-real` on a tiny random model, without transformers; `make test-hf` has that too."""

import json
from pathlib import Path
from typing import Any

import pytest
from real_demo import ARTICLE, Demo, real

from braeburn.errors import UserError


@pytest.mark.deep
def test_a_model_goes_through_all_stages_and_a_second_call_repeats_none(
    demo: Demo, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo("--no-comparison", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    rows = {row["model"]: row for row in printed["rows"]}
    assert rows["imported"]["parameters"] > rows["pruned"]["parameters"]
    assert len({row["parameters"] for row in printed["rows"]}) == 2
    for name, type_ in real.EXPORTS:
        file = tmp_path / "out" / f"{name}-{type_}.gguf"
        assert rows[file.name]["bytes"] == file.stat().st_size
    bits = {name: row["bits_per_byte"] for name, row in rows.items() if row["braeburn"]}
    assert all(4 < value < 16 for value in bits.values()), bits
    assert len(set(bits.values())) == 4

    calls = list(demo.commands)
    kinds = ["import", "evaluate", "prune", "evaluate", "train", "evaluate", "train", "evaluate"]
    assert calls == [*kinds, *["export"] * len(real.EXPORTS)]
    # One stage is lost, and it alone is made again.
    kept = json.loads((tmp_path / "out" / "results.json").read_text())
    lost = kept["results"].pop("evaluate pruned")
    (tmp_path / "out" / "results.json").write_text(json.dumps(kept))
    assert demo("--no-comparison") == 0
    assert demo.commands == [*calls, "evaluate"]
    output = capsys.readouterr()
    assert f"{lost['perplexity']:.4f}" in output.out
    assert "== distil: finished before" in output.err

    assert demo("--no-comparison", "--ffn", "32") == 1
    assert "holds results of another --ffn" in capsys.readouterr().err


def test_the_last_articles_are_evaluated_and_the_others_learned_from(tmp_path: Path) -> None:
    articles = [f" = Title {number} = \n \n {ARTICLE} = = Part = = \n" for number in range(4)]
    file = tmp_path / "wiki.txt"
    file.write_text(" \n" + "".join(articles))
    documents = real.texts(file)
    assert documents == articles
    learned, evaluated = real.divided(documents, len(articles[3]) + 1)
    assert (learned, evaluated) == (articles[:2], articles[2] + articles[3])
    # Something is left to learn from, however much is asked for.
    assert real.divided(documents, 10**9) == (articles[:1], "".join(articles[1:]))


def test_a_text_that_cannot_be_divided_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("one line\n")
    with pytest.raises(UserError, match="too few to train and to evaluate on"):
        real.texts(tmp_path / "short.txt")
    with pytest.raises(UserError, match="cannot be read as text"):
        real.texts(tmp_path / "missing.txt")


def test_programs_that_do_not_agree_are_told_of() -> None:
    def ours(perplexity: float) -> dict[str, float]:
        return {"perplexity": perplexity, "tokens": 100}

    results: dict[str, Any] = {
        **{f"evaluate {name}": ours(20.0) for name in ("imported", "distilled", "rounded")},
        "transformers imported": {"perplexity": 20.01, "tokens": 100},
        "transformers distilled-f16.gguf": {"perplexity": 20.03, "tokens": 100},
        "transformers rounded-q4_0.gguf": {"perplexity": 20.0, "tokens": 101},
        "greedy text": {"text": {"same": True, "tokens": 64}, "seconds": 1.0},
    }
    found = real.checks(results)
    assert list(found.values()) == [True, False, False, True]
    assert "+0.0500%" in next(iter(found))


def test_two_calls_do_not_work_in_one_folder(
    demo: Demo, capsys: pytest.CaptureFixture[str]
) -> None:
    demo.folder.mkdir()
    with real.alone(demo.folder):
        assert demo("--no-comparison") == 1
    assert "another call works in" in capsys.readouterr().err
    assert not demo.commands
