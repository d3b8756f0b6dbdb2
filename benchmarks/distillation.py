"""What a teacher is worth: next-token accuracy and bits per byte of one student, distilled in three
ways and not at all.

One teacher, wider and trained for longer, is made once. For each seed the same student then sees
the same number of tokens without it, with its top-1 token as the label (0.9, and 0.1 of the
text: AFM, arXiv 2407.21075), with its top 8 tokens, and with its whole distribution. Stages
with a teacher cut text at fixed positions, and the one without does not: apart from that and the
targets, the arms are the same.
"""

import argparse
import json
import logging
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from braeburn.config import (
    ONE_DEVICE,
    Checkpoint,
    Data,
    Distillation,
    Evaluation,
    ModelConfig,
    Precision,
    Run,
    Schedule,
    Source,
    Stage,
)
from braeburn.errors import UserError
from braeburn.train.compiler_flags import cache_compilations
from braeburn.train.loop import train
from corpora import sources

TARGETS: dict[str, Distillation | None] = {
    "no teacher": None,
    "label": Distillation(target="label"),
    "top_k 8": Distillation(target="top_k", top_k=8),
    "distribution": Distillation(target="distribution"),
}


def small_run(
    arguments: argparse.Namespace,
    found: dict[str, Source],
    *,
    teacher: Path | None,
    seed: int,
    target: str,
) -> Run:
    """A student of a teacher in a folder; the teacher itself where there is none."""
    width = arguments.d_model if teacher else arguments.teacher_d_model
    steps_of = arguments.tokens if teacher else arguments.teacher_tokens
    distillation = TARGETS[target]
    distilled = {"teacher": str(teacher), "distillation": distillation} if distillation else {}
    stage = Stage(
        tokens=steps_of,
        sequence_length=64,
        batch_tokens=1024,
        mixture=dict.fromkeys(found, 1.0),
        learning_rate=arguments.learning_rate,
        weight_decay=3.16e-4,
        schedule=Schedule(warmup_steps=10, floor=0.02),
        **distilled,
    )
    return Run(
        name="student" if teacher else "teacher",
        model=ModelConfig(
            vocab_size=512,
            d_model=width,
            num_layers=arguments.layers if teacher else arguments.teacher_layers,
            num_heads=4,
            num_kv_heads=2,
            head_dim=width // 4,
            ffn_dim=3 * width,
            scan_layers=False,
        ),
        stages={"core": stage},
        data=Data(sources=found, held_out=0.1, cache=str(arguments.out / "cache")),
        seed=seed,
        mesh=ONE_DEVICE,
        checkpoint=Checkpoint(every_steps=1_000_000, keep_last=1),
        precision=Precision(compute="float32"),
        evaluation=Evaluation(tokens=arguments.held_out_tokens),
    )


def result_of(run: Run, directory: Path) -> dict[str, float]:
    """Trains, or shows what was trained there: accuracy, bits per byte and loss of the held-out
    text of all sources.
    """
    held_out = train(run, directory).stages[-1]["held_out"].values()
    tokens, text = sum(r["tokens"] for r in held_out), sum(r["bytes"] for r in held_out)
    return {
        "accuracy": sum(r["accuracy"] * r["tokens"] for r in held_out) / tokens,
        "bits_per_byte": sum(r["bits_per_byte"] * r["bytes"] for r in held_out) / text,
        "loss": sum(r["loss"] * r["tokens"] for r in held_out) / tokens,
        "tokens": tokens,
    }


def measure(arguments: argparse.Namespace, found: dict[str, Source]) -> dict[str, Any]:
    """The teacher, and the students of each seed by target."""
    out = arguments.out
    teacher = small_run(arguments, found, teacher=None, seed=0, target="no teacher")
    of_teacher = result_of(teacher, out / "teacher")
    students = [
        {
            target: result_of(
                small_run(arguments, found, teacher=out / "teacher", seed=seed, target=target),
                out / f"seed-{seed}-{target.replace(' ', '-')}",
            )
            for target in TARGETS
        }
        for seed in arguments.seeds
    ]
    return {"teacher": of_teacher, "students": students}


def report(result: dict[str, Any]) -> str:
    """The result as text."""
    settings, students, teacher = result["settings"], result["students"], result["teacher"]
    heads = [f"seed {seed}" for seed in settings["seeds"]]
    lines = [
        f"teacher {settings['teacher_d_model']} x {settings['teacher_layers']} layers, "
        f"{settings['teacher_tokens']:,} tokens; student {settings['d_model']} x "
        f"{settings['layers']} layers, {settings['tokens']:,} tokens; {teacher['tokens']:,} "
        f"held-out tokens"
    ]
    for measure, name, form in (
        ("accuracy", "accuracy", "9.2%"),
        ("bits_per_byte", "bits per byte", "9.4f"),
    ):
        lines += [
            "",
            f"{'held-out ' + name:<26}" + "".join(f"{head:>9}" for head in (*heads, "mean")),
        ]
        lines.append(f"{'teacher':<26}" + " " * 9 * len(heads) + format(teacher[measure], form))
        for target in TARGETS:
            values = [student[target][measure] for student in students]
            values.append(statistics.mean(values))
            lines.append(
                f"{'student, ' + target:<26}" + "".join(format(value, form) for value in values)
            )
    words = "Labels of the teacher give a higher accuracy than no teacher, with every seed."
    return "\n".join([*lines, "", f"{'yes' if result['labels_win'] else 'NO'}: {words}"])


def main() -> int:
    """Trains everything; returns 1 if labels do not beat plain training."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--data", type=Path, nargs="+", default=[], metavar="FILE", help="text or JSON lines"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="keep the run directories here; what is finished there is used again",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--d-model", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=102_400, help="that each student sees")
    parser.add_argument("--teacher-d-model", type=int, default=128)
    parser.add_argument("--teacher-layers", type=int, default=3)
    parser.add_argument("--teacher-tokens", type=int, default=819_200)
    parser.add_argument("--held-out-tokens", type=int, default=24_576, help="of each source")
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    parser.add_argument("--json", action="store_true", help="print JSON alone on standard output")
    arguments = parser.parse_args()
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING)

    cache_compilations()
    with tempfile.TemporaryDirectory() as temporary:
        arguments.out = arguments.out or Path(temporary)
        try:
            found = sources(arguments.data, arguments.out / "text")
            result = measure(arguments, found)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    settings = {
        key: value for key, value in vars(arguments).items() if key not in ("data", "out", "json")
    }
    wins = all(
        row["label"]["accuracy"] > row["no teacher"]["accuracy"] for row in result["students"]
    )
    result |= {"settings": settings, "sources": sorted(found), "labels_win": wins}
    print(json.dumps(result) if arguments.json else report(result))
    return 0 if wins else 1


if __name__ == "__main__":
    sys.exit(main())
