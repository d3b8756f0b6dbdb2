from braeburn.config import Run
from braeburn.train.stages import model_at


def test_model_at_a_step_is_that_of_the_stage_that_made_it(tiny: Run) -> None:
    lengthened = tiny.models()["context"].left
    assert lengthened.rope_base == 6_315_089.0 != tiny.model.rope_base
    assert model_at(tiny, 0) == (tiny.model, 0)
    assert model_at(tiny, 1) == model_at(tiny, 6) == (tiny.model, 64)
    assert model_at(tiny, 7) == model_at(tiny, 10) == (tiny.model, 128)
    assert model_at(tiny, 11) == model_at(tiny, 14) == (lengthened, 256)
