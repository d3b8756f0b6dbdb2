"""Models in transformers, for the tests and the program that compare with it."""

from pathlib import Path

import numpy as np
import torch
import transformers
from hf_models import FAMILIES

from braeburn.config import ModelConfig
from braeburn.models.families import family_of

transformers.logging.set_verbosity_error()


def their_logits(theirs, tokens: np.ndarray) -> np.ndarray:
    """Logits [B, T, V] in float32 of tokens [B, T]."""
    with torch.no_grad():
        return theirs(torch.from_numpy(tokens).long()).logits.float().numpy()


def their_config(model: ModelConfig):
    """The configuration that a user of transformers would write for the same sizes."""
    model_type = family_of(model).model_type
    module = next(
        family
        for family in FAMILIES.values()
        if any(family_of(other).model_type == model_type for other, _ in family.MODELS.values())
    )
    fields = {
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "intermediate_size": model.ffn_dim,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "rms_norm_eps": model.norm_epsilon,
        "tie_word_embeddings": model.tied_embeddings,
        "max_position_embeddings": 2048,
    }
    return transformers.AutoConfig.for_model(model_type, **(fields | module.config(model)))


def their_model(model: ModelConfig):
    """A transformers model whose random weights give logits of about unit deviation."""
    theirs = transformers.AutoModelForCausalLM.from_config(their_config(model)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
                parameter -= family_of(model).norm_offset
            else:
                parameter.normal_(0, parameter.shape[1] ** -0.5, generator=generator)
    return theirs


def load(directory: Path, **options):
    """The model in a directory, which must hold just what transformers expects there."""
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        directory, output_loading_info=True, **options
    )
    assert not any(info.values()), info
    return theirs.eval()
