from braeburn import recipes
from braeburn.config import ONE_DEVICE, Run
from braeburn.train.resolved import resolve_stage
from braeburn.train.stages import lower_stage


def test_model_at_a_step_is_that_of_the_stage_that_made_it(tiny: Run) -> None:
    lengthened = tiny.models()["context"].left
    assert lengthened.rope_base == 6_315_089.0 != tiny.model.rope_base
    assert tiny.model_at(0) == (tiny.model, 0)
    assert tiny.model_at(1) == tiny.model_at(6) == (tiny.model, 64)
    assert tiny.model_at(7) == tiny.model_at(10) == (tiny.model, 128)
    assert tiny.model_at(11) == tiny.model_at(14) == (lengthened, 256)


def test_offsets_of_stages(tiny: Run) -> None:
    steps = {name: stage.steps for name, stage in tiny.stages.items()}
    assert tiny.first_steps == {"core": 0, "continued": 6, "context": 10}
    assert tiny.last_steps == {name: tiny.first_steps[name] + steps[name] for name in steps}
    assert list(tiny.last_steps.values())[-1] == tiny.total_steps
    assert [len(tiny.begun_by(step)) for step in (0, 1, 6, 7, 10, 11, 99)] == [0, 1, 1, 2, 2, 3, 3]
    core, continued = tiny.stages["core"], tiny.stages["continued"]
    assert tiny.tokens_by(0) == 0 and tiny.tokens_by(6) == 6 * core.batch_tokens
    assert tiny.tokens_by(7) == 6 * core.batch_tokens + continued.batch_tokens


def test_the_program_of_more_layers_is_no_larger() -> None:
    """What is traced and compiled does not grow with depth where layers are scanned."""

    def size(layers: int) -> int:
        run = recipes.load("afm-on-device-2025-tiny")  # two stacks, one of which reuses keys
        depth = {"num_layers": layers, "tail_layers": layers // 2}
        run = run.replace(model=run.model.model_copy(update=depth), mesh=ONE_DEVICE)
        return len(lower_stage(resolve_stage(run, "core")).as_text())

    assert size(80) < 1.02 * size(8)
