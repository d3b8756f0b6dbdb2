"""What a step of a mixture of experts computes on a CPU, counted in the compiled program.

XLA's own account (`cost_analysis`) counts the body of every loop once, however often it runs, and
so is of no use here. The matrix products of the compiled text are counted instead, each as often as
the loops around it run: by their trip counts where the text has them, and for loops over blocks of
an expert's rows, whose number hangs on the routing, by running the same loop on as many rows of
each expert.
"""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from braeburn.config import AdamW, Execution, LayerConfig, ModelConfig, Precision
from braeburn.config.mesh import ONE_DEVICE
from braeburn.config.sublayers.experts import Experts
from braeburn.layers import dispatch as module
from braeburn.layers.grouped import blocks, select
from braeburn.layers.spec import count_active, initialize
from braeburn.models.decoder import param_specs
from braeburn.objectives.cross_entropy import loss
from braeburn.optim.build import build_optimizer
from braeburn.plan import hlo
from braeburn.recipes import load
from braeburn.train.state import TrainState
from braeburn.train.step import accumulated, train_step

EXECUTION = Execution(ONE_DEVICE, precision=Precision(compute="float32"))
LAYERS, SEQUENCES, LENGTH = 2, 4, 512
MOST = 1.15


def model_of(config: Experts) -> ModelConfig:
    # No size but that of a block is one of a block.
    return ModelConfig(
        vocab_size=384,
        d_model=192,
        num_layers=LAYERS,
        num_heads=6,
        num_kv_heads=2,
        head_dim=32,
        ffn_dim=320,
        pattern=(LayerConfig(feed_forward=config),),
    )


def tokens_of(model: ModelConfig) -> dict[str, Any]:
    ids = np.random.default_rng(0).integers(0, model.vocab_size, (SEQUENCES, LENGTH))
    positions = np.broadcast_to(np.arange(LENGTH), ids.shape)
    tokens = {"inputs": ids, "targets": ids, "positions": positions, "segment_ids": ids * 0 + 1}
    batch = {name: jnp.asarray(values, jnp.int32) for name, values in tokens.items()}
    return batch | {"weights": jnp.ones(ids.shape)}


def compiled_step(model: ModelConfig) -> hlo.Module:
    """A step of AdamW, as a CPU runs it."""
    specs = param_specs(model)
    stage = next(iter(load("afm-tiny").stages.values()))
    optimizer = build_optimizer(AdamW(), stage, specs, model)

    def step(state: TrainState, batch: Any) -> Any:
        gradients = accumulated(lambda *given: loss(*given, model, EXECUTION), 1)
        return train_step(state, batch, gradients=gradients, optimizer=optimizer)

    params = initialize(specs, 0)
    state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))
    compiled = jax.jit(step).lower(state, tokens_of(model)).compile()
    return hlo.parse(compiled.as_text())


def rows_of_experts(model: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """How many rows each expert of each layer has, with the weights and tokens of the step."""
    found: list[np.ndarray] = []
    ordered = module.ordered

    def told(*given: Any) -> module.Order:
        order = ordered(*given)
        jax.debug.callback(lambda sizes: found.append(np.asarray(sizes)), order.sizes)
        return order

    with monkeypatch.context() as patch:
        patch.setattr(module, "ordered", told)
        jax.block_until_ready(
            loss(initialize(param_specs(model), 0), tokens_of(model), model, EXECUTION)
        )
        jax.effects_barrier()
    return found


@jax.jit
def rounds(sizes: jax.Array) -> jax.Array:
    """How often blocks of each number of rows are worked through for experts with so many rows."""

    def counted(start: Any, block: int, counts: Any) -> Any:
        return counts.at[blocks.BLOCKS.index(block)].add(1)

    def of_expert(counts: Any, ends: Any) -> Any:
        return blocks._over_blocks(ends, counted, counts, blocks.BLOCKS[0]), None

    nothing = jnp.zeros(len(blocks.BLOCKS), jnp.int32)
    return jax.lax.scan(of_expert, nothing, blocks._ends(sizes))[0]


def executed_flops(program: hlo.Module, rows: list[np.ndarray]) -> tuple[float, float]:
    """The FLOPs of the matrix products of a program, and those of them in loops over blocks."""
    total = np.sum([rounds(jnp.asarray(sizes)) for sizes in rows], axis=0)
    times = dict(zip(blocks.BLOCKS, map(int, total), strict=True))
    known, in_blocks = 0, 0
    for place in program.walk():
        found = place.instruction
        if found.opcode != "dot":
            continue
        left = dims(program.computations[place.computation][found.arguments[0]].type)
        summed = [
            left[int(dim)] for dim in re.findall(r"\d+", found.attributes["lhs_contracting_dims"])
        ]
        once = 2 * math.prod(dims(found.type)) * math.prod(summed)
        if not place.endless:
            known += once * place.times
            continue
        # The loops around that over blocks are those over layers and experts.
        assert place.times == LAYERS * rows[0].size
        (block,) = set(left) & set(blocks.BLOCKS)
        in_blocks += once * times[block]
    return float(known + in_blocks), float(in_blocks)


def dims(kind: str) -> list[int]:
    """The sizes in a type, as `f32[16,192]{1,0}`."""
    found = re.match(r"\w+\[([\d,]*)\]", kind)
    assert found
    return [int(size) for size in found[1].split(",") if size]


def active_flops(model: ModelConfig) -> float:
    """Of weights by which tokens are multiplied, and of attention to what is not in the future."""
    attended = 12 * model.num_layers * model.num_heads * model.head_dim * LENGTH / 2
    return SEQUENCES * LENGTH * (6 * count_active(param_specs(model)) + attended)


@pytest.mark.parametrize(
    "sizes",
    [
        {"num_experts": 8, "experts_per_token": 2, "expert_dim": 320},
        {"num_experts": 64, "experts_per_token": 8, "expert_dim": 80},
    ],
    ids=["8 experts", "64 experts"],
)
def test_a_step_computes_little_more_than_what_is_active(
    sizes: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Experts(**sizes)
    model = model_of(config)
    rows = rows_of_experts(model, monkeypatch)
    assignments = SEQUENCES * LENGTH * config.experts_per_token
    assert [sizes.sum() for sizes in rows] == [assignments] * LAYERS
    assert max(sizes.max() for sizes in rows) > 1.2 * assignments / config.num_experts
    executed, of_experts = executed_flops(compiled_step(model), rows)
    least = LAYERS * assignments * 18 * model.d_model * config.expert_dim
    print(f"{executed / active_flops(model):.3f} of all, {of_experts / least:.3f} of the experts'")
    assert 1.0 <= of_experts / least < MOST
    assert executed / active_flops(model) < MOST


def test_products_with_all_experts_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """As XLA for CPUs makes of `ragged_dot`."""
    model = model_of(Experts(num_experts=8, experts_per_token=2, expert_dim=320))
    rows = rows_of_experts(model, monkeypatch)
    everywhere = select.Backend("all", lambda request: None, jax.lax.ragged_dot)
    monkeypatch.setattr(select, "BACKENDS", (everywhere,))
    executed, of_experts = executed_flops(compiled_step(model), rows)
    assert of_experts == 0.0
    assert executed > 2 * active_flops(model)
