"""Models to time on one GPU: the dense Qwen3 shape at three sizes, sequences of 4096, bf16.

A name that ends in `_80gb` or `_141gb` says which card the batch is meant for. What stays is
estimated: 16 bytes a parameter (float32 weights, two moments and a gradient) and, for each token
and layer, two bytes for each value that remat keeps. AdamW; `--set optimizer.kind=afm` on the
command line takes the other one.
"""

from pathlib import Path

from braeburn.config import (
    ONE_DEVICE,
    AdamW,
    Checkpoint,
    Data,
    ModelConfig,
    NamedActivation,
    Precision,
    Remat,
    Run,
    Schedule,
    Source,
    Stage,
)

SEQUENCE_LENGTH = 4096
# With these no product but those that feed query and key is computed twice.
ALL_PRODUCTS: tuple[NamedActivation, ...] = (
    "query",
    "key",
    "value",
    "attention",
    "attention_output",
    "ffn_gate",
    "ffn_up",
)
# The FFN is computed again: a third of the memory.
ATTENTION_ONLY: tuple[NamedActivation, ...] = ("query", "key", "value", "attention")


def _run(
    name: str,
    model: ModelConfig,
    sequences: int,
    kept: tuple[NamedActivation, ...] = ALL_PRODUCTS,
    length: int = SEQUENCE_LENGTH,
) -> Run:
    return Run(
        name=name,
        model=model,
        stages={
            "pretrain": Stage(
                tokens=sequences * length * 1000,
                sequence_length=length,
                batch_tokens=sequences * length,
                mixture={"random": 1.0},
                learning_rate=3e-4,
                weight_decay=0.1,
            )
        },
        data=Data(sources={"random": Source(paths=("random",))}),
        mesh=ONE_DEVICE,
        optimizer=AdamW(),
        remat=Remat(policy="save_named", names=kept),
    )


def _model(d_model: int, num_layers: int, num_heads: int, ffn_dim: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=151_936,
        d_model=d_model,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads // 2,
        head_dim=128,
        ffn_dim=ffn_dim,
        norm_epsilon=1e-6,
        rope_base=10_000.0,
        z_loss=0.0,
    )


def _in_fp8(run: Run) -> Run:
    """The same with the products of layers in fp8."""
    precision = run.precision.model_copy(update={"matmul": "fp8"})
    return run.model_copy(update={"name": f"{run.name}-fp8", "precision": precision})


def dense_0_6b_80gb() -> Run:
    """0.6B, the shape of Qwen3-0.6B."""
    return _run("dense-0.6b", _model(1024, 28, 16, 3072), sequences=12)


def dense_0_6b_141gb() -> Run:
    """0.6B, the shape of Qwen3-0.6B."""
    return _run("dense-0.6b", _model(1024, 28, 16, 3072), sequences=24)


def dense_1_5b_80gb() -> Run:
    """1.5B, Qwen3-1.7B with four layers fewer."""
    return _run("dense-1.5b", _model(2048, 24, 16, 6144), sequences=6)


def dense_1_5b_141gb() -> Run:
    """1.5B, Qwen3-1.7B with four layers fewer."""
    return _run("dense-1.5b", _model(2048, 24, 16, 6144), sequences=16)


def dense_1_5b_fp8_80gb() -> Run:
    """1.5B, with the products of layers in fp8."""
    return _in_fp8(dense_1_5b_80gb())


def dense_1_5b_fp8_141gb() -> Run:
    """1.5B, with the products of layers in fp8."""
    return _in_fp8(dense_1_5b_141gb())


def dense_3b_fp8_80gb() -> Run:
    """3B, with the products of layers in fp8."""
    return _in_fp8(dense_3b_80gb())


def dense_3b_fp8_141gb() -> Run:
    """3B, with the products of layers in fp8."""
    return _in_fp8(dense_3b_141gb())


def dense_3b_80gb() -> Run:
    """3B, Qwen3-4B with eight layers fewer and 20 query heads."""
    return _run("dense-3b", _model(2560, 28, 20, 9728), sequences=4, kept=ATTENTION_ONLY)


def dense_3b_141gb() -> Run:
    """3B, Qwen3-4B with eight layers fewer and 20 query heads."""
    return _run("dense-3b", _model(2560, 28, 20, 9728), sequences=8)


def dense_toy_80gb() -> Run:
    """A model to try the scripts with where there is no GPU: seconds on a CPU."""
    sizes = {"vocab_size": 512, "head_dim": 32}
    model = _model(128, 2, 4, 256).model_copy(update=sizes)
    return _run("dense-toy", model, sequences=4, length=256)


def train_toy() -> Run:
    """What gpu_train.py trains where there is no GPU: two stages of ten steps, on this folder."""
    stage = Stage(
        tokens=10 * 256,
        sequence_length=64,
        batch_tokens=256,
        mixture={"code": 1.0},
        learning_rate=5e-3,
        schedule=Schedule(warmup_steps=2),
    )
    sizes = {"vocab_size": 300, "head_dim": 16}
    folder = Path(__file__).parent
    return Run(
        name="train-toy",
        model=_model(32, 1, 2, 64).model_copy(update=sizes),
        stages={"core": stage, "continued": stage.model_copy(update={"learning_rate": 1e-3})},
        data=Data(sources={"code": Source(paths=(str(folder / "*.py"),))}, held_out=0.0),
        checkpoint=Checkpoint(every_steps=5),
        mesh=ONE_DEVICE,
        precision=Precision(compute="float32"),
        optimizer=AdamW(),
    )
