"""The programs that the jobs after training run on devices, before they are compiled: those that
`evaluate` and `generate` call, with the types of their arguments.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractDevice

from braeburn.config import Execution, MeshConfig, ModelConfig, Run
from braeburn.errors import UserError
from braeburn.evaluate.decoding import abstract_params as weights_to_generate_from
from braeburn.evaluate.decoding import abstract_prompts, abstract_rows, inference_layout, programs
from braeburn.evaluate.generate import rooms, round_up
from braeburn.evaluate.sampling import DEFAULT_TEMPERATURE, Sampling
from braeburn.evaluate.text import BATCH_TOKENS
from braeburn.evaluate.windows import batch_rows
from braeburn.layers.spec import Tree
from braeburn.models.decoder import param_specs
from braeburn.parallel.layout import Layout
from braeburn.parallel.mesh import abstract_mesh, build
from braeburn.parallel.rules import batch_shards, sequence_pieces
from braeburn.plan.jobs import Evaluate, Generate
from braeburn.train.held_out import evaluation_sums
from braeburn.train.stages import abstract_params


@dataclass(frozen=True)
class JobProgram:
    """A program of a job.

    Attributes:
        name: of what it does, as reports have it.
        function: of whole arrays.
        arguments: the types of its arguments, the model's weights first.
        held: which of the further arguments are memory that a plan tells apart, by name.
        rounds: how often the loop that it consists of goes round for the job; 0 where it is no
            loop, and all of the program runs `calls` times.
        calls: how often the program is called.
        given_up: the indices of the arguments whose memory the results may take.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    held: tuple[str, ...] = ()
    rounds: int = 0
    calls: int = 1
    given_up: tuple[int, ...] = ()


def job_layout(
    run: Run, model: ModelConfig, sizes: MeshConfig, devices: Sequence[Any] | None
) -> Layout:
    """Where a model's parameters lie for a job, as `train.resolved.model_layout` has it.

    Args:
        run: that trained the model.
        model: the model.
        sizes: of the mesh, resolved.
        devices: those of the mesh, which need not be there; None where there are none at all.
    """
    execution = Execution(mesh=sizes, rules=run.rules, precision=run.precision)
    mesh: Any = (
        abstract_mesh(sizes, AbstractDevice("", None, "cpu"))
        if devices is None
        else build(sizes, devices)
    )
    return Layout(execution, mesh, param_specs(model))


def programs_of(job: Evaluate | Generate, model: ModelConfig, layout: Layout) -> list[JobProgram]:
    """The programs that a job runs, in order.

    Args:
        job: the job.
        model: that it works on.
        layout: where the model's parameters lie.

    Raises:
        UserError: the mesh does not divide what the job works on.
    """
    if isinstance(job, Evaluate):
        return [_evaluation(job, model, layout)]
    return _generation(job, model, layout)


def held_params(layout: Layout, weights: str) -> Tree:
    """The types and shardings of parameters as a job holds them: norms in float32, all else in the
    type that is asked for.
    """

    def held(spec: Any, leaf: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, spec.held_in(weights), sharding=leaf.sharding)

    return jax.tree.map(held, layout.specs, abstract_params(layout))


def _evaluation(job: Evaluate, model: ModelConfig, layout: Layout) -> JobProgram:
    sequences, pieces = batch_shards(layout.execution), sequence_pieces(layout.sizes)
    length = job.sequence_length
    if length % pieces:
        raise UserError(
            f"windows of {length} tokens do not come out even in {pieces} pieces; set "
            f"--sequence-length to a multiple of {pieces}"
        )
    windows = max(1, -(-job.tokens // length))
    rows = batch_rows(length, windows, BATCH_TOKENS * sequences, sequences)
    types = dict.fromkeys(("inputs", "targets", "positions", "segment_ids"), jnp.int32)
    batch = {
        name: jax.ShapeDtypeStruct((rows, length), dtype, sharding=layout.batch())
        for name, dtype in (types | {"weights": jnp.float32}).items()
    }
    # How many bytes each token stands for changes nothing of the program.
    sums = evaluation_sums(model, np.ones(model.vocab_size, np.int32), layout.execution)
    return JobProgram(
        "batch",
        layout.total(sums),
        (held_params(layout, job.dtype), batch),
        calls=-(-windows // rows),
    )


def _generation(job: Generate, model: ModelConfig, layout: Layout) -> list[JobProgram]:
    precision = layout.execution.precision.model_copy(update={"compute": job.dtype})
    execution = replace(layout.execution, precision=precision)
    own = inference_layout(model, replace(layout, execution=execution))
    sequences = batch_shards(own.execution)
    rows = -(-job.batch // sequences) * sequences
    length, first_room = rooms(job.prompt_tokens, job.max_new_tokens)
    room = round_up(job.max_new_tokens)
    compiled = programs(model, own.execution, own.mesh, Sampling(DEFAULT_TEMPERATURE))
    params = weights_to_generate_from(model, own)
    prompts, draws = abstract_prompts(rows, length, own)
    until = jax.ShapeDtypeStruct((), jnp.int32, sharding=own.everywhere())
    found = [
        JobProgram(
            "prefill",
            lambda params, prompts, draws: compiled.begin(params, prompts, draws, first_room),
            (params, prompts, draws),
        )
    ]
    if job.max_new_tokens > 1:
        written = abstract_rows(model, rows, length, room, own)
        found.append(
            JobProgram(
                "token",
                compiled.go_on,
                (params, written, draws, until),
                held=("cache",),
                rounds=job.max_new_tokens - 1,
                given_up=(1,),
            )
        )
    return found
