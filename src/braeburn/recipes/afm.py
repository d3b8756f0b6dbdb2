"""The Apple Foundation Models, from their reports (arXiv 2407.21075) and the public code of
AXLearn.

Data is not part of a recipe: the sources name folders to be filled, or to be set from the command
line.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from braeburn.config import (
    Checkpoint,
    Data,
    Distillation,
    MeshConfig,
    ModelConfig,
    Precision,
    Pruning,
    Remat,
    Run,
    Schedule,
    Source,
    Stage,
)

SERVER_BATCH_TOKENS = 4096 * 4096
WEB = ("web", "code", "maths", "long")
NOTHING: Mapping[str, Any] = MappingProxyType({})

# Not queries and keys: their products are cheaper to form again than others, for what they take.
KEEP = Remat(
    policy="save_named", names=("value", "attention", "attention_output", "ffn_gate", "ffn_up")
)


def stages(
    *,
    batch_tokens: int,
    meshes: Mapping[str, MeshConfig] = NOTHING,
    remats: Mapping[str, Remat] = NOTHING,
) -> dict[str, Stage]:
    """The three stages: core, continued with maths and code up-weighted, and context lengthening.

    `meshes` and `remats` are those of the stages that have their own.

    Token counts, rates, decay and RoPE bases are the published ones; the weights of the mixtures
    are not published.
    """
    continued = Schedule(warmup_steps=1000, floor=0.001)
    return {
        "core": Stage(
            tokens=6_300_000_000_000,
            sequence_length=4096,
            batch_tokens=batch_tokens,
            mixture={"web": 0.75, "code": 0.15, "maths": 0.10},
            learning_rate=0.01,
            weight_decay=3.16e-4,
            schedule=Schedule(warmup_steps=5000, floor=0.005),
        ),
        "continued": Stage(
            tokens=1_000_000_000_000,
            sequence_length=8192,
            batch_tokens=batch_tokens,
            mixture={"web": 0.40, "code": 0.35, "maths": 0.25},
            learning_rate=3e-4,
            weight_decay=1e-5,
            schedule=continued,
            mesh=meshes.get("continued"),
        ),
        "context": Stage(
            tokens=100_000_000_000,
            sequence_length=32_768,
            batch_tokens=batch_tokens,
            mixture={"web": 0.30, "code": 0.25, "maths": 0.20, "long": 0.25},
            learning_rate=3e-4,
            weight_decay=1e-5,
            schedule=continued,
            rope_base=6_315_089.0,
            mesh=meshes.get("context"),
            remat=remats.get("context"),
        ),
    }


def data() -> Data:
    """One folder of JSON lines for each source."""
    return Data(
        sources={name: Source(paths=(f"data/{name}/*.jsonl.zst",), format="jsonl") for name in WEB}
    )


def afm_on_device_scratch() -> Run:
    """AFM-on-device, 2.7B: the published 3B model from scratch on 7.4T tokens, neither pruned nor
    distilled.
    """
    return Run(
        name="afm-on-device-scratch",
        model=ModelConfig(
            vocab_size=49_152,
            d_model=3072,
            num_layers=26,
            num_heads=24,
            num_kv_heads=8,
            head_dim=128,
            ffn_dim=8064,
        ),
        # A slice of 2,048 chips, where shards of 48 columns are gathered faster than narrower ones.
        # Of longer sequences there are 1,024, and of the longest 256.
        stages=stages(
            batch_tokens=2048 * 4096,
            meshes={
                "continued": MeshConfig(data=-1, fsdp=64, context=2),
                "context": MeshConfig(context=4, tensor=2),
            },
        ),
        mesh=MeshConfig(data=-1, fsdp=64),
        data=data(),
        checkpoint=Checkpoint(every_steps=1000, keep_every_steps=50_000),
        remat=KEEP,
    )


def afm_on_device() -> Run:
    """AFM-on-device as it was made: a 6.4B model, pruned to 2.7B, pretrained on its labels,
    continued and lengthened.

    The report says that the larger model has 6.4B parameters and the server's recipe, that
    Soft-Top-K cuts its FFN alone, on 188B tokens of the core mixture, that the core stage takes all
    its 6.3T tokens, and that the teacher's top-1 token has a weight of 0.9 and the text one of 0.1.
    This recipe assumes the larger FFN (the multiple of 128 that gives 6.4B parameters), the larger
    model's 6.3T tokens, the rates and batches of pruning, those of the core stage, and the teacher,
    which the report does not name: the larger model. The teacher's labels are cached, so that a
    step of the core stage takes no longer than one of plain pretraining.
    """
    run = afm_on_device_scratch()
    core, ffn_dim = run.stages["core"], run.model.ffn_dim
    added = {
        "larger": core.replace(batch_tokens=SERVER_BATCH_TOKENS),
        "prune": core.replace(tokens=188_000_000_000, pruning=Pruning(keep={"ffn": ffn_dim})),
    }
    distilled = core.replace(teacher="larger", distillation=Distillation(weight=0.9, cached=True))
    return run.replace(
        name="afm-on-device",
        model=run.model.replace(ffn_dim=23_296),
        stages=added | run.stages | {"core": distilled},
    )


def afm_server() -> Run:
    """AFM-server as a 69B dense model: shape assumed, since unpublished; batch 4096 x 4096.

    Published are the 100k vocabulary, eight KV heads, and everything that it shares with
    AFM-on-device. Assumed are the depth, width, and FFN, those of the 70B class.
    """
    return Run(
        name="afm-server",
        model=ModelConfig(
            vocab_size=100_352,
            d_model=8192,
            num_layers=80,
            num_heads=64,
            num_kv_heads=8,
            head_dim=128,
            ffn_dim=28_672,
        ),
        # Slices of 1,024 chips, each a replica once their number is given. Where sequences are
        # split a quarter of the chips shares the state, which leaves less room for activations.
        stages=stages(
            batch_tokens=SERVER_BATCH_TOKENS,
            meshes={"context": MeshConfig(context=4, tensor=4)},
            remats={"context": KEEP.replace(names=KEEP.names[:-1])},
        ),
        mesh=MeshConfig(tensor=4),
        data=data(),
        checkpoint=Checkpoint(every_steps=1000, keep_every_steps=50_000),
        precision=Precision(reduce="bfloat16"),
        remat=KEEP,
    )


def afm_85m() -> Run:
    """85M parameters of the AFM family on a single accelerator: 1.7B + 0.3B + 0.1B tokens."""
    sizes = {
        "core": (1_700_000_000, 2048, 300),
        "continued": (300_000_000, 4096, 60),
        "context": (100_000_000, 16_384, 20),
    }
    shorter = {}
    for name, stage in stages(batch_tokens=64 * 4096).items():
        tokens, sequence_length, warmup_steps = sizes[name]
        schedule = stage.schedule.replace(warmup_steps=warmup_steps)
        shorter[name] = stage.replace(
            tokens=tokens, sequence_length=sequence_length, schedule=schedule
        )
    model = ModelConfig(
        vocab_size=12_288,
        d_model=768,
        num_layers=12,
        num_heads=12,
        num_kv_heads=4,
        head_dim=64,
        ffn_dim=2048,
    )
    # So that a batch fits a chip of 32 GB.
    remat = Remat(policy="save_named", names=("attention",))
    return Run(name="afm-85m", model=model, stages=shorter, data=data(), remat=remat)
