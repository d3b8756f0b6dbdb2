"""Families of models that other software knows: every module that has a `FAMILY` is one."""

from braeburn.config import ModelConfig
from braeburn.discovery import modules_of
from braeburn.errors import UserError
from braeburn.models.families.definition import Family

FAMILIES: tuple[Family, ...] = tuple(
    module.FAMILY for module in modules_of(__name__, __path__) if hasattr(module, "FAMILY")
)

__all__ = ["FAMILIES", "Family", "families_by_type", "family_of"]


def family_of(model: ModelConfig) -> Family:
    """The family that a model is one of.

    Raises:
        UserError: other software has no such model.
    """
    for family in FAMILIES:
        if family.matches(model):
            return family
    known = ", ".join(family.model_type for family in FAMILIES)
    raise UserError(
        f"no other software has a model of these layers (known are {known}); keep it as a run "
        f"directory, or train one whose pattern of layers is that of a family"
    )


def families_by_type() -> dict[str, Family]:
    """The family that each `model_type` of a `config.json` is read as."""
    return {type_: family for family in FAMILIES for type_ in family.types}
