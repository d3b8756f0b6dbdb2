import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from braeburn import config
from braeburn.config import (
    AdamW,
    AfmOptimizer,
    FullAttention,
    flatten,
    override,
    parse_assignment,
    provenance,
    validate,
)
from braeburn.config.sublayers.latent import LatentAttention
from braeburn.errors import UserError, did_you_mean
from braeburn.layers import spec
from braeburn.models import decoder
from braeburn.recipes import BUILT_IN, description, load
from support import braeburn

RUNS = {name: load(name) for name in BUILT_IN}
LEAVES = [
    (name, path, value) for name, run in RUNS.items() for path, value in flatten(run.model_dump())
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children),
    max_leaves=5,
)


@pytest.mark.parametrize("name", BUILT_IN)
def test_recipe_survives_json_and_is_described(name: str) -> None:
    run = RUNS[name]
    assert run.name == name
    assert validate(json.loads(run.model_dump_json())) == run
    assert validate(run.model_dump()) == run
    assert len(description(name)) > 20
    assert 0 < run.total_steps == sum(stage.steps for stage in run.stages.values())


@given(st.sampled_from(LEAVES))
@settings(deadline=None)
def test_overriding_a_leaf_with_its_own_value_changes_nothing(leaf: tuple) -> None:
    name, path, value = leaf
    run = RUNS[name]
    assert override(run, {path: value}) == run
    assert provenance(run, {path: value})[path] == "command line"


@given(
    path=st.sampled_from(sorted({path for _, path, _ in LEAVES})),
    value=JSON,
    name=st.sampled_from(sorted(RUNS)),
)
@settings(deadline=None, max_examples=300)
def test_any_value_gives_a_valid_run_or_one_sentence(path: str, value: object, name: str) -> None:
    try:
        run = override(RUNS[name], {path: value})
    except UserError as error:
        assert len(str(error).split()) >= 4
    else:
        assert validate(json.loads(run.model_dump_json())) == run


@pytest.mark.parametrize(
    ("assignment", "sentence"),
    [
        (
            "mesh.fsdp=10000000000",
            "mesh.fsdp=10000000000 is not valid: it should be less than or equal to 16777216",
        ),
        ("stages.core.sequence_length=9000000000", "it should be less than or equal to 1073741824"),
        (
            "stages.core.batch_tokens=100000000000000000",
            "it should be less than or equal to 1099511627776",
        ),
        (
            "stages.core.tokens=999999999999999999",
            "steps in all, and a run has at most 2,147,483,647; lower tokens or",
        ),
        (
            "stages.core.tokens=9999999999999999999",
            "it should be less than or equal to 1000000000000000000",
        ),
        (
            "data.workers=100000",
            "data.workers=100000 is not valid: it should be less than or equal to 1024",
        ),
        ("data.prefetch=10000000", "it should be less than or equal to 65536"),
        ("seed=" + "9" * 5000, "--set seed has a number of thousands of digits"),
        (
            "seed=" + "[" * 100_000,
            "--set seed has a number of thousands of digits, or lists within lists",
        ),
        ("checkpoint.keep_last=" + "9" * 4000, "...9999"),
    ],
)
def test_no_size_is_beyond_reason(assignment: str, sentence: str) -> None:
    began = time.monotonic()
    answer = braeburn("explain", "afm-tiny", "--set", assignment)
    assert sentence in answer.error and len(answer.error) < 500
    assert time.monotonic() - began < 5


def test_remedies_are_found_at_once_and_are_few() -> None:
    assert config.divisors(36) == [1, 2, 3, 4, 6, 9, 12, 18, 36]
    assert config.divisors(1) == [1] and config.divisors(7919) == [1, 7919]
    assert config.divisors(2**40)[-1] == 2**40  # in time of its square root, or it would not end
    assert config.some(config.divisors(36)) == "[1, 2, 3, 4, 6, 9, 12, 18, 36]"
    assert config.some(range(20)) == "[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, ...]"


@given(st.text())
@settings(deadline=None)
def test_any_path_is_refused_or_known(path: str) -> None:
    try:
        override(RUNS["afm-tiny"], {path: 1})
    except UserError as error:
        assert str(error)


@given(st.from_regex(r"[a-z_.]+", fullmatch=True), JSON)
def test_an_assignment_of_json_is_read_as_written(path: str, value: object) -> None:
    assert parse_assignment(f"{path}={json.dumps(value)}") == (path, value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed=3", ("seed", 3)),
        ("name=my run", ("name", "my run")),
        ("data.sources.code.separator==", ("data.sources.code.separator", "=")),
        ("data.cache=/tmp/a=b", ("data.cache", "/tmp/a=b")),
        ("model.rope_scaling=None", ("model.rope_scaling", None)),
        ("model.qk_norm=True", ("model.qk_norm", True)),
        ("model.qk_norm=false", ("model.qk_norm", False)),
        ("stages.core.learning_rate=1e-3", ("stages.core.learning_rate", 1e-3)),
        ('data.sources.code.paths=["a.py"]', ("data.sources.code.paths", ["a.py"])),
    ],
)
def test_assignments(text: str, expected: tuple) -> None:
    assert parse_assignment(text) == expected


@pytest.mark.parametrize("text", ["seed", "=1", ""])
def test_what_is_no_assignment_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="write --set path=value"):
        parse_assignment(text)


def test_override_changes_only_what_it_names() -> None:
    run = RUNS["afm-tiny"]
    changed = override(run, {"stages.core.learning_rate": 0.5, "model.ffn_dim": 96})
    before, after = dict(flatten(run.model_dump())), dict(flatten(changed.model_dump()))
    assert {path for path in before if before[path] != after[path]} == {
        "stages.core.learning_rate",
        "model.ffn_dim",
    }
    assert run.stages["core"].learning_rate == 0.01


def test_override_replaces_sections_and_opens_optional_ones() -> None:
    run = RUNS["afm-tiny"]
    assert override(run, {"stages.core.mixture": {"long": 1}}).stages["core"].mixture == {"long": 1}
    assert override(run, {"model.rope_scaling.factor": 4}).model.rope_scaling == config.RopeScaling(
        factor=4
    )
    assert override(RUNS["llama3-8b"], {"model.rope_scaling": None}).model.rope_scaling is None
    wider = override(run, {"data.sources.mine": {"paths": ["x"]}, "stages.core.mixture.mine": 0.5})
    assert wider.stages["core"].mixture == {"code": 0.8, "prose": 0.2, "mine": 0.5}


def test_override_changes_kinds_and_their_fields_in_any_order() -> None:
    run = override(RUNS["afm-tiny"], {"optimizer.momentum": 0.5})
    wanted = AdamW(beta1=0.8, clip_norm=2)
    assignments = {"optimizer.kind": "adamw", "optimizer.beta1": 0.8, "optimizer.clip_norm": 2}
    assert override(run, assignments).optimizer == wanted
    assert override(run, dict(reversed(assignments.items()))).optimizer == wanted
    assert override(RUNS["llama2-7b"], {"optimizer.kind": "afm"}).optimizer == AfmOptimizer()
    # Of two kinds, the one is derived from a class that the other is not.
    latent = "model.pattern.0.attention"
    changed = override(run, {f"{latent}.latent_dim": 32, f"{latent}.kind": "latent"})
    assert changed.model.pattern[0].attention == LatentAttention(latent_dim=32)
    back = override(changed, {f"{latent}.qk_norm": "width", f"{latent}.kind": "full"})
    assert back.model.pattern[0].attention == FullAttention(qk_norm="width")
    with pytest.raises(UserError, match=r"'optimizer.momentum' is not a field"):
        override(run, {"optimizer.kind": "adamw", "optimizer.momentum": 0.5})


def test_provenance_tells_default_recipe_and_command_line_apart() -> None:
    run = RUNS["llama2-7b"]
    origins = provenance(run, {"stages.pretrain.tokens": 2**23 * 2000, "optimizer.beta1": 0.8})
    assert origins["stages.pretrain.tokens"] == origins["optimizer.beta1"] == "command line"
    assert origins["stages.pretrain.learning_rate"] == origins["optimizer.kind"] == "recipe"
    assert origins["seed"] == origins["optimizer.beta2"] == "default"
    assert provenance(RUNS["afm-tiny"], {})["optimizer.kind"] == "default"
    assert set(origins) == {path for path, _ in flatten(override(run, {}).model_dump())}


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        ({"learning_rate": 1}, "did you mean 'stages.core.learning_rate'"),
        ({"stages.core.lerning_rate": 1}, "did you mean 'stages.core.learning_rate'"),
        (
            {"modl.d_model": 1},
            "'modl' is not a field of the run 'afm-tiny'; did you mean 'model.d_model'",
        ),
        ({"name.first": 1}, "'name.first' is not a field"),
        ({"stages.core": {"tokens": 1}}, "stages.core.sequence_length is missing; give it a value"),
        (
            {"stages.core.schedule": {"warmup": 1}},
            "'stages.core.schedule.warmup' is not a field; did you mean 'warmup",
        ),
        ({"model.d_model": 1.5}, "model.d_model=1.5 is not valid: it should be a valid integer"),
        ({"model.d_model": 0}, "model.d_model=0 is not valid: it should be greater than 0"),
        (
            {"model.num_kv_heads": 3},
            r"num_kv_heads=3 does not divide num_heads=4; set num_kv_heads to one of \[1, 2, 4",
        ),
        ({"model.head_dim": 15}, "head_dim=15 is odd, .* use 16"),
        (
            {"stages.core.batch_tokens": 1000},
            "batch_tokens=1000 is not a multiple .* set batch_tokens to 1024",
        ),
        (
            {"stages.core.accumulation_steps": 3},
            r"set accumulation_steps to one of \[1, 2, 4, 8, 16\]",
        ),
        (
            {
                "stages.core.tokens": 10**15,
                "stages.core.sequence_length": 1,
                "stages.core.batch_tokens": 10**12,
                "stages.core.accumulation_steps": 3,
            },
            r"set accumulation_steps to one of \[1, 2, 4, 5, 8, .*, \.\.\.\]",
        ),
        (
            {"stages.core.schedule.warmup_steps": 20},
            "set schedule.warmup_steps below 20 or raise tokens",
        ),
        (
            {"stages.core.mixture.cod": 1},
            "stages.core.mixture.cod is not a source of the data; did you mean 'code'",
        ),
        ({"stages.core.mixture": {"code": 0}}, "no weight above zero"),
        ({"stages.core.learning_rate": float("nan")}, "learning_rate=nan is not valid"),
        (
            {"optimizer.kind": "sgd"},
            "optimizer.kind='sgd' is not valid: it must be 'adamw' or 'afm'",
        ),
        ({"optimizer.kind": ["afm"]}, "optimizer.kind=.* must be 'adamw' or 'afm'"),
        (
            {"mesh.data": 0},
            "mesh: data=0 leaves no device; set data to 1, or to -1 for all devices left",
        ),
        (
            {"offload.activations": ["query"]},
            "offload.activations has 'query', which is not kept for the backward pass;",
        ),
        (
            {"mesh.data": -1},
            "mesh: data and fsdp are both -1, but only one can be inferred; set data to a size",
        ),
        ({"data.sources.code.format": "text"}, "data.sources.code: paths is empty"),
        (
            {"precision.compute": "float16"},
            "precision.compute='float16' is not valid: it should be 'float32' or",
        ),
        (
            {"model.num_heads": 10**10},
            r"model.num_heads=10000000000 is not valid: it should be less than or equal to 65536",
        ),
        (
            {"model.num_layers": 10**9},
            r"model.num_layers=1000000000 is not valid: it should be less than or equal to 10000",
        ),
    ],
)
def test_refusals_name_the_field_and_the_fix(assignments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        override(RUNS["afm-tiny"], assignments)


@pytest.mark.parametrize("fields", [[], None, 3, {"run": 1}, {"name": "x"}])
def test_what_is_no_run_is_refused(fields: object) -> None:
    with pytest.raises(UserError, match=r"is missing|not a field|the run=.* is not valid"):
        validate(fields)  # type: ignore[arg-type]


def test_did_you_mean_lists_the_nearest_or_all() -> None:
    assert (
        did_you_mean("lerning", ["learning", "burning", "x"])
        == "did you mean 'learning' or 'burning'?"
    )
    assert did_you_mean("zzz", ["b", "a", "a"]) == "it must be one of a, b"


def test_flatten_gives_every_leaf_once() -> None:
    assert dict(flatten({"a": {"b": 1, "c": {}}, "d": [1, {"e": 2}]})) == {
        "a.b": 1,
        "a.c": {},
        "d": [1, {"e": 2}],
    }


def test_stages_and_their_steps() -> None:
    run = override(RUNS["afm-tiny"], {"stages.core.tokens": 5 * 1024 + 1})
    core = run.stages["core"]
    assert (core.steps, core.batch_size, run.total_steps) == (6, 16, 26)
    found = [(run.stage_at(step)[0], run.stage_at(step)[2]) for step in (0, 5, 6, 15, 16, 25)]
    assert found == [
        ("core", 0),
        ("core", 5),
        ("continued", 0),
        ("continued", 9),
        ("context", 0),
        ("context", 9),
    ]
    with pytest.raises(IndexError):
        run.stage_at(26)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama2-7b", 6_738_415_616),
        ("llama2-70b", 68_976_648_192),
        ("llama3-8b", 8_030_261_248),
        ("qwen3-0.6b", 596_049_920),
        ("qwen3-8b", 8_190_735_360),
        ("qwen3-30b-a3b", 30_532_122_624),
        ("qwen3-235b-a22b", 235_093_634_560),
        ("gpt-oss-20b", 20_914_757_184),
        ("gpt-oss-120b", 116_829_156_672),
        ("afm-on-device-scratch", 2_737_739_264),
    ],
)
def test_parameter_counts_are_the_published_ones(name: str, parameters: int) -> None:
    assert spec.count(decoder.param_specs(RUNS[name].model)) == parameters


def test_parameters_of_afm_on_device_are_split_as_published() -> None:
    specs = decoder.param_specs(RUNS["afm-on-device-scratch"].model)
    assert round(spec.count(specs, ("matrix", "norm")) / 1e9, 3) == 2.587
    assert round(spec.count(specs, ("embedding",)) / 1e9, 3) == 0.151


def test_afm_on_device_is_made_in_the_published_order() -> None:
    run = RUNS["afm-on-device"]
    trillion = 1_000_000_000_000
    tokens = {
        "prune": 188_000_000_000,
        "core": 6.3 * trillion,
        "continued": trillion,
        "context": trillion // 10,
    }
    assert list(run.stages) == ["larger", *tokens]
    assert {name: run.stages[name].tokens for name in tokens} == tokens
    sizes = {
        name: spec.count(decoder.param_specs(left)) for name, (_, _, left) in run.models().items()
    }
    assert round(sizes["larger"] / 1e9, 1) == 6.4
    assert {sizes[name] for name in tokens} == {2_737_739_264}
    assert run.stages["prune"].pruning == config.Pruning(keep={"ffn": 8064}, method="soft_top_k")
    # Only the core stage is distilled; after the cut it is the published model in all else.
    core, *others = (
        run.stages[name] for name in ("core", "larger", "prune", "continued", "context")
    )
    assert (core.teacher, core.distillation.target, core.distillation.weight) == (
        "larger",
        "label",
        0.9,
    )
    assert [stage.teacher for stage in others] == [None] * 4
    scratch = RUNS["afm-on-device-scratch"]
    assert {
        name: models.left for name, models in run.models().items() if name in scratch.stages
    } == {name: models.left for name, models in scratch.models().items()}


def test_the_tiny_chain_has_the_same_stages_and_rounds_at_the_end() -> None:
    run, large = RUNS["afm-on-device-tiny"], RUNS["afm-on-device"]
    assert list(run.stages) == [*large.stages, "quantized"]
    assert run.stages["quantized"].quantization == config.Quantization(kind="int4", group_size=32)
    with pytest.raises(UserError, match=r"would round them once more; set precision\.matmul to"):
        override(run, {"precision.matmul": "fp8"})
    without = {"precision.matmul": "fp8", "stages.quantized.quantization": None}
    assert override(run, without).precision.matmul == "fp8"
    models = run.models()
    assert models["larger"].left.ffn_dim == 3 * models["prune"].left.ffn_dim
    for name, stage in large.stages.items():
        assert (stage.teacher, stage.rope_base) == (
            run.stages[name].teacher,
            run.stages[name].rope_base,
        )
        assert bool(stage.pruning) == bool(run.stages[name].pruning)


def test_fewer_than_200_fields() -> None:
    models = [m for m in vars(config).values() if isinstance(m, type) and issubclass(m, BaseModel)]
    assert 50 < sum(len(model.model_fields) for model in models) < 200


def test_resolving_a_recipe_imports_no_jax() -> None:
    program = (
        "import sys\n"
        "from braeburn.config import override\n"
        "from braeburn.recipes import BUILT_IN, load\n"
        "for name in BUILT_IN: override(load(name), {'seed': 1})\n"
        "sys.exit('jax' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


RECIPES = '''
from braeburn.config import Run, validate
from braeburn.errors import UserError
from braeburn.recipes import load

def good(name="mine") -> Run:
    """A run of mine."""
    return load("afm-tiny").model_copy(update={"name": name})

def needs(argument): ...
def nothing(): ...
def refused(): return Run(name="x", model={"vocab_size": -1}, stages={})
def sentence(): raise UserError("set this to that")
def broken(): return 1 / 0
def wrong_type(): return len(3)
'''


def test_recipe_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(RECIPES)
    assert load(f"{path}:good").name == "mine"


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            "god",
            "has no function 'god'; its functions are good, needs, nothing, refused, sentence, "
            "broken, wrong_type",
        ),
        (
            "needs",
            "cannot be called without arguments .*missing a required argument: 'argument'.*; give "
            "them defaults",
        ),
        ("nothing", "returned NoneType; it must return a braeburn.config.Run"),
        ("refused", "recipe '.*mine.py:refused': model.vocab_size=-1 is not valid"),
        ("sentence", "^set this to that$"),
        ("broken", "recipe '.*mine.py:broken' fails: ZeroDivisionError: division by zero"),
        ("wrong_type", r"fails: TypeError: object of type 'int' has no len\(\)"),
    ],
)
def test_mistakes_in_a_recipe_of_a_file(tmp_path: Path, function: str, message: str) -> None:
    path = tmp_path / "mine.py"
    path.write_text(RECIPES)
    with pytest.raises(UserError, match=message):
        load(f"{path}:{function}")


def test_recipe_files_that_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"'.*none\.py' does not exist; check the path before the colon"
    ):
        load(f"{tmp_path}/none.py:run")
    broken = tmp_path / "broken.py"
    broken.write_text("def run(:\n")
    assert "fails on import: SyntaxError" in braeburn("explain", f"{broken}:run").error
    broken.write_text("import nowhere_to_be_found")
    with pytest.raises(UserError, match="fails on import: ModuleNotFoundError"):
        load(f"{broken}:run")


def typed(*assignments: str) -> dict[str, object]:
    """Assignments as they are typed on the command line."""
    return dict(parse_assignment(text) for text in assignments)


def test_one_value_stands_for_a_list_of_one() -> None:
    run = override(
        RUNS["afm-tiny"],
        typed(
            "data.sources.code.paths=txt/*.txt",
            "remat.policy=save_named",
            "remat.names=query",
            "offload.activations=query",
            'mesh.torus={"fsdp": 4}',
        ),
    )
    assert run.data.sources["code"].paths == ("txt/*.txt",)
    assert run.remat.names == run.offload.activations == ("query",)
    assert run.mesh.torus == {"fsdp": (4,)}
    with pytest.raises(UserError, match=r"remat\.names\.0='qeury' is not valid"):
        override(RUNS["afm-tiny"], typed("remat.names=qeury"))


@pytest.mark.parametrize("value", ["123", "1e5", "true", "0.50"])
def test_text_may_look_like_a_number(value: str) -> None:
    run = override(
        RUNS["afm-tiny"],
        typed(f"name={value}", f"data.cache={value}", f"data.sources.code.field={value}"),
    )
    assert (run.name, run.data.cache, run.data.sources["code"].field) == (value, value, value)
    assert override(run, typed("data.cache=null")).data.cache is None


def test_a_source_and_a_stage_are_added_by_their_fields() -> None:
    fields = {
        "data.sources.mine.paths": "mine/*.txt",
        "stages.extra.tokens": "4096",
        "stages.extra.sequence_length": "128",
        "stages.extra.batch_tokens": "1024",
        "stages.extra.learning_rate": "1e-3",
        "stages.extra.mixture.mine": "1",
        "stages.extra.schedule.decay": "linear",
    }
    run = override(RUNS["afm-tiny"], typed(*(f"{path}={value}" for path, value in fields.items())))
    assert run.data.sources["mine"].paths == ("mine/*.txt",)
    assert list(run.stages) == [*RUNS["afm-tiny"].stages, "extra"]
    assert (run.stages["extra"].steps, run.stages["extra"].schedule.decay) == (4, "linear")


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        (
            "data.sources.cod.paths=x",
            "data.sources.cod is a new source that no stage draws from; did you mean 'code'? "
            "Otherwise add its weight, as --set stages.core.mixture.cod=1",
        ),
        (
            "data.sources.code.paths=['a', 'b']",
            """data.sources.code.paths: "['a', 'b']" is no list in JSON; """
            """write it with double quotes, as ["a", "b"]""",
        ),
        ("stages.coer.tokens=1", "'coer' is a new stage; did you mean the stage 'core'?"),
        (
            "stages.other.tokens=1",
            "stages.other.sequence_length is missing; give it a value, since 'other' is a new",
        ),
        ("stages.other.tokns=1", "is not a field"),
        ("data.sources.mine.path=x", "is not a field"),
        (f"seed={2**64}", "it should be less than 18446744073709551616"),
    ],
)
def test_what_is_typed_wrongly(assignment: str, message: str) -> None:
    with pytest.raises(UserError) as refused:
        override(RUNS["afm-tiny"], typed(assignment))
    assert message in str(refused.value)
    assert len(str(refused.value)) < 400


def test_nothing_need_be_held_out() -> None:
    assert override(RUNS["afm-tiny"], typed("data.held_out=0")).data.held_out == 0


def test_replace_validates_and_keeps_what_was_left_at_its_default() -> None:
    run = RUNS["quickstart"]
    core = run.stages["core"]
    wide = run.replace(name="wide", model=run.model.replace(ffn_dim=1024))
    assert (wide.name, wide.model.ffn_dim, wide.stages) == ("wide", 1024, run.stages)
    assert provenance(wide, {})["seed"] == provenance(run, {})["seed"] == "default"
    assert provenance(wide, {})["model.ffn_dim"] == "recipe"
    with pytest.raises(
        UserError, match=r"^batch_tokens=100 is not a multiple of sequence_length=256; set "
    ):
        core.replace(batch_tokens=100)
    with pytest.raises(
        UserError, match=r"'batch_tokes' is not a field; did you mean 'batch_tokens'"
    ):
        core.replace(batch_tokes=100)
    with pytest.raises(UserError, match=r"stages\.core\.mixture\.web is not a source"):
        run.replace(stages={"core": core.replace(mixture={"web": 1.0})})


def test_what_was_made_without_a_check_is_checked_as_a_part() -> None:
    run = RUNS["quickstart"]
    wrong = run.stages["core"].model_copy(update={"batch_tokens": 100})
    with pytest.raises(UserError, match=r"stages\.core: batch_tokens=100 is not a multiple"):
        run.replace(stages={"core": wrong})


def test_a_recipe_that_copies_without_a_check_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from braeburn.recipes.quickstart import quickstart\n"
        "def wrong():\n"
        "    run = quickstart()\n"
        "    stage = run.stages['core'].model_copy(update={'mixture': {'web': 1.0}})\n"
        "    return run.model_copy(update={'stages': {'core': stage}})\n"
    )
    with pytest.raises(
        UserError, match=r"recipe '.*mine\.py:wrong': stages\.core\.mixture\.web is not a source"
    ):
        load(f"{path}:wrong")


def test_built_in_recipes_copy_nothing_without_a_check() -> None:
    folder = Path(config.__file__).parents[1] / "recipes"
    assert [path.name for path in folder.glob("*.py") if ".model_copy(" in path.read_text()] == []


def test_a_constant_rate_has_no_floor() -> None:
    assert config.Schedule(decay="constant").floor == 0
    with pytest.raises(UserError) as error:
        override(RUNS["quickstart"], {"stages.core.schedule.decay": "constant"})
    assert str(error.value) == (
        "stages.core.schedule: floor=0.05 is never reached with decay='constant'; set floor to 0, "
        "or decay to 'cosine' or 'linear'"
    )
    advice = {"stages.core.schedule.decay": "constant", "stages.core.schedule.floor": 0}
    assert override(RUNS["quickstart"], advice).stages["core"].schedule.decay == "constant"


@pytest.mark.parametrize(
    ("typed", "separator"),
    [
        (r"\n\n", "\n\n"),
        (r'"\n\n"', "\n\n"),
        (r"\r\n", "\r\n"),
        (r"\t", "\t"),
        (r"a\\nb", r"a\nb"),
        (r"\d", r"\d"),
        ("\n", "\n"),
        ("null", None),
    ],
)
def test_a_separator_means_what_was_typed(typed: str, separator: str | None) -> None:
    run = override(
        RUNS["quickstart"], dict([parse_assignment(f"data.sources.code.separator={typed}")])
    )
    assert run.data.sources["code"].separator == separator
    assert validate(json.loads(run.model_dump_json())) == run


def test_explain_warns_of_shares_that_are_rounded() -> None:
    arguments = ("explain", "quickstart", "--set", "stages.core.mixture.prose=1e-6")
    warning = (
        "warning: stages.core.mixture.prose=1e-06 asks for 1.2e-06 of the sequences but gets "
        "1 of each 1024"
    )
    assert warning in braeburn(*arguments).out
    (line,) = json.loads(braeburn(*arguments, "--json").out)["warnings"]
    assert line.startswith(warning)
    assert json.loads(braeburn("explain", "quickstart", "--json").out)["warnings"] == []


def test_a_stage_may_have_the_name_of_an_optimizer() -> None:
    fields = RUNS["quickstart"].model_dump()
    fields["stages"] = {"afm": fields["stages"]["core"] | {"tokens": 0}}
    with pytest.raises(UserError, match=r"stages\.afm\.tokens=0 is not valid"):
        config.validate(fields)
