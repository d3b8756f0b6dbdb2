"""Commands about recipes: `recipes` and `explain`."""

import json
from typing import Any

import typer

from braeburn.cli.options import AsJson, Recipe, Set
from braeburn.cli.output import print_json, print_rows
from braeburn.cli.resolve import resolve

commands = typer.Typer()


@commands.command()
def recipes(as_json: AsJson = False) -> None:
    """List the built-in recipes."""
    from braeburn import recipes

    descriptions = {name: recipes.description(name) for name in recipes.BUILT_IN}
    if as_json:
        print_json(descriptions)
        return
    print_rows(list(descriptions.items()), "ll")


@commands.command()
def explain(recipe: Recipe, assignments: Set = None, as_json: AsJson = False) -> None:
    """Print the resolved run, where each value came from, and what it amounts to."""
    run, origins = resolve(recipe, assignments)
    from braeburn.config import flatten
    from braeburn.data.mixture import rounded_shares
    from braeburn.layers import spec
    from braeburn.models import decoder

    specs = decoder.param_specs(run.model)
    parameters = {
        "total": spec.count(specs),
        "embedding": spec.count(specs, ("embedding",)),
        "non_embedding": spec.count(specs) - spec.count(specs, ("embedding",)),
        "active": spec.count_active(specs),
    }
    stages = {
        name: {
            "tokens": stage.steps * stage.batch_tokens,
            "steps": stage.steps,
            "sequence_length": stage.sequence_length,
            "batch_size": stage.batch_size,
            "rope_base": models.trained.rope_base,
            "parameters": spec.count(decoder.param_specs(models.trained)),
            "parameters_left": spec.count(decoder.param_specs(models.left)),
        }
        for (name, stage), models in zip(run.stages.items(), run.models().values(), strict=True)
    }
    resolved = run.model_dump(mode="json")
    warnings = rounded_shares(run.stages)
    if as_json:
        facts = {"run": resolved, "provenance": origins, "parameters": parameters, "stages": stages}
        print_json({**facts, "warnings": warnings})
        return
    print_rows(
        [
            (path, json.dumps(value), origins.get(path, "default"))
            for path, value in flatten(resolved)
        ],
        "lll",
    )
    total, embedding = parameters["total"], parameters["embedding"]
    active = parameters["active"]
    of_experts = f"; a token uses {active:,}" if active < total else ""
    print(
        f"\nparameters: {total:,} ({parameters['non_embedding']:,} without the {embedding:,} of "
        f"embeddings{of_experts})\n"
    )
    header = ("stage", *(field.replace("_", " ") for field in next(iter(stages.values()), {})))
    rows = [
        (name, *(f"{value:,.0f}" for value in facts.values()), _besides_training(run.stages[name]))
        for name, facts in stages.items()
    ]
    total_row = ("all", f"{sum(f['tokens'] for f in stages.values()):,}", f"{run.total_steps:,}")
    print_rows([header, *rows, total_row], "l" + "r" * (len(header) - 1) + "l")
    for line in warnings:
        print(f"\n{line}")


def _besides_training(stage: Any) -> str:
    """What a stage does to its model besides training it, and its teacher, in a few words."""
    found = [transform.summary for transform in stage.transforms.values()]
    if stage.teacher:
        how = stage.distillation
        target = f"top {how.top_k}" if how.target == "top_k" else how.target
        found.append(
            f"distilled from {stage.teacher}: {target}{', cached' if how.cached else ''}, weight "
            f"{how.weight:g}"
        )
    return "; ".join(found)
