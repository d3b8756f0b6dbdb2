"""The arguments of a run that several processes train."""

import json
from typing import Any

import pytest
from together import RECIPE, STEPS


@pytest.fixture(scope="session")
def arguments(tmp_path_factory: pytest.TempPathFactory, tiny_fields: dict[str, Any]) -> list[str]:
    """A run of one stage with a checkpoint every 5 steps."""
    recipe = tmp_path_factory.mktemp("recipe") / "one_stage.py"
    recipe.write_text(RECIPE)
    fields = {
        path: value for path, value in tiny_fields.items() if not path.startswith("stages.con")
    }
    fields |= {
        "stages.core.tokens": STEPS * 1024,
        "model.num_layers": 1,
        "precision.compute": "float32",
        "checkpoint.every_steps": 5,
        "mesh.fsdp": 1,
        "mesh.data": -1,
    }
    return [
        f"{recipe}:run",
        *(part for path, v in fields.items() for part in ("--set", f"{path}={json.dumps(v)}")),
    ]
