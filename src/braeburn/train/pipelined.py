"""The gradients of a loss by a pipeline: a `Schedule` carried out by the program of each device.

The program is the same on all devices. At every slot each looks its own task up in the schedule's
table and branches: it is idle, takes a microbatch forward through one of its stages, or takes one
backward. Then neighbours exchange results. The branches of devices differ, so that a collective
within one runs among the devices of one place along `pipeline` alone, which all take the same.

The forward pass of a stage keeps what its backward pass needs (as the remat policy says) in a
buffer, which has as many places as the schedule holds microbatches at once. Weights of the stage
are not kept again. The loss of the last stage is computed when its microbatch goes backward, so
that its gradients need no place.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from braeburn.config import Execution, ModelConfig
from braeburn.data.packing import Batch
from braeburn.layers.spec import Tree
from braeburn.layers.sublayers.definition import Report
from braeburn.models import decoder
from braeburn.models.decoder import Carry
from braeburn.models.staged import StagedModel, StageWeights
from braeburn.objectives.vocabulary import Projection
from braeburn.parallel.collectives import PIPELINE, axis_index, gather_tokens
from braeburn.parallel.schedule import Schedule, Task, schedule_of
from braeburn.train.step import Gradients, in_microbatches

# (projection, microbatch, the teacher's projection) -> (loss, metrics).
LossOfHidden = Callable[[Projection, Batch, Projection | None], tuple[Array, dict[str, Array]]]

FORWARD, BACKWARD = 1, 2


class Work(NamedTuple):
    """A row of the schedule's table, of one device and slot.

    Attributes:
        kind: `FORWARD`, `BACKWARD`, or 0 where the device is idle.
        microbatch: its number.
        turn: which of the device's stages.
        is_first: whether that is the first stage of all.
        is_last: whether it is the last.
        input: the place of what the task works on, among inputs or gradients by its kind.
        kept: the place of what the forward task keeps for the backward one.
        next_input: the place for an input that arrives at the end of the slot.
        next_gradient: the place for a gradient that arrives at the end of the slot.
        result: the place, among gradients, for what the last stage leaves.
    """

    kind: Any
    microbatch: Any
    turn: Any
    is_first: Any
    is_last: Any
    input: Any
    kept: Any
    next_input: Any
    next_gradient: Any
    result: Any


class Places(NamedTuple):
    """How many places each buffer has on a device, without the one for what nobody needs."""

    inputs: int
    gradients: int
    kept: int


def tabled(plan: Schedule) -> tuple[Work, Places]:
    """The schedule as arrays int32 [slots, devices], with a place in a buffer for all that waits.

    What waits for the same device at the same time has different places; a place is free again
    when it was read. All devices have as many places as the one that needs most.
    """
    shape, last = (len(plan.slots), plan.num_devices), plan.num_stages - 1
    table = {name: np.zeros(shape, np.int32) for name in Work._fields}
    # What arrives in no slot has no place yet.
    arrivals = ("next_input", "next_gradient", "result")
    table |= {name: np.full(shape, -1, np.int32) for name in arrivals}
    places = {"input": 0, "gradient": 0, "kept": 0}
    for device in range(plan.num_devices):
        tasks = plan.tasks(device)
        waiting: dict[str, list[tuple[int, int, Task]]] = {name: [] for name in places}
        for task in tasks:
            slot, forward = plan.slot_of[task], task.kind == "forward"
            if forward:
                back = plan.slot_of[Task("backward", task.microbatch, task.stage)]
                waiting["kept"].append((slot, back, task))
            # Of what a task needs, the last is what it is sent, or what the last stage left itself.
            for needed in plan.needs(task)[-1:]:
                waiting["input" if forward else "gradient"].append(
                    (plan.slot_of[needed], slot, task)
                )
        found = {name: _placed(waits) for name, waits in waiting.items()}
        for name, of_task in found.items():
            places[name] = max(places[name], 1 + max(of_task.values(), default=-1))
        for task in tasks:
            slot, forward = plan.slot_of[task], task.kind == "forward"
            table["kind"][slot, device] = FORWARD if forward else BACKWARD
            table["microbatch"][slot, device] = task.microbatch
            table["turn"][slot, device] = task.stage // plan.num_devices
            table["is_first"][slot, device] = task.stage == 0
            table["is_last"][slot, device] = task.stage == last
            table["input"][slot, device] = found["input" if forward else "gradient"].get(task, 0)
            own = Task("forward", task.microbatch, task.stage)
            table["kept"][slot, device] = found["kept"][own]
        for begins, _, task in waiting["input"]:
            table["next_input"][begins, device] = found["input"][task]
        for begins, _, task in waiting["gradient"]:
            field = "result" if task.stage == last else "next_gradient"
            table[field][begins, device] = found["gradient"][task]
    sizes = Places(max(1, places["input"]), max(1, places["gradient"]), places["kept"])
    for name, size in zip(arrivals, (sizes.inputs, sizes.gradients, sizes.gradients), strict=True):
        # The place after all others is for what nobody needs.
        table[name][table[name] < 0] = size
    return Work(**table), sizes


def _placed(waits: list[tuple[int, int, Task]]) -> dict[Task, int]:
    """The place of each task's wait (from slot, to slot, task): the first that is free."""
    free_from: list[int] = []
    found = {}
    for begins, ends, task in sorted(waits, key=lambda wait: wait[:2]):
        # What arrives at the end of a slot may take the place of what was read in it.
        place = next((i for i, free in enumerate(free_from) if free <= begins), len(free_from))
        if place == len(free_from):
            free_from.append(0)
        free_from[place] = ends
        found[task] = place
    return found


class Message(NamedTuple):
    """What a stage hands on for one microbatch.

    Attributes:
        student: the residual stream and shared keys and values, or the gradients of these.
        teacher: those of the online teacher, going forward; None without one.
    """

    student: Carry
    teacher: Carry | None


class State(NamedTuple):
    """What a device has at hand between slots.

    Attributes:
        inputs: messages for forward tasks, along a leading dimension of places.
        gradients: those for backward tasks.
        kept: of each microbatch under way, what its backward pass needs.
        totals: sums of gradients so far.
        metrics: sums of metrics so far.
    """

    inputs: Any
    gradients: Any
    kept: list[Array]
    totals: StageWeights
    metrics: dict[str, Array]


@dataclass(frozen=True)
class Pipeline:
    """A stage of training on a pipeline.

    Attributes:
        student: the model that is trained.
        teacher: that of an online teacher; None without one.
        loss: of a microbatch, from final hidden states.
        num_microbatches: of a batch.
    """

    student: StagedModel
    teacher: StagedModel | None
    loss: LossOfHidden
    num_microbatches: int

    @property
    def plan(self) -> Schedule:
        """Its schedule."""
        return schedule_of(self.student.execution.mesh, self.num_microbatches)

    def gradients(self, params: Tree, batch: Batch, *teaching: Tree) -> tuple[Tree, Any]:
        """As `accumulated` gives them: summed over the microbatches of a batch.

        Args:
            params: this device's part of each parameter, float32.
            batch: this device's part, the same on all devices of the pipeline.
            teaching: the parameters of an online teacher, if there is one.
        """
        weights, back = self.student.dealt(params)
        teacher = self.teacher.dealt(teaching[0])[0] if self.teacher else None
        device = _Device(self, in_microbatches(batch, self.num_microbatches), weights, teacher)
        state = device.run()
        with jax.named_scope("exchange_gradients"):
            gradients = back(state.totals)
        names = decoder.empty_report(self.student.model)
        if names is None:
            return gradients, state.metrics
        found = Report(names.loss, {name: state.metrics[name] for name in names.metrics})
        averaged = decoder.averaged(found, self.student.model)
        return gradients, state.metrics | averaged.metrics


def pipelined(
    models: tuple[ModelConfig, ModelConfig | None],
    execution: Execution,
    loss: LossOfHidden,
    num_microbatches: int,
) -> Gradients:
    """The gradients of a loss over a batch, whose microbatches flow through a pipeline: what
    `accumulated` gives.

    Args:
        models: the one that is trained, and that of an online teacher or None.
        execution: how both are carried out, on a mesh with a pipeline.
        loss: of a microbatch, from final hidden states.
        num_microbatches: of a batch.
    """
    model, teacher = models
    taught = StagedModel(teacher, execution.forward_only) if teacher else None
    return Pipeline(StagedModel(model, execution), taught, loss, num_microbatches).gradients


class _Device:
    """A device at work on one batch."""

    def __init__(
        self,
        pipeline: Pipeline,
        microbatches: Batch,
        weights: StageWeights,
        teacher: StageWeights | None,
    ):
        self.pipeline, self.microbatches = pipeline, microbatches
        self.weights, self.teacher = weights, teacher
        self.student = pipeline.student
        self.plan = pipeline.plan
        table, self.places = tabled(self.plan)
        place = axis_index(PIPELINE, self.student.execution.mesh)
        self.counts, self.teacher_counts = (
            {name: jnp.asarray(each)[place] for name, each in model.counts().items()}
            if model
            else {}
            for model in (self.student, pipeline.teacher)
        )
        self.work = Work(*(jnp.asarray(column)[:, place] for column in table))
        # Which weight each value of a backward pass is, None where it is none; known when a forward
        # pass has been traced.
        self.weight_of: list[int | None] = []

    def run(self) -> State:
        """Works through all slots."""
        state = self._begin()
        for span in self.plan.spans:
            slots = slice(span.first, span.first + span.count)
            rounds = Work(*(column[slots].reshape(-1, span.period) for column in self.work))
            exchanges = [self.plan.exchanges(span, i) for i in range(span.period)]
            kinds = [self.plan.kinds(span, i) for i in range(span.period)]

            def one_round(
                state: State,
                round_: Work,
                exchanges: list[Any] = exchanges,
                kinds: list[Any] = kinds,
            ) -> tuple[State, None]:
                for i, pairs in enumerate(exchanges):
                    work = Work(*(column[i] for column in round_))
                    state = self._slot(state, work, kinds[i], pairs)
                return state, None

            state, _ = lax.scan(one_round, state, rounds)
        return state

    def _begin(self) -> State:
        first, pull, metrics = jax.eval_shape(self._traced_pass)
        self.pull_structure = jax.tree.structure(pull)
        kept = self._without_weights(pull)
        self.no_message = _zeros(first)
        totals = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), self.weights)
        return State(
            _zeros(first, self.places.inputs + 1),
            _zeros(first, self.places.gradients + 1),
            _zeros(kept, self.places.kept),
            totals,
            _zeros(metrics),
        )

    def _traced_pass(self) -> tuple[Message, Any, dict[str, Array]]:
        """What a forward task hands on, what it keeps and all metrics, for their shapes."""
        zero = jnp.zeros((), jnp.int32)
        message = self._first(zero)
        work = Work(*[zero] * len(Work._fields))
        carry, report, pull = self._forward_pass(message.student, work)
        message = message._replace(student=carry)
        (_, metrics), _ = self._loss(message, self._microbatch(zero))
        return message, pull, metrics | (report.metrics if report else {})

    def _microbatch(self, number: Array) -> Batch:
        return jax.tree.map(lambda each: _at(each, number), self.microbatches)

    def _first(self, number: Array) -> Message:
        """What the first stage reads."""
        microbatch, teacher = self._microbatch(number), None
        layers = jax.tree.map(lambda leaf: leaf[0], self.weights.layers)
        student = self.student.first_carry(self.weights.table, microbatch, layers)
        if self.pipeline.teacher and self.teacher:
            layers = jax.tree.map(lambda leaf: leaf[0], self.teacher.layers)
            teacher = self.pipeline.teacher.first_carry(self.teacher.table, microbatch, layers)
        return Message(student, teacher)

    def _forward_pass(self, carry: Carry, work: Work) -> tuple[Carry, Report | None, Any]:
        """What the stage hands on, its report, and the function for the way back."""
        layers = jax.tree.map(lambda leaf: _at(leaf, work.turn), self.weights.layers)
        counts = {name: each[work.turn] for name, each in self.counts.items()}
        microbatch = self._microbatch(work.microbatch)
        (carry, report), pull = jax.vjp(
            lambda layers, carry: self.student.run(layers, carry, microbatch, counts), layers, carry
        )
        number_of = {id(leaf): number for number, leaf in enumerate(jax.tree.leaves(layers))}
        self.weight_of = [number_of.get(id(leaf)) for leaf in jax.tree.leaves(pull)]
        return carry, report, pull

    def _without_weights(self, pull: Any) -> list[Any]:
        """The values that the way back needs besides weights."""
        leaves = zip(jax.tree.leaves(pull), self.weight_of, strict=True)
        return [leaf for leaf, weight in leaves if weight is None]

    def _slot(self, state: State, work: Work, kinds: Any, exchanges: Any) -> State:
        message = self.no_message
        # Two branches, neither of which returns what only the other changes: that would be copied.
        if "forward" in kinds:
            message, kept, gradients, metrics = lax.cond(
                work.kind == FORWARD,
                lambda: self._forward(state, work),
                lambda: (message, state.kept, state.gradients, state.metrics),
            )
            state = state._replace(kept=kept, gradients=gradients, metrics=metrics)
        if "backward" in kinds:
            message, totals, metrics = lax.cond(
                work.kind == BACKWARD,
                lambda: self._backward(state, work),
                lambda: (message, state.totals, state.metrics),
            )
            state = state._replace(totals=totals, metrics=metrics)
        received = [lax.ppermute(message, PIPELINE, pairs) for pairs in exchanges]
        if not received:
            return state
        # Where devices are sent two messages in a slot, inputs come first.
        return state._replace(
            inputs=_put(state.inputs, received[0], work.next_input),
            gradients=_put(state.gradients, received[-1], work.next_gradient),
        )

    def _forward(self, state: State, work: Work) -> tuple[Message, Any, Any, dict[str, Array]]:
        """What a forward task hands on, and `kept`, `gradients` and `metrics` after it."""
        with jax.named_scope("forward"):
            message = lax.cond(
                work.is_first == 1,
                lambda: self._first(work.microbatch),
                lambda: jax.tree.map(lambda each: _at(each, work.input), state.inputs),
            )
            carry, report, pull = self._forward_pass(message.student, work)
            kept = self._without_weights(pull)
            message = Message(carry, self._taught(message.teacher, work))
        metrics = dict(state.metrics)
        for name, value in (report.metrics if report else {}).items():
            metrics[name] += value
        kept = _put(state.kept, kept, work.kept)
        return message, kept, _put(state.gradients, message, work.result), metrics

    def _taught(self, carry: Carry | None, work: Work) -> Carry | None:
        """What the teacher's stage hands on."""
        if carry is None or self.pipeline.teacher is None or self.teacher is None:
            return None
        layers = jax.tree.map(lambda leaf: _at(leaf, work.turn), self.teacher.layers)
        counts = {name: each[work.turn] for name, each in self.teacher_counts.items()}
        microbatch = self._microbatch(work.microbatch)
        unweighted = {name: value for name, value in microbatch.items() if name != "weights"}
        with jax.named_scope("teacher"):
            return self.pipeline.teacher.run(layers, carry, unweighted, counts)[0]

    def _loss(self, message: Message, microbatch: Batch) -> tuple[Any, Any]:
        """((the loss, metrics), their gradients with respect to the residual stream, the table and
        the final norm).
        """
        execution, model = self.student.within, self.student.model

        def projected(
            x_BTD: Array, norm: Array, table: Array, model: ModelConfig = model
        ) -> Projection:
            hidden = decoder.final_normed(x_BTD, norm, model)
            return Projection(gather_tokens(hidden, execution.mesh), table)

        teacher = None
        if message.teacher is not None and self.pipeline.teacher and self.teacher:
            taught = self.teacher
            teacher = jax.lax.stop_gradient(
                projected(
                    message.teacher.x_BTD,
                    taught.final_norm,
                    taught.table,
                    self.pipeline.teacher.model,
                )
            )

        def loss(x_BTD: Array, norm: Array, table: Array) -> tuple[Array, dict[str, Array]]:
            with jax.named_scope("loss"):
                return self.pipeline.loss(projected(x_BTD, norm, table), microbatch, teacher)

        return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(
            message.student.x_BTD, self.weights.final_norm, self.weights.table
        )

    def _backward(self, state: State, work: Work) -> tuple[Message, StageWeights, dict[str, Array]]:
        """What a backward task hands on, and `totals` and `metrics` after it."""
        with jax.named_scope("backward"):
            microbatch = self._microbatch(work.microbatch)
            message = jax.tree.map(lambda each: _at(each, work.input), state.gradients)

            def at_the_end(
                message: Message, totals: StageWeights, metrics: dict[str, Array]
            ) -> tuple[Carry, StageWeights, dict[str, Array]]:
                (_, found), (x_BTD, norm, table) = self._loss(message, microbatch)
                carry = _zeros(message.student)._replace(x_BTD=x_BTD)
                return (
                    carry,
                    totals._replace(
                        table=totals.table + table, final_norm=totals.final_norm + norm
                    ),
                    metrics | {name: metrics[name] + found[name] for name in found},
                )

            carry, totals, metrics = lax.cond(
                work.is_last == 1,
                at_the_end,
                lambda message, totals, metrics: (message.student, totals, metrics),
                message,
                state.totals,
                state.metrics,
            )
            layers = jax.tree.map(lambda leaf: _at(leaf, work.turn), self.weights.layers)
            weights = jax.tree.leaves(layers)
            kept = iter(jax.tree.map(lambda each: _at(each, work.kept), state.kept))
            pull = jax.tree.unflatten(
                self.pull_structure,
                [next(kept) if own is None else weights[own] for own in self.weight_of],
            )
            reported = decoder.empty_report(self.student.model)
            if reported is not None:
                reported = reported._replace(loss=jnp.ones_like(reported.loss))
            of_layers, carry = pull((carry, reported))
            totals = totals._replace(
                layers=jax.tree.map(
                    lambda total, found: total.at[work.turn].add(found.astype(total.dtype)),
                    totals.layers,
                    of_layers,
                )
            )

            def at_the_beginning(table: Array, x_BTD: Array) -> Array:
                student = self.student
                _, back = jax.vjp(
                    lambda table: decoder.embedded(
                        table, microbatch["inputs"], student.model, student.within
                    ),
                    self.weights.table,
                )
                return table + back(x_BTD)[0]

            table = lax.cond(
                work.is_first == 1,
                at_the_beginning,
                lambda table, _: table,
                totals.table,
                carry.x_BTD,
            )
        teacher = None if self.teacher is None else self.no_message.teacher
        return Message(carry, teacher), totals._replace(table=table), metrics


def _at(array: Array, index: Array) -> Array:
    return lax.dynamic_index_in_dim(array, index, 0, keepdims=False)


def _put(buffers: Any, values: Any, place: Array) -> Any:
    """Buffers with values at one place."""
    return jax.tree.map(
        lambda buffer, value: lax.dynamic_update_index_in_dim(buffer, value, place, 0),
        buffers,
        values,
    )


def _zeros(tree: Any, places: int | None = None) -> Any:
    """Zeros of the shapes of a tree, along a leading dimension of so many places."""
    leading = () if places is None else (places,)
    return jax.tree.map(lambda leaf: jnp.zeros((*leading, *leaf.shape), leaf.dtype), tree)
