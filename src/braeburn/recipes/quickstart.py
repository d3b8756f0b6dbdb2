"""Small runs on the standard library of the Python that runs them: nothing to download, on any machine."""

from braeburn.config import Checkpoint, Data, Evaluation, Model, Precision, Run, Schedule, Source, Stage


def _standard_library() -> Data:
    return Data(
        sources={
            "code": Source(format="python-code"),
            "prose": Source(format="python-prose"),
            "long": Source(format="python-long"),
        }
    )


def quickstart() -> Run:
    """The three AFM stages in minutes on two CPU cores: a small model of Python code."""
    return Run(
        name="quickstart",
        model=Model(
            vocab_size=4096,
            d_model=256,
            num_layers=4,
            num_heads=4,
            num_kv_heads=2,
            head_dim=64,
            ffn_dim=704,
            scan_layers=False,
        ),
        stages={
            "core": Stage(
                tokens=900_000,
                sequence_length=256,
                batch_tokens=2048,
                mixture={"code": 0.8, "prose": 0.2},
                learning_rate=0.01,
                weight_decay=3.16e-4,
                schedule=Schedule(warmup_steps=40, floor=0.05),
            ),
            "continued": Stage(
                tokens=200_000,
                sequence_length=512,
                batch_tokens=2048,
                mixture={"code": 0.9, "prose": 0.1},
                learning_rate=2e-3,
                weight_decay=1e-5,
                schedule=Schedule(warmup_steps=5, floor=0.01),
            ),
            "context": Stage(
                tokens=100_000,
                sequence_length=1024,
                batch_tokens=2048,
                mixture={"code": 0.5, "long": 0.5},
                learning_rate=1e-3,
                weight_decay=1e-5,
                schedule=Schedule(warmup_steps=5, floor=0.01),
                rope_base=6_315_089.0,
            ),
        },
        data=_standard_library(),
        checkpoint=Checkpoint(every_steps=200),
        precision=Precision(compute="float32"),
        evaluation=Evaluation(tokens=1_000_000),
    )


def afm_tiny() -> Run:
    """Three stages of a few small steps each: for tests, and to see a whole run in seconds."""
    return Run(
        name="afm-tiny",
        model=Model(
            vocab_size=512,
            d_model=64,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=16,
            ffn_dim=160,
        ),
        stages={
            "core": Stage(
                tokens=20_480,
                sequence_length=64,
                batch_tokens=1024,
                mixture={"code": 0.8, "prose": 0.2},
                learning_rate=0.01,
                weight_decay=3.16e-4,
                schedule=Schedule(warmup_steps=5, floor=0.005),
            ),
            "continued": Stage(
                tokens=10_240,
                sequence_length=128,
                batch_tokens=1024,
                mixture={"code": 0.9, "prose": 0.1},
                learning_rate=3e-3,
                weight_decay=1e-5,
                schedule=Schedule(warmup_steps=2, floor=0.001),
            ),
            "context": Stage(
                tokens=10_240,
                sequence_length=256,
                batch_tokens=1024,
                mixture={"code": 0.5, "long": 0.5},
                learning_rate=3e-3,
                weight_decay=1e-5,
                schedule=Schedule(warmup_steps=2, floor=0.001),
                rope_base=6_315_089.0,
            ),
        },
        data=_standard_library(),
        checkpoint=Checkpoint(every_steps=10),
        precision=Precision(compute="float32"),
        evaluation=Evaluation(tokens=8192),
    )
