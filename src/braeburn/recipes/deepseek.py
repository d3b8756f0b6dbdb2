"""DeepSeek-V3 (arXiv 2412.19437), as its report says in sections 2 and 4.2, without the prediction
of a second token and without the stages that lengthen its context.
"""

from braeburn.config import (
    AdamW,
    Checkpoint,
    Data,
    ModelConfig,
    Remat,
    Run,
    Schedule,
    Source,
    Stage,
)
from braeburn.config.sublayers.experts import Experts
from braeburn.config.sublayers.latent import LatentAttention
from braeburn.models.families.deepseek_v3 import layers


def deepseek_v3() -> Run:
    """DeepSeek-V3 671B: attention by latents; 256 experts, of which a token uses 8, 37B in all."""
    experts = Experts(
        num_experts=256,
        experts_per_token=8,
        expert_dim=2048,
        scores="sigmoid",
        scale=2.5,
        bias=True,
        groups=8,
        groups_per_token=4,
        shared_dim=2048,
        balance_loss=1e-4,
    )
    model = ModelConfig(
        vocab_size=129_280,
        d_model=7168,
        num_heads=128,
        num_kv_heads=1,
        head_dim=128,
        ffn_dim=18_432,
        qk_norm=False,
        tied_embeddings=False,
        norm_epsilon=1e-6,
        rope_base=10_000.0,
        z_loss=0.0,
        **layers(LatentAttention(), experts, num_layers=61, dense=3),
    )
    pretrain = Stage(
        tokens=14_800_000_000_000,
        sequence_length=4096,
        batch_tokens=15_360 * 4096,
        accumulation_steps=30,
        mixture={"web": 0.8, "code": 0.2},
        learning_rate=2.2e-4,
        weight_decay=0.1,
        schedule=Schedule(warmup_steps=2000, floor=0.1),
    )
    sources = {
        name: Source(paths=(f"data/{name}/*.jsonl.zst",), format="jsonl")
        for name in ("web", "code")
    }
    return Run(
        name="deepseek-v3",
        model=model,
        stages={"pretrain": pretrain},
        data=Data(sources=sources),
        optimizer=AdamW(),
        checkpoint=Checkpoint(every_steps=1000, keep_every_steps=50_000),
        remat=Remat(policy="full"),
    )
