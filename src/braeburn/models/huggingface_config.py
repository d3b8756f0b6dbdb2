"""The `config.json` of a Hugging Face model as our `ModelConfig`, and back; the rules are those of
transformers 5, and of the families in `braeburn.models.families`.

What we have not is refused by the field that differs.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from braeburn.config import ModelConfig, explain_validation_error
from braeburn.errors import UserError
from braeburn.models.families import families_by_type, family_of
from braeburn.models.families.fields import Config, Contents, common_fields
from braeburn.reading import read_object, shown, validated


def is_huggingface(directory: Path) -> bool:
    """Whether a folder's config.json is that of transformers; a run directory has one too."""
    try:
        return "model_type" in read_object(directory / "config.json", "restore it")
    except UserError:
        return False


def read_config(directory: Path) -> ModelConfig:
    """The sizes of the model in a Hugging Face directory; its weights are not read.

    Raises:
        UserError: its config.json is missing or damaged, or of a model that Braeburn has not.
    """
    path = directory / "config.json"
    contents = read_object(path, "name the folder of a downloaded Hugging Face model")
    return parse_config(contents, str(path))


def parse_config(stated: Mapping[str, Any], path: str) -> ModelConfig:
    """The model that a `config.json` describes.

    Args:
        stated: the fields of the file.
        path: names it in errors.

    Raises:
        UserError: a field has another type, or the model is one that Braeburn has not.
    """
    config = validated(Config, stated, path, "download config.json again")
    try:
        families = families_by_type()
        family = families.get(config.model_type or "")
        if family is None:
            raise UserError(
                f"model_type={shown(config.model_type)} cannot be imported; choose a model of type "
                f"{', '.join(list(families)[:-1])} or {list(families)[-1]}"
            )
        defaults = family.types[config.model_type or ""]
        return ModelConfig.model_validate(family.parse(Contents(config, stated), defaults))
    except UserError as error:
        raise UserError(f"{path!r}: {error}") from None
    except ValidationError as error:
        raise UserError(f"{path!r}: {explain_validation_error(error)}") from None


def write_config(model: ModelConfig, max_position_embeddings: int) -> dict[str, Any]:
    """The `config.json` of a model, without the ids of its tokens.

    Args:
        model: the sizes, from which its family follows.
        max_position_embeddings: the longest sequence, in tokens, that the model is meant for.

    Raises:
        UserError: transformers has no such model.
    """
    family = family_of(model)
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **common_fields(model, max_position_embeddings),
        **family.fields(model),
    }
