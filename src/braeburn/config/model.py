"""The model: its sizes and how positions are rotated."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from braeburn.config.base import Count, Frozen, NonNegative, Positive, Size, divisors, some
from braeburn.errors import UserError

# Far beyond any model that is published; without a limit, one wrong digit would take all memory
# before it is noticed.
LARGEST_SIZES = {
    "vocab_size": 2**24,
    "d_model": 2**20,
    "num_layers": 10_000,
    "num_heads": 2**16,
    "num_kv_heads": 2**16,
    "head_dim": 2**16,
    "ffn_dim": 2**24,
}


class RopeScaling(Frozen):
    """How rotary frequencies are stretched to reach beyond the trained length; names as in
    transformers.
    """

    kind: Literal["linear", "llama3"] = "llama3"
    factor: Positive = 8.0
    low_freq_factor: Positive = 1.0
    high_freq_factor: Positive = 4.0
    original_max_position_embeddings: Size = 8192


class ModelConfig(Frozen):
    """A decoder-only transformer: grouped-query attention, rotary positions, RMSNorm before each
    block, SwiGLU.

    `max_position_embeddings` is the longest sequence that weights from elsewhere were made for; 0
    where none were.
    """

    vocab_size: Annotated[int, Field(gt=0, le=LARGEST_SIZES["vocab_size"])]
    d_model: Annotated[int, Field(gt=0, le=LARGEST_SIZES["d_model"])]
    num_layers: Annotated[int, Field(gt=0, le=LARGEST_SIZES["num_layers"])]
    num_heads: Annotated[int, Field(gt=0, le=LARGEST_SIZES["num_heads"])]
    num_kv_heads: Annotated[int, Field(gt=0, le=LARGEST_SIZES["num_kv_heads"])]
    head_dim: Annotated[int, Field(gt=0, le=LARGEST_SIZES["head_dim"])]
    ffn_dim: Annotated[int, Field(gt=0, le=LARGEST_SIZES["ffn_dim"])]
    qk_norm: bool = True
    tied_embeddings: bool = True
    norm_epsilon: Positive = 1e-5
    rope_base: Positive = 500_000.0
    rope_scaling: RopeScaling | None = None
    z_loss: NonNegative = 1e-6
    scan_layers: bool = True
    max_position_embeddings: Count = 0

    @classmethod
    def from_directory(cls, directory: str | Path) -> "ModelConfig":
        """The model of a run directory's newest checkpoint or of one of its checkpoints, as
        `braeburn import` makes it.

        A recipe that trains on from it names the directory as `initial_weights`, too.

        Raises:
            UserError: it is no run directory, or holds no checkpoint.
        """
        # A run is made of models, so what reads runs cannot be imported before this module.
        from braeburn.config.directory import read_run

        path = Path(directory).expanduser()
        step = None
        if path.parent.name == "checkpoints" and path.name.isdigit():
            step = int(path.name)
            path = path.parent.parent
        try:
            run = read_run(path)
        except UserError as error:
            raise UserError(
                f"ModelConfig.from_directory({str(directory)!r}): {error}; a Hugging Face "
                f"directory is made one by `braeburn import`"
            ) from None
        found = sorted(
            int(each.name) for each in (path / "checkpoints").glob("*") if each.name.isdigit()
        )
        if not found or (step is not None and step not in found):
            raise UserError(
                f"ModelConfig.from_directory({str(directory)!r}): there is no such checkpoint; "
                f"train for at least one, or name one of {found}"
            )
        model, length = run.model_at(found[-1] if step is None else step)
        return model.model_copy(update={"max_position_embeddings": length})

    @model_validator(mode="after")
    def _check(self) -> "ModelConfig":
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}; "
                f"set num_kv_heads to one of {some(divisors(self.num_heads))}"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim={self.head_dim} is odd, but rotary positions need pairs; use "
                f"{self.head_dim + 1}"
            )
        return self
