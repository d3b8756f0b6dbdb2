"""The GPT models that were trained on the MI250X of Frontier (Dash et al. 2023, arXiv 2312.12705):
22 billion, 175 billion and a trillion parameters.

Sizes, micro-batch and layouts are those of the paper, as far as they are known. Its layers have two
feed-forward matrices of 4 d_model units; these have three of 8/3, which is as many parameters and
as many products. It trained in float16 with ZeRO-1: here the optimizer's state is split over `data`
as far as the sizes divide. All activations but the inputs of layers are computed again.
"""

from braeburn.config import (
    AdamW,
    Checkpoint,
    Data,
    MeshConfig,
    ModelConfig,
    Placement,
    Remat,
    Run,
    Schedule,
    ShardingRules,
    Source,
    Stage,
)

# The paper's was of 51,200 entries.
VOCABULARY = 51_200
SEQUENCE_LENGTH = 2048


def frontier_22b() -> Run:
    """22B as on Frontier; its layout is not published, and this one is for mi250x:64."""
    model = _model(48, 6144, 48, 16_384)
    mesh = MeshConfig(data=4, fsdp=1, pipeline=8, tensor=4)
    return _run("frontier-22b", model, mesh, microbatches=128, split="embed")


def frontier_175b() -> Run:
    """175B as on 1,024 GCDs of Frontier, mi250x:512: tensor 4, pipeline 16, data 16."""
    model = _model(96, 12_288, 96, 32_768)
    mesh = MeshConfig(data=16, fsdp=1, pipeline=16, tensor=4)
    return _run("frontier-175b", model, mesh, microbatches=640, split="embed")


def frontier_1t() -> Run:
    """1T as on 3,072 GCDs of Frontier, mi250x:1536: tensor 8, pipeline 64, data 6."""
    # 8/3 d_model, rounded up to what 6 x 8 devices divide.
    model = _model(128, 25_600, 128, 68_352)
    mesh = MeshConfig(data=6, fsdp=1, pipeline=64, tensor=8)
    return _run("frontier-1t", model, mesh, microbatches=1600, split="ffn")


def _model(num_layers: int, d_model: int, num_heads: int, ffn_dim: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=VOCABULARY,
        d_model=d_model,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=d_model // num_heads,
        ffn_dim=ffn_dim,
        tied_embeddings=True,
        qk_norm=False,
    )


def _run(name: str, model: ModelConfig, mesh: MeshConfig, *, microbatches: int, split: str) -> Run:
    """A run in micro-batches of one sequence.

    Args:
        name: of the recipe.
        model: that is trained.
        mesh: that it was trained on.
        microbatches: of each replica, in a batch.
        split: the axis of matrices whose optimizer state is split over `data` as well.
    """
    sequences = microbatches * mesh.data
    pretrain = Stage(
        tokens=300_000_000_000,
        sequence_length=SEQUENCE_LENGTH,
        batch_tokens=sequences * SEQUENCE_LENGTH,
        mixture={"web": 1.0},
        learning_rate=6e-5,
        weight_decay=0.1,
        schedule=Schedule(warmup_steps=10, floor=0.1),
        accumulation_steps=microbatches,
    )
    usual = ShardingRules()
    placed = {
        axis: getattr(usual, axis)
        for axis in ((split, "embedding_embed") if split == "embed" else (split,))
    }
    rules = {
        axis: Placement(
            parameters=found.parameters,
            optimizer=(*found.optimizer, "data"),
            activations=found.activations,
        )
        for axis, found in placed.items()
    }
    return Run(
        name=name,
        model=model,
        stages={"pretrain": pretrain},
        data=Data(sources={"web": Source(paths=("data/web/*.jsonl.zst",), format="jsonl")}),
        optimizer=AdamW(),
        checkpoint=Checkpoint(every_steps=100),
        mesh=mesh,
        rules=ShardingRules(**rules),
        remat=Remat(policy="full"),
    )
