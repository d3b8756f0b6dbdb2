"""What is particular to files of DeepSeek-V3: parts passed over, fields refused."""

from pathlib import Path

import numpy as np
import pytest
from hf_models import MODELS, assert_same, change_config, random_params, write
from safetensors.numpy import load_file, save_file

from braeburn.errors import UserError
from braeburn.interop import huggingface
from braeburn.models.families import family_of

MODEL, _ = MODELS["deepseek-v3"]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A model as it is exported, with a tokenizer.json that is not looked at."""
    written = write(tmp_path / "model", random_params(MODEL), MODEL, None)
    (written / "tokenizer.json").write_text("{}")
    return written


def test_layers_that_predict_a_second_token_are_passed_over(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    further = f"model.layers.{MODEL.num_layers}"
    tensors[f"{further}.eh_proj.weight"] = np.zeros((64, 128), np.float32)
    tensors[f"{further}.mlp.gate.weight"] = np.zeros((8, 64), np.float32)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    change_config(directory, num_nextn_predict_layers=1)
    model, params, _ = huggingface.read(directory)
    assert model.layer_configs == MODEL.layer_configs
    assert_same(params, random_params(MODEL))


def test_other_tensors_still_have_no_place(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(8, np.float32)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"q_proj.bias has no place"):
        huggingface.read(directory)


@pytest.mark.parametrize(
    ("field", "value", "fits"),
    [
        ("quantization_config", {"quant_method": "fp8"}, "quantization_config=None"),
        ("rope_interleave", False, "rope_interleave=True"),
        ("scoring_func", "softmax", "scoring_func='sigmoid'"),
        ("kv_lora_rank", 0, "the positive integer"),
        ("n_shared_experts", 0, "the positive integer"),
        ("first_k_dense_replace", -1, "the positive integer"),
    ],
)
def test_fields_of_another_computation_are_refused(
    directory: Path, field: str, value: object, fits: str
) -> None:
    change_config(directory, **{field: value})
    with pytest.raises(UserError, match=rf"{field}=.*{fits}"):
        huggingface.describe(directory)


def test_shared_experts_that_files_cannot_count_are_refused(tmp_path: Path) -> None:
    layer = MODEL.tail_pattern[0]
    experts = layer.feed_forward.model_copy(update={"shared_dim": 40})
    tail = (layer.model_copy(update={"feed_forward": experts}),)
    model = MODEL.model_copy(update={"tail_pattern": tail})
    assert family_of(model).model_type == "deepseek_v3"
    with pytest.raises(UserError, match=r"shared_dim=40 is not a multiple of expert_dim=36.*=72"):
        write(tmp_path / "model", random_params(model), model, None)
