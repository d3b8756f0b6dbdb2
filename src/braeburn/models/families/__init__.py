"""Families of models that other software knows: every module that has a `FAMILY` is one."""

from braeburn.config import ModelConfig
from braeburn.discovery import modules_of
from braeburn.errors import UserError
from braeburn.models.families.definition import Family, undescribed_fields
from braeburn.reading import shown

FAMILIES: tuple[Family, ...] = tuple(
    module.FAMILY for module in modules_of(__name__, __path__) if hasattr(module, "FAMILY")
)

__all__ = ["FAMILIES", "Family", "families_by_type", "family_of"]


def family_of(model: ModelConfig) -> Family:
    """The family that a model is one of.

    Raises:
        UserError: other software has no such model.
    """
    matching = [family for family in FAMILIES if family.matches(model)]
    for family in matching:
        if not undescribed_fields(model, family):
            return family
    if matching:
        name = undescribed_fields(model, matching[0])[0]
        usual = type(model).model_fields[name].get_default(call_default_factory=True)
        raise UserError(
            f"model.{name}={shown(getattr(model, name))} is nothing that files of type "
            f"{matching[0].model_type} describe; keep it as a run directory, or train with "
            f"model.{name}={shown(usual)}"
        )
    known = ", ".join(family.model_type for family in FAMILIES)
    raise UserError(
        f"no other software has a model of these layers (known are {known}); keep it as a run "
        f"directory, or train one whose pattern of layers is that of a family"
    )


def families_by_type() -> dict[str, Family]:
    """The family that each `model_type` of a `config.json` is read as."""
    return {type_: family for family in FAMILIES for type_ in family.types}
