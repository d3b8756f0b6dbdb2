"""What is done with a model after training, as it is planned: `evaluate`, `generate` and `export`,
each with its settings. Without JAX.
"""

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, ClassVar

from braeburn.config import ModelConfig, Run, WeightType, file_type, weight_type
from braeburn.errors import UserError, did_you_mean
from braeburn.hardware.targets import Target

TRAIN = "train"
WIDTHS: dict[str, int] = {"float32": 4, "bfloat16": 2}
# Tokens of a window where the run does not tell how long its sequences are, as of an import.
DEFAULT_LENGTH = 2048
# Of what a network disk or an object store gives to one host, and a disk takes from it. Nothing in
# the catalogue tells them.
DEFAULT_GB_PER_S = 1.0


@dataclass(frozen=True)
class Evaluate:
    """`braeburn evaluate`: the loss of a text.

    Attributes:
        tokens: of the text.
        sequence_length: tokens of a window.
        dtype: the type that weights are held in.
        read_gb_per_s: what each host reads of the checkpoint in a second, in GB.
    """

    name: ClassVar[str] = "evaluate"
    tokens: int
    sequence_length: int
    dtype: WeightType
    read_gb_per_s: float


@dataclass(frozen=True)
class Generate:
    """`braeburn generate`: the continuation of prompts.

    Attributes:
        batch: prompts that are continued at once.
        prompt_tokens: of each.
        max_new_tokens: written for each.
        dtype: the type of weights and cache; weights are read in it.
        read_gb_per_s: what each host reads of the checkpoint in a second, in GB.
    """

    name: ClassVar[str] = "generate"
    batch: int
    prompt_tokens: int
    max_new_tokens: int
    dtype: WeightType
    read_gb_per_s: float


@dataclass(frozen=True)
class Export:
    """`braeburn export`: the weights in the files of other software.

    Attributes:
        format: "hf", "stablehlo" or "gguf".
        type: of the weights in the files: f16, q8_0 or q4_0 of gguf, float32 or bfloat16 of others.
        host_memory_gb: of the host that runs it; None where it is not known.
        read_gb_per_s: what the host reads of the checkpoint in a second, in GB.
        write_gb_per_s: what it writes of the files.
    """

    name: ClassVar[str] = "export"
    format: str
    type: str
    host_memory_gb: float | None
    read_gb_per_s: float
    write_gb_per_s: float


Job = Evaluate | Generate | Export
JOBS: dict[str, type[Any]] = {job.name: job for job in (Evaluate, Generate, Export)}

# The options of each job on the command line, by the names of their arguments there.
OPTIONS: dict[str, tuple[str, ...]] = {
    "evaluate": ("tokens", "sequence_length", "dtype", "read_gb_per_s"),
    "generate": ("batch", "prompt_tokens", "max_new_tokens", "dtype", "read_gb_per_s"),
    "export": ("format", "dtype", "type", "host_memory_gb", "read_gb_per_s", "write_gb_per_s"),
}


@dataclass(frozen=True)
class JobOn:
    """A job on devices that it is planned or compiled for.

    Attributes:
        job: with its settings.
        run: that trained the model.
        stage: after which the job works on the model; "" of a run without stages.
        target: the chips.
    """

    job: Evaluate | Generate
    run: Run
    stage: str
    target: Target

    @cached_property
    def model(self) -> ModelConfig:
        """The model that the job works on."""
        return model_after(self.run, self.stage)[0]


def option(name: str) -> str:
    """An option as the command line has it."""
    return "--" + name.replace("_", "-")


def check_job(name: str, given: dict[str, Any], of_training: dict[str, Any]) -> None:
    """Refuses a job that does not exist, and options that belong to another.

    Args:
        name: of the job, "train" among them.
        given: options of jobs after training, by their names; None of those that are not given.
        of_training: the same, of training.

    Raises:
        UserError: naming the option, and the jobs that have it.
    """
    known = [TRAIN, *JOBS]
    if name not in known:
        raise UserError(f"--job {name!r} is no job; {did_you_mean(name, known)}")
    for key, value in given.items():
        if value is not None and key not in OPTIONS.get(name, ()):
            jobs = [job for job, options in OPTIONS.items() if key in options]
            raise UserError(
                f"{option(key)} is of --job {' and --job '.join(jobs)}; leave it out, or add "
                f"--job {jobs[0]}" + (f" in place of --job {name}" if name != TRAIN else "")
            )
    for key, value in of_training.items():
        if name != TRAIN and value is not None:
            raise UserError(
                f"{option(key)} is of training alone; leave it out of --job {name}, or plan "
                f"training with --job {TRAIN}"
            )


def model_after(run: Run, stage: str) -> tuple[ModelConfig, int]:
    """The model that a stage leaves, and the longest sequence that it was trained on by then; of a
    run without stages, its own model.
    """
    return run.model_at(run.last_steps[stage] if stage else 0)


def job_of(name: str, run: Run, stage: str, given: dict[str, Any]) -> Job:
    """A job with what is given, and a default for what is not.

    Args:
        name: of the job.
        run: whose model it works on.
        stage: after which it works on it; "" of a run without stages.
        given: settings by the names of options, None of those that are not given.

    Raises:
        UserError: a type that the format does not have.
    """
    set_ = {key: value for key, value in given.items() if value is not None}
    trained = model_after(run, stage)[1] or DEFAULT_LENGTH
    defaults: dict[str, Any] = {
        "tokens": run.evaluation.tokens * max(1, len(run.data.sources)),
        "sequence_length": trained,
        "batch": 8,
        "prompt_tokens": 1024,
        "max_new_tokens": 256,
        # Generation reads weights in the type that it computes in; evaluation casts as it goes.
        "dtype": run.precision.compute if name == Generate.name else "float32",
        "host_memory_gb": None,
        "read_gb_per_s": DEFAULT_GB_PER_S,
        "write_gb_per_s": DEFAULT_GB_PER_S,
    }
    if name == Export.name:
        format_ = set_.pop("format", "hf")
        found_type = file_type(format_, set_.pop("dtype", None), set_.pop("type", None))
        defaults |= {"format": format_, "type": found_type or run.precision.compute}
    elif "dtype" in set_:
        set_["dtype"] = weight_type(set_["dtype"])
    names = [field.name for field in fields(JOBS[name])]
    found: Job = JOBS[name](**{key: (defaults | set_)[key] for key in names})
    if isinstance(found, Generate) and found.prompt_tokens + found.max_new_tokens > 2**24:
        raise UserError(
            f"--prompt-tokens {found.prompt_tokens} and --max-new-tokens {found.max_new_tokens} "
            f"come to more than {2**24:,} positions; lower one of them"
        )
    return found
