"""What a model's pass over a batch is made of on one device, and what a live teacher's forward pass
takes there.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property

from braeburn.config import MeshConfig, ModelConfig, OptimizerConfig, Run, Stage
from braeburn.layers.spec import Role, Tree, count
from braeburn.models.decoder import param_specs
from braeburn.optim.definition import Parameters, state_bytes

FLOAT = 4


@dataclass(frozen=True)
class Exchange:
    """One kind of collective along one axis, over a whole step.

    Attributes:
        axis: of the mesh, or "host".
        kind: as HLO names it, or "copy".
        bytes: on one device, as `plan.collectives.Collective.bytes` counts them.
        times: how many there are.
        what: "weights", with gradients and what waits on the host, which can be had early; or
            "tokens" or "update", which computing waits for.
    """

    axis: str
    kind: str
    bytes: float
    times: int
    what: str


@cache
def specs_of(model: ModelConfig) -> Tree:
    """The specs of a model's parameters."""
    return param_specs(model)


@cache
def _count(model: ModelConfig, roles: tuple[Role, ...] = ("matrix", "embedding", "norm")) -> int:
    return count(specs_of(model), roles)


@cache
def _state_bytes(optimizer: OptimizerConfig, model: ModelConfig) -> int:
    return state_bytes(optimizer, Parameters(specs_of(model), model))


@dataclass(frozen=True)
class Pass:
    """A model that works on a stage's batch, over a mesh of resolved sizes."""

    run: Run
    stage: Stage
    mesh: MeshConfig
    model: ModelConfig

    @property
    def width(self) -> int:
        """Bytes of an activation."""
        return 2 if self.run.precision.compute == "bfloat16" else FLOAT

    @cached_property
    def tokens(self) -> int:
        """Tokens that a device, with the tensor shards that share them, works on at once."""
        mesh = self.mesh
        shards = mesh.replica * mesh.data * mesh.fsdp * mesh.context
        return self.stage.batch_tokens // (shards * self.stage.accumulation_steps)

    @cached_property
    def parts(self) -> int:
        """Times a step that the model runs: layers of a pass, over all parts of an accumulated
        batch.
        """
        return self.model.num_layers * self.stage.accumulation_steps

    @cached_property
    def kv_heads(self) -> int:
        """Key heads worked with on all tensor shards together: at least one on each."""
        return max(self.model.num_kv_heads, self.mesh.tensor)

    @cached_property
    def widths(self) -> dict[str, int]:
        """Values of each named activation for each token."""
        model = self.model
        heads, kv_heads = model.num_heads * model.head_dim, self.kv_heads * model.head_dim
        inner = {"query": heads, "key": kv_heads, "value": kv_heads, "attention": heads}
        outer = {"attention_output": model.d_model, "ffn_output": model.d_model}
        return inner | outer | {"ffn_gate": model.ffn_dim, "ffn_up": model.ffn_dim}

    @cached_property
    def layer_parameters(self) -> int:
        """Weights of the matrices of one layer."""
        return _count(self.model, ("matrix",)) // self.model.num_layers

    @cached_property
    def shard(self) -> float:
        """Parameters that a device stores."""
        return _count(self.model) / (self.mesh.fsdp * self.mesh.tensor)

    @cached_property
    def optimizer_bytes(self) -> float:
        """Bytes of what the optimizer remembers of the parameters that a device stores."""
        whole = _state_bytes(self.run.optimizer, self.model)
        return whole / (self.mesh.fsdp * self.mesh.tensor)

    @cached_property
    def products(self) -> dict[str, int]:
        """FLOPs of the matrix product that each named activation comes from, for each token."""
        model, width = self.model, self.widths
        products = {
            name: 2 * model.d_model * size for name, size in width.items() if name != "attention"
        }
        products["attention_output"] = 2 * model.d_model * width["query"]
        products["ffn_output"] = 2 * model.d_model * model.ffn_dim
        return products

    @cached_property
    def element_wise(self) -> int:
        """Values read and written for each token of a layer by norms, rotations, activation and
        residuals.
        """
        model, width = self.model, self.widths
        # Two norms and two residuals in five passes each; queries and keys, and the three sides of
        # SwiGLU, in one.
        return 10 * model.d_model + 2 * (width["query"] + width["key"]) + 3 * model.ffn_dim


@dataclass(frozen=True)
class Teaching(Pass):
    """A teacher whose weights are at hand: it runs forward on each part of a batch, before the
    student does.
    """

    @property
    def head_passes(self) -> int:
        """Times that its logits are formed: where all are taught and the head is gathered, again
        for the gradient.
        """
        return 2 if self.stage.distillation.target == "distribution" and self.mesh.fsdp > 1 else 1

    @cached_property
    def matrix_flops(self) -> float:
        """Of all matrix products but attention's."""
        layers = self.tokens * self.parts * sum(self.products.values())
        head = 2 * self.model.d_model * self.model.vocab_size * self.head_passes
        return (layers + self.tokens * self.stage.accumulation_steps * head) / self.mesh.tensor

    def attention_flops(self, tile: int) -> float:
        """Of attention's two products, over the tiles that causality leaves."""
        once = self.model.num_heads * self.model.head_dim * (self.stage.sequence_length + tile)
        return self.tokens * self.parts * 2 * once / self.mesh.tensor

    @cached_property
    def memory_bytes(self) -> float:
        """Read and written by element-wise work."""
        layers = self.width * self.parts * self.element_wise
        logits = (
            2 * FLOAT * self.stage.accumulation_steps * self.model.vocab_size * self.head_passes
        )
        return self.tokens * (layers + logits) / self.mesh.tensor

    @cached_property
    def stored_bytes(self) -> float:
        """On a device all the while: its weights, and what it says of a part of the batch."""
        distillation = self.stage.distillation
        whole = distillation.target == "distribution"
        said = self.width * self.model.d_model if whole else 2 * FLOAT * distillation.kept
        return FLOAT * self.shard + self.tokens * said

    @cached_property
    def working_bytes(self) -> float:
        """On a device while it runs: a layer's weights gathered, and its activations."""
        weights = self.layer_parameters / self.mesh.tensor * self.width * (self.mesh.fsdp > 1)
        live = (
            sum(self.widths.values()) + self.model.ffn_dim
        ) / self.mesh.tensor + 2 * self.model.d_model
        return weights + self.width * self.tokens * live

    def exchanges(self) -> Iterator[Exchange]:
        """Every collective of its pass over all parts of a batch."""
        model, mesh, parts, steps = self.model, self.mesh, self.parts, self.stage.accumulation_steps
        hidden = self.width * self.tokens * model.d_model
        if mesh.fsdp > 1:
            head = model.vocab_size * model.d_model * steps * self.head_passes
            gathered = self.width * (self.layer_parameters * parts + head) / mesh.tensor
            yield Exchange(
                "fsdp", "all-gather", gathered, 7 * parts + 8 * steps * self.head_passes, "weights"
            )
            yield Exchange("fsdp", "all-to-all", hidden / mesh.tensor * steps, steps, "tokens")
        if mesh.tensor > 1:
            yield Exchange(
                "tensor", "all-gather", hidden * (2 * parts + steps), 2 * parts + steps, "tokens"
            )
            yield Exchange(
                "tensor",
                "reduce-scatter",
                hidden * (2 * parts + steps),
                2 * parts + steps,
                "tokens",
            )
        if mesh.context > 1:
            keys = self.width * self.tokens * 2 * self.widths["key"] / mesh.tensor
            if mesh.context_attention == "ring":
                hops = (mesh.context - 1) * parts
                yield Exchange("context", "collective-permute", keys * hops, hops, "tokens")
            else:
                yield Exchange(
                    "context", "all-gather", keys * mesh.context * parts, parts, "tokens"
                )
