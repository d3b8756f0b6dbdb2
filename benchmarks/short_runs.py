"""What comparisons of short training runs share: the first stage of the quickstart with fewer
tokens, and the held-out loss that a run of one stage ends with.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from braeburn.config import Run, override
from braeburn.jsonfile import json_lines
from braeburn.recipes import load


def first_stage(arguments: argparse.Namespace, seed: int, changes: Mapping[str, Any]) -> Run:
    """The first stage of the quickstart.

    Args:
        arguments: `tokens` to train on, `held_out` tokens of each source, and `out`, the folder of
            all runs.
        seed: of the run.
        changes: to further fields.
    """
    run = load("quickstart")
    run = run.replace(stages={"core": run.stages["core"]})
    return override(
        run,
        {
            "seed": seed,
            "stages.core.tokens": arguments.tokens,
            "stages.core.schedule.warmup_steps": arguments.tokens // 512 // 16,
            "evaluation.tokens": arguments.held_out,
            "data.cache": str(arguments.out / "data"),
            **changes,
        },
    )


def stage_end(directory: Path) -> dict[str, Any]:
    """What a run of one stage noted at its end."""
    (end,) = [
        event for event in json_lines(directory / "events.jsonl") if event["event"] == "stage_end"
    ]
    return dict(end)


def held_out_loss(end: Mapping[str, Any]) -> float:
    """The held-out loss at the end of a stage, in nats per token over all sources."""
    held_out = end["held_out"].values()
    tokens = sum(source["tokens"] for source in held_out)
    return float(sum(source["loss"] * source["tokens"] for source in held_out) / tokens)
