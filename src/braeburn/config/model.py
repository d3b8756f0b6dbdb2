"""The model: its sizes, its layers, and how positions are rotated."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from braeburn.atomic import write_atomically
from braeburn.config.base import Count, Frozen, NonNegative, Positive, Size, divisors, some
from braeburn.config.sublayers import Attention, FeedForward, FullAttention, SwiGLU
from braeburn.errors import UserError
from braeburn.remote import RemoteFolder, folder_for, place, user_cache

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

    Attributes:
        kind: "linear", "llama3" (that of Llama 3.1) or "yarn" (arXiv 2309.00071).
        factor: by which the longest wavelengths grow.
        low_freq_factor: of llama3: turns within the original length up to which a wavelength grows
            by the whole factor.
        high_freq_factor: of llama3: turns from which on it stays.
        original_max_position_embeddings: the trained length in tokens; of llama3 and yarn.
        beta_fast: of yarn: turns within that length from which on a wavelength stays.
        beta_slow: of yarn: turns up to which it grows by the whole factor.
        truncate: of yarn: whether the pairs between the two are counted from a whole one.
        attention_factor: of yarn: what rotated queries and keys are multiplied by; None for what
            follows from `factor` and the next two.
        mscale: of yarn: None or the weight of log(factor) in that factor.
        mscale_all_dim: of yarn: None or the weight by which attention by latents multiplies its
            scores instead (DeepSeek-V3).
    """

    kind: Literal["linear", "llama3", "yarn"] = "llama3"
    factor: Positive = 8.0
    low_freq_factor: Positive = 1.0
    high_freq_factor: Positive = 4.0
    original_max_position_embeddings: Size = 8192
    beta_fast: Positive = 32.0
    beta_slow: Positive = 1.0
    truncate: bool = True
    attention_factor: Positive | None = None
    mscale: NonNegative | None = None
    mscale_all_dim: NonNegative | None = None


class LayerConfig(Frozen):
    """One layer: attention, then a feed-forward sublayer, each added to the residual stream.

    Attributes:
        attention: its kind.
        feed_forward: its kind.
        norms: whether an RMSNorm comes before each sublayer, after it (on what is added to the
            stream), or both.
    """

    attention: Attention = FullAttention()
    feed_forward: FeedForward = SwiGLU()
    norms: Literal["before", "after", "both"] = "before"


@dataclass(frozen=True)
class Segment:
    """Layers that repeat one pattern, and whose parameters are stacked along the repeats.

    Attributes:
        name: of their parameters in the tree of all.
        pattern: the layers of one repeat.
        repeats: how many there are.
    """

    name: str
    pattern: tuple[LayerConfig, ...]
    repeats: int

    @property
    def num_layers(self) -> int:
        """Layers of all repeats."""
        return len(self.pattern) * self.repeats


class ModelConfig(Frozen):
    """A decoder-only transformer of grouped-query attention with rotary positions.

    Attributes:
        pattern: the layers that repeat, from the first layer on; the last repeat may be cut short.
        tail_pattern: the layers that repeat in the last `tail_layers`, if there are any.
        tail_layers: how many of `num_layers` those are.
        qk_norm: whether queries and keys are normalised head by head, where a layer does not say.
        scaled_embedding: whether embeddings are multiplied by sqrt(d_model).
        max_position_embeddings: the longest sequence that weights from elsewhere were made for; 0
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
    pattern: Annotated[tuple[LayerConfig, ...], Field(min_length=1)] = (LayerConfig(),)
    tail_pattern: tuple[LayerConfig, ...] = ()
    tail_layers: Count = 0
    scaled_embedding: bool = False

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The layers from first to last: repeats of the pattern, the rest of one, the tail."""
        repeats, rest = divmod(self.num_layers - self.tail_layers, len(self.pattern))
        found = [
            Segment("layers", self.pattern, repeats),
            Segment("rest", self.pattern[:rest], 1),
            Segment("tail", self.tail_pattern, self.tail_layers // max(1, len(self.tail_pattern))),
        ]
        return tuple(segment for segment in found if segment.num_layers)

    @property
    def layer_configs(self) -> tuple[LayerConfig, ...]:
        """The configuration of each layer, from first to last."""
        return tuple(
            layer
            for segment in self.segments
            for _ in range(segment.repeats)
            for layer in segment.pattern
        )

    @classmethod
    def from_directory(cls, directory: str | Path) -> "ModelConfig":
        """The model of a run directory's newest checkpoint or of one of its checkpoints, as
        `braeburn import` makes it; also of one at a URL.

        A recipe that trains on from it names the directory as `initial_weights`, too.

        Raises:
            UserError: it is no run directory, or holds no checkpoint.
        """
        # A run is made of models, so what reads runs cannot be imported before this module.
        from braeburn.config.directory import read_run

        found_place = place(str(directory), "ModelConfig.from_directory")
        text, step = str(found_place), None
        if match := re.fullmatch(r"(.+)/checkpoints/([0-9]+)/?", text):
            text, step = match[1], int(match[2])
        if isinstance(found_place, RemoteFolder):
            path, found = _described(RemoteFolder(text, found_place.named_by))
        else:
            path = Path(text)
            names = (each.name for each in (path / "checkpoints").glob("*"))
            found = sorted(int(name) for name in names if name.isdigit())
        try:
            run = read_run(path)
        except UserError as error:
            raise UserError(
                f"ModelConfig.from_directory({str(directory)!r}): {error}; a Hugging Face "
                f"directory is made one by `braeburn import`"
            ) from None
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
        if self.tail_layers % max(1, len(self.tail_pattern)):
            raise ValueError(
                f"tail_layers={self.tail_layers} is not a multiple of the {len(self.tail_pattern)} "
                f"layers of tail_pattern; set it to "
                f"{-(-self.tail_layers // len(self.tail_pattern)) * len(self.tail_pattern)}"
            )
        if bool(self.tail_layers) != bool(self.tail_pattern):
            raise ValueError(
                f"tail_layers={self.tail_layers} and a tail_pattern of {len(self.tail_pattern)} "
                f"layers do not agree; give both or neither"
            )
        if self.tail_layers >= self.num_layers:
            raise ValueError(
                f"tail_layers={self.tail_layers} leaves none of num_layers={self.num_layers} to "
                f"the pattern; set tail_layers below {self.num_layers}"
            )
        makes_keys = False
        for number, layer in enumerate(self.layer_configs):
            makes_keys = makes_keys or layer.attention.makes_keys
            if layer.attention.reuses_keys and not makes_keys:
                raise ValueError(
                    f"attention.kind={layer.attention.kind!r} of layer {number} reuses the keys of "
                    f"an earlier layer, but none of those makes any; give the first layer of the "
                    f"pattern attention.kind='full'"
                )
        return self


def _described(folder: RemoteFolder) -> tuple[Path, list[int]]:
    """A local folder with the configuration of a remote run directory, and the steps of the
    complete checkpoints there, in order.
    """
    path = folder_for(folder.url, user_cache() / "described")
    content = folder.read_if_there("config.json")
    path.mkdir(parents=True, exist_ok=True)
    if content is None:
        (path / "config.json").unlink(missing_ok=True)
    else:
        write_atomically(path / "config.json", content.decode("utf-8", "replace"))
    complete = (re.fullmatch(r"checkpoints/([0-9]+)/record\.json", name) for name in folder.list())
    return path, sorted(int(match[1]) for match in complete if match)
