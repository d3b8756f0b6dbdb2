"""MaxText: its own training loop on its synthetic data, held at the start of each step."""

import os
import time

BEGAN = time.perf_counter()
os.environ["DECOUPLE_GCLOUD"] = "TRUE"

from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import protocol  # noqa: E402


def arguments(work: protocol.Work, folder: str) -> list[str]:
    """The command line of the work."""
    import maxtext

    base = Path(maxtext.__file__).parent / "configs" / "base.yml"
    values: dict[str, Any] = {
        "run_name": "rival",
        "base_output_directory": folder,
        "hardware": "cpu",
        "decoder_block": "qwen3",
        "base_emb_dim": work.width,
        "base_num_decoder_layers": work.layers,
        "base_num_query_heads": work.heads,
        "base_num_kv_heads": work.kv_heads,
        "base_mlp_dim": work.ffn,
        "head_dim": work.head_dim,
        "vocab_size": work.vocab,
        "mlp_activations": "['silu','linear']",
        "normalization_layer_epsilon": 1e-6,
        "use_qk_norm": True,
        "logits_via_embedding": True,
        "normalize_embedding_logits": False,
        "enable_dropout": False,
        "dtype": "float32",
        "weight_dtype": "float32",
        "attention": "dot_product",
        "per_device_batch_size": work.sequences,
        "max_target_length": work.length,
        "dataset_type": "synthetic",
        "packing": False,
        "steps": 1_000_000,
        "learning_rate": protocol.LEARNING_RATE,
        "adam_b1": protocol.BETA1,
        "adam_b2": protocol.BETA2,
        "adam_eps": protocol.EPSILON,
        "adam_weight_decay": protocol.WEIGHT_DECAY,
        "gradient_clipping_threshold": protocol.CLIP,
        "enable_checkpointing": False,
        "enable_tensorboard": False,
        "enable_goodput_recording": False,
        "monitor_goodput": False,
        "skip_jax_distributed_system": True,
        "jax_cache_dir": "",
        "log_config": False,
        "scan_layers": False,
        "remat_policy": "minimal",
    }
    values.update(work.setting)
    return ["", str(base), *(f"{name}={value}" for name, value in values.items())]


def main() -> None:
    """Serves steps of the model."""
    serving = protocol.Serving(BEGAN)
    import tempfile

    import jax
    import maxtext.trainers.pre_train.train as program

    iteration = program.training_loop_iteration
    first = True

    def held(state: dict[str, Any], variables: Any, fixed: Any) -> Any:
        nonlocal first
        if not first:
            serving.wait()
        began = time.perf_counter()
        metrics = iteration(state, variables, fixed)
        jax.block_until_ready((state["state"], metrics))
        loss = float(metrics["scalar"]["learning/loss"])
        if first:
            from importlib.metadata import version

            serving.ready(loss, versions={"maxtext": version("maxtext"), "jax": jax.__version__})
            first = False
        else:
            serving.made(time.perf_counter() - began, loss)
        return metrics

    program.training_loop_iteration = held
    with tempfile.TemporaryDirectory() as folder:
        program.main(arguments(serving.work, folder))


if __name__ == "__main__":
    main()
