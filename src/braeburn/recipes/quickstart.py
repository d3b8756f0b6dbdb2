"""Small runs on the standard library of the Python that runs them: nothing to download, on any
machine.
"""

from braeburn.config import (
    ONE_DEVICE,
    Checkpoint,
    Data,
    Distillation,
    Evaluation,
    ModelConfig,
    Precision,
    Pruning,
    Quantization,
    Run,
    Schedule,
    Source,
    Stage,
)

SOURCES = {
    "code": Source(format="python-code"),
    "prose": Source(format="python-prose"),
    "long": Source(format="python-long"),
}
MIXTURES = {
    "core": {"code": 0.8, "prose": 0.2},
    "continued": {"code": 0.9, "prose": 0.1},
    "context": {"code": 0.5, "long": 0.5},
}


def quickstart() -> Run:
    """The three AFM stages in minutes on two CPU cores: a small model of Python code."""
    return Run(
        name="quickstart",
        model=ModelConfig(
            vocab_size=4096,
            d_model=256,
            num_layers=3,
            num_heads=4,
            num_kv_heads=1,
            head_dim=64,
            ffn_dim=512,
            scan_layers=False,
        ),
        stages={
            "core": _stage("core", 480_000, 256, 512, 5e-3, Schedule(warmup_steps=60, floor=0.05)),
            "continued": _stage(
                "continued", 96_000, 512, 512, 1e-3, Schedule(warmup_steps=5, floor=0.01)
            ),
            "context": _stage(
                "context", 64_000, 1024, 1024, 5e-4, Schedule(warmup_steps=5, floor=0.01)
            ),
        },
        data=Data(sources=SOURCES, held_out=0.04),
        checkpoint=Checkpoint(every_steps=200),
        mesh=ONE_DEVICE,
        precision=Precision(compute="float32"),
        evaluation=Evaluation(tokens=1_000_000),
    )


def afm_tiny() -> Run:
    """Three stages of a few small steps each: for tests, and to see a whole run in seconds."""
    return Run(
        name="afm-tiny",
        model=ModelConfig(
            vocab_size=512,
            d_model=64,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=16,
            ffn_dim=160,
        ),
        stages={
            "core": _stage("core", 20_480, 64, 1024, 0.01, Schedule(warmup_steps=5, floor=0.005)),
            "continued": _stage(
                "continued", 10_240, 128, 1024, 3e-3, Schedule(warmup_steps=2, floor=0.001)
            ),
            "context": _stage(
                "context", 10_240, 256, 1024, 3e-3, Schedule(warmup_steps=2, floor=0.001)
            ),
        },
        data=Data(sources=SOURCES, held_out=0.04),
        checkpoint=Checkpoint(every_steps=10),
        precision=Precision(compute="float32"),
        evaluation=Evaluation(tokens=8192),
    )


def afm_on_device_tiny() -> Run:
    """AFM-on-device in minutes on two CPU cores: a model of Python code pruned, distilled,
    lengthened and quantised.

    The order of the stages and the method of pruning are published; sizes, rates and distillation
    targets are of this recipe. A teacher of minutes knows little more than the student that was cut
    from it: a weight of 0.5 on its distribution helps, and one of 0.9 on its top-1 tokens would
    hold the student back. The teacher is online, since the core stage reads only some of the text
    that a pass would label.
    """
    falling = Schedule(warmup_steps=5, floor=0.01)
    core = _stage("core", 320_000, 256, 512, 5e-3, Schedule(warmup_steps=60, floor=0.05))
    context = _stage("context", 64_000, 1024, 1024, 5e-4, falling)
    distillation = Distillation(target="distribution", weight=0.5)
    pruning = Pruning(keep={"ffn": 384})
    return Run(
        name="afm-on-device-tiny",
        model=ModelConfig(
            vocab_size=2048,
            d_model=192,
            num_layers=3,
            num_heads=4,
            num_kv_heads=2,
            head_dim=48,
            ffn_dim=1152,
            scan_layers=False,
        ),
        stages={
            "larger": core.replace(tokens=1_200_000),
            "prune": core.replace(tokens=120_000, learning_rate=2e-3, pruning=pruning),
            "core": core.replace(teacher="larger", distillation=distillation),
            "continued": _stage("continued", 96_000, 512, 512, 1e-3, falling),
            "context": context,
            "quantized": context.replace(quantization=Quantization(kind="int4")),
        },
        data=Data(sources=SOURCES, held_out=0.04),
        checkpoint=Checkpoint(every_steps=500),
        mesh=ONE_DEVICE,
        precision=Precision(compute="float32"),
        evaluation=Evaluation(tokens=1_000_000),
    )


def _stage(
    name: str,
    tokens: int,
    sequence_length: int,
    batch_tokens: int,
    learning_rate: float,
    schedule: Schedule,
) -> Stage:
    """An AFM stage of small sizes; weight decay and RoPE base are the published ones."""
    return Stage(
        tokens=tokens,
        sequence_length=sequence_length,
        batch_tokens=batch_tokens,
        mixture=MIXTURES[name],
        learning_rate=learning_rate,
        weight_decay=3.16e-4 if name == "core" else 1e-5,
        schedule=schedule,
        rope_base=6_315_089.0 if name == "context" else None,
    )
