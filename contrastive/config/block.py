"""What all blocks of a recipe are made of."""

from __future__ import annotations

import os
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

# The kind of a block that does not say one; `reading` needs it to know whether an override changes it.
DEFAULT_KINDS = {
    "model": "pair",
    "model.image": "timm",
    "model.text": "transformer",
    "model.tokenizer": "trained",
    "loss": "infonce",
}


class Block(BaseModel):
    """What all blocks share: unknown keys are errors, `1` is not `true`, nothing changes later."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def kind_of(block: str) -> Discriminator:
    """Tells the kinds of a block apart: by its `kind`, or the default."""

    def kind(value: Any) -> str | None:
        if isinstance(value, dict):
            return str(value.get("kind", DEFAULT_KINDS[block]))
        return getattr(value, "kind", None)

    return Discriminator(kind)


Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]


def at_home(path: str) -> str:
    """The path with a leading ``~`` or ``~name`` replaced by that home folder, as a shell does it."""
    if "\0" in path:
        raise PydanticCustomError("path", "expected a path, which has no NUL character")
    whole = os.path.expanduser(path)
    if whole.startswith("~"):
        text = "expected a path; no user has that name, and a folder of it is written ./{path}"
        raise PydanticCustomError("path", text, {"path": path})
    return whole


PathText = Annotated[str, AfterValidator(at_home)]  # of every key that may name a file or a folder


def fields_of(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """The fields of a block, by the keys of a recipe."""
    return {field.alias or name: field for name, field in model.model_fields.items()}


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """The blocks that a key may hold, one for each kind."""
    parts = get_args(annotation)  # first: to Python 3.10, `tuple[int, ...]` is an instance of `type`
    if not parts and isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return list(dict.fromkeys(model for part in parts for model in models_in(part)))
